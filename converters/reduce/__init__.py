"""Token-reduction methods, one file each."""

from edgetok.registry import Registry

METHODS: Registry = Registry(  # type: ignore[type-arg]
    package="edgetok.converters.reduce",
    attribute="METHOD",
    kind="reduction method",
    group="edgetok.reduce",
    helpers=frozenset({"apply", "base", "core", "schedule", "spec"}),
)
