"""Cut a graph at named tensors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgetok.errors import InputError


def cut_outputs(model: ir.Model, names: Sequence[str]) -> int:
    """Make the named tensors the graph's outputs, in this order, and remove what they do not need.

    Args:
        model: changed in place.
        names: tensors of the main graph (outputs of nodes).

    Returns:
        How many nodes were removed.

    Raises:
        InputError: no name, a repeated one, or a tensor the graph does not have.
    """
    if not names or len(set(names)) != len(names):
        raise InputError(
            "--outputs needs different tensor names", where=", ".join(names) or "no names", next="name each output once"
        )
    values = {out.name: out for node in model.graph for out in node.outputs if out.name}
    chosen: list[ir.Value] = []
    for name in names:
        if name not in values:
            near = difflib.get_close_matches(name, list(values), n=3, cutoff=0.4)
            raise InputError(
                f"the graph has no tensor {name!r}",
                where="--outputs",
                next=f"did you mean {', '.join(near)}?" if near else "list tensors with edgetok inspect",
            )
        chosen.append(values[name])
    before = len(model.graph)
    model.graph.outputs.clear()
    model.graph.outputs.extend(chosen)
    RemoveUnusedNodesPass()(model)
    return before - len(model.graph)
