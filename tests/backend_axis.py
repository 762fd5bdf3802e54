"""Helpers of the tests that run every backend."""

import pytest
import torch

import dskernels as dsk


def need(op: str, backend: str, **shapes) -> None:
    """Skip, with the reason, where a backend has no kernel for this op."""
    support = dsk.supports(op, backend=backend, **shapes)
    if not support:
        pytest.skip(support.reason)


def on_device(x, backend: str):
    """A tensor, ScaledTensor or None where the backend wants it."""
    if x is None or backend not in ("cuda", "triton") or not torch.cuda.is_available():
        return x
    return x.to("cuda")


def on_cpu(x):
    return x if x is None else x.to("cpu")


def interpret_once(backend: str, first: bool) -> None:
    """Skip all but the first of a test's cases that meet before they reach a kernel, where kernels
    are interpreted: they would run the same one again, slowly."""
    if backend == "triton" and not first and not torch.cuda.is_available():
        pytest.skip("interpreted once: the cases differ before the kernel only")
