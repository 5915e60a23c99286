"""The kernels of libedgetok from Python: numpy or DLPack in, numpy out. Names are loaded on first use."""

from __future__ import annotations

from typing import Any

_LAZY = {
    "Attended": "attend",
    "AttentionOptions": "attend",
    "BlockIndex": "index.blocks",
    "CacheOutputs": "kv",
    "KVCache": "kv",
    "KVMemory": "kv",
    "Matching": "merging",
    "Merged": "merging",
    "PackedWeight": "packed",
    "Quantized": "gemm",
    "add": "ops",
    "add_norm_quantize": "ops",
    "argmax": "ops",
    "attention": "attend",
    "attention_outputs": "attend",
    "block_index": "attend",
    "cmake_dir": "c_files",
    "column_masses": "attend",
    "density_and_recall": "index.quality",
    "gather_rows": "ops",
    "gelu": "ops",
    "include_dir": "c_files",
    "layernorm": "ops",
    "library_dir": "c_files",
    "match_tokens": "merging",
    "matmul": "gemm",
    "matmul_integer": "gemm",
    "merge_attention": "attend",
    "merge_rows": "merging",
    "pitome_energy": "merging",
    "pkgconfig_dir": "c_files",
    "quantize_activations": "gemm",
    "rmsnorm": "ops",
    "select_keys": "select",
    "rope": "ops",
    "rope_tables": "ops",
    "scatter_rows": "ops",
    "silu": "ops",
    "softmax": "ops",
    "swiglu": "ops",
    "token_merge": "merging",
    "topk": "ops",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
