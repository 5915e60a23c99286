"""Reading ``--reduce``: a share, a method, or a method with settings.

``0.3`` | ``tome`` | ``tome:r=13`` | ``tome:r=0/0/4/8/14`` | ``pitome:ratio=0.925,layers=1-11`` |
``expedit:alpha=6,grid=12x12`` | ``tome:removed=0.3,schedule=late``
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, fields
from typing import Any

from edgetok.converters.reduce import METHODS
from edgetok.converters.reduce.base import Method, Settings, check_range
from edgetok.errors import InputError
from edgetok.registry import canonical

_EXAMPLES = "0.3, tome:r=13, pitome:ratio=0.925,layers=1-11"


@dataclass(frozen=True)
class ReduceSpec:
    """What to reduce and how.

    Args:
        method: a registered name, or None to leave the choice to a trial.
        settings: of the method; None when ``method`` is None.
        removed: share of tokens to remove (decision 24), or None when the settings give counts.
        text: as the user wrote it.
    """

    method: str | None
    settings: Settings | None
    removed: float | None
    text: str

    @property
    def nothing(self) -> bool:
        """True when no token is to be removed, so that the graph stays byte for byte the same."""
        return self.removed == 0.0


def parse_reduce(text: str) -> ReduceSpec:
    """Read a ``--reduce`` value.

    Raises:
        InputError: unknown method or setting, a value of the wrong form or out of range.
    """
    given = text.strip()
    if not given:
        raise InputError("--reduce is empty", next=f"give a share or a method, as {_EXAMPLES}")
    number = _float(given)
    if number is not None:
        check_range("--reduce", number, 0.0, 1.0, open_end=True)
        return ReduceSpec(None, None, number, given)
    name, colon, rest = given.partition(":")
    method: Method = METHODS.get(name)
    if colon and not rest.strip():
        raise InputError(f"--reduce {given!r} ends after the colon", next=f"as {_EXAMPLES}")
    settings = make_settings(method, _pairs(rest, given) if colon else {})
    return ReduceSpec(method.name, settings, settings.removed, given)


def make_settings(method: Method, values: dict[str, str]) -> Settings:
    """Settings of a method from text values.

    Raises:
        InputError: a setting the method does not have, or a value that does not fit.
    """
    kinds = typing.get_type_hints(method.settings)
    known = [f.name for f in fields(method.settings)]
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        key = canonical(key)
        if key not in known:
            raise InputError(f"{method.name} has no setting {key!r}", next=f"choose from: {', '.join(sorted(known))}")
        parsed[key] = _value(method.name, key, value, kinds[key])
    return method.settings(**parsed)


def format_spec(method: str, settings: Settings) -> str:
    """The shortest text that ``parse_reduce`` reads back to the same settings."""
    parts = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            parts.append(f"{field.name}={_text(field.name, value)}")
    return f"{method}:{','.join(parts)}" if parts else method


def _pairs(rest: str, whole: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise InputError(f"--reduce {whole!r}: {part.strip()!r} is not name=value", next=f"as {_EXAMPLES}")
        if canonical(key) in found:
            raise InputError(f"--reduce {whole!r}: {key} is given twice")
        found[canonical(key)] = value
    return found


def _value(method: str, key: str, text: str, kind: object) -> Any:
    kind = _plain(kind)
    try:
        if key == "layers":
            return _layers(text)
        if key == "grid":
            return _grid(text)
        if kind is bool:
            return {
                "true": True,
                "yes": True,
                "on": True,
                "1": True,
                "false": False,
                "no": False,
                "off": False,
                "0": False,
            }[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(t) for t in text.split("/"))
        return text
    except (ValueError, KeyError) as exc:
        raise InputError(f"{method}: {key}={text!r} is not {_wanted(key, kind)}") from exc


def _plain(kind: object) -> object:
    """``X`` of ``X | None``."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _wanted(key: str, kind: object) -> str:
    if key == "layers":
        return "a list of blocks, as 1-11 or 3+6+9"
    if key == "grid":
        return "rows x columns, as 12x12"
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}s, as 0/0/4/8"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")  # type: ignore[call-overload,no-any-return]


def _layers(text: str) -> tuple[int, ...]:
    blocks: set[int] = set()
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if high < low or high > 10_000:
            raise ValueError(text)
        blocks.update(range(low, high + 1))
    return tuple(sorted(blocks))


def _grid(text: str) -> tuple[int, int]:
    rows, x, columns = text.lower().partition("x")
    grid = int(rows), int(columns)
    if not x or min(grid) < 1:
        raise ValueError(text)
    return grid


def _text(key: str, value: object) -> str:
    if key == "grid" and isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return ("+" if key == "layers" else "/").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
