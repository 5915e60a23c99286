"""Attention on numpy or DLPack arrays: dense and block-sparse, float and INT8.

``O[i] = sum_j p[i, j] V[j]``, ``p = softmax_j(scale Q[i].K[j] + bias[j])`` over the keys that row i may see. Arrays are
read where they lie: any order of axes does (transpose a [B, N, H, d] array), as long as the last axis is dense.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels import attend_inputs as given
from edgetok.kernels.attend_inputs import DEFAULT, Attended, AttentionOptions
from edgetok.kernels.index.blocks import BlockIndex, block_count
from edgetok.native import attn as native
from edgetok.native.tensors import numpy_from

Compute = Literal["fp32", "int8", "int8_float_pv"]


def block_index(mask: Any, n: int, m: int, causal: bool = False) -> BlockIndex:
    """The index of a block mask.

    Args:
        mask: bool [B or 1, H or 1, ceil(N/64), ceil(M/64)], leading axes may be absent; True = compute.
        n: query tokens.
        m: key tokens.
        causal: the tiles are also cut at the causal edge.

    Raises:
        InputError: another dtype or shape.
    """
    from edgetok.native.index import Csr

    array = numpy_from(mask, "block_mask")
    want = (block_count(n), block_count(m))
    if array.dtype != np.bool_ or not 2 <= array.ndim <= 4 or array.shape[-2:] != want:
        raise InputError(
            f"block_mask is {array.dtype} {array.shape}, expected bool [B or 1, H or 1, {want[0]}, {want[1]}]",
            next="one entry for each 64 x 64 tokens",
        )
    batch, heads = (1, 1, *array.shape[:-2])[-2:]
    rows = array.reshape(batch * heads * want[0], want[1])
    col = np.nonzero(rows)[1].astype(np.int32)
    row_ptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.count_nonzero(rows, axis=1), out=row_ptr[1:])
    none = np.empty((0, 64), np.uint64)
    # Every tile is held against the causal edge and the ends of the sequences anyway, so kind is 1 throughout.
    csr = Csr(row_ptr, col, np.ones(len(col), np.uint8), none, np.full(len(col), -1, np.int32))
    return BlockIndex(csr, n, m, batch, heads, causal)


def attention_outputs(
    q: Any,
    k: Any,
    v: Any,
    *,
    compute: Compute = "int8",
    causal: bool = False,
    block_mask: Any = None,
    index: BlockIndex | None = None,
    window: int | tuple[int, int] | None = None,
    sink: int = 0,
    scale: float | None = None,
    key_bias: Any = None,
    softcap: float = 0.0,
    threads: int = 1,
    lse: bool = True,
    column_mass: Literal["query", "key"] | None = None,
    score_rows: int = 0,
    options: AttentionOptions = DEFAULT,
    out: np.ndarray | None = None,
) -> Attended:
    """Attend, and return more than the output.

    Args:
        lse: the logarithm of each row's sum, for merging (:func:`merge_attention`).
        column_mass: how much each key was attended to, per ``"query"`` head or summed per ``"key"`` head.
        score_rows: logits of this many last rows.
        q, k, v, compute, causal, block_mask, index, window, sink, scale, key_bias, softcap, threads, options, out: as
            in :func:`attention`.

    Raises:
        InputError: shapes, dtypes, strides or indices that do not fit; the message names the argument.
        UnsupportedError: a combination this version does not offer.
    """
    if block_mask is not None and index is not None:
        raise InputError("block_mask and index were both given", next="pass one of them")
    if column_mass not in (None, "query", "key"):
        raise InputError(f"column_mass is {column_mass!r}, expected 'query', 'key' or None")
    given.check_threads(threads)
    arrays = given.inputs(q, k, v, key_bias, options)
    fields = given.fields(arrays, compute, scale, softcap, options) | given.limits(window, sink)
    tokens = (arrays["q"].shape[-2], arrays["k"].shape[-2])
    if block_mask is not None:
        index = block_index(block_mask, *tokens, causal)
    bsr = given.bsr(index, arrays, fields["batch"], fields["hq"], *tokens)
    if not 0 <= score_rows <= tokens[0]:
        raise InputError(f"score_rows is {score_rows}, expected 0 to {tokens[0]}")
    fields["mask_kind"] = given.mask_kind(causal, window, bsr, options.gather)
    fields["flags"] = given.flags(options, lse, column_mass, score_rows)
    given.outputs(arrays, out, lse, column_mass, score_rows)
    notes = native.run(fields, arrays, bsr, score_rows, threads)
    found = (arrays["o"], arrays.get("lse"), arrays.get("colmass"), arrays.get("scores"))
    return Attended(*found, nonfinite=notes == native.NOTE_NONFINITE, empty_rows=notes == native.NOTE_EMPTY_ROWS)


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    compute: Compute = "int8",
    causal: bool = False,
    block_mask: Any = None,
    index: BlockIndex | None = None,
    window: int | tuple[int, int] | None = None,
    sink: int = 0,
    scale: float | None = None,
    key_bias: Any = None,
    softcap: float = 0.0,
    threads: int = 1,
    return_lse: bool = False,
    options: AttentionOptions = DEFAULT,
    out: np.ndarray | None = None,
) -> Any:
    """Attend: softmax(scale Q K^T + bias) V, in INT8 unless asked otherwise.

    Args:
        q: float32 or float16 [B, H, N, d]; packed sequences: [tokens, H, d] with options.cu_q. d, dv at most 1024.
        k: [B, Hkv, M, d]; H is a multiple of Hkv, query head h reads key head h // (H / Hkv).
        v: [B, Hkv, M, dv].
        compute: ``int8`` (QK and PV in INT8, table softmax), ``int8_float_pv`` (only QK in INT8) or ``fp32``.
        causal: key j is seen by query i when j <= i + (M - N).
        block_mask: bool [B or 1, H or 1, ceil(N/64), ceil(M/64)], True = compute; leading axes may be absent. Blocks
            are cut at the causal edge and the window where those are given too.
        index: the same as a :class:`BlockIndex`, with bits, variable blocks and row orders.
        window: keys this far to the left and right of a query's position, one number or (left, right).
        sink: with a window: the first keys, seen by all.
        scale: of the logits; None = 1 / sqrt(d).
        key_bias: float32 [B or 1, H or 1, M], added to the logits; -inf hides a key. Packed: [tokens, H or 1].
        softcap: c > 0 turns a logit s into c tanh(s / c).
        threads: 1..256; the result does not depend on it.
        return_lse: also the natural log of each row's sum, float32 [B, H, N] (packed: [tokens, H]).
        options: rarer inputs and switches.
        out: float32 array to write to.

    Returns:
        float32 [B, H, N, dv] (packed: [tokens, H, dv]), and lse when asked. Rows that see no key are 0.

    Raises:
        InputError: shapes, dtypes, strides or indices that do not fit.
        UnsupportedError: a combination this version does not offer.

    Source: block-wise online softmax of FlashAttention; INT8 with K smoothing of SageAttention; P is u8 against the
        maximum of its tile, so that attention sinks do not push other keys under the smallest code.

    Example:
        >>> import numpy as np
        >>> from edgetok.kernels import attention
        >>> x = np.random.default_rng(0).normal(size=(1, 2, 5, 16)).astype(np.float32)
        >>> attention(x, x, x, causal=True).shape
        (1, 2, 5, 16)
    """
    done = attention_outputs(
        q, k, v, compute=compute, causal=causal, block_mask=block_mask, index=index, window=window, sink=sink,
        scale=scale, key_bias=key_bias, softcap=softcap, threads=threads, lse=return_lse, options=options, out=out,
    )  # fmt: skip
    return (done.o, done.lse) if done.lse is not None else done.o


def column_masses(
    q: Any,
    k: Any,
    *,
    row_weight: Any = None,
    temperature: float = 1.0,
    seed: int = 0,
    layer: int = 0,
    sum_group: bool = False,
    compute: Compute = "int8",
    causal: bool = False,
    scale: float | None = None,
    threads: int = 1,
    options: AttentionOptions = DEFAULT,
) -> np.ndarray:
    """How much each key is attended to, weighted by row: sum_i w[i] mean over heads of softmax((s[i] + noise) / T).

    Args:
        q: float32 or float16 [B, H, N, d].
        k: [B, Hkv, M, d].
        row_weight: float32 [N]; None = 1.
        temperature: T > 0.
        seed: 0 = no noise, else Gumbel noise keyed by (seed, layer, head, query position, key position).
        layer: of the key of the noise.
        sum_group: sum over the query heads of a key head instead of their mean.
        compute, causal, scale, threads, options: as in :func:`attention`.

    Returns:
        float32 [B, Hkv, M].

    Raises:
        InputError: shapes, dtypes or parameters that do not fit.
    """
    arrays = given.inputs(q, k, k, None, options)
    fields = given.fields(arrays, compute, scale, 0.0, options)
    del arrays["v"]
    fields["mask_kind"] = given.mask_kind(causal, None, None, options.gather)
    fields["flags"] = given.flags(options, False, "key", 0)
    weight = None if row_weight is None else np.ascontiguousarray(numpy_from(row_weight, "row_weight"), np.float32)
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}, expected more than 0")
    k_array = arrays["k"]
    out = np.empty(k_array.shape[:3], np.float32)
    native.colmass(
        fields, arrays, out, weight, None, threads, temperature=temperature, seed=seed, layer=layer, sum_group=sum_group
    )
    return out


def merge_attention(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge attention over disjoint sets of keys.

    Args:
        parts: 1 to 256 of (o float32 [B, H, N, dv], lse float32 [B, H, N]).

    Returns:
        (o, lse) over the union of the keys.

    Raises:
        InputError: no parts, or shapes that differ.
    """
    if not parts:
        raise InputError("nothing to merge", next="pass at least one (o, lse)")
    o, lse = np.empty(parts[0][0].shape, np.float32), np.empty(parts[0][1].shape, np.float32)
    native.merge([p[0] for p in parts], [p[1] for p in parts], o, lse)
    return o, lse
