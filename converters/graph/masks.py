"""What a mask means, judged by its shape and, where it can be computed, by its contents."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.trace import Trace, graph_inputs, trace
from edgetok.converters.graph.walk import Reader

HIDDEN = -1e3  # an additive entry below this hides the key; real biases are far smaller


class MaskReader:
    """Masks of one graph under two feeds: nothing padded, and the last positions padded."""

    def __init__(self, reader: Reader, sizes: dict[str, tuple[int, ...]]) -> None:
        self.reader = reader
        self.sizes = sizes
        self._traces: dict[bool, Trace] = {}

    def contents(self, value: ir.Value, padded: bool) -> np.ndarray | None:
        """The mask's array when every integer input is one (and masks end in zeros when padded)."""
        if value not in self.reader.trace.varies:
            return self.reader.trace.data.get(value)
        if padded not in self._traces:
            self._traces[padded] = trace(self.reader.model, self.sizes, self._feeds(padded))
        return self._traces[padded].data.get(value)

    def _feeds(self, padded: bool) -> dict[str, np.ndarray]:
        feeds = {}
        for value in graph_inputs(self.reader.model.graph):
            shape = self.sizes.get(value.name or "")
            if shape is None or value.dtype is None or len(shape) not in (1, 2):
                continue
            is_mask = "mask" in (value.name or "").lower()
            if value.dtype.is_floating_point() and not is_mask:
                continue
            array = np.ones(shape, dtype=value.dtype.numpy())
            if padded and is_mask and shape[-1] > 2:
                array[..., -2:] = 0
            feeds[value.name or ""] = array
        return feeds

    def kind(self, value: ir.Value, how: str, heads: int, batch: int) -> str:
        """Class of one term.

        Args:
            value: what is added to the scores or chooses among them, [.., 1 or H, 1 or N, N].
            how: "add", "sub", "scaled-add", "keep" or "hide".
            heads: H.
            batch: B at the traced sizes; biases may come as [B*H,N,N].

        Returns:
            "none", "key-padding", "causal", "full", "windowed" or "relative-bias".
        """
        shape = self.reader.shape(value)
        if shape is None:
            return "full"
        if len(shape) >= 3 and heads > 1 and (shape[-3] == heads or (len(shape) == 3 and shape[0] == heads * batch)):
            return "relative-bias"
        rows = shape[-2] if len(shape) > 1 else 1
        plain = self.contents(value, padded=False)
        if plain is not None and len(shape) >= 3 and shape[0] > 1 and bool((plain != plain[:1]).any()):
            return "windowed"  # nothing is padded and yet it differs along the batch: one mask per window
        if plain is None:
            return "key-padding" if rows == 1 else "full"
        seen = _visible(plain, how)
        if seen is None:
            return "relative-bias"
        if rows == 1:
            return "none" if value not in self.reader.trace.varies and bool(seen.all()) else "key-padding"
        return self._square(value, how, seen)

    def _square(self, value: ir.Value, how: str, seen: np.ndarray) -> str:
        upper = np.triu(np.ones(seen.shape[-2:], dtype=bool), k=1)
        if upper.any() and not seen[..., upper].any() and seen[..., ~upper].all():
            return "causal"
        if not seen.all():
            return "causal" if upper.any() and not seen[..., upper].any() else "full"
        if value not in self.reader.trace.varies:
            return "none"
        padded = self.contents(value, padded=True)
        hidden = None if padded is None else _visible(padded, how)
        if hidden is None:
            return "full"
        return "key-padding" if bool((hidden == hidden[..., :1, :]).all()) else "full"


def _visible(mask: np.ndarray, how: str) -> np.ndarray | None:
    """Which keys are visible, as booleans; None when the numbers are a bias and not a mask."""
    if how in ("keep", "hide") or mask.dtype == bool:
        return mask.astype(bool) if how != "hide" else ~mask.astype(bool)
    values = -mask if how == "sub" else mask
    hidden = np.isneginf(values) | (values < HIDDEN)
    return ~hidden if bool((hidden | (np.abs(values) < 1e-6)).all()) else None
