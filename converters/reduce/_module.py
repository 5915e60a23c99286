"""Merging inside a block: fewer tokens into attention and MLP, all of them out again."""

from __future__ import annotations

import onnx_ir as ir

from edgetok.converters.graph.blocks import Block
from edgetok.converters.reduce import core
from edgetok.converters.reduce._builder import Builder
from edgetok.converters.reduce._shapes import set_dims
from edgetok.converters.reduce._tail import upstream
from edgetok.converters.reduce.base import Emitted, Method, Settings, Site
from edgetok.errors import UnsupportedError


def emit_module(
    b: Builder, graph: ir.Graph, block: Block, site: Site, count: int, method: Method, settings: Settings
) -> list[ir.Value]:
    """Write one plan for the block, and merge and unmerge around its modules.

    Returns:
        values whose shapes have changed.

    Raises:
        UnsupportedError: a module's entry or exit cannot be told.
    """
    spans = []
    if getattr(settings, "attn", True):
        spans.append(_span(block, block.x_in, block.x_attn))
    if getattr(settings, "mlp", True) and block.x_out is not None:
        spans.append(_span(block, block.x_attn, block.x_out))
    done = method.emit(b, site, count, settings)
    origin = core.emit_origin(b, done, site.tokens, None)
    changed: list[ir.Value] = []
    for entry, uses, residual, index in spans:
        changed += _wrap(b, block, done, origin, site.tokens, entry, uses, residual, index)
    return changed


def _span(block: Block, before: ir.Value, after: ir.Value) -> tuple[ir.Value, list[tuple[ir.Node, int]], ir.Node, int]:
    """Of a residual module from ``before`` to ``after``: its entry, who reads it, and the residual Add's branch."""
    residual = after.producer()
    if residual is not None and residual.op_type == "LayerNormalization" and residual.inputs[0] is not None:
        residual = residual.inputs[0].producer()
    branches = [i for i, v in enumerate(residual.inputs) if v is not before] if residual is not None else []
    if residual is None or residual.op_type != "Add" or len(branches) != 1:
        raise UnsupportedError(
            "the residual around this module is not one Add", where=block.name, next="clean the graph up first"
        )
    branch = residual.inputs[branches[0]]
    inside = upstream(branch) if branch is not None else set()
    uses = [(n, i) for n, i in before.uses() if n in inside]
    entry = before
    if len(uses) == 1 and uses[0][0].op_type == "LayerNormalization":
        entry = uses[0][0].outputs[0]
        uses = [(n, i) for n, i in entry.uses() if n in inside]
    if not uses or (entry is before and block.norm == "pre"):
        raise UnsupportedError(
            "the normalization in front of this module is not one node",
            where=block.name,
            next="clean the graph up first",
        )
    return entry, uses, residual, branches[0]


def _wrap(
    b: Builder,
    block: Block,
    done: Emitted,
    origin: ir.Value,
    tokens: int,
    entry: ir.Value,
    uses: list[tuple[ir.Node, int]],
    residual: ir.Node,
    index: int,
) -> list[ir.Value]:
    set_dims(entry, [b.batch, tokens, block.width])
    merged, _ = core.emit_merge(b, entry, None, done, padded=False)
    for node, i in uses:
        node.replace_input_with(i, merged)
    short = residual.inputs[index]
    if short is None:
        raise ValueError("a residual without a branch")
    set_dims(short, [b.batch, done.outputs, block.width])
    residual.replace_input_with(index, b.rows(short, origin))
    return [merged]
