"""``edgetok completion SHELL``: print the script that completes verbs, flags and names."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetok.errors import InputError

SHELLS = ("bash", "zsh", "fish")


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", autocompletion=lambda: list(SHELLS))],
) -> None:
    """Print the shell completion script.

    Store it where the shell looks:

    \b
    bash: edgetok completion bash > ~/.local/share/bash-completion/completions/edgetok
    zsh:  edgetok completion zsh > ~/.zfunc/_edgetok
    fish: edgetok completion fish > ~/.config/fish/completions/edgetok.fish
    """
    if shell not in SHELLS:
        raise InputError(f"no completion for the shell {shell!r}", next=f"choose one of: {', '.join(SHELLS)}")
    from typer.completion import get_completion_script

    print(get_completion_script(prog_name="edgetok", complete_var="_EDGETOK_COMPLETE", shell=shell))
