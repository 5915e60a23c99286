"""What a reduction method is: settings, a numpy law that returns a ``Plan``, and the same law as ONNX nodes.

A method file shows only its method: ``plan`` decides in numpy which rows go where, ``emit`` writes nodes that decide
the same thing at run time. Applying a decision, carrying sizes and origins, masks, restoring and reporting is done
once, in ``core`` and ``apply``.

Axes: B batch, H heads, N tokens before and M after, R removed, D width, Dh head width, P protected leading rows.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.cost import macs
from edgetok.converters.reduce._builder import Builder
from edgetok.errors import ArtifactError, InputError


@dataclass(frozen=True)
class Settings:
    """What every method takes.

    Args:
        layers: blocks (from 0) that may reduce; None means all.
        removed: share of tokens to remove over the whole network (decision 24), 0 to below 1; overrides counts.
        schedule: how the removed tokens are spread over the layers, a name of ``schedule.SHAPES``.
        insist: go on where the block finder warns (relative bias, rope, ...).
    """

    layers: tuple[int, ...] | None = None
    removed: float | None = None
    schedule: str = ""
    insist: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise InputError("layers: give block numbers from 0, as 1-11 or 3+6+9")
        if self.removed is not None:
            check_range("removed", self.removed, 0.0, 1.0, open_end=True)

    def allowed(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


def check_range(name: str, value: float, low: float, high: float, *, open_end: bool = False) -> None:
    """Raise InputError unless low <= value <= high (or < high); written so that NaN fails."""
    fine = low <= value < high if open_end else low <= value <= high
    if not fine:
        bracket = ")" if open_end else "]"
        raise InputError(f"{name}={value} is outside [{low:g}, {high:g}{bracket}")


@dataclass(frozen=True, eq=False)
class TokenView:
    """What a law may look at, in numpy.

    Args:
        x: residual stream [B,N,D].
        k: keys [B,H,N,Dh].
        probs: attention probabilities [B,H,N,N], or None.
        size: [B,N,1], how many source tokens each row stands for; 0 for padding rows.
        protected: leading rows that never move.
        layer, layers: which block of how many.
        grid: (rows, columns) of the unprotected tokens, or None.
    """

    x: np.ndarray
    k: np.ndarray
    probs: np.ndarray | None
    size: np.ndarray
    protected: int
    layer: int = 0
    layers: int = 1
    grid: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        return int(self.x.shape[1])

    @property
    def pad(self) -> np.ndarray:
        """float32 [B,N], 1 for padding rows."""
        return (self.size[..., 0] <= 1e-6).astype(np.float32)

    def one(self, b: int) -> TokenView:
        """The same for one sample."""
        s = slice(b, b + 1)
        probs = None if self.probs is None else self.probs[s]
        return TokenView(self.x[s], self.k[s], probs, self.size[s], self.protected, self.layer, self.layers, self.grid)


@dataclass(frozen=True, eq=False)
class Plan:
    """One layer's decision, as data.

    Args:
        kind: "merge" (removed rows live on in others), "prune" (they are gone), "transform" (dense weights).
        tokens: N.
        protected: P.
        kept: int64 [B,M], the input row behind each output row, in output order (empty for cluster centres).
        removed: int64 [B,R].
        target: int64 [B,R], the *output* row each removed row went into; [B,0] for "prune" and "transform".
        assign: float32 [B,N,M] or None; row n says how token n spreads over the outputs, rows sum to one.
        restore: float32 [B,N,M] or None; rows sum to one; how outputs make up the input rows again.
    """

    kind: str
    tokens: int
    protected: int
    kept: np.ndarray
    removed: np.ndarray
    target: np.ndarray
    assign: np.ndarray | None = None
    restore: np.ndarray | None = None

    @property
    def outputs(self) -> int:
        """M."""
        return int(self.assign.shape[2] if self.assign is not None else self.kept.shape[1])

    def origin(self) -> np.ndarray:
        """int64 [B,N]: the output row each input row is now part of (merge only; -1 where pruned)."""
        rows = np.full((self.kept.shape[0], self.tokens), -1, np.int64)
        np.put_along_axis(rows, self.kept, np.broadcast_to(np.arange(self.kept.shape[1]), self.kept.shape), 1)
        if self.kind == "merge":
            np.put_along_axis(rows, self.removed, self.target, 1)
        return rows

    def save(self) -> bytes:
        """The plan as npz bytes, without pickle."""
        arrays = {n: getattr(self, n) for n in ("kept", "removed", "target", "assign", "restore")}
        buffer = io.BytesIO()
        head = {"kind": np.array(self.kind), "tokens": np.array(self.tokens), "protected": np.array(self.protected)}
        np.savez(buffer, allow_pickle=False, **head, **{n: a for n, a in arrays.items() if a is not None})
        return buffer.getvalue()

    @staticmethod
    def load(data: bytes) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: not a plan.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as f:
                get = {n: f[n] for n in f.files}
            return Plan(
                str(get["kind"]), int(get["tokens"]), int(get["protected"]),
                get["kept"], get["removed"], get["target"], get.get("assign"), get.get("restore"),
            )  # fmt: skip
        except (ValueError, KeyError, OSError, EOFError) as exc:
            raise ArtifactError("not a saved reduction plan") from exc


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the graph where a method writes its nodes; the graph's side of ``TokenView``.

    Args:
        x: [B,N,D]. k: keys with axes as ``k_layout`` says. probs: [B,H,N,N] or None.
        heads: H.
        size: float [B,N], or None while every token stands for itself.
        padded: rows with size 0 are padding; False when there can be none.
        tokens, protected, layer, layers, grid: as in ``TokenView``.
    """

    x: ir.Value
    k: ir.Value | None
    probs: ir.Value | None
    size: ir.Value | None
    padded: bool
    tokens: int
    protected: int
    layer: int
    layers: int
    grid: tuple[int, int] | None = None
    heads: int = 1
    k_layout: str = "BHND"

    def pad(self, b: Builder) -> ir.Value | None:
        """float [B,N], 1 for padding rows; None when there are none."""
        if not self.padded or self.size is None:
            return None
        real = b.cast(b.binary("Greater", self.size, 1e-6), ir.DataType.FLOAT)
        return b.op("Sub", [b.const(1.0), real], [b.batch, self.tokens])


@dataclass(frozen=True, eq=False)
class Emitted:
    """A decision as graph values; the graph's side of ``Plan``.

    ``assign`` and ``restore`` are over the unprotected rows only ([B,N-P,M-P]): protected rows pass unchanged.
    """

    kind: str
    outputs: int
    kept: ir.Value | None = None
    removed: ir.Value | None = None
    target: ir.Value | None = None
    assign: ir.Value | None = None
    restore: ir.Value | None = None


@dataclass(frozen=True)
class Counts:
    """Tokens removed by each layer, and what had to be changed to make that possible.

    Args:
        removed: one number per block.
        notes: a sentence per clamp.
    """

    removed: tuple[int, ...]
    notes: tuple[str, ...] = ()


class Method(ABC):
    """One reduction method.

    Class attributes:
        name: the file's name.
        settings: the frozen dataclass of its settings.
        kind: "merge", "prune" or "transform".
        where: "attn" (after the attention residual, before the MLP), "input" (in front of a block) or
            "module" (inside a block: merged before attention or MLP and unmerged right after).
        needs: of "k", "probs", "grid".
        prop_attn: settings attribute that switches proportional attention, or "" for never.
        max_share: the largest share of the unprotected tokens one layer can remove.
        shape: the schedule shape used when a removed share is asked for and no shape.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Settings]]
    kind: ClassVar[str]
    where: ClassVar[str] = "attn"
    needs: ClassVar[frozenset[str]] = frozenset({"k"})
    max_share: ClassVar[Fraction] = Fraction(1, 2)
    shape: ClassVar[str] = "increasing"

    def prop_attn(self, settings: Settings) -> bool:
        """Whether later layers add log(size) to their logits."""
        return bool(getattr(settings, "prop_attn", False))

    def limit(self, tokens: int, protected: int) -> int:
        """The most tokens one layer can remove, with at least one unprotected token left."""
        free = tokens - protected
        return max(0, min(int(free * self.max_share), free - 1))

    def macs(self, settings: Settings, counts: Sequence[int], tokens: int, width: int) -> int:
        """Multiply-accumulates of all blocks, without what the matching itself costs."""
        total, left = 0, tokens
        for count in counts:
            after = left - count
            total += macs(after if self.where == "input" else left, after, width)
            left = after
        return total

    def tokens_in_mlp(self, settings: Settings, counts: Sequence[int], tokens: int) -> tuple[int, ...]:
        """Tokens entering the MLP of each block, what decision 24 counts."""
        return tuple(tokens - sum(counts[: i + 1]) for i in range(len(counts)))

    @abstractmethod
    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        """Tokens removed per layer, from the method's own settings (``removed`` is handled by the caller)."""

    def share(self, settings: Settings, removed: float, tokens: int, protected: int, layers: int) -> Counts | None:
        """Counts for a removed share, where a method spreads them in its own way; None to use a schedule shape."""
        return None

    @abstractmethod
    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        """Decide which ``count`` tokens go, in numpy: the law."""

    @abstractmethod
    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        """Write nodes that decide the same."""


def clamp(wanted: Sequence[int], tokens: int, protected: int, method: Method) -> Counts:
    """Cut a list of counts to what is possible, saying so."""
    removed, notes = [], []
    for layer, count in enumerate(wanted):
        most = method.limit(tokens, protected)
        if count > most:
            notes.append(
                f"layer {layer}: {count} of {tokens} tokens asked for, {most} is the most {method.name} can remove"
            )
        removed.append(max(0, min(count, most)))
        if method.where != "module":
            tokens -= removed[-1]
    return Counts(tuple(removed), tuple(notes))


def per_layer(values: Sequence[int], settings: Settings, layers: int) -> list[int]:
    """One number for all allowed layers, or a list per block (a short one is padded with zeros).

    Raises:
        InputError: more numbers than blocks.
    """
    if len(values) > layers:
        raise InputError(f"{len(values)} counts given, but the model has {layers} blocks")
    filled = list(values) * layers if len(values) == 1 else [*values, *[0] * (layers - len(values))]
    return [v if settings.allowed(i) else 0 for i, v in enumerate(filled)]


def kept_count(tokens: int, ratio: float) -> int:
    """tokens - floor(tokens - tokens*ratio), in exact arithmetic on the decimal the user wrote."""
    exact = Fraction(repr(ratio)) if not isinstance(ratio, int) else Fraction(ratio)
    return tokens - int(tokens - tokens * exact)
