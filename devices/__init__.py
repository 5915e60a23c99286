"""Backends, one file each, installed as ``edgetok.devices``."""

# The checkout's root is on sys.path in an editable install: a module imported under two names would be two registries.
if __name__ != "edgetok.devices":
    raise ImportError("import this as edgetok.devices (run from outside the checkout, or install with pip)")

from edgetok.registry import Registry

BACKENDS: Registry = Registry(  # type: ignore[type-arg]
    package="edgetok.devices",
    attribute="BACKEND",
    kind="device",
    group="edgetok.devices",
    helpers=frozenset({"base"}),
)
