"""Static INT8: u8 activations (one scale and zero point each) times s8 weights (one scale per output channel).

Emitted as QuantizeLinear / DequantizeLinear around the MatMul, with a float result: onnxruntime fuses
Q -> DQ -> MatMul(DQ W) into QuantizeLinear + MatMulIntegerToFloat, which is as fast as a u8 result (QLinearMatMul) and
loses half as much: the product is rounded once less. One QuantizeLinear serves all linears that read the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor, take_over
from edgetok.converters.quantize.calibrate import ActivationStats, choose_range, fake_quantize, to_scale
from edgetok.converters.quantize.linears import Group, Linear
from edgetok.converters.quantize.settings import QuantizeSettings
from edgetok.converters.quantize.smooth import Fold, smoothing_scale

_FOLD_GAIN = 1.1  # a free scale is taken if it divides the squared error by this
_MIN_ROWS = 8


@dataclass(eq=False)
class GroupPlan:
    """All that was decided for one activation and the linears that read it.

    Args:
        scale, zero_point: of the u8 activation.
        method: the range rule that won.
        errors: relative L2 output error per linear, on sampled rows.
        shifts: mean output error per linear [N], to be taken off the bias.
        alpha, fold: of smoothing; alpha None when there is none.
        rank: number of axes of the activation.
    """

    group: Group
    scale: np.float32 = field(default_factory=lambda: np.float32(1))
    zero_point: int = 0
    method: str = "minmax"
    errors: list[float] = field(default_factory=list)
    shifts: list[np.ndarray] = field(default_factory=list)
    alpha: float | None = None
    fold: Fold | None = None
    rank: int = 3


def quantize_weight(matrix: np.ndarray, *, reduce_range: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric s8 per output channel.

    Args:
        matrix: [K, N] float32.
        reduce_range: use -64..64 instead of -127..127.

    Returns:
        (s8 [K, N], scales float32 [N]); an all-zero column gets scale 1.
    """
    top = 64 if reduce_range else 127
    peak = np.abs(matrix).max(0)
    scales = np.where(peak > np.finfo(np.float32).tiny * 256, peak / top, 1).astype(np.float32)
    return np.clip(np.rint(matrix / scales), -top, top).astype(np.int8), scales


def rounded_weight(matrix: np.ndarray, settings: QuantizeSettings) -> np.ndarray:
    """The weight as the int8 graph sees it, float32 [K, N]."""
    q, scales = quantize_weight(matrix, reduce_range=settings.reduce_range)
    return q.astype(np.float32) * scales


def _evaluator(
    x: np.ndarray, weights: list[np.ndarray], settings: QuantizeSettings
) -> Callable[[np.float32, int], list[float]]:
    """A function from (scale, zero point) to the relative L2 output error of each linear on the rows x [R, K]."""
    rounded = [rounded_weight(w, settings) for w in weights]
    exact = [x @ w for w in weights]
    energies = [max(float(np.square(y).sum()), 1e-30) for y in exact]

    def evaluate(scale: np.float32, zero_point: int) -> list[float]:
        rounded_x = fake_quantize(x, scale, zero_point)
        errors = [rounded_x @ w - y for w, y in zip(rounded, exact)]
        return [float(np.sqrt(np.square(e).sum() / y)) for e, y in zip(errors, energies)]

    return evaluate


def choose_alpha(
    stats: ActivationStats, weights: list[np.ndarray], fold: Fold, settings: QuantizeSettings
) -> tuple[float, np.ndarray] | None:
    """Pick the migration strength with the least output error on rows it was not fitted to.

    A smoothed activation has all its channels at the edge of the range, so a few samples make smoothing look better
    than it is on others: scales and range come from the rows of the first half of the samples, the error from the
    second half.

    Returns:
        (alpha, s [K]) with s from everything seen, or None if smoothing does not pay.
    """
    half = len(stats.rows) // 2
    if half < _MIN_ROWS:
        return None
    seen, unseen = stats.rows[:half], stats.rows[half:]
    low, high = seen.min(0), seen.max(0)
    unseen = unseen[:: max(1, len(unseen) // 192)]

    def cost(s: np.ndarray) -> float:
        ws = [w * s[:, None] for w in weights]
        energy = np.sum([np.square(w).sum(1) for w in ws], axis=0)
        bounds = choose_range("mse", seen / s, float((low / s).min()), float((high / s).max()), energy)
        errors = _evaluator(unseen / s, ws, settings)(*to_scale(*bounds))
        return float(np.mean(np.square(errors)))

    plain = cost(np.ones(len(low), np.float32))
    tried = [(cost(smoothing_scale(low, high, weights, a)), a) for a in settings.alphas]
    best, alpha = min(tried)
    need = settings.insert_gain if fold.kind == "insert" else _FOLD_GAIN
    if not best * need < plain:
        return None
    return alpha, smoothing_scale(stats.low, stats.high, weights, alpha)


def fit(group: Group, stats: ActivationStats, settings: QuantizeSettings) -> GroupPlan:
    """Choose the activation range by measured output error over the candidates of ``settings.range_methods``.

    Args:
        stats: of the group's input, already divided by the smoothing scale.
    """
    weights = [linear.matrix() for linear in group.linears]
    energy = np.sum([np.square(w).sum(1) for w in weights], axis=0)
    low, high = float(stats.low.min()), float(stats.high.max())
    evaluate = _evaluator(stats.rows[:: max(1, len(stats.rows) // 256)], weights, settings)
    best = np.inf
    plan = GroupPlan(group, rank=stats.rank)
    for method in settings.range_methods:
        scale, zero_point = to_scale(*choose_range(method, stats.rows, low, high, energy))
        errors = evaluate(scale, zero_point)
        cost = float(np.mean(np.square(errors)))
        if cost < best:
            best = cost
            plan.scale, plan.zero_point, plan.method, plan.errors = scale, zero_point, method, errors
    noise = (fake_quantize(stats.rows, plan.scale, plan.zero_point) - stats.rows).mean(0)
    for weight in weights:
        rounded = rounded_weight(weight, settings)
        plan.shifts.append(noise @ rounded + stats.mean @ (rounded - weight))
    return plan


def emit(editor: Editor, plan: GroupPlan, settings: QuantizeSettings) -> None:
    """Put Q/DQ around the group's MatMuls; a Gemm becomes MatMul + Add."""
    name = plan.group.name
    first = plan.group.linears[0].node
    scale = editor.const(f"{name}/scale", np.asarray(plan.scale, np.float32))
    zero = editor.const(f"{name}/zero", np.asarray(plan.zero_point, np.uint8))
    q = editor.node(first, "QuantizeLinear", [plan.group.x, scale, zero], f"{name}/q").outputs[0]
    x = editor.node(first, "DequantizeLinear", [q, scale, zero], f"{name}/dq").outputs[0]
    q.type, q.shape = ir.TensorType(ir.DataType.UINT8), plan.group.x.shape
    x.type, x.shape = ir.TensorType(ir.DataType.FLOAT), plan.group.x.shape
    for linear in plan.group.linears:
        codes, scales = quantize_weight(linear.matrix(), reduce_range=settings.reduce_range)
        weight = _dequantized(editor, linear, codes, scales)
        _emit_product(editor, linear, x, weight, plan.rank)


def _dequantized(editor: Editor, linear: Linear, codes: np.ndarray, scales: np.ndarray) -> ir.Value:
    name = linear.name
    inputs = [editor.const(f"{name}/w_q", codes), editor.const(f"{name}/w_scale", scales)]
    value = editor.node(linear.node, "DequantizeLinear", inputs, f"{name}/w_dq", {"axis": 1}).outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(codes.shape)
    return value


def _emit_product(editor: Editor, linear: Linear, x: ir.Value, weight: ir.Value, rank: int) -> None:
    """MatMul, then the bias in a shape that onnxruntime does not turn into a Gemm.

    It joins MatMul + Add with a bias [N] to Gemm before it looks for Q/DQ (on static shapes, and always on matrices),
    and then computes that Gemm in float: 4x slower. A bias [1, 1, N] is left alone; so is a Reshape in between.
    """
    name, node = linear.name, linear.node
    product = editor.node(node, "MatMul", [x, weight], f"{name}/mm").outputs[0]
    old = node.outputs[0]
    product.type, product.shape = old.type, old.shape
    if linear.bias is None:
        take_over(old, product)
        return
    bias = linear.bias
    if rank == 2:
        product = editor.node(node, "Reshape", [product, _keep_matrix(editor)], f"{name}/rows").outputs[0]
        product.type, product.shape = old.type, old.shape
    else:
        array = linear.bias_array()
        bias = editor.const(f"{name}/b_wide", np.reshape(array, (1,) * (rank - 1) + (-1,)))  # type: ignore[arg-type]
    where = linear.add or node
    total = editor.node(where, "Add", [product, bias], f"{name}/biased").outputs[0]
    take_over(where.outputs[0], total)
    if linear.add is not None:
        editor.graph.remove(node, safe=True)


def _keep_matrix(editor: Editor) -> ir.Value:
    """The shape [0, -1]: a Reshape that changes nothing."""
    name = "edgetok/keep_matrix"
    found = editor.graph.initializers.get(name)
    return editor.const(name, np.array([0, -1], np.int64)) if found is None else found
