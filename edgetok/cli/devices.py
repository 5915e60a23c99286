"""``edgetok devices``: what can run here, and if not, why and how to change that."""

from __future__ import annotations

from typing import Any

from edgetok.cli import output
from edgetok.cli.options import Json, Quiet, Verbose


def list_devices() -> list[dict[str, Any]]:
    """Every registered device with its probe's answer; a probe that cannot even be loaded answers no."""
    from edgetok.devices import BACKENDS

    rows = []
    for name in BACKENDS.names():
        row: dict[str, Any] = {"name": name.replace("_", "-"), "available": False, "version": "", "fix": ""}
        try:
            found = BACKENDS.get(name).probe()
            row |= {"available": found.ok, "reason": found.reason, "fix": found.fix, "version": found.version}
        except Exception as exc:  # one broken device must not hide the others
            row["reason"] = f"its probe failed: {type(exc).__name__}: {exc}"
        rows.append(row)
    return rows


def list_kernels() -> dict[str, Any]:
    """The kernels that libedgetok takes on this CPU, or why there are none."""
    from edgetok.errors import EdgeTokError
    from edgetok.native.table import chosen

    try:
        return {"available": True, "chosen": [kernel.name for kernel in chosen()]}
    except EdgeTokError as exc:
        return {"available": False, "chosen": [], "reason": exc.message, "fix": exc.next}


def devices(json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List devices, and why each is available or not."""
    out = output.setup(json, verbose, quiet)
    rows = list_devices()
    out.table(
        ["device", "available", "version", "reason"],
        [(r["name"], "yes" if r["available"] else "no", r["version"] or "-", _reason(r)) for r in rows],
    )
    kernels = list_kernels()
    if kernels["available"]:
        out.line("kernels", f"libedgetok takes {', '.join(kernels['chosen']) or 'nothing: this build holds no kernel'}")
    else:
        out.line("kernels", kernels["reason"], "no")
    out.emit({"devices": rows, "kernels": kernels})


def _reason(row: dict[str, Any]) -> str:
    return f"{row['reason']}; fix: {row['fix']}" if row["fix"] and not row["available"] else str(row["reason"])
