"""Where the installed package keeps what a C program needs: headers, library, CMake package, pkg-config file."""

from __future__ import annotations

from pathlib import Path

from edgetok import native
from edgetok.errors import BackendError


def _folder(*parts: str) -> Path:
    library = native.library_path()
    if library is None:
        raise BackendError("libedgetok is not installed", next="pip install . (it compiles the library)")
    found = library.resolve().parent.joinpath(*parts)
    if not found.is_dir():
        raise BackendError(
            "this libedgetok has no files for C programs beside it", where=str(found), next="pip install ."
        )
    return found


def include_dir() -> Path:
    """The folder that holds ``edgetok/edgetok.h``, for ``-I``.

    Raises:
        BackendError: the library is not installed, or ``EDGETOK_LIBRARY`` names one outside an installation.
    """
    return _folder("include")


def library_dir() -> Path:
    """The folder of the library, for ``-L`` and the run path.

    Raises:
        BackendError: it is not installed.
    """
    return _folder()


def cmake_dir() -> Path:
    """The folder for ``-Dedgetok_DIR=``; the target is ``edgetok::edgetok``.

    Raises:
        BackendError: as in ``include_dir``.
    """
    return _folder("cmake", "edgetok")


def pkgconfig_dir() -> Path:
    """The folder for ``PKG_CONFIG_PATH``; the module is ``edgetok``.

    Raises:
        BackendError: as in ``include_dir``.
    """
    return _folder("pkgconfig")
