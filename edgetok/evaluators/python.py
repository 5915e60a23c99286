"""A function of the user's own: ``python:module:function``, or a callable given to ``edgetok.convert``.

It is called with ``run`` (feeds to outputs) and returns points, or (points, per-sample values), or an ``EvalResult``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.evaluators.base import EvalResult, EvalSpec, Run, Step


class Python:
    """Fields: ``kind: python:module:function``; ``metric`` names it; ``settings`` are passed on as keywords."""

    def __init__(self, spec: EvalSpec) -> None:
        spec.only("call", "metric", "settings")
        given = spec.values.get("call")
        self.function: Callable[..., Any] = given if callable(given) else _find(spec)
        settings = spec.values.get("settings") or {}
        if not isinstance(settings, dict):
            raise InputError("settings must be a mapping", where=spec.where)
        self.settings = {str(k): v for k, v in settings.items()}
        self.metric = spec.text("metric", getattr(self.function, "__name__", "metric"))
        self.limit = spec.limit
        self.tensors: tuple[str, ...] = ()

    def score(self, run: Run, on_step: Step | None = None) -> EvalResult:
        """Whatever the function says.

        Raises:
            InputError: it returned something that is no score.
        """
        found = self.function(run, **self.settings)
        if isinstance(found, EvalResult):
            return found
        value, per_sample = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise InputError(f"{self.metric} returned {type(value).__name__}; expected points as a number")
        values = None if per_sample is None else np.asarray(per_sample, np.float64).reshape(-1)
        return EvalResult(self.metric, float(value), 0 if values is None else len(values), values)


def _find(spec: EvalSpec) -> Callable[..., Any]:
    _, _, rest = spec.text("kind").partition(":")
    module, _, name = rest.partition(":")
    if not module or not name:
        raise InputError("expected python:module:function", where=spec.where)
    added = str(spec.folder) if str(spec.folder) != "." else ""
    if added and added not in sys.path:  # a module beside the eval file
        sys.path.insert(0, added)
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise InputError(
            f"cannot import {name!r} from {module!r}: {exc}", where=spec.where, next="put the module on PYTHONPATH"
        ) from exc
    finally:
        if added and sys.path[:1] == [added]:
            sys.path.pop(0)
    if not callable(found):
        raise InputError(f"{module}:{name} is not a function", where=spec.where)
    return found  # type: ignore[no-any-return]


EVALUATOR = Python
