"""The CPU backend's functions take what the reference's take, so that no op can outgrow them."""

import importlib.util
import inspect

import pytest

STEMS = ("gemm", "mla", "moe", "rowwise")
# Arithmetic of other machines, which only the reference imitates.
REFERENCE_ONLY = {"accumulate"}


def reference_of(stem: str, name: str):
    for module in (f"dskernels.ref.{stem}", f"dskernels.ref.{stem}_backward"):
        if importlib.util.find_spec(module) is None:
            continue
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found
    return None


def pairs():
    for stem in STEMS:
        module = importlib.import_module(f"dskernels.cpu.{stem}")
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                reference = reference_of(stem, name)
                if reference is not None and function is not reference:
                    yield pytest.param(function, reference, id=f"{stem}.{name}")


@pytest.mark.parametrize("function, reference", list(pairs()))
def test_no_argument_is_missing(function, reference):
    ours, theirs = (inspect.signature(f).parameters for f in (function, reference))
    missing = set(theirs) - set(ours) - REFERENCE_ONLY
    assert not missing
    for name in set(theirs) & set(ours):
        assert ours[name].kind == theirs[name].kind, name
        assert ours[name].default == theirs[name].default, name


def test_the_list_is_not_empty():
    assert len(list(pairs())) >= 15
