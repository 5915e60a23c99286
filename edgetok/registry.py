"""Registries found by file name: a method, backend or evaluator is one file, and dropping the file in is all it takes.

A registry lists the modules of one sub-package whose names do not start with an underscore and are not in
``helpers``, and the entry points of a group, which packages outside the project use. Nothing is imported until
asked for.
"""

from __future__ import annotations

import difflib
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from edgetok.errors import InputError

T = TypeVar("T")


def canonical(name: str) -> str:
    """Names take hyphen or underscore; inside they have underscores."""
    return name.strip().replace("-", "_")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The named things of one kind.

    Args:
        package: the sub-package to list, as ``edgetok.converters.reduce``.
        attribute: the module attribute that holds the thing, as ``METHOD``.
        kind: the word for messages, as ``reduction method``.
        group: entry-point group for packages outside the project.
        helpers: module names in the package that are not entries.
    """

    package: str
    attribute: str
    kind: str
    group: str
    helpers: frozenset[str] = frozenset()

    @cached_property
    def _files(self) -> tuple[str, ...]:
        paths = import_module(self.package).__path__
        names = {m.name for m in pkgutil.iter_modules(paths)}
        return tuple(sorted(n for n in names if not n.startswith("_") and n not in self.helpers))

    @cached_property
    def _points(self) -> dict[str, Any]:
        return {canonical(p.name): p for p in entry_points(group=self.group)}

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        return tuple(sorted({*self._files, *self._points}))

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            InputError: no such name; the message lists the known ones.
        """
        key = canonical(name)
        if key in self._files:
            return getattr(import_module(f"{self.package}.{key}"), self.attribute)  # type: ignore[no-any-return]
        if key in self._points:
            return self._points[key].load()  # type: ignore[no-any-return]
        near = difflib.get_close_matches(key, self.names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(self.names())}"
        raise InputError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}", next=hint)
