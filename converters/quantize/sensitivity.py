"""Measure which layers cost accuracy, one at a time, against the float graph's outputs.

One graph holds both versions of every layer behind an ``If``, so that one session answers for any choice of layers:
the float layers keep their speed and nothing is rebuilt between measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor, open_session, take_over
from edgetok.converters.quantize.settings import OnStep, QuantizeSettings
from edgetok.converters.quantize.static_int8 import GroupPlan, quantize_weight

_GATE = "edgetok/gate"
_WORTH = 0.97  # a layer is kept float only if the squared output error falls by at least 3 %


class Switchboard:
    """The graph with a switch per group: False is float, True is int8.

    Args:
        model: the float graph (smoothed or not); left as it is.
        plans: of the groups, made on ``model``.
        samples: feeds to measure on; the float outputs are computed once.
    """

    def __init__(
        self,
        model: ir.Model,
        plans: Sequence[GroupPlan],
        samples: Sequence[Mapping[str, np.ndarray]],
        settings: QuantizeSettings,
    ) -> None:
        self.count = len(plans)
        self.session = open_session(_switchable(model, plans, settings), threads=settings.threads)
        self.outputs = [o.name for o in self.session.get_outputs() if o.type == "tensor(float)"]
        wanted = {i.name for i in self.session.get_inputs()}
        self.samples = [{k: v for k, v in s.items() if k in wanted} for s in samples]
        self.exact = [self._run(sample, ()) for sample in self.samples]

    def _run(self, sample: Mapping[str, np.ndarray], on: Iterable[int]) -> list[np.ndarray]:
        active = set(on)
        gates = {f"{_GATE}/{i}": np.asarray(i in active) for i in range(self.count)}
        answer: list[np.ndarray] = self.session.run(self.outputs, {**sample, **gates})
        return answer

    def errors(self, on: Iterable[int]) -> dict[str, float]:
        """Squared relative L2 error per float output with the groups ``on`` in int8."""
        active = tuple(on)
        total = np.zeros((len(self.outputs), 2))
        for sample, exact in zip(self.samples, self.exact):
            for i, (got, want) in enumerate(zip(self._run(sample, active), exact)):
                total[i] += np.square(got - want, dtype=np.float64).sum(), np.square(want, dtype=np.float64).sum()
        return {n: float(e / max(y, 1e-30)) for n, (e, y) in zip(self.outputs, total)}

    def error(self, on: Iterable[int]) -> float:
        """Mean over outputs of the squared relative error; NaN counts as infinite."""
        value = float(np.mean(list(self.errors(on).values()))) if self.outputs else 0.0
        return value if value == value else float("inf")


@dataclass
class Selection:
    """Which groups stay float and why.

    Args:
        shares: share of the summed squared output error per group.
        keep: group index to reason.
        total: squared relative output error with everything in int8.
        final: the same with ``keep`` float.
    """

    shares: list[float]
    keep: dict[int, str] = field(default_factory=dict)
    total: float = 0.0
    final: float = 0.0


def select_float(
    board: Switchboard, plans: Sequence[GroupPlan], settings: QuantizeSettings, on_step: OnStep | None = None
) -> Selection:
    """Measure each group alone, then keep groups float, most harm per multiply first, until the aim is met.

    Nothing is kept when int8 as a whole already meets ``max_error``.
    """
    alone = []
    for i in range(len(plans)):
        alone.append(board.error([i]))
        if on_step:
            on_step("sensitivity", i + 1, len(plans))
    everything = range(len(plans))
    scale = sum(alone) or 1.0
    chosen = Selection([e / scale for e in alone], total=board.error(everything))
    chosen.final = chosen.total
    if settings.auto_keep:
        _keep_greedily(board, plans, settings, alone, chosen)
    return chosen


def _keep_greedily(
    board: Switchboard, plans: Sequence[GroupPlan], settings: QuantizeSettings, alone: list[float], chosen: Selection
) -> None:
    macs = [plan.group.macs for plan in plans]
    room = settings.max_float_macs * sum(macs)
    aim = settings.max_error**2
    for i in sorted(range(len(plans)), key=lambda g: -alone[g] / macs[g]):
        if chosen.final <= aim:
            return
        if macs[i] > room or chosen.shares[i] < 0.5 / len(plans):
            continue
        keep = [*chosen.keep, i]
        after = board.error(g for g in range(len(plans)) if g not in keep)
        if after < _WORTH * chosen.final:
            room -= macs[i]
            chosen.keep[i] = f"{100 * chosen.shares[i]:.1f} % of the output error"
            chosen.final = after


def _switchable(model: ir.Model, plans: Sequence[GroupPlan], settings: QuantizeSettings) -> ir.Model:
    twin = model.clone()
    graph = twin.graph
    editor = Editor(graph)
    nodes = {node.name: node for node in graph}
    for i, plan in enumerate(plans):
        gate = ir.Value(name=f"{_GATE}/{i}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        graph.inputs.append(gate)
        for linear in plan.group.linears:
            _add_switch(editor, nodes[linear.node.name], linear.matrix(), plan, gate, settings)
    return twin


def _add_switch(
    editor: Editor, node: ir.Node, matrix: np.ndarray, plan: GroupPlan, gate: ir.Value, settings: QuantizeSettings
) -> None:
    """Replace one linear by If(gate, int8 version, float version)."""
    inputs = list(node.inputs)
    copy = ir.node(node.op_type, inputs, dict(node.attributes), name=f"{node.name}/float")  # type: ignore[arg-type]
    branches = {
        "then_branch": _int8_branch(node, matrix, plan, settings),
        "else_branch": _branch([copy], copy.outputs[0], f"{node.name}/else"),
    }
    switch = editor.node(node, "If", [gate], f"{node.name}/switch", branches)
    take_over(node.outputs[0], switch.outputs[0])


def _branch(nodes: list[ir.Node], out: ir.Value, name: str, initializers: Sequence[ir.Value] = ()) -> ir.Graph:
    out.name = f"{name}/out"
    out.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [out], nodes=nodes, initializers=initializers, name=name)


def _int8_branch(node: ir.Node, matrix: np.ndarray, plan: GroupPlan, settings: QuantizeSettings) -> ir.Graph:
    codes, scales = quantize_weight(matrix, reduce_range=settings.reduce_range)
    name = f"{node.name}/int8"

    def const(key: str, array: np.ndarray) -> ir.Value:
        return ir.Value(name=f"{name}/{key}", const_value=ir.tensor(array, name=f"{name}/{key}"))

    def step(op: str, inputs: list[ir.Value | None], attributes: dict[str, Any] | None = None) -> ir.Node:
        nodes.append(ir.node(op, inputs, attributes or {}, name=f"{name}/{len(nodes)}"))
        nodes[-1].outputs[0].name = f"{name}/{len(nodes)}"
        return nodes[-1]

    nodes: list[ir.Node] = []
    constants = [const("s", np.asarray(plan.scale, np.float32)), const("z", np.asarray(plan.zero_point, np.uint8))]
    constants += [const("w", codes), const("ws", scales)]
    s, z, w, ws = constants
    q = step("QuantizeLinear", [node.inputs[0], s, z]).outputs[0]
    x = step("DequantizeLinear", [q, s, z]).outputs[0]
    weight = step("DequantizeLinear", [w, ws], {"axis": 1}).outputs[0]
    out = step("MatMul", [x, weight]).outputs[0]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        out = step("Add", [out, bias]).outputs[0]
    return _branch(nodes, out, name, constants)
