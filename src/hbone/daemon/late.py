"""What imports leave that a daemon never comes to use: modules that other packages import at once, and sources."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
from typing import Any

__all__ = ["UNUSED", "import_late", "tidy"]

UNUSED = (
    "calendar",
    "google.protobuf.internal.python_message",
    "hashlib",
    "hmac",
    "idna",
    "shutil",
    "ssl",
    "tempfile",
    "tokenize",
)
"""Protobuf without its C; what brings a second OpenSSL: Trio's TLS and DTLS, and how cryptography may name a key;
Trio's international names; and what ctypes has for a search with a compiler."""


def import_late(*names: str) -> None:
    """Put off what the first import of these modules does until something in them is used.

    An import finds them in place meanwhile. What asks one for a name, as `from ssl import SSLContext` does, runs it
    first. `importlib.util.LazyLoader` would run it at the next import already, whatever that asks for.

    Args:
        names: modules. One that is there already, or not installed, is left alone.
    """
    for name in names:
        if name not in sys.modules:
            _put_off(name)


def tidy() -> None:
    """Let go of what the imports so far do not need any more, so that what comes takes its place.

    That is garbage in cycles, and the sources of generated methods, which attrs keeps in linecache for debuggers.
    """
    import linecache  # brings tokenize, which is among those to put off

    linecache.clearcache()
    gc.collect()


def _put_off(name: str) -> None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return  # of a parent; its importer will say so
    if spec is None or spec.loader is None:
        return
    loader = spec.loader
    module = importlib.util.module_from_spec(spec)
    lock = threading.RLock()
    running = False

    def first_use(attribute: str) -> Any:
        nonlocal running
        if attribute == "__path__":  # the import system asks whether it is a package
            raise AttributeError(attribute)
        with lock:
            if running:  # the thread that runs it, in a circle
                raise AttributeError(f"module {name!r} has no attribute {attribute!r} yet", name=attribute, obj=module)
            if module.__dict__.get("__getattr__") is first_use:
                running = True
                try:
                    loader.exec_module(module)
                finally:
                    running = False
                if module.__dict__.get("__getattr__") is first_use:
                    del module.__dict__["__getattr__"]
        return getattr(module, attribute)

    module.__dict__["__getattr__"] = first_use
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
