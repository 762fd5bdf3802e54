"""Until the public ops exist: their reference functions under the same names."""

import importlib

import dskernels

if not hasattr(dskernels, "gemm"):
    for _stem in ("rowwise", "gemm", "mla", "moe"):
        _module = importlib.import_module(f"dskernels.ref.{_stem}")
        for _name, _value in vars(_module).items():
            if not _name.startswith("_") and getattr(_value, "__module__", "") == _module.__name__:
                setattr(dskernels, _name, _value)
    dskernels.ScaledTensor = importlib.import_module("dskernels.types").ScaledTensor
