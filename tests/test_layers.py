"""The import ranks: nothing calls back up, and two sides of the same rank stay apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import its own rank and lower ones. Longest prefix wins.
RANKS = {
    "edgetok._version": 0,
    "edgetok.cache": 0,
    "edgetok.errors": 0,
    "edgetok.kernels": 0,
    "edgetok.limits": 0,
    "edgetok.measuring": 0,
    "edgetok.native": 0,
    "edgetok.paths": 0,
    "edgetok.progress": 0,
    "edgetok.registry": 0,
    "edgetok.archive": 1,
    "edgetok.artifact": 1,
    "edgetok.atomic": 1,
    "edgetok.feeds": 1,
    "edgetok.machine": 1,
    "edgetok.manifest": 1,
    "edgetok.models": 1,
    "edgetok.npz": 1,
    "edgetok.onnx_rules": 1,
    "edgetok.onnx_scan": 1,
    "edgetok.onnx_tensors": 1,
    "edgetok.preprocess": 1,
    "edgetok.reading": 1,
    "edgetok.recipe": 1,
    "edgetok.store": 1,
    "edgetok.structure": 1,
    "edgetok.tvm_build": 1,
    "edgetok.tvm_graph": 1,
    "edgetok.weights": 1,
    "edgetok.converters": 2,
    "edgetok.devices": 2,
    "edgetok.onnx_backend": 3,
    "edgetok.runtime": 3,
    "edgetok": 4,
    "edgetok.__main__": 5,
    "edgetok.cli": 5,
}


def rank(module: str) -> int:
    while module not in RANKS:
        module = module.rpartition(".")[0]
    return RANKS[module]


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder in ("edgetok", "converters", "devices", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "edgetok" else ("edgetok", *parts))
            found.append((name.removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.level:
                names.add("RELATIVE")
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return {n for n in names if n == "RELATIVE" or n == "edgetok" or n.startswith("edgetok.")}


@pytest.mark.parametrize(("name", "path"), modules(), ids=[n for n, _ in modules()])
def test_module_imports_only_its_rank_and_lower(name: str, path: Path) -> None:
    if name == "edgetok":  # the lazy public face names everything
        pytest.skip("the package's face is lazy; see test_import_is_light")
    for target in imports(path):
        assert target != "RELATIVE", f"{name} uses a relative import"
        if target == "edgetok.__version__":
            continue
        assert rank(target) <= rank(name), f"{name} (rank {rank(name)}) imports {target} (rank {rank(target)})"
        sides = ("edgetok.converters", "edgetok.devices")
        for mine, other in (sides, sides[::-1]):
            assert not (name.startswith(mine) and target.startswith(other)), f"{name} imports {target}"


def test_libraries_not_in_the_required_set_are_imported_only_where_they_belong() -> None:
    allowed = {
        "torch": {"converters/sources/torch_export.py"},
        "tvm": {"edgetok/tvm_build.py", "edgetok/tvm_graph.py", "devices/tvm.py"},
    }
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top not in ("onnxscript", "scipy", "psutil", "matplotlib"), f"{path} imports {top}"
                if top in allowed:
                    assert str(path.relative_to(ROOT)) in allowed[top], f"{path} imports {top}"
