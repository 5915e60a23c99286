"""Put the taken branch of an If whose condition is known in place of the If."""

from __future__ import annotations

import onnx_ir as ir

from edgetok.converters.graph.infer import Facts, content
from edgetok.converters.graph.match import unique_name


def inline_branches(model: ir.Model, facts: Facts) -> int:
    """Replace every If of the main graph that can go only one way. Returns how many."""
    count = 0
    for node in list(model.graph):
        condition = content(facts, node.inputs[0]) if node.op_type == "If" and node.domain in ("", "ai.onnx") else None
        if condition is None or condition.size != 1 or any(out.is_graph_output() for out in node.outputs):
            continue
        taken = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
        _inline(model.graph, node, node.attributes[taken].as_graph())
        count += 1
    return count


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Move a branch's nodes and constants before ``node``, rename them apart, and let its outputs take over."""
    outputs = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        value.name = unique_name(graph, value.name or "constant")
        graph.register_initializer(value)
    for inner in list(branch):
        branch.remove(inner)
        for out in inner.outputs:
            if out.name:
                out.name = unique_name(graph, out.name)
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, outputs, strict=True):
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
