"""The entry point: build the parser, run one verb, turn whatever happens into an exit code.

Tables go to stdout, everything else to stderr; with ``--json`` stdout holds exactly one document, for errors too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from edgetok.cli import output
from edgetok.errors import EXIT_CODES, INTERRUPTED, EdgeTokError, InputError, error_from

FAULT = "EDGETOK_FAULT"  # tests set it to "internal" to see what a defect of ours looks like

_CODES = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())


def _version(value: bool) -> None:
    if value:
        from edgetok._version import __version__

        print(f"edgetok {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Trained transformers on the device in front of you: fewer tokens, fewer bits, proven answers, measured speed."""


def build() -> Any:
    """The parser with every verb; each verb's module imports only typer until it runs."""
    from edgetok.cli import (
        bench,
        compare,
        completion,
        convert,
        demo,
        devices,
        doctor,
        inspect,
        models,
        run,
        verify,
    )

    app = typer.Typer(
        name="edgetok",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda name: name.replace("_", "-"),
            "max_content_width": 100,
        },
        epilog="\b\nexit codes:\n" + _CODES,
    )
    app.callback()(_root)
    app.command("doctor")(doctor.doctor)
    app.command("inspect")(inspect.inspect)
    app.command("convert")(convert.convert)
    app.command("verify")(verify.verify)
    app.command("run")(run.run)
    app.command("bench")(bench.bench)
    app.command("compare")(compare.compare)
    app.add_typer(models.app, name="models")
    app.command("devices")(devices.devices)
    app.command("completion")(completion.completion)
    app.command("demo")(demo.demo)
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None means ``sys.argv``.

    Returns:
        The exit code of ``edgetok.errors.EXIT_CODES``.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    output.scan(args)
    try:
        _terminate_cleanly()
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has seen enough; keep the interpreter from complaining when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _report(_Interrupted("interrupted; nothing was left half written"))
    except Exception as exc:  # every exit has a code, a cause and a next step
        if output.current().verbose > 1:
            import traceback

            traceback.print_exc()
        return _report(_usage(exc) or error_from(exc))


def _run(args: list[str]) -> int:
    command = build()
    if "_EDGETOK_COMPLETE" in os.environ:
        from typer.completion import completion_init

        completion_init()
        command.main(args=args, prog_name="edgetok")
        return 0
    if not args:
        with command.make_context("edgetok", [], resilient_parsing=True) as ctx:
            print(ctx.get_help(), file=sys.stderr)
        return InputError.code
    try:
        with command.make_context("edgetok", args) as ctx:
            if os.environ.get(FAULT) == "internal":
                raise RuntimeError(f"injected by {FAULT}")
            command.invoke(ctx)
    except typer.Exit as exc:
        return int(exc.exit_code)
    return 0


class _Interrupted(EdgeTokError):
    code = INTERRUPTED
    kind = "interrupted"


def _terminate_cleanly() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that temporary files go."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: the embedding program owns the signals
        return


def _usage(exc: Exception) -> InputError | None:
    """A complaint of the parser as an ``InputError``; None for anything else.

    The parser's exception classes live in click or inside typer, by version, so they are known by what they offer.
    """
    if not (hasattr(exc, "format_message") and hasattr(exc, "exit_code")):
        return None
    context = getattr(exc, "ctx", None)
    path = context.command_path if context is not None else "edgetok"
    message = exc.format_message()
    near = getattr(exc, "possibilities", None)
    help_ = f"{path} --help"
    if near:
        message = message.split(" (Possible options")[0].split(" Did you mean")[0]
        return InputError(message, where=path, next=f"did you mean {near[0]}? ({help_})")
    message, found, suggestion = message.partition(" Did you mean ")
    return InputError(message, where=path, next=f"did you mean {suggestion} ({help_})" if found else help_)


def _report(error: EdgeTokError) -> int:
    try:
        output.current().error(error)
        sys.stdout.flush()
    except OSError:
        # stdout or stderr is gone or full: the exit code still says what happened.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return error.code
