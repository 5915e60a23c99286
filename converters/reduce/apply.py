"""Put a reduction method into a graph: nodes at each layer, sizes into attention, masks, heads and outputs served.

Works in place on the clean graph (attention open). Reduction by zero tokens touches nothing. Over 400 lines because it
is one walk along the token stream whose steps (blocks, masks, sinks) share one state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.blocks import Block, Finding
from edgetok.converters.graph.outputs import cut_outputs
from edgetok.converters.reduce import METHODS, core
from edgetok.converters.reduce._builder import FLOAT, INT64, Builder, Dim, dims
from edgetok.converters.reduce._insist import follow_places
from edgetok.converters.reduce._module import emit_module
from edgetok.converters.reduce._shapes import release_baked_counts, set_dims, shapes_again
from edgetok.converters.reduce._tail import Sink, Stream, const, follow
from edgetok.converters.reduce.base import Counts, Emitted, Method, Settings, Site, clamp
from edgetok.converters.reduce.schedule import schedule, tokens_per_layer
from edgetok.converters.reduce.spec import ReduceSpec, format_spec
from edgetok.errors import InputError, UnsupportedError

Outputs = str | tuple[str, ...]


@dataclass(frozen=True)
class ReduceReport:
    """What was reduced.

    Args:
        method: registered name.
        spec: text that gives the same settings again; the counts are in ``counts``.
        counts: tokens removed by each block.
        tokens: tokens entering each block's MLP; ``tokens_in`` enter the network.
        removed: share of tokens removed over the whole network (decision 24).
        macs, macs_before: multiply-accumulates of the blocks by the cost model.
        notes: clamps and remarks, a sentence each.
        restored: outputs given back at full resolution.
        added: names of outputs added.
        nodes_added: how many ONNX nodes the reduction costs.
    """

    method: str
    spec: str
    counts: tuple[int, ...]
    tokens_in: int
    tokens: tuple[int, ...]
    removed: float
    macs: int
    macs_before: int
    notes: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    nodes_added: int = 0

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the blocks relative to unreduced."""
        return self.macs / self.macs_before if self.macs_before else 1.0


@dataclass(eq=False)
class _State:
    """What is carried through the graph.

    Args:
        tokens: rows now.
        size: float [B,N] or None. padded: size 0 marks padding.
        origin: per segment, int64 [B,N0] rows or float [B,N0-P,N-P] weights; entry 0 is None.
        kept: int64 [B,N], the source row behind each row, when wanted.
    """

    tokens: int
    size: ir.Value | None = None
    padded: bool = False
    origin: list[ir.Value | None] = field(default_factory=lambda: [None])
    kept: ir.Value | None = None
    sizes: list[ir.Value | None] = field(default_factory=lambda: [None])
    kepts: list[ir.Value | None] = field(default_factory=lambda: [None])


def resolve(spec: ReduceSpec, finding: Finding, counts: Sequence[int] | None = None) -> tuple[Method, Settings, Counts]:
    """The method, its settings and tokens removed per layer for this network.

    Raises:
        InputError: the token count is open, or there is no block.
    """
    tokens, layers = finding.tokens, len(finding.blocks)
    if not layers:
        raise InputError("no block was found whose tokens could be reduced", next="run: edgetok inspect MODEL")
    if tokens is None:
        raise InputError(
            "the number of tokens is open in this graph", next="fix the input size, as --shape input=1x3x224x224"
        )
    method: Method = METHODS.get(spec.method or "tome")
    settings = spec.settings if spec.settings is not None else method.settings()
    if counts is not None:
        if len(counts) != layers or min(counts) < 0:
            raise InputError(f"expected {layers} counts of zero or more, one per block, got {list(counts)}")
        return method, settings, clamp(counts, tokens, finding.leading, method)
    own = None if spec.removed is None else method.share(settings, spec.removed, tokens, finding.leading, layers)
    if own is not None:
        return method, settings, own
    if spec.removed is not None:
        return (
            method,
            settings,
            schedule(
                spec.removed, tokens, finding.leading, layers, method, shape=settings.schedule, allowed=settings.layers
            ),
        )
    return method, settings, method.counts(settings, tokens, finding.leading, layers)


def reduce_model(
    model: ir.Model,
    finding: Finding,
    spec: ReduceSpec,
    *,
    counts: Sequence[int] | None = None,
    outputs: Outputs = "restore",
) -> ReduceReport:
    """Reduce tokens in place.

    Args:
        model: the clean graph that ``finding`` describes.
        spec: what to do; without a method, ToMe.
        counts: tokens removed by each block, instead of what ``spec`` says.
        outputs: "restore" gives every output its source shape and row order; "reduced" leaves per-token outputs
            short and adds ``<name>.kept`` (int64, source row of each row) and, for merging, ``<name>.size``;
            a tuple of tensor names cuts the graph at those, restored.

    Raises:
        InputError: settings that do not fit this network.
        UnsupportedError: the graph cannot be reduced this way; the message names the next step.
    """
    method, settings, planned = resolve(spec, finding, counts)
    if isinstance(outputs, tuple):
        cut_outputs(model, outputs)
        finding = _living(finding)
        live = planned.removed[: len(finding.blocks)]
        planned = Counts(live, planned.notes) if live else planned
    if finding.blocks and any(planned.removed):
        restored, added, nodes = _Job(model, finding, method, settings, planned.removed, outputs).run()
    else:
        restored, added, nodes = (), (), 0
    return _report(finding, method, settings, planned, restored, added, nodes)


def _living(finding: Finding) -> Finding:
    """The blocks that are left after a cut; the last of them may have lost its MLP."""
    blocks = []
    for block in finding.blocks:
        if not _alive(block.x_attn):
            break
        blocks.append(block if block.x_out is None or _alive(block.x_out) else replace(block, x_out=None))
    return replace(finding, blocks=tuple(blocks))


def _alive(value: ir.Value) -> bool:
    node = value.producer()
    return node is None or node.graph is not None


def _report(
    finding: Finding,
    method: Method,
    settings: Settings,
    planned: Counts,
    restored: tuple[str, ...],
    added: tuple[str, ...],
    nodes: int,
) -> ReduceReport:
    tokens, width = finding.tokens or 0, finding.blocks[0].width if finding.blocks else 1
    left = method.tokens_in_mlp(settings, planned.removed, tokens)
    return ReduceReport(
        method.name,
        format_spec(method.name, settings),
        planned.removed,
        tokens,
        left,
        1 - sum(left) / (len(left) * tokens) if left else 0.0,
        method.macs(settings, planned.removed, tokens, width),
        method.macs(settings, [0] * len(planned.removed), tokens, width),
        planned.notes,
        restored,
        added,
        nodes,
    )


class _Job:
    """One run of ``reduce_model`` that does change something."""

    def __init__(
        self,
        model: ir.Model,
        finding: Finding,
        method: Method,
        settings: Settings,
        counts: Sequence[int],
        outputs: Outputs,
    ) -> None:
        self.model, self.finding, self.method, self.settings = model, finding, method, settings
        self.counts, self.outputs = counts, "restore" if method.where == "input" else outputs
        self.blocks, self.protected = finding.blocks, finding.leading
        self.first = next(i for i, c in enumerate(counts) if c)
        self.insisted = settings.insist and any(_places(b) for b in self.blocks[self.first :])
        self.state = _State(finding.tokens or 0)
        self.b = Builder(model, _batch(finding.blocks[0].x_in))
        _check(model, finding, method, settings, self.first)

    def run(self) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        if self.method.where == "module":
            return self._run_modules()
        last = self.blocks[-1]
        end = last.x_out or last.x_attn
        stream = follow(self.model.graph, self._sites(), end, self.protected, through=self.method.where != "input")
        self._check_sinks(stream)
        self.need_origin = any(s.kind in ("restore", "shape") or self._restores(s) for s in stream.sinks)
        release_baked_counts(stream, self.state.tokens)
        if not self.insisted:
            self._start_padding()
        for index in range(self.first, len(self.blocks)):
            self._block(index, stream)
        if self.insisted:
            self.b.scope = f"{self.method.name}/places"
            follow_places(self.b, stream, self.state.kepts, self.finding.tokens or 0)
        restored, added = self._serve(stream)
        self.b.finish()
        shapes_again(self.model, [*stream.segments], self._expected())
        return restored, added, len(self.b.nodes)

    def _run_modules(self) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        touched: list[ir.Value] = []
        for index, count in enumerate(self.counts):
            if count:
                self.b.scope = f"{self.method.name}/{index}"
                block = self.blocks[index]
                site = self._site(block, block.x_in, self.state.tokens)
                touched += emit_module(self.b, self.model.graph, block, site, count, self.method, self.settings)
        self.b.finish()
        shapes_again(self.model, touched, {})
        return (), (), len(self.b.nodes)

    # -- the blocks --------------------------------------------------------------------------------------------

    def _sites(self) -> list[ir.Value]:
        return [self._place(b) for b, count in zip(self.blocks, self.counts, strict=True) if count]

    def _place(self, block: Block) -> ir.Value:
        return block.x_in if self.method.where == "input" else block.x_attn

    def _block(self, index: int, stream: Stream) -> None:
        block, count = self.blocks[index], self.counts[index]
        self.b.scope = f"{self.method.name}/{index}"
        before = self.method.where == "input"
        if count and before:
            self._reduce(block, count, stream)
        if self.state.tokens != self.finding.tokens:
            self._bias(block)
        if count and not before:
            self._reduce(block, count, stream)

    def _site(self, block: Block, x: ir.Value, tokens: int) -> Site:
        batch = self.b.batch
        set_dims(x, [batch, tokens, block.width])
        k, probs = None, None
        if "k" in self.method.needs and block.k is not None:
            h, d = block.heads, block.head_dim
            k = block.k
            set_dims(k, {"BHND": [batch, h, tokens, d], "BNHD": [batch, tokens, h, d],
                         "BHDN": [batch, h, d, tokens], "BNC": [batch, tokens, h * d]}[block.k_layout])  # fmt: skip
        if "probs" in self.method.needs and block.probs is not None:
            probs = block.probs
            set_dims(probs, [batch, block.heads, tokens, tokens])
        return Site(
            x, k, probs, self.state.size, self.state.padded, tokens, self.protected, block.index, len(self.blocks),
            self.finding.grid, block.heads, block.k_layout,
        )  # fmt: skip

    def _reduce(self, block: Block, count: int, stream: Stream) -> None:
        state, b = self.state, self.b
        x = self._place(block)
        uses = [(n, i) for n, i in x.uses() if n in stream.inside]
        site = self._site(block, x, state.tokens)
        done = self.method.emit(b, site, count, self.settings)
        if self.method.kind == "merge":
            y, size = core.emit_merge(b, x, state.size, done, padded=state.padded)
        elif self.method.kind == "transform":
            y, size = core.emit_transform(b, x, state.size, done, self.protected)
        else:
            y, kept_size = core.emit_select(b, x, state.size, done)
            size = kept_size  # type: ignore[assignment]
        for node, index in uses:
            node.replace_input_with(index, y)
        if self.need_origin:
            self._follow_origin(done)
        if (self.outputs == "reduced" or self.insisted) and done.kept is not None:
            state.kept = done.kept if state.kept is None else b.take(state.kept, done.kept)
        state.tokens, state.size = done.outputs, size
        state.sizes.append(size)
        state.kepts.append(state.kept)

    def _follow_origin(self, done: Emitted) -> None:
        b, state = self.b, self.state
        before = state.origin[-1]
        if self.method.kind == "transform":
            if done.restore is None:
                raise ValueError(f"{self.method.name} gives no way back")
            state.origin.append(done.restore if before is None else b.matmul(before, done.restore))
        else:
            state.origin.append(core.emit_origin(b, done, state.tokens, before))

    def _bias(self, block: Block) -> None:
        """Let this block's attention know how much each key weighs, and which are padding."""
        state, b = self.state, self.b
        if state.size is None:
            return
        bias = core.emit_bias(b, state.size, prop=self.method.prop_attn(self.settings), padded=state.padded)
        if bias is None or block.logits is None:
            return
        if block.mask is not None and not self.insisted:
            node, index = _mask_use(block)
            node.replace_input_with(index, bias)
            return
        uses = [(n, i) for n, i in block.logits.uses() if n is block.anchor]
        shape: list[Dim] = [b.batch, block.heads, state.tokens, state.tokens]
        total = b.op("Add", [block.logits, bias], shape)
        for node, index in uses:
            node.replace_input_with(index, total)

    def _start_padding(self) -> None:
        """Sizes of zero for padding rows, read from the first reduced block's mask."""
        block = self.blocks[self.first]
        if block.mask is None:
            return
        b = self.b
        b.scope = f"{self.method.name}/mask"
        mask = block.mask
        if mask.shape is None or len(mask.shape) != 4:
            raise UnsupportedError(
                f"the attention mask {mask.name} does not have the form [B,1,1,N]",
                where=block.name,
                next="clean the graph up first (leave --no-cleanup out)",
            )
        shape = dims(mask)
        if shape[2] != 1:
            mask = b.slice(mask, 2, 0, 1)
        row = b.op("Squeeze", [mask, b.const([1, 2])], [shape[0], self.state.tokens], mask.dtype or FLOAT)
        if mask.dtype == ir.DataType.BOOL:
            real = b.cast(row if block.mask_keeps else b.op("Not", [row], dims(row), ir.DataType.BOOL), FLOAT)
        else:
            real = b.cast(b.binary("Greater", row, -100.0), FLOAT)
        if self.protected:
            keep = np.zeros((1, self.state.tokens), np.float32)
            keep[:, : self.protected] = 1
            real = b.binary("Max", real, keep)
        self.state.size, self.state.padded = real, True
        self.state.sizes[0] = real

    # -- everything that reads the stream besides the blocks -----------------------------------------------------

    def _restores(self, sink: Sink) -> bool:
        if sink.kind == "mean":
            return self.method.kind != "prune" and self.blocks[self.first].mask is not None
        return sink.kind == "output" and self.outputs != "reduced"

    def _check_sinks(self, stream: Stream) -> None:
        if self.method.kind != "prune":
            return
        for sink in stream.sinks:
            if sink.kind == "restore" or self._restores(sink):
                reader = (
                    "an output of the graph" if sink.node is None else f"node {sink.node.name} ({sink.node.op_type})"
                )
                raise UnsupportedError(
                    f"{self.method.name} drops tokens, but {reader} reads every token",
                    where=sink.value.name,
                    next="give --outputs reduced, or a method that merges (tome, pitome, token_transforming)",
                )

    def _serve(self, stream: Stream) -> tuple[tuple[str, ...], tuple[str, ...]]:
        self.b.scope = f"{self.method.name}/restore"
        full: dict[ir.Value, ir.Value] = {}
        restored: list[str] = []
        added: list[str] = []
        for sink in stream.sinks:
            if sink.kind == "protected":
                continue
            if sink.kind == "mean" and not self._restores(sink):
                self._weighted_mean(sink)
            elif sink.kind == "output":
                names = restored if self.outputs != "reduced" else added
                names.extend(self._output(sink, full))
            elif self.method.kind == "prune":  # a Shape node: the source's own stream has the source's shape
                self._use(sink, self._sites()[0])
            else:
                self._use(sink, self._full(sink, full))
        return tuple(restored), tuple(added)

    def _use(self, sink: Sink, value: ir.Value) -> None:
        if sink.node is not None:
            sink.node.replace_input_with(sink.index, value)

    def _full(self, sink: Sink, known: dict[ir.Value, ir.Value]) -> ir.Value:
        """The value at full resolution."""
        value, b = sink.value, self.b
        if value not in known:
            origin = self.state.origin[sink.segment]
            if origin is None:
                raise UnsupportedError("this output cannot be restored", where=value.name)
            rows = self._rows_at(sink.segment)
            rest: list[Dim] = (
                dims(value)[2:] if value.shape is not None and len(value.shape) > 2 else [self.blocks[0].width]
            )
            set_dims(value, [b.batch, rows, *rest])
            if self.method.kind == "transform":
                soft = b.matmul(origin, b.slice(value, 1, self.protected, rows))
                head = [b.slice(value, 1, 0, self.protected)] if self.protected else []
                known[value] = b.concat([*head, soft], 1)
            else:
                known[value] = b.rows(value, origin)
        return known[value]

    def _rows_at(self, segment: int) -> int:
        return (self.finding.tokens or 0) - sum([c for c in self.counts if c][:segment])

    def _output(self, sink: Sink, full: dict[ir.Value, ir.Value]) -> list[str]:
        """Serve a per-token output; returns the names restored or added."""
        graph, name = self.model.graph, str(sink.value.name)
        if self.outputs == "reduced":
            set_dims(sink.value, [self.b.batch, self._rows_at(sink.segment), *dims(sink.value)[2:]])
            return self._tell_rows(sink, name)
        value = self._full(sink, full)
        sink.value.name, value.name = self.b.fresh("reduced"), name
        value.doc_string, value.type = sink.value.doc_string, sink.value.type
        graph.outputs[sink.index] = value
        return [name]

    def _tell_rows(self, sink: Sink, name: str) -> list[str]:
        added = []
        kept, size = self.state.kepts[sink.segment], self.state.sizes[sink.segment]
        extra = {".kept": kept, ".size": size if self.method.kind != "prune" else None}
        for suffix, value in extra.items():
            if value is not None:
                copy = self.b.op("Identity", [value], dims(value), value.dtype or INT64)
                copy.name = name + suffix
                self.model.graph.outputs.append(copy)
                added.append(name + suffix)
        return added

    def _weighted_mean(self, sink: Sink) -> None:
        """sum(size*y)/sum(size) instead of the plain mean; the plain mean of the survivors after pruning."""
        size, node, b = self.state.sizes[sink.segment], sink.node, self.b
        if self.method.kind == "prune" or size is None or node is None:
            return
        weight = b.binary("Div", size, b.reduce("ReduceSum", size, 1, keep=True))
        rows, width = self._rows_at(sink.segment), dims(sink.value)[-1]
        set_dims(sink.value, [b.batch, rows, width])
        mean = b.matmul(b.unsqueeze(weight, 1), sink.value)
        if _keepdims(node) == 0:
            mean = b.op("Squeeze", [mean, b.const([1])], [b.batch, width])
        old = node.outputs[0]
        mean.name, old.name = old.name, b.fresh("replaced")
        old.replace_all_uses_with(mean, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)

    def _expected(self) -> dict[ir.Value, int]:
        """Width of the token axis that inference must find at the end of each block."""
        left = tokens_per_layer(self.counts, self.finding.tokens or 0, where=self.method.where)
        return {block.x_out: n for block, n in zip(self.blocks, left, strict=True) if block.x_out is not None}


def _places(block: Block) -> bool:
    """Whether something in the block is laid out by source place."""
    return bool(block.hazards) or block.mask_kind in ("causal", "full")


def _keepdims(node: ir.Node) -> int:
    attribute = node.attributes.get("keepdims")
    return 1 if attribute is None else attribute.as_int()


def _batch(x: ir.Value) -> Dim:
    if x.shape is None or len(x.shape) != 3:
        return "batch"
    first = x.shape[0]
    return first if isinstance(first, int) else (first.value or "batch")


def _mask_use(block: Block) -> tuple[ir.Node, int]:
    """The Add by which the mask enters this block's logits.

    Raises:
        UnsupportedError: it enters in another way.
    """
    value = block.logits
    for _ in range(6):
        node = None if value is None else value.producer()
        if node is None:
            break
        if node.op_type == "Add":
            for index, operand in enumerate(node.inputs):
                if operand is block.mask:
                    return node, index
        value = next((v for v in node.inputs if v is not None and const(v) is None and v is not block.mask), None)
    raise UnsupportedError(
        "the attention mask does not enter by one Add",
        where=block.name,
        next="clean the graph up first (leave --no-cleanup out)",
    )


def _check(model: ir.Model, finding: Finding, method: Method, settings: Settings, first: int) -> None:
    """Refuse what cannot be done, before anything is changed."""
    opset = model.opset_imports.get("", 0)
    if opset < 18:
        raise UnsupportedError(
            f"reducing tokens needs opset 18, the graph has {opset}", next="clean the graph up first"
        )
    reader_blocks = finding.blocks[first:]
    for block in reader_blocks:
        if block.hazards and not settings.insist:
            raise UnsupportedError(
                f"tokens of this block cannot be moved safely: {', '.join(block.hazards)}",
                where=block.name,
                next="leave --reduce out, or insist=true in its settings to try all the same",
            )
        if block.mask_kind in ("causal", "full") and not settings.insist:
            raise UnsupportedError(
                f"the attention mask is {block.mask_kind}; tokens under it must not mix", where=block.name
            )
        if block.logits is None:
            raise UnsupportedError(
                f"the attention of this block is inside {block.fused_op or 'one node'}",
                where=block.name,
                next="clean the graph up first: it opens fused attention",
            )
        if block.x_attn.dtype not in (FLOAT, None):
            raise UnsupportedError(
                f"tokens are {block.x_attn.dtype}, expected float32",
                where=block.name,
                next="reduce before lowering precision",
            )
    if "grid" in method.needs and finding.grid is None:
        raise UnsupportedError(f"{method.name} needs a grid of tokens, and none was found", next="use tome or pitome")
