"""Registration with torch.library, and the way a public function calls its op.

An op is four functions: the kernel (validate, choose an implementation, run it), the fake kernel
(validate, make empty outputs), and for a differentiable op how to save and how to go back. They
are registered through Library.define/impl: torch.library.custom_op wraps each call in checks that
cost ten times as much.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

LIBRARY = torch.library.Library("dskernels", "DEF")
SCHEMAS: dict[str, str] = {}

_is_grad_enabled = torch.is_grad_enabled
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_DISPATCHER_TYPE_ERROR = re.compile(
    r"dskernels::(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found "
    r"type '(.+?)'"
)


def define(
    schema: str,
    kernel: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
) -> Callable:
    """Register `schema` under dskernels:: and return the function that calls it.

    kernel, fake  take the schema's arguments in order; both validate, so that a bad call fails the
                  same way in eager mode, under torch.compile and through torch.ops
    backward      (ctx, *grads) -> one gradient per argument, calling dskernels:: ops; without it
                  the backward raises: an op never detaches in silence
    save          (ctx, inputs, output), as torch.library.register_autograd's setup_context
    """
    name = schema[: schema.index("(")]
    SCHEMAS[name] = schema
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dskernels::{name}", fake, lib=LIBRARY)
    if "!" not in schema:  # an op that writes its arguments has no gradient to offer
        if backward is None:
            backward, save = _no_backward(name), None
        torch.library.register_autograd(
            f"dskernels::{name}", backward, setup_context=save, lib=LIBRARY
        )
    return _caller(getattr(torch.ops.dskernels, name).default)


def _no_backward(name: str) -> Callable:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name} is not differentiable: detach its inputs or outputs")

    return backward


def _caller(op: Callable) -> Callable:
    """The call from Python. The autograd layer of torch.library costs 9 us even when there is
    nothing to differentiate; then it is skipped."""

    schema = op._schema
    name = schema.name.removeprefix("dskernels::")
    # The dispatcher lets None pass for a Tensor; a kernel would stumble over it.
    required = [
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if isinstance(argument.type, torch.TensorType)
    ]

    def call(*args: Any) -> Any:
        for i, argument in required:
            if args[i] is None:
                raise TypeError(f"{name}: {argument}: expected Tensor, got NoneType")
        if is_compiling():
            return op(*args)
        try:
            if _differentiates(name, args):
                return op(*args)
            with _BelowAutograd():
                return op(*args)
        except RuntimeError as error:
            readable = _argument_error(error)
            if readable is None:
                raise
        raise readable

    return call


def _differentiates(name: str, args: tuple) -> bool:
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    if not _is_grad_enabled():
        return False
    for arg in args:
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _refuse_tangents(name: str, args: tuple) -> None:
    """torch.library drops forward-mode tangents without a word."""
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative")


def _argument_error(error: RuntimeError) -> TypeError | None:
    """The dispatcher's complaint about an argument's type, in the form of all our errors."""
    match = _DISPATCHER_TYPE_ERROR.match(str(error))
    if match is None:
        return None
    op, expected, name, actual = match.groups()
    return TypeError(f"{op}: {name}: expected {expected}, got {actual}")


def constant(ctx: Any, op: str, inputs: tuple, **positions: int) -> None:
    """Refuse to differentiate by the named inputs, which the op treats as constants."""
    for name, position in positions.items():
        if ctx.needs_input_grad[position]:
            raise NotImplementedError(f"{op} is not differentiable in {name}: detach it")
