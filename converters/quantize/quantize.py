"""Turn a float graph into fewer bits: the entry to all precisions, and the order of the int8 steps.

Int8, in order: find linears, watch the float graph on calibration samples, smooth (the float function stays the same),
choose each activation range by measured output error, measure every layer's share of the error at the graph outputs,
keep the worst float if the aim is missed, correct biases, emit Q/DQ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize import dynamic_int8, fp16, int4, static_int8, tables
from edgetok.converters.quantize.building import Editor, check_feeds, drop_unused, open_session
from edgetok.converters.quantize.calibrate import ActivationStats, collect
from edgetok.converters.quantize.linears import (
    Group,
    Linear,
    find_linears,
    group_by_input,
    initializer_bytes,
    protected,
)
from edgetok.converters.quantize.sensitivity import Selection, Switchboard, select_float
from edgetok.converters.quantize.settings import (
    PRECISIONS,
    LayerRecord,
    OnStep,
    QuantizeReport,
    QuantizeSettings,
)
from edgetok.converters.quantize.smooth import Fold, apply_fold, find_fold, set_bias
from edgetok.converters.quantize.static_int8 import GroupPlan
from edgetok.errors import InputError, InternalError

Smoothing = tuple[float, Fold]  # migration strength, where it went


@dataclass(eq=False)
class Work:
    """What the steps pass along.

    Args:
        model: the copy being changed.
        editor: of its graph.
        groups: linears to quantize, by input.
        float_linears: linears left out by name.
    """

    model: ir.Model
    editor: Editor
    groups: list[Group]
    float_linears: list[Linear]


def quantize_model(
    model: ir.Model,
    precision: str,
    calib: Sequence[Mapping[str, np.ndarray]],
    settings: QuantizeSettings | None = None,
    on_step: OnStep | None = None,
) -> tuple[ir.Model, QuantizeReport]:
    """Quantize a graph; the given model is not changed.

    Args:
        model: a cleaned-up, possibly token-reduced graph with static weights.
        precision: "keep", "fp16", "int8", "int8-dynamic" or "int4".
        calib: feeds for calibration; needed for "int8", used for smoothing by "int8-dynamic".
        settings: defaults if None.
        on_step: told (step name, done, total).

    Returns:
        The new model and what was done. The same inputs give the same bytes.

    Raises:
        InputError: unknown precision, no calibration samples, or samples that do not fit.
        UnsupportedError: onnxruntime cannot run the graph.
    """
    run = _METHODS.get(precision)
    if run is None:
        raise InputError(f"unknown precision {precision!r}", next=f"choose one of {', '.join(PRECISIONS)}")
    settings = settings or QuantizeSettings()
    start = time.perf_counter()
    before = initializer_bytes(model.graph)
    if precision == "keep":
        return model, QuantizeReport(precision, bytes_before=before, bytes_after=before)
    work = _prepare(model, settings)
    report = run(work, calib, settings, on_step)
    drop_unused(work.model)
    after = initializer_bytes(work.model.graph)
    seconds = time.perf_counter() - start
    return work.model, replace(report, bytes_before=before, bytes_after=after, seconds=seconds)


def _prepare(model: ir.Model, settings: QuantizeSettings) -> Work:
    copy = model.clone()
    taken: set[str] = set()
    for i, node in enumerate(copy.graph):
        node.name = node.name if node.name and node.name not in taken else f"{node.op_type}_{i}"
        taken.add(node.name)
    linears = find_linears(copy.graph)
    chosen = [item for item in linears if not protected(item.node, settings.keep_float)]
    left = [item for item in linears if protected(item.node, settings.keep_float)]
    return Work(copy, Editor(copy.graph), group_by_input(chosen), left)


def _int8(
    work: Work, calib: Sequence[Mapping[str, np.ndarray]], settings: QuantizeSettings, on_step: OnStep | None
) -> QuantizeReport:
    check_feeds(work.model, calib)
    if not work.groups:
        return _report("int8", [], work, calib, settings, None, ("no linear layer to quantize",))
    plans, reference = _plan(work, calib, settings, on_step)
    samples = _spread(calib, settings.sensitivity_samples)
    board = Switchboard(work.model, plans, samples, settings)
    _check_same_function(reference, board)
    selection = select_float(board, plans, settings, on_step)
    errors = board.errors(i for i in range(len(plans)) if i not in selection.keep)
    del board
    notes = []
    for i, plan in enumerate(plans):
        if i in selection.keep:
            continue
        if settings.bias_correction:
            _correct_bias(work.editor, plan)
        static_int8.emit(work.editor, plan, settings)
        if on_step:
            on_step("write int8", i + 1, len(plans))
    if selection.final > settings.max_error**2 and settings.auto_keep:
        notes.append(
            f"the aim of {settings.max_error:g} relative output error was missed: {selection.final**0.5:.3f} "
            f"with {100 * settings.max_float_macs:.0f} % of the multiplies allowed to stay float"
        )
    report = _report("int8", plans, work, calib, settings, selection, tuple(notes))
    return replace(report, output_error={n: e**0.5 for n, e in errors.items()})


def _plan(
    work: Work, calib: Sequence[Mapping[str, np.ndarray]], settings: QuantizeSettings, on_step: OnStep | None
) -> tuple[list[GroupPlan], dict[str, np.ndarray]]:
    """Calibrate, smooth, choose ranges. Also returns the float outputs of the first sensitivity sample."""
    names = [group.name for group in work.groups]
    stats = collect(work.model, names, calib, rows=settings.rows, threads=settings.threads, on_step=on_step)
    watched = [stats.pop(name) for name in names]
    first = _spread(calib, settings.sensitivity_samples)[0]
    reference = _outputs(work.model, first, settings)
    alphas = smooth_groups(work, watched, settings, on_step)
    plans = []
    for i, (group, stat) in enumerate(zip(work.groups, watched)):
        plan = static_int8.fit(group, stat, settings)
        smoothing = alphas[i]
        if smoothing is not None:
            plan.alpha, plan.fold = smoothing
        plans.append(plan)
        if on_step:
            on_step("choose ranges", i + 1, len(work.groups))
    return plans, reference


def smooth_groups(
    work: Work, stats: list[ActivationStats], settings: QuantizeSettings, on_step: OnStep | None = None
) -> list[Smoothing | None]:
    """Smooth every group where it lowers the error; the statistics follow. Returns (alpha, fold) or None per group."""
    linears = [linear for group in work.groups for linear in group.linears]
    carriers = {id((item.add or item.node).outputs[0]): item for item in linears}
    answer: list[Smoothing | None] = []
    for i, (group, stat) in enumerate(zip(work.groups, stats)):
        answer.append(None)
        fold = find_fold(group, carriers)
        if settings.smooth != "off" and not (settings.smooth == "fold" and fold.kind == "insert"):
            chosen = static_int8.choose_alpha(stat, [item.matrix() for item in group.linears], fold, settings)
            if chosen is not None:
                alpha, s = chosen
                apply_fold(work.editor, fold, group, s)
                stat.divide(s)
                answer[-1] = (alpha, fold)
        if on_step:
            on_step("smooth", i + 1, len(stats))
    return answer


def _outputs(model: ir.Model, feed: Mapping[str, np.ndarray], settings: QuantizeSettings) -> dict[str, np.ndarray]:
    session = open_session(model, threads=settings.threads)
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in wanted})))


def _check_same_function(reference: dict[str, np.ndarray], board: Switchboard) -> None:
    """Smoothing must not change the float function; a wrong fold would be a defect of ours."""
    for name, got in zip(board.outputs, board.exact[0]):
        want = reference[name]
        error = float(np.linalg.norm(got - want)) / max(float(np.linalg.norm(want)), 1e-30)
        if not error <= 1e-3:
            raise InternalError(
                f"smoothing changed the float output by {error:.2g} (relative)",
                where=name,
                next="convert with smoothing off, and report the model: this is a defect of edgetok",
            )


def _correct_bias(editor: Editor, plan: GroupPlan) -> None:
    for linear, shift in zip(plan.group.linears, plan.shifts):
        bias = linear.bias_array()
        if bias is not None:
            set_bias(editor, linear, bias - shift)


def _spread(calib: Sequence[Mapping[str, np.ndarray]], count: int) -> list[Mapping[str, np.ndarray]]:
    """``count`` samples at even distances."""
    count = min(count, len(calib))
    return [calib[i * len(calib) // count] for i in range(count)]


def _report(
    precision: str,
    plans: list[GroupPlan],
    work: Work,
    calib: Sequence[Mapping[str, np.ndarray]],
    settings: QuantizeSettings,
    selection: Selection | None,
    notes: tuple[str, ...],
) -> QuantizeReport:
    records = [_float_record(item, "named in keep_float") for item in work.float_linears]
    for i, plan in enumerate(plans):
        reason = selection.keep.get(i, "") if selection else ""
        share = selection.shares[i] if selection else None
        for j, linear in enumerate(plan.group.linears):
            record = LayerRecord(
                linear.name,
                linear.node.op_type,
                "int8",
                linear.shape,
                linear.macs,
                plan.method,
                float(plan.scale),
                plan.zero_point,
                plan.fold.label if plan.fold else "",
                plan.alpha,
                plan.errors[j],
                share,
            )
            records.append(replace(record, precision="float", reason=reason) if reason else record)
    if settings.tables:
        records += tables.quantize_tables(work.editor)
    kept = tuple(r.name for r in records if r.precision == "float")
    return QuantizeReport(precision, tuple(records), kept, len(calib), notes=notes)


def _float_record(linear: Linear, reason: str) -> LayerRecord:
    return LayerRecord(linear.name, linear.node.op_type, "float", linear.shape, linear.macs, reason=reason)


def _int8_dynamic(
    work: Work, calib: Sequence[Mapping[str, np.ndarray]], settings: QuantizeSettings, on_step: OnStep | None
) -> QuantizeReport:
    alphas: list[Smoothing | None] = [None] * len(work.groups)
    if calib and work.groups and settings.smooth != "off":
        check_feeds(work.model, calib)
        names = [group.name for group in work.groups]
        stats = collect(work.model, names, calib, rows=settings.rows, threads=settings.threads, on_step=on_step)
        alphas = smooth_groups(work, [stats.pop(n) for n in names], settings, on_step)
    records = [_float_record(item, "named in keep_float") for item in work.float_linears]
    for i, group in enumerate(work.groups):
        dynamic_int8.emit(work.editor, group, settings)
        for linear in group.linears:
            record = LayerRecord(linear.name, linear.node.op_type, "int8-dynamic", linear.shape, linear.macs)
            smoothing = alphas[i]
            if smoothing is not None:
                record = replace(record, alpha=smoothing[0], smooth=smoothing[1].label)
            records.append(record)
        if on_step:
            on_step("write int8", i + 1, len(work.groups))
    if settings.tables:
        records += tables.quantize_tables(work.editor)
    kept = tuple(r.name for r in records if r.precision == "float")
    return QuantizeReport("int8-dynamic", tuple(records), kept, len(calib) if any(alphas) else 0)


def _int4(
    work: Work, calib: Sequence[Mapping[str, np.ndarray]], settings: QuantizeSettings, on_step: OnStep | None
) -> QuantizeReport:
    records = [_float_record(item, "named in keep_float") for item in work.float_linears]
    linears = [linear for group in work.groups for linear in group.linears]
    for i, linear in enumerate(linears):
        records.append(int4.emit(work.editor, linear, settings))
        if on_step:
            on_step("write int4", i + 1, len(linears))
    if linears:
        work.model.opset_imports.setdefault("com.microsoft", 1)
    if settings.tables:
        records += tables.quantize_tables(work.editor)
    kept = tuple(r.name for r in records if r.precision == "float")
    return QuantizeReport("int4", tuple(records), kept)


def _fp16(
    work: Work, calib: Sequence[Mapping[str, np.ndarray]], settings: QuantizeSettings, on_step: OnStep | None
) -> QuantizeReport:
    return fp16.store_fp16(work.editor, on_step)


_Method = Callable[[Work, Sequence[Mapping[str, np.ndarray]], QuantizeSettings, OnStep | None], QuantizeReport]
_METHODS: dict[str, _Method] = {
    "keep": _fp16,  # never called: "keep" returns the model itself
    "fp16": _fp16,
    "int8": _int8,
    "int8-dynamic": _int8_dynamic,
    "int4": _int4,
}
