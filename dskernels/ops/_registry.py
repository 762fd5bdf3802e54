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
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_profiler_enabled = torch.autograd._profiler_enabled
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
    return _caller(getattr(torch.ops.dskernels, name).default, kernel)


def _no_backward(name: str) -> Callable:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name} is not differentiable: detach its inputs or outputs")

    return backward


def _caller(op: Any, kernel: Callable) -> Callable:
    """The call from Python. Where nothing but the kernel could run, the kernel is called directly:
    converting fifteen arguments for the dispatcher costs more than all of our checks."""
    schema = op._schema
    name = schema.name.removeprefix("dskernels::")
    arguments = [(a.name, _plain_types(a.real_type)) for a in schema.arguments]

    def call(*args: Any) -> Any:
        if is_compiling():
            return op(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if _is_plain(args, arguments):
            with _BelowAutograd():
                return kernel(*args)
        for value, (argument, types) in zip(args, arguments):
            if value is None and NoneType not in types:  # the dispatcher lets None pass
                raise TypeError(f"{name}: {argument}: expected Tensor, got NoneType")
        try:
            return op(*args)
        except RuntimeError as error:
            readable = _argument_error(error)
            if readable is None:
                raise
        raise readable

    return call


def _plain_types(type_: Any) -> tuple[type, ...]:
    """The exact Python types of an argument that a kernel takes without the dispatcher's help."""
    if isinstance(type_, torch.OptionalType):
        return (*_plain_types(type_.getElementType()), NoneType)
    return _PLAIN_TYPES[str(type_)]


NoneType = type(None)
_PLAIN_TYPES = {
    "Tensor": (Tensor, torch.nn.Parameter),
    "str": (str,),
    "bool": (bool,),
    "float": (float, int),
    "int": (int,),
    "SymInt": (int,),
    "ScalarType": (torch.dtype,),
    "List[int]": (list, tuple),
    "List[SymInt]": (list, tuple),
}
_TENSORS = (Tensor, torch.nn.Parameter)


def _is_plain(args: tuple, arguments: list) -> bool:
    """Whether the dispatcher would do nothing but call the kernel: real, ordinary tensors, exact
    argument types, no gradient to record, no mode, transform or profiler that wants to see ops."""
    if (
        _dispatch_modes()
        or _transforms() is not None
        or _profiler_enabled()
        or len(args) != len(arguments)
    ):
        return False
    grad = _is_grad_enabled()
    for value, (_, types) in zip(args, arguments):
        kind = type(value)
        if kind not in types:
            return False
        if kind in _TENSORS:
            if (grad and value.requires_grad) or value.is_meta or value.is_neg():
                return False
        elif (kind is list or kind is tuple) and any(type(v) is not int for v in value):
            return False
    return True


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
