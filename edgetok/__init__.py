"""edgetok: put trained transformers on the device in front of you.

Five functions (``convert``, ``load``, ``profile``, ``compare``, ``tune``) and three nouns (``Artifact``,
``Session``, ``Report``). Names appear here with the work that makes them run. Everything is loaded on first
use, so ``import edgetok`` costs nothing but this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetok._version import __version__

if TYPE_CHECKING:
    from edgetok.artifact import Artifact as Artifact
    from edgetok.comparing import compare as compare
    from edgetok.gates import Limits as Limits
    from edgetok.kernels.attend import attention as attention
    from edgetok.pipeline import convert as convert
    from edgetok.runtime.session import Session as Session
    from edgetok.runtime.session import load as load

# A checkout holds converters/, devices/ and runtime/ beside this package; a wheel holds them inside it.
# With this line both import the same way. It does nothing in a wheel.
_beside = Path(__file__).resolve().parent.parent
if (_beside / "kernels_c" / "CMakeLists.txt").is_file():
    __path__.append(str(_beside))

_LAZY = {
    "Artifact": "edgetok.artifact",
    "Limits": "edgetok.gates",
    "Session": "edgetok.runtime.session",
    "attention": "edgetok.kernels.attend",
    "compare": "edgetok.comparing",
    "convert": "edgetok.pipeline",
    "load": "edgetok.runtime.session",
}

__all__ = ["Artifact", "Limits", "Session", "__version__", "attention", "compare", "convert", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'edgetok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
