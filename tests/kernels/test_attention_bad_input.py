"""Bad input to attention: the documented status, and no output touched. Lent pools and cancelled runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import attention_law as law
import numpy as np
import pytest

from edgetok import attention
from edgetok.errors import EdgeTokError, InputError, UnsupportedError
from edgetok.kernels import AttentionOptions
from edgetok.native import attn as native

BAD: dict[str, Callable[[dict[str, Any]], None]] = {
    "q of another width": lambda a: a.update(q=np.zeros((1, 2, 70, 32), np.float32)),
    "v of another length": lambda a: a.update(v=a["v"][:, :, :100]),
    "o of another length": lambda a: a.update(o=np.full((1, 2, 69, 64), 5, np.float32)),
    "o in float16": lambda a: a.update(o=np.full((1, 2, 70, 64), 5, np.float16)),
    "o over k": lambda a: a.update(o=a["k2"]),
    "o broadcast": lambda a: a.update(
        o=np.lib.stride_tricks.as_strided(np.full(64, 5, np.float32), (1, 2, 70, 64), (0, 0, 0, 4))
    ),
    "lse of another shape": lambda a: a.update(lse=np.full((1, 2, 71), 5, np.float32)),
    "key_bias in float64": lambda a: a.update(key_bias=np.zeros((1, 1, 130))),
    "key_bias too short": lambda a: a.update(key_bias=np.zeros((1, 1, 129), np.float32)),
    "q_perm with a double": lambda a: a.update(q_perm=np.zeros((1, 1, 70), np.int32)),
    "k_perm out of range": lambda a: a.update(k_perm=np.arange(1, 131, dtype=np.int32)[None, None]),
    "seq_k over M": lambda a: a.update(seq_k=np.array([131], np.int32)),
    "seq_k below 0": lambda a: a.update(seq_k=np.array([-1], np.int32)),
    "scores without the flag": lambda a: a.update(scores=np.zeros((1, 2, 1, 130), np.float32)),
    "gate of another width": lambda a: a.update(gate=np.zeros((1, 2, 70, 63), np.float32)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors_are_refused_and_nothing_is_written(name: str) -> None:
    memory = np.zeros(2 * 130 * 64 + 2 * 70 * 64, np.float32)
    q, k, v = law.draw(1, 2, 2, 70, 130, 64, 64)
    inside = memory[: 2 * 130 * 64].reshape(1, 2, 130, 64)
    inside[...] = k
    over = memory[64 : 64 + 2 * 70 * 64].reshape(1, 2, 70, 64)
    arrays = {"q": q, "k": inside, "v": v, "o": np.full((1, 2, 70, 64), 5, np.float32), "k2": over}
    BAD[name](arrays)
    del arrays["k2"]
    before = {key: x.copy() for key, x in arrays.items()}
    fields = {"batch": 1, "hq": 2, "hkv": 2, "d": 64, "dv": 64, "max_n": 70, "max_m": 130, "compute": 2}
    with pytest.raises(EdgeTokError):
        native.run(fields, arrays)
    for key, x in arrays.items():
        assert (x == before[key]).all(), key


FIELDS: dict[str, Any] = {"batch": 1, "hq": 2, "hkv": 1, "d": 64, "dv": 64, "max_n": 70, "max_m": 130, "compute": 2}
BAD_FIELDS: list[tuple[dict[str, Any], int]] = [
    ({"version": 1}, -2),
    ({"batch": -1}, -3),
    ({"hq": 3, "hkv": 2}, -3),
    ({"hkv": 0}, -3),
    ({"hq": 0}, -3),
    ({"d": 0}, -3),
    ({"d": 1025}, -3),
    ({"dv": 0}, -3),
    ({"max_n": -1}, -3),
    ({"max_m": 2**31}, -3),
    ({"compute": 1}, -10),
    ({"compute": 9}, -7),
    ({"mask_kind": 16}, -7),
    ({"mask_kind": 12}, -7),
    ({"scale": float("nan")}, -7),
    ({"scale": -1.0}, -7),
    ({"scale": float("inf")}, -7),
    ({"softcap": -1.0}, -7),
    ({"clip_gamma": 0.5}, -7),
    ({"clip_zeta": 0.5}, -7),
    ({"win_left": -1}, -7),
    ({"flags": 1 << 11}, -7),
    ({"softmax_mode": 9}, -7),
    ({"softmax_mode": 4}, -10),
    ({"softmax_mode": 1}, -10),
    ({"isa_cap": 99}, -11),
    ({"isa_cap": -1}, -11),
    ({"phase": 7}, -7),
    ({"kv_layout": 5}, -7),
    ({"tile_skip_log2": -1.0}, -7),
    ({"batch": 1 << 20, "max_m": 2**31 - 1, "hq": 1 << 16, "hkv": 1 << 16}, -8),
]


@pytest.mark.parametrize(("change", "status"), BAD_FIELDS)
def test_bad_descriptors_have_their_status(change: dict[str, Any], status: int) -> None:
    desc = native.Desc(struct_size=ctypes.sizeof(native.Desc), **{**FIELDS, **change})
    out = ctypes.c_void_p(77)
    got = native._lib().etk_attn_plan_create(ctypes.byref(desc), None, 1, ctypes.byref(out))
    assert got == status
    assert out.value == 77


def test_descriptor_sizes_are_versions() -> None:
    lib, size = native._lib(), ctypes.sizeof(native.Desc)
    buffer = (ctypes.c_uint8 * (size + 16))()
    desc = native.Desc.from_buffer(buffer)
    for name, value in FIELDS.items():
        setattr(desc, name, value)
    out = ctypes.c_void_p()

    def create() -> int:
        return lib.etk_attn_plan_create(ctypes.byref(buffer), None, 1, ctypes.byref(out))

    for given, tail, status in (
        (size, 0, 0),
        (size + 16, 0, 0),
        (size + 16, 1, -2),
        (size - 4, 0, 0),
        (0, 0, -2),
        (3, 0, -2),
    ):
        desc.struct_size, buffer[size + 7] = given, tail
        assert create() == status, (given, tail)
        if status == 0:
            lib.etk_attn_plan_free(out)


def test_workspace_one_byte_short_or_misaligned_is_refused() -> None:
    q, k, v = law.draw(1, 2, 1, 70, 130, 64, 64)
    o = np.full((1, 2, 70, 64), 5, np.float32)
    io = native.fill_io({"q": q, "k": k, "v": v, "o": o}, None, 0)
    owner = native._Owner(native.Desc(struct_size=ctypes.sizeof(native.Desc), **FIELDS), 1, None)
    ws = native._workspace(owner.plan.workspace + 64)
    for address, size in (
        (ws.ctypes.data, owner.plan.workspace - 1),
        (ws.ctypes.data + 1, owner.plan.workspace),
        (None, owner.plan.workspace),
    ):
        assert native._lib().etk_attn_run(owner.plan.address, ctypes.byref(io), address, size, None) == -9
    assert (o == 5).all()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"compute": "int4"}, InputError),
        ({"block_mask": np.ones((3, 3), bool)}, InputError),
        ({"sink": 3}, InputError),
        ({"block_mask": np.ones((2, 3))}, InputError),
        ({"window": -1}, InputError),
        ({"threads": 0}, InputError),
        ({"out": np.zeros((1, 2, 70, 63), np.float32)}, InputError),
        ({"softcap": float("nan")}, InputError),
        ({"options": AttentionOptions(isa="sse")}, InputError),
        ({"options": AttentionOptions(clip=(0.1, 1.0))}, InputError),
        ({"options": AttentionOptions(gather=np.full((1, 1, 5), 130, np.int32))}, InputError),
        (
            {
                "options": AttentionOptions(
                    gather=np.zeros((1, 1, 5), np.int32), k_perm=np.arange(130, dtype=np.int32)[None, None]
                )
            },
            UnsupportedError,
        ),
    ],
)
def test_bad_arguments_name_themselves(settings: dict[str, Any], error: type[Exception]) -> None:
    q, k, v = law.draw(1, 2, 1, 70, 130, 64, 64)
    with pytest.raises(error):
        attention(q, k, v, **settings)
    with pytest.raises(InputError, match="q is float64"):
        attention(q.astype(np.float64), k, v)
    with pytest.raises(InputError, match="whole number of query heads"):
        attention(np.repeat(q, 2, 1)[:, :3], np.repeat(k, 2, 1), np.repeat(v, 2, 1))
    with pytest.raises(InputError, match="not dense"):
        attention(q[..., ::2], k[..., ::2], v)


CUT = [(1, 0), (1, 3), (5, 2)]


@pytest.mark.parametrize(("workers", "stop"), CUT)
def test_lent_pools_of_any_order_and_cancelled_runs(workers: int, stop: int) -> None:
    """A pool that runs tasks backwards on one thread, and one that stops after some tasks."""
    task_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    count = 0

    def run(_: int, fn: Any, arg: int, tasks: int) -> int:
        nonlocal count
        call = ctypes.cast(fn, task_type)
        for i in reversed(range(tasks)):
            if stop and count >= stop:
                return 1
            call(arg, i, i % workers)
            count += 1
        return 0

    threads = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: workers)
    loop = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(run)
    table = (ctypes.c_void_p * 4)(None, ctypes.cast(threads, ctypes.c_void_p), ctypes.cast(loop, ctypes.c_void_p), None)
    q, k, v = law.draw(1, 2, 1, 130, 200, 64, 64)
    want = attention(q, k, v)
    o = np.empty_like(want)
    io = native.fill_io({"q": q, "k": k, "v": v, "o": o}, None, 0)
    fields = {**FIELDS, "max_n": 130, "max_m": 200}
    owner = native._Owner(native.Desc(struct_size=ctypes.sizeof(native.Desc), **fields), 5, None)
    ws = native._workspace(owner.plan.workspace)
    status = native._lib().etk_attn_run(
        owner.plan.address, ctypes.byref(io), ws.ctypes.data, owner.plan.workspace, table
    )
    if workers > 1 or not stop:
        assert status == (-15 if stop else 0)
    if status == 0:
        assert (o == want).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": (1, 2, 5, 8)}, "k has width 8, q 16"),
        ({"v": (1, 2, 4, 16)}, "v has shape"),
        ({"k": (2, 2, 5, 16), "v": (2, 2, 5, 16)}, "k has a batch of 2, q of 1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_messages_name_the_argument(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys("qkv", (1, 2, 5, 16)) | changes
    arrays = {n: np.ones(s, np.float32) for n, s in arguments.items() if n in "qkv"}
    with pytest.raises(InputError, match=words):
        attention(**arrays, threads=arguments.get("threads", 1))
