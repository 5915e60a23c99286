"""``edgetok inspect``: what is in a file, without running it or trusting it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetok.cli import child, output
from edgetok.cli.options import Json, ModelFile, Quiet, Shapes, Verbose, parse_shapes, pick_source

_SHOWN_OPS = 12
_SHOWN_REFUSALS = 8


def inspect(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help=".onnx file, Hugging Face folder or artifact.")
    ] = None,
    model: ModelFile = None,
    shape: Shapes = None,
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Memory the reader may take.")] = "4GiB",
    timeout: Annotated[int, typer.Option("--timeout", min=1, help="Seconds the reader may take.")] = child.SECONDS,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model or artifact, without running it.

    Operators, attention blocks, tokens per layer, FLOPs, hazards, which reductions apply and what they could gain.
    The file is read in a child process with memory and time limits.
    """
    out = output.setup(json, verbose, quiet)
    path = pick_source(file, model, "edgetok inspect model.onnx")
    progress = out.progress()
    progress.start("inspect")
    try:
        found = child.call(
            "inspect",
            {"path": str(path), "shapes": parse_shapes(shape)},
            memory_bytes=output.parse_bytes(memory, "--memory") or child.MEMORY_BYTES,
            seconds=timeout,
        )
    finally:
        progress.done()
    _print_file(out, found)
    _print_blocks(out, found)
    _print_methods(out, found)
    if found["manifest"]:
        _print_manifest(out, found["manifest"])
    out.emit(found)


def _print_file(out: output.Output, found: dict[str, Any]) -> None:
    out.line("file", f"{found['path']}, {found['kind']}, {output.mb(found['bytes'])}, sha256 {found['sha256'][:16]}...")
    out.line("graph", f"{found['name']}, from {found['producer'] or 'an unnamed exporter'}, opset {found['opset']}")
    for side in ("inputs", "outputs"):
        for tensor in found[side]:
            out.line(side[:-1], f"{tensor['name']} {_dtype(tensor['dtype'])} {_shape(tensor['dims'])}")
    if found["assumed"]:
        out.line("assumed", f"{', '.join(found['assumed'])} for what follows (say otherwise with --shape)")
    ops = list(found["op_counts"].items())
    shown = ops if out.verbose else ops[:_SHOWN_OPS]
    more = f", and {len(ops) - len(shown)} more kinds (-v)" if len(ops) > len(shown) else ""
    out.line("operators", f"{found['nodes']}: " + ", ".join(f"{k} {v}" for k, v in shown) + more)
    kinds = ", ".join(f"{_dtype(k)} {output.mb(v)}" for k, v in found["bytes_by_type"].items())
    out.line("weights", f"{found['parameters']:,} parameters, {output.mb(found['weight_bytes'])} ({kinds})")
    missing = f" ({found['uncounted']} products of unknown size not counted)" if found["uncounted"] else ""
    total, blocks = 2 * found["macs"] / 1e9, 2 * found["macs_blocks"] / 1e9
    out.line("work", f"{total:.4g} GFLOP for one sample, {blocks:.4g} in the blocks{missing}")


def _dtype(name: str) -> str:
    return {"float": "float32", "double": "float64"}.get(name, name)


def _shape(shape: list[Any] | None) -> str:
    return "of unknown shape" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def _print_blocks(out: output.Output, found: dict[str, Any]) -> None:
    if not found["blocks"]:
        what = "block whose tokens could be removed" if found["refused"] else "attention"
        out.line("blocks", f"no {what} was found; quantization needs none")
    else:
        grid = f", patches {found['grid'][0]}x{found['grid'][1]}" if found["grid"] else ""
        leading = f", first {found['leading']} protected" if found["leading"] else ""
        out.line("blocks", f"{len(found['blocks'])} of family {found['family']}{leading}{grid}")
        if not out.quiet:
            columns = ["block", "name", "heads", "head", "width", "tokens", "MLP", "norm", "mask", "q k v", "hazards"]
            out.table(columns, _block_rows(found["blocks"], each=out.verbose > 0), right=[2, 3, 4, 5, 6])
    for sentence in found["hazards"]:
        out.line("hazard", sentence)
    refused = found["refused"]
    for refusal in refused if out.verbose else refused[:_SHOWN_REFUSALS]:
        out.line("refused", refusal["sentence"])
    if len(refused) > _SHOWN_REFUSALS and not out.verbose:
        out.line("refused", f"and {len(refused) - _SHOWN_REFUSALS} more places (-v)")


def _block_rows(blocks: list[dict[str, Any]], *, each: bool) -> Iterator[list[object]]:
    """One row per block, or per run of blocks that differ only in name."""

    def look(block: dict[str, Any]) -> object:
        if each:
            return block["index"]
        return [v for k, v in block.items() if k not in ("index", "name")]

    for _, run in groupby(blocks, key=look):
        same = list(run)
        b, last = same[0], same[-1]
        index = str(b["index"]) if len(same) == 1 else f"{b['index']}-{last['index']}"
        name = b["name"] if len(same) == 1 else f"{b['name']} ..."
        ratio = "-" if b["mlp_ratio"] is None else f"{b['mlp_ratio']:.3g}x"
        joined = b["fused"] or ("packed" if b["packed"] else "apart")
        yield [index, name, b["heads"], b["head_dim"], b["width"], b["tokens"], ratio, b["norm"], b["mask"], joined,
               ", ".join(b["hazards"]) or "none"]  # fmt: skip


def _print_methods(out: output.Output, found: dict[str, Any]) -> None:
    if not found["blocks"] or out.quiet:
        return
    removed = next((m["removed"] for m in found["methods"] if m["removed"]), 0.0)
    out.line("reduce", f"estimates for {100 * removed:.0f} % of the tokens removed, from the FLOPs alone")
    rows = []
    for m in found["methods"]:
        counted = bool(m["removed"])
        rows.append(
            [
                m["name"].replace("_", "-"),
                "yes" if m["applies"] else "no",
                f"{100 * m['macs_ratio']:.0f} %" if counted else "-",
                f"{m['speedup']:.2f}x" if counted else "-",
                _runs(m["tokens_per_layer"]) if counted else "-",
                m["reason"],
            ]
        )
    out.table(["method", "applies", "block FLOPs", "at most", "tokens entering the MLPs", "remark"], rows, right=[2, 3])


def _runs(values: list[int]) -> str:
    """Equal neighbours joined: ``257 x3, 240, 223``."""
    runs = [(value, len(list(run))) for value, run in groupby(values)]
    return ", ".join(str(v) if n == 1 else f"{v} x{n}" for v, n in runs)


def _print_manifest(out: output.Output, manifest: dict[str, Any]) -> None:
    source = manifest["source"]
    out.line("artifact", f"format {manifest['format']}, sha256 {manifest['content_sha256']}")
    out.line("made from", f"{source['name']} ({source['kind']}), sha256 {source['sha256']}, {source['producer']}")
    if source["licence"]:
        out.line("licence", source["licence"])
    recipe = manifest["recipe"]
    out.line("recipe", ", ".join(f"{k}={v}" for k, v in recipe.items() if v not in (None, {}, []) and k != "quantize"))
    for group in manifest["precision"]:
        out.line(
            "precision", f"{group['group']}: {group['dtype']}, {group['tensors']} tensors, {output.mb(group['bytes'])}"
        )
    for name, value in manifest["agreement"].items():
        out.line("agreement", f"{name} {value:.6g}")
    for figure in manifest["accuracy"]:
        out.line("accuracy", f"{figure['metric']} {figure['source']:.2f} -> {figure['artifact']:.2f} {figure['unit']}")
    speed = manifest["measured_values"].get("speed")
    if isinstance(speed, dict):
        out.line("measured", ", ".join(f"{k} {v}" for k, v in speed.items()))
    for entry in manifest["files"]:
        out.line("contains", f"{entry['name']}, {output.mb(entry['bytes'])}, sha256 {entry['sha256'][:16]}...")
