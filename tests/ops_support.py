"""Fake backends for the tests of the op layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from dskernels import Support
from dskernels import backend as dsk_backend


@contextmanager
def planted_modules(backend: str, available: Support | None = None, **stems: dict) -> Iterator:
    """The package dskernels.<backend> with modules of the given functions, for as long as it lasts.

    stems: {"rowwise": {"rms_norm": function}}; available: what the package says of itself.
    """
    name = f"dskernels.{backend}"
    package = ModuleType(name)
    package.__path__ = []
    if available is not None:
        package.available = lambda: available
    modules = {name: package}
    for stem, functions in stems.items():
        module = ModuleType(f"{name}.{stem}")
        vars(module).update(functions)
        modules[module.__name__] = module
    kept = {key: sys.modules.get(key) for key in modules}
    sys.modules.update(modules)
    dsk_backend._forget()
    try:
        yield
    finally:
        for key, old in kept.items():
            if old is None:
                del sys.modules[key]
            else:
                sys.modules[key] = old
        dsk_backend._forget()
