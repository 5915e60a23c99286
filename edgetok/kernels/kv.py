"""A paged KV cache and attention over it: INT8, INT4 or f16 pages of 64 tokens, the last ones also in f16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.native import attn
from edgetok.native import kv as native_kv
from edgetok.native import select as native_select
from edgetok.native.pool import pool
from edgetok.native.tensors import numpy_from

PAGE = 64
_BITS = {"int8": 8, "int4": 4, "f16": 16}


@dataclass(frozen=True)
class KVMemory:
    """Bytes of a cache, counted in allocated pages whether their slots are live or not.

    Args:
        reserved: the whole arena; memory is committed when a page is first used.
        pages: pages in use, a page shared by forks counted once.
        tail: f16 copies of the last pages, for all sequences.
        tables: block tables, positions, live masks, means of K, scratch.
        used_pages: pages in use, of one layer and head each.
        free_pages: pages left.
        tokens: slots in use over all layers, sequences and heads.
        live: of them, not evicted.
    """

    reserved: int
    pages: int
    tail: int
    tables: int
    used_pages: int
    free_pages: int
    tokens: int
    live: int

    @property
    def total(self) -> int:
        """Bytes in use: pages, tail and tables."""
        return self.pages + self.tail + self.tables


@dataclass(frozen=True)
class CacheOutputs:
    """What ``KVCache.attend`` returns beside the output, as asked for.

    Args:
        o: float32 [B, Hq, N, dv].
        lse: float32 [B, Hq, N], natural logarithm; -inf for a row without a key.
        scores: float32 [B, Hq, score_rows, M] logits of the last rows by slot, -inf where masked; or None.
        mass: float32 [B, Hkv, M] sums of the probabilities over rows and the heads of a group; or None.
    """

    o: np.ndarray
    lse: np.ndarray
    scores: np.ndarray | None = None
    mass: np.ndarray | None = None


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


class KVCache:
    """Keys and values of ``batch`` sequences in ``layers`` layers.

    A query reads the page of its own token from f16 and every earlier page quantized. Results are bit for bit the same
    however tokens are cut into calls and whatever the thread count.

    Args:
        layers, batch, hkv, d, dv: layers, sequences, KV heads, width of K and of V (default d), 1..1024.
        kind: ``int8``, ``int4`` or ``f16``.
        max_tokens: most tokens of one sequence.
        pages: capacity in pages of one layer and head; default room for ``max_tokens`` in every sequence and layer.
        per_token: INT8 with one scale per key instead of one per page, for caches that evict.
        per_head: one block table per KV head, for policies that evict heads apart.
        rotate: rotate K by a Hadamard matrix before quantizing.
        smooth: subtract the mean of the first 64 keys before quantizing.
        tail_pages: f16 pages kept per layer, sequence and head, 1..64; a call of ``attend`` may hold rows of that many
            pages, and truncation within them leaves no trace.
        isa: highest instruction set to use, or None for the best.
        threads: most threads that ``append`` uses.

    Raises:
        InputError: a value out of range.
        UnsupportedError: ``isa`` does not run here, or ``kind`` and ``per_token`` or ``rotate`` do not go together.
        ResourceError: the arena cannot be reserved.

    Source: page and scale layout follow KIVI (K per channel, V per token there; V per channel here) for INT4.

    Example:
        >>> import numpy as np
        >>> cache = KVCache(layers=1, batch=1, hkv=2, d=16, max_tokens=256)
        >>> k = np.ones((2, 3, 16), np.float32)
        >>> cache.append(0, 0, k, 2 * k)
        >>> cache.attend(0, k[None, :, -1:]).o[0, :, 0, :2]
        array([[2., 2.],
               [2., 2.]], dtype=float32)
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        hkv: int,
        d: int,
        max_tokens: int,
        dv: int | None = None,
        kind: str = "int8",
        pages: int | None = None,
        per_token: bool = False,
        per_head: bool = False,
        rotate: bool = False,
        smooth: bool = True,
        tail_pages: int = 2,
        isa: str | None = None,
        threads: int = 1,
    ) -> None:
        if kind not in _BITS:
            raise InputError(f"kind must be one of {', '.join(_BITS)}, got {kind!r}")
        if isa not in native_kv.ISA:
            known = ", ".join(str(name) for name in native_kv.ISA if name)
            raise InputError(f"isa must be one of {known} or None, got {isa!r}")
        layers, batch, hkv = (
            _whole("layers", layers, 1, 4096),
            _whole("batch", batch, 1, 65536),
            _whole("hkv", hkv, 1, 4096),
        )
        max_tokens = _whole("max_tokens", max_tokens, 1, 2**31 - 128)
        if pages is None:
            pages = layers * batch * hkv * (max_tokens // PAGE)
        flags = native_kv.PER_HEAD * per_head | native_kv.ROT_K * rotate | native_kv.NO_SMOOTH_K * (not smooth)
        self._handle = native_kv.Handle(
            native_kv.Desc(
                layers=layers,
                batch=batch,
                hkv=hkv,
                d=_whole("d", d, 1, 1024),
                dv=_whole("dv", d if dv is None else dv, 1, 1024),
                bits=_BITS[kind],
                k_scale=int(per_token),
                tail_pages=_whole("tail_pages", tail_pages, 1, 64),
                pages=_whole("pages", pages, 0, 2**31 - 1),
                max_tokens=max_tokens,
                isa_cap=native_kv.ISA[isa],
                flags=flags,
                threads=_whole("threads", threads, 1, 256),
            )
        )
        self._threads, self._isa = threads, native_kv.ISA[isa]
        self.kind = kind
        self.layers, self.batch, self.hkv, self.max_tokens = layers, batch, hkv, max_tokens
        self.d, self.dv = int(self._handle.cache.desc.d), int(self._handle.cache.desc.dv)
        self.tail_pages = tail_pages

    def _place(self, layer: int, seq: int) -> tuple[int, int]:
        return _whole("layer", layer, 0, self.layers - 1), _whole("seq", seq, 0, self.batch - 1)

    def append(
        self, layer: int, seq: int, k: Any, v: Any, pos: Any = None, *, rope: tuple[Any, Any] | None = None,
        first: int = 0, interleaved: bool = False,
    ) -> None:  # fmt: skip
        """Append N tokens of one sequence in one layer.

        Args:
            layer, seq: where.
            k: float32 or float16 [Hkv, N, d].
            v: float32 or float16 [Hkv, N, dv].
            pos: int32 or int64 [N] ascending positions; default the ones after the last.
            rope: (cos, sin) float32 [P, width / 2] from ``rope_tables``: rotate the keys on their way in, the same as
                ``rope`` before appending without another pass over them. first: position of row 0 of the tables.
            interleaved: pairing, as ``rope``.

        Raises:
            InputError: a shape or dtype, positions that do not ascend, or one without a row in the tables.
            ResourceError: no page is left, or the sequence would pass ``max_tokens``; nothing is appended then.
        """
        layer, seq = self._place(layer, seq)
        k, v = numpy_from(k, "k"), numpy_from(v, "v")
        pos = None if pos is None else numpy_from(pos, "pos")
        if rope is None:
            self._handle.pack(layer, seq, k, v, pos, pool(self._threads))
            return
        cos, sin = numpy_from(rope[0], "cos"), numpy_from(rope[1], "sin")
        self._handle.pack_rope(layer, seq, k, v, pos, cos, sin, first, interleaved, pool(self._threads))

    def attend(
        self,
        layer: int,
        q: Any,
        *,
        seq: int = 0,
        pages: Any = None,
        window: int | None = None,
        sink: int = 0,
        causal: bool = True,
        scale: float = 0.0,
        softcap: float = 0.0,
        compute: str | None = None,
        pos: Any = None,
        score_rows: int = 0,
        mass: bool = False,
        threads: int = 1,
        **extra: Any,
    ) -> CacheOutputs:
        """Attention of queries over the cached tokens, their own included: append first.

        Args:
            layer: which layer.
            q: float32 or float16 [B, Hq, N, d]; row i stands at the position of the i-th of the last N tokens.
            seq: the sequence of batch row 0; the other rows follow it.
            pages: int32 [B, Hkv or 1, n]: read only these pages of each sequence, ascending, -1 = padding.
            window: keys up to this many positions back, beside the first ``sink`` positions.
            sink: see ``window``.
            causal: keys at later positions are hidden.
            scale: of the logits; 0 = 1/sqrt(d).
            softcap: c of c tanh(s / c); 0 = off.
            compute: ``int8``, ``int8_float_pv`` or ``fp32``; default what the pages hold.
            pos: int32 or int64 [B or 1, N] positions of the queries.
            score_rows: also return the logits of so many last rows.
            mass: also return column sums of the probabilities.
            threads: 1..256.
            extra: further tensors of ``etk_attn_io`` by name: key_bias, alibi_slope, sink_logit, gate.

        Raises:
            InputError: a shape, a page that is not there, or rows whose own page has left the f16 tail.
            UnsupportedError: ``compute`` does not fit the cache.
        """
        layer, seq = self._place(layer, seq)
        q = numpy_from(q, "q")
        if q.ndim != 4 or q.shape[3] != self.d or q.shape[1] % self.hkv or q.shape[1] == 0:
            raise InputError(f"q must be [B, Hq, N, {self.d}] with Hq a multiple of {self.hkv}, got {list(q.shape)}")
        b, hq, n, _ = q.shape
        if b < 1 or b > self.batch - seq:
            raise InputError(f"q has batch {b}, the cache has {self.batch - seq} sequences from {seq} on")
        kind = attn.CAUSAL * causal | attn.WINDOW * (window is not None) | attn.GATHER * (pages is not None)
        compute = compute or ("fp32" if self.kind == "f16" else "int8")
        if compute not in attn.COMPUTE:
            raise InputError(f"compute must be one of {', '.join(attn.COMPUTE)}, got {compute!r}")
        arrays: dict[str, np.ndarray] = {
            "q": q,
            "o": np.empty((b, hq, n, self.dv), np.float32),
            "lse": np.empty((b, hq, n), np.float32),
        }
        arrays |= {name: numpy_from(value, name) for name, value in extra.items()}
        if pages is not None:
            arrays["gather"] = np.ascontiguousarray(pages, np.int32)
        if pos is not None:
            arrays["q_pos"] = numpy_from(pos, "pos")
        slots = int(self._handle.seq_k()[layer, seq : seq + b].max())
        flags = attn.RETURN_LSE
        if score_rows:
            arrays["scores"] = np.empty((b, hq, score_rows, slots), np.float32)
            flags |= attn.RETURN_SCORES
        if mass:
            arrays["colmass"] = np.empty((b, self.hkv, slots), np.float32)
            flags |= attn.RETURN_COLMASS | attn.COLMASS_PER_KV_HEAD
        fields = {
            "batch": b, "hq": hq, "hkv": self.hkv, "d": self.d, "dv": self.dv,
            "max_n": max(1, 1 << (n - 1).bit_length() if n else 1), "max_m": self.max_tokens,
            "compute": attn.COMPUTE[compute], "kv_layout": 1, "mask_kind": kind, "scale": scale, "softcap": softcap,
            "win_left": 0 if window is None else window, "sink": sink, "flags": flags, "isa_cap": self._isa,
        }  # fmt: skip
        attn.run(fields, arrays, score_rows=score_rows, threads=threads, kv=(self._handle.address, layer, seq))
        return CacheOutputs(arrays["o"], arrays["lse"], arrays.get("scores"), arrays.get("colmass"))

    def select(
        self,
        layer: int,
        q: Any,
        k: int,
        *,
        seq: int = 0,
        pages: bool = True,
        n_init: int = 0,
        n_local: int = 0,
        pool_width: int = 1,
        sum_heads: bool = False,
        softmax: bool = True,
        threads: int = 1,
    ) -> np.ndarray:
        """Choose tokens by score alone: the mean of the queries against every live key.

        Args:
            layer: which layer.
            q: float32 or float16 [B, Hq, N, d].
            k: tokens to choose; with ``pages`` the pages of the best tokens, as many as hold k tokens.
            seq: the sequence of batch row 0.
            pages: give page numbers, as ``attend`` takes them, instead of slots.
            n_init, n_local: first and last tokens that are taken beside the best.
            pool_width: odd; scores become the largest within it.
            sum_heads: one list for all KV heads.
            softmax: softmax per query head before adding up heads; False adds raw logits.
            threads: 1..256.

        Returns:
            int32 [B, Hkv or 1, n], ascending, padded with -1.

        Raises:
            InputError: a shape or number that does not fit.

        Source: TokenSelect's rule, in page granularity by default.
        """
        layer, seq = self._place(layer, seq)
        q = numpy_from(q, "q")
        if q.ndim != 4 or q.shape[3] != self.d or q.shape[1] % self.hkv or q.shape[1] == 0 or q.shape[2] == 0:
            raise InputError(
                f"q must be [B, Hq, N > 0, {self.d}] with Hq a multiple of {self.hkv}, got {list(q.shape)}"
            )
        b, hq, n, _ = q.shape
        if b < 1 or b > self.batch - seq:
            raise InputError(f"q has batch {b}, the cache has {self.batch - seq} sequences from {seq} on")
        k = _whole("k", k, 0, 2**31 - 1)
        n_init, n_local = _whole("n_init", n_init, 0, 2**30), _whole("n_local", n_local, 0, 2**30)
        slots = int(self._handle.seq_k()[layer, seq : seq + b].max())
        most = k + n_init + n_local
        capacity = min(-(-most // PAGE) + 4, -(-slots // PAGE)) if pages else min(most, slots)
        out = np.empty((b, 1 if sum_heads else self.hkv, capacity), np.int32)
        fields = {
            "batch": b, "hq": hq, "hkv": self.hkv, "d": self.d, "dv": self.dv, "max_n": 1 << (n - 1).bit_length(),
            "max_m": self.max_tokens, "compute": 0 if self.kind == "f16" else 2, "kv_layout": 1, "isa_cap": self._isa,
        }  # fmt: skip
        native_select.run(
            fields, {"q": q}, out, threads, (self._handle.address, layer, seq), k=k, pool_width=pool_width,
            n_init=n_init, n_local=n_local, sum_heads=int(sum_heads), softmax=int(softmax), round_pages=int(pages),
        )  # fmt: skip
        return out

    def lengths(self) -> np.ndarray:
        """int32 [layers, batch, Hkv or 1]: slots in use, evicted ones in pages not yet freed included."""
        return self._handle.seq_k().copy()

    def positions(self, layer: int, seq: int, head: int = 0) -> np.ndarray:
        """int32 [slots]: the position of each slot of a head."""
        layer, seq = self._place(layer, seq)
        table = 0 if self._handle.cache.tables == 1 else _whole("head", head, 0, self.hkv - 1)
        return self._handle.pos()[layer, seq, table, : self._handle.seq_k()[layer, seq, table]].copy()

    def live(self, layer: int, seq: int, head: int = 0) -> np.ndarray:
        """bool [slots]: which slots of a head are not evicted."""
        layer, seq = self._place(layer, seq)
        table = 0 if self._handle.cache.tables == 1 else _whole("head", head, 0, self.hkv - 1)
        words = self._handle.live()[layer, seq, table]
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        return bits[: self._handle.seq_k()[layer, seq, table]]

    def next_pos(self, layer: int, seq: int) -> int:
        """The position after the last one appended; eviction does not change it."""
        layer, seq = self._place(layer, seq)
        return int(self._handle.next_pos()[layer, seq])

    def read(self, layer: int, seq: int, head: int, *, tail: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Every slot of a head as float32: K [slots, d], V [slots, dv].

        Args:
            layer, seq, head: which.
            tail: give pages that still have their f16 copy from it.
        """
        layer, seq = self._place(layer, seq)
        head = _whole("head", head, 0, self.hkv - 1)
        count = int(self._handle.seq_k()[layer, seq, head if self._handle.cache.tables > 1 else 0])
        return self._handle.unpack(layer, seq, head, 0, count, tail)

    def evict(self, layer: int, seq: int, keep: Any, head: int | None = None) -> None:
        """Forget slots; a page without a live slot is freed and later slots move down by 64.

        Args:
            layer, seq: where.
            keep: bool [slots], False = evict.
            head: of a cache with ``per_head``; None = every head.
        """
        layer, seq = self._place(layer, seq)
        bits = np.asarray(keep, bool)
        padded = np.zeros((bits.size + PAGE - 1) // PAGE * PAGE, bool)
        padded[: bits.size] = bits
        words = np.packbits(padded, bitorder="little").view(np.uint64)
        self._handle.evict(layer, seq, -1 if head is None else head, words)

    def repack(self, layer: int, seq: int, head: int | None = None) -> int:
        """Move survivors together where live slots are under 7/8 of all; how many were rewritten."""
        layer, seq = self._place(layer, seq)
        return self._handle.repack(layer, seq, -1 if head is None else head)

    def truncate(self, seq: int, next_pos: int) -> None:
        """Forget every token at ``next_pos`` and later, in all layers."""
        self._handle.call("truncate", self._place(0, seq)[1], _whole("next_pos", next_pos, 0, 2**31 - 1))

    def clear(self, seq: int) -> None:
        """Empty a sequence."""
        self._handle.call("clear", self._place(0, seq)[1])

    def fork(self, source: int, target: int) -> None:
        """Make sequence ``target`` continue as ``source``; full pages are shared, not copied."""
        self._handle.call("fork", self._place(0, source)[1], self._place(0, target)[1])

    def save(self, seq: int) -> bytes:
        """The sequence as portable bytes: codes, scales, tail, masks, positions."""
        return self._handle.save(self._place(0, seq)[1])

    def load(self, seq: int, blob: bytes) -> None:
        """Replace a sequence by what ``save`` gave; continuing is then bit-identical, on another machine as well.

        Raises:
            InputError: bytes of another shape of cache, or damaged ones; the cache is unchanged then.
        """
        self._handle.load(self._place(0, seq)[1], bytes(blob))

    def memory(self) -> KVMemory:
        """Bytes and counts."""
        s = self._handle.stats()
        return KVMemory(
            reserved=s.arena_bytes,
            pages=s.page_bytes_used,
            tail=s.tail_bytes,
            tables=s.table_bytes,
            used_pages=s.pages_used,
            free_pages=s.pages_free,
            tokens=s.slots,
            live=s.live_slots,
        )
