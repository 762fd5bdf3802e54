"""Registration with torch.library, and the way a public function calls its op.

An op is five functions: the check of its arguments, the kernel (choose an implementation, run it),
the fake kernel (make empty outputs), and for a differentiable op how to save and how to go back.
They are registered through Library.define/impl: torch.library.custom_op wraps each call in checks
that cost ten times as much.

A check reads nothing but the call's signature: types, sizes, strides, dtypes, devices, and the
values of arguments that are no tensors. So what passed once passes again, and a call from Python
whose signature is remembered (`_C.ops.Signatures`) goes straight to the kernel. Values of index
tensors are the kernel's to check, every time (`_values`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import backend as _backend

LIBRARY = torch.library.Library("dskernels", "DEF")
SCHEMAS: dict[str, str] = {}
SIGNATURES: dict[str, Any] = {}

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
    check: Callable,
    kernel: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
) -> Callable:
    """Register `schema` under dskernels:: and return the function that calls it.

    check         raises for a bad call; takes those of the schema's arguments that its parameters
                  name. It runs before kernel and fake, so that a bad call fails the same way in
                  eager mode, under torch.compile and through torch.ops
    kernel, fake  take the schema's arguments in order
    backward      (ctx, *grads) -> one gradient per argument, calling dskernels:: ops; without it
                  the backward raises: an op never detaches in silence
    save          (ctx, inputs, output), as torch.library.register_autograd's setup_context
    """
    name = schema[: schema.index("(")]
    SCHEMAS[name] = schema
    LIBRARY.define(schema)
    op = getattr(torch.ops.dskernels, name).default
    validate = _validator(op, check)
    LIBRARY.impl(name, _after(validate, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dskernels::{name}", _after(validate, fake), lib=LIBRARY)
    if "!" not in schema:  # an op that writes its arguments has no gradient to offer
        if backward is None:
            backward, save = _no_backward(name), None
        torch.library.register_autograd(
            f"dskernels::{name}", backward, setup_context=save, lib=LIBRARY
        )
    return _caller(op, validate, kernel)


def _validator(op: Any, check: Callable) -> Callable:
    """The check as a function of all of the op's arguments, in order."""
    positions = {argument.name: i for i, argument in enumerate(op._schema.arguments)}
    picked = {}
    for name, parameter in inspect.signature(check).parameters.items():
        if name in positions:
            picked[name] = positions[name]
        elif parameter.default is parameter.empty:
            raise TypeError(f"{op._schema.name}: its check takes {name}, which is no argument")

    def validate(*args: Any) -> None:
        check(**{name: args[i] for name, i in picked.items()})

    return validate


def _after(validate: Callable, function: Callable) -> Callable:
    def checked(*args: Any) -> Any:
        validate(*args)
        return function(*args)

    return checked


def _no_backward(name: str) -> Callable:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name} is not differentiable: detach its inputs or outputs")

    return backward


def _caller(op: Any, validate: Callable, kernel: Callable) -> Callable:
    """The call from Python. Where nothing but the kernel could run, the kernel is called directly:
    converting fifteen arguments for the dispatcher costs more than all of our checks."""
    schema = op._schema
    name = schema.name.removeprefix("dskernels::")
    arguments = [(a.name, _plain_types(a.real_type)) for a in schema.arguments]
    signatures = SIGNATURES[name] = _new_signatures()

    def call(*args: Any) -> Any:
        if is_compiling():
            return op(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if not (_dispatch_modes() or _transforms() is not None or _profiler_enabled()):
            grad = _is_grad_enabled()
            if signatures is not None and signatures.known(args, grad):
                with _BelowAutograd():
                    return kernel(*args)
            if _is_plain(args, arguments, grad):
                validate(*args)
                if signatures is not None:
                    signatures.remember(args)
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


def _new_signatures() -> Any:
    """An op's memory of validated signatures; None without the compiled library: a signature in
    Python costs as much as the checks that it would save."""
    native = _backend.compiled("ops")
    return None if native is None else native.Signatures(_TENSORS, torch.dtype)


def _is_plain(args: tuple, arguments: list, grad: bool) -> bool:
    """Whether the dispatcher would do nothing but call the kernel, where no mode, transform or
    profiler wants to see ops: real, ordinary tensors, exact argument types, no gradient to record.
    """
    if len(args) != len(arguments):
        return False
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
