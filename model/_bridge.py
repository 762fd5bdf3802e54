"""Until the public ops exist: their reference functions under the same names."""

import importlib

import dskernels

try:
    _ref = importlib.import_module("dskernels.ref")
    _types = importlib.import_module("dskernels.types")
except ImportError:
    _ref = _types = importlib.import_module("stubdsk")

for _name in dir(_ref):
    if not _name.startswith("_") and not hasattr(dskernels, _name):
        setattr(dskernels, _name, getattr(_ref, _name))
if not hasattr(dskernels, "ScaledTensor"):
    dskernels.ScaledTensor = _types.ScaledTensor
