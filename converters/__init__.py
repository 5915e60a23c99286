"""Installed as ``edgetok.converters``; see the guard below."""

# The checkout's root is on sys.path in an editable install: a module imported under two names would be two modules.
if __name__ != "edgetok.converters":
    raise ImportError("import this as edgetok.converters (run from outside the checkout, or install with pip)")
