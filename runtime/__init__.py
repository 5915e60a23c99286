"""Installed as ``edgetok.runtime``; see the guard below."""

# The checkout's root is on sys.path in an editable install: a module imported under two names would be two modules.
if __name__ != "edgetok.runtime":
    raise ImportError("import this as edgetok.runtime (run from outside the checkout, or install with pip)")
