"""Evaluators, one file each."""

from edgetok.registry import Registry

EVALUATORS: Registry = Registry(  # type: ignore[type-arg]
    package="edgetok.evaluators",
    attribute="EVALUATOR",
    kind="evaluator",
    group="edgetok.evaluators",
    helpers=frozenset({"base"}),
)
