"""Split a backward pass: the input gradient now, the weight gradients later.

Zero-bubble schedules send a stage's input gradient on before they compute its weight gradients.
Autograd has no such half; but a weight gradient is a leaf of the backward graph, so an autograd
function can hand it to a store as a closure instead of computing it. `WeightGradStore` is that
store, with the names of deepseek-ai/DualPipe, for user functions that know it. For all other
modules `defer_linears()` swaps `torch.nn.functional.linear` on leaf weights for such a function
while a stage's forward runs. Other parameters (norms, embeddings) get their gradients with the
input gradient: they are cheap.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode


class WeightGradStore:
    """Closures of weight gradients not computed yet: one pass fills `cache`, `flush` ends it.

    Class-level, as in deepseek-ai/DualPipe: one process runs one pass at a time.
    """

    enabled: bool = False
    cache: list[Callable[[], None]] = []
    funcs_queue: queue.Queue = queue.Queue()

    @classmethod
    def put(cls, func: Callable[[], None]) -> None:
        """Keep a closure that adds one weight's gradient; call only while `enabled`."""
        cls.cache.append(func)

    @classmethod
    def take(cls) -> list[Callable[[], None]]:
        """Remove and return the closures of the pass that just ended."""
        taken, cls.cache = cls.cache, []
        return taken

    @classmethod
    def flush(cls) -> None:
        """End a pass: its closures join the queue as one entry."""
        cls.funcs_queue.put(cls.take())

    @classmethod
    def pop(cls) -> None:
        """Compute the oldest entry."""
        if cls.funcs_queue.empty():
            raise RuntimeError("WeightGradStore.pop: no pass is queued")
        with torch.no_grad():
            for func in cls.funcs_queue.get():
                func()

    @classmethod
    def clear(cls) -> None:
        cls.cache = []
        cls.funcs_queue = queue.Queue()


def accumulate(param: torch.Tensor, grad: torch.Tensor) -> None:
    """What autograd's accumulation does for a leaf."""
    if param.grad is None:
        param.grad = grad
    else:
        param.grad += grad


class _DeferredLinear(torch.autograd.Function):
    """y = x w^T + bias, whose weight gradient goes to the store if it is enabled.

    The products are those that autograd forms for `linear`, so the results agree bit for bit.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias = bias
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        bias = ctx.bias

        @torch.no_grad()
        def weight_grad() -> None:
            rows = grad.reshape(-1, grad.shape[-1])
            accumulate(weight, rows.t().mm(x.reshape(-1, x.shape[-1])))
            if bias is not None and bias.requires_grad:
                accumulate(bias, rows.sum(0))

        if WeightGradStore.enabled:
            WeightGradStore.put(weight_grad)
        else:
            weight_grad()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.reshape(-1, grad.shape[-1]).mm(weight).view(x.shape)
        return grad_x, None, None


class defer_linears(TorchFunctionMode):
    """While active, `linear` on leaf weights can leave its weight gradient for later.

    A linear whose input needs no gradient (a frozen or first layer) still takes part: its
    output's graph is kept alive by the weight itself.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and torch.is_grad_enabled():
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if _splittable(weight, bias) and x.dim() >= 2:
                # A mode is off while it handles a call: the function's own linear is the real one.
                return _DeferredLinear.apply(x, weight, bias)
        return func(*args, **kwargs)


def _linear_arguments(input, weight, bias=None):
    return input, weight, bias


def _splittable(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Plain leaf parameters without hooks: nothing else wants to see their gradient arrive."""
    if not (weight.is_leaf and weight.requires_grad and weight.dim() == 2):
        return False
    watched = (weight,) if bias is None else (weight, bias)
    return all(
        p.is_leaf and not p._backward_hooks and not getattr(p, "_post_accumulate_grad_hooks", None)
        for p in watched
    )


def run_backward(tensors, grads) -> None:
    """`torch.autograd.backward` of several outputs, keeping no graph."""
    torch.autograd.backward(list(tensors), list(grads))
