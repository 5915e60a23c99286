"""Sparse block indices: which 64 x 64 tiles of Q K^T attention computes.

One module per builder, each with its law in numpy (``*_reference``) beside the call into libedgetok. Names are loaded
on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetok.kernels.index.blocks import BlockIndex as BlockIndex
    from edgetok.kernels.index.clusters import from_clusters as from_clusters
    from edgetok.kernels.index.mask import from_mask as from_mask
    from edgetok.kernels.index.paro import from_paro as from_paro
    from edgetok.kernels.index.quality import density_and_recall as density_and_recall
    from edgetok.kernels.index.radial import from_radial as from_radial
    from edgetok.kernels.index.topp import from_topp as from_topp
    from edgetok.kernels.index.window import from_window as from_window
    from edgetok.kernels.index.xattn import from_xattn as from_xattn

_LAZY = {
    "BlockIndex": "blocks",
    "density_and_recall": "quality",
    "from_clusters": "clusters",
    "from_mask": "mask",
    "from_paro": "paro",
    "from_radial": "radial",
    "from_topp": "topp",
    "from_window": "window",
    "from_xattn": "xattn",
}

__all__ = [
    "BlockIndex",
    "density_and_recall",
    "from_clusters",
    "from_mask",
    "from_paro",
    "from_radial",
    "from_topp",
    "from_window",
    "from_xattn",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
