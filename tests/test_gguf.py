"""GGUF: every tensor type against its definition written out element by element, and files that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_files import gguf, info, string
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetok.converters.sources._decoder.packed import pack
from edgetok.converters.sources._gguf.blocks import TYPES
from edgetok.converters.sources._gguf.reader import Gguf
from edgetok.errors import ArtifactError, UnsupportedError
from edgetok.limits import DEFAULT


def half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def nibble(codes: bytes, i: int, width: int = 16) -> int:
    """Element i of a run of 2 * width nibbles: low ones first."""
    return codes[i % width] & 15 if i % (2 * width) < width else codes[i % width] >> 4


def k_scale(packed: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4


def element(name: str, b: bytes, i: int) -> float:
    """Element i of one block, from the definition of the format."""
    if name == "Q4_0":
        return half(b, 0) * (nibble(b[2:], i) - 8)
    if name == "Q4_1":
        return half(b, 0) * nibble(b[4:], i) + half(b, 2)
    if name == "Q5_0":
        return half(b, 0) * ((nibble(b[6:], i) | (int.from_bytes(b[2:6], "little") >> i & 1) << 4) - 16)
    if name == "Q5_1":
        return half(b, 0) * (nibble(b[8:], i) | (int.from_bytes(b[4:8], "little") >> i & 1) << 4) + half(b, 2)
    if name == "Q8_0":
        return half(b, 0) * struct.unpack_from("b", b, 2 + i)[0]
    chunk, j = i // 64, i // 32
    if name in ("Q4_K", "Q5_K"):
        scale, low = k_scale(b[4:16], j)
        start = 16 if name == "Q4_K" else 48
        code = nibble(b[start + 32 * chunk :], i % 64, 32)
        if name == "Q5_K":
            code |= (b[16 + i % 32] >> j & 1) << 4
        return half(b, 0) * scale * code - half(b, 2) * low
    if name == "Q6_K":
        n, r = divmod(i, 128)
        q, l = divmod(r, 32)
        byte = b[64 * n + l + 32 * (q % 2)]
        code = (byte & 15 if q < 2 else byte >> 4) | (b[128 + 32 * n + l] >> 2 * q & 3) << 4
        return half(b, 208) * struct.unpack_from("b", b, 192 + i // 16)[0] * (code - 32)
    return {"F32": lambda: struct.unpack("<f", b)[0], "F16": lambda: half(b, 0)}.get(
        name, lambda: struct.unpack("<f", b"\0\0" + b)[0]
    )()


def block(kind: int, rng: np.random.Generator) -> bytes:
    """A random block whose half-precision scales are finite."""
    t = TYPES[kind]
    data = rng.integers(0, 256, t.bytes, dtype=np.uint8)
    for at in {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q6_K": (208,), "F32": (), "F16": (0,), "BF16": ()}.get(
        t.name, (0, 2)
    ):
        data[at : at + 2] = np.frombuffer(np.float16(rng.normal()).tobytes(), np.uint8)
    if t.name in ("F32", "BF16"):
        data[-1] &= 0x3F
    return data.tobytes()


@pytest.mark.parametrize("kind", TYPES, ids=lambda k: TYPES[k].name)
def test_blocks_stand_for_the_numbers_of_the_definition(kind: int, tmp_path: Path) -> None:
    t, rng = TYPES[kind], np.random.default_rng(kind)
    rows, wide = 3, 2
    blocks = [block(kind, rng) for _ in range(rows * wide)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"a": 1}, [("w", [wide * t.size, rows], kind, b"".join(blocks))]))
    with Gguf(path) as file:
        found = file.floats("w")
    expected = [
        [element(t.name, b, i) for b in blocks[r * wide : (r + 1) * wide] for i in range(t.size)] for r in range(rows)
    ]
    # float32 products of exact codes: the last bit may differ from the double-precision definition
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", TYPES, ids=lambda k: TYPES[k].name)
def test_codes_carried_over_stand_for_the_same_numbers(kind: int, tmp_path: Path) -> None:
    t, rng = TYPES[kind], np.random.default_rng(kind)
    blocks = [block(kind, rng) for _ in range(6)]
    if t.name in ("Q4_1", "Q5_1"):  # a block of one value: scale zero
        blocks[3] = bytes(2) + blocks[3][2:]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({}, [("w", [2 * t.size, 3], kind, b"".join(blocks))]))
    with Gguf(path) as file:
        packed, expected = pack(t.name, file.blocks("w")), file.floats("w")
    if packed is None:
        assert t.name in ("F32", "F16", "BF16")
        return
    assert packed.bits == (4 if t.name in ("Q4_0", "Q4_1", "Q4_K") else 8)
    assert packed.stored().shape == (3, 2 * t.size // packed.block, packed.block * packed.bits // 8)
    # (code - zero) * scale against d * code + m: the zero point -m/d is rounded to float32, as is the product
    np.testing.assert_allclose(packed.floats(), expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(packed.rows(order).floats(), packed.floats()[order])


def test_metadata_comes_back(tmp_path: Path) -> None:
    given_ = {"general.architecture": "llama", "n": 7, "x": 1.5, "yes": True, "names": ["a", "ü"], "kinds": [1, -2, 3]}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(given_))
    with Gguf(path) as file:
        got = file.metadata
    assert {**got, "kinds": list(got["kinds"])} == given_


F32_ROW = ("w", [4], 0, bytes(16))
BROKEN = {
    "not GGUF": (b"GGML" + bytes(40), ArtifactError, "does not begin with GGUF"),
    "empty": (b"", ArtifactError, "too few"),
    "version 1": (gguf(version=1), UnsupportedError, "version 1"),
    "tensor count": (gguf(counts=(1 << 40, 0)), ArtifactError, "over the limit"),
    "tensors that are not there": (gguf(counts=(5, 0)), ArtifactError, "rank|left"),
    "key count": (gguf(counts=(0, 1 << 50)), ArtifactError, "over the limit"),
    "key length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + bytes(64), ArtifactError, "over the limit"),
    "string length": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IQ", 8, 1 << 19) + bytes(64),
        ArtifactError,
        "are left",
    ),
    "key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (string("k") + struct.pack("<II", 4, 1)) + bytes(64),
        ArtifactError,
        "twice",
    ),
    "not UTF-8": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"\xff\xfe") + struct.pack("<II", 4, 1) + bytes(64),
        ArtifactError,
        "UTF-8",
    ),
    "value type": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<II", 77, 1) + bytes(64),
        ArtifactError,
        "unknown value type 77",
    ),
    "array of arrays": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64),
        ArtifactError,
        "array of value type 9",
    ),
    "array length": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(64),
        ArtifactError,
        "over the limit",
    ),
    "array of strings that are not there": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 1_000_000) + bytes(64),
        ArtifactError,
        "too short",
    ),
    "alignment": (gguf({"general.alignment": 33}), ArtifactError, "alignment"),
    "alignment of zero": (gguf({"general.alignment": 0}), ArtifactError, "alignment"),
    "rank": (gguf(infos=info("w", [1] * 5, 0, 0), counts=(1, 0)), ArtifactError, "rank 5"),
    "rank of zero": (gguf(infos=info("w", [], 0, 0), counts=(1, 0)), ArtifactError, "rank 0"),
    "tensor type": (gguf(infos=info("w", [4], 99, 0), counts=(1, 0)), UnsupportedError, "tensor type 99"),
    "row no multiple of the block": (
        gguf(infos=info("w", [33], 2, 0), counts=(1, 0)) + bytes(64),
        ArtifactError,
        "no multiple of 32",
    ),
    "dims that wrap": (
        gguf(infos=info("w", [1 << 30, 1 << 30, 1 << 30], 0, 0), counts=(1, 0)),
        ArtifactError,
        "outside 0",
    ),
    "dimension": (gguf(infos=info("w", [1 << 40], 0, 0), counts=(1, 0)), ArtifactError, "over the limit"),
    "past the end": (gguf(infos=info("w", [64], 0, 0), counts=(1, 0)) + bytes(32), ArtifactError, "ends at byte"),
    "offset past the end": (
        gguf(infos=info("w", [4], 0, 1 << 62), counts=(1, 0)) + bytes(32),
        ArtifactError,
        "ends at byte",
    ),
    "offset that wraps": (
        gguf(infos=info("w", [4], 0, (1 << 64) - 32), counts=(1, 0)) + bytes(32),
        ArtifactError,
        "outside 0",
    ),
    "offset not aligned": (gguf(infos=info("w", [4], 0, 7), counts=(1, 0)) + bytes(64), ArtifactError, "multiple"),
    "overlap": (
        gguf(infos=info("a", [16], 0, 0) + info("b", [16], 0, 32), counts=(2, 0)) + bytes(128),
        ArtifactError,
        "overlap",
    ),
    "same name": (
        gguf(infos=info("a", [4], 0, 0) + info("a", [4], 0, 32), counts=(2, 0)) + bytes(128),
        ArtifactError,
        "same name",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    data, kind, words = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(kind, match=words) as caught:
        Gguf(path)
    assert caught.value.where == "m.gguf"


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    whole = gguf({"general.architecture": "llama", "names": ["a", "b"]}, [F32_ROW])
    path = tmp_path / "m.gguf"
    need = whole.rindex(bytes(16)) + 16  # the padding behind the last tensor may be missing
    for size in range(need - 16):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError):
            Gguf(path)


def test_limits_hold(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({}, [F32_ROW]))
    Gguf(path, DEFAULT.lowered({"tensors": 1})).close()
    with pytest.raises(ArtifactError, match="tensors"):
        Gguf(path, DEFAULT.lowered({"tensors": 0}))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bytes_changed_at_random_never_surprise(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(gguf({"general.architecture": "llama", "names": ["a", "b"], "kinds": [1, 2]}, [F32_ROW]))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    try:
        with Gguf(path) as file:
            for name in file.tensors:
                file.floats(name)
    except (ArtifactError, UnsupportedError):
        pass  # any other exception is a failure
