"""Validation of arguments: every error names op, argument, what was expected and what came.

They run on fake tensors under torch.compile too, and what passes once is remembered by its
signature (see `_registry`): they read nothing of a tensor but sizes, strides, dtype and device.
Wrong kinds of value are TypeErrors, wrong sizes ValueErrors. What depends on the VALUES of index
tensors is in `_values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int64, torch.int32)


def bad_type(op: str, name: str, expected: object, actual: object) -> NoReturn:
    raise TypeError(f"{op}: {name}: expected {expected}, got {actual}")


def bad_value(op: str, name: str, expected: object, actual: object) -> NoReturn:
    raise ValueError(f"{op}: {name}: expected {expected}, got {actual}")


def show(shape: Sequence[int]) -> str:
    """A shape as the messages print it: [3, 128]."""
    return str(list(shape))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        bad_type(op, name, f"dtype {_names(allowed)}", _names([tensor.dtype]))


def same_dtype(op: str, name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        bad_type(op, name, f"{like}'s dtype {_names([other.dtype])}", _names([tensor.dtype]))


def same_device(op: str, name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.is_cpu and other.is_cpu:  # a fifth of the cost of comparing devices
        return
    if tensor.device != other.device:
        bad_value(op, name, f"{like}'s device {other.device}", tensor.device)


def readable(op: str, name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """An index tensor that an implementation may also take from the host."""
    if not tensor.is_cpu and tensor.device != other.device:
        bad_value(op, name, f"{like}'s device {other.device} or cpu", tensor.device)


def shape(op: str, name: str, tensor: Tensor, letters: str, sizes: tuple) -> None:
    """The tensor has exactly these sizes; letters is how the docstring writes them, "[m, k]"."""
    if tensor.shape != sizes:
        bad_value(op, name, f"{letters} = {show(sizes)}", show(tensor.shape))


def rank(op: str, name: str, tensor: Tensor, letters: str, at_least: int, at_most: int = 0) -> None:
    """The tensor has a number of dimensions between at_least and at_most (0: no limit)."""
    dims = tensor.dim()
    if dims < at_least or (at_most and dims > at_most):
        bad_value(op, name, f"shape {letters}", show(tensor.shape))


def one_of(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        bad_value(op, name, f"one of {list(allowed)}", repr(value))


def positive(op: str, name: str, value: int) -> None:
    if value < 1:
        bad_value(op, name, "a positive integer", value)


def block(op: str, name: str, value: Sequence[int]) -> None:
    if len(value) != 2 or min(value) < 1:
        bad_value(op, name, "(rows, columns), both positive", tuple(value))
