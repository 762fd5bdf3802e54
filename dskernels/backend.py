"""Which implementation runs an op, and why.

A backend is a package `dskernels.<name>` with one module per stem, whose functions have the names
and arguments of `dskernels.ref`. The package says through `available() -> Support` whether it can
run on this machine; a package without that function is not (yet) a backend. A stem module may
define `supports(op, **shapes) -> Support` for limits that depend on shapes, and its functions
raise `Unsupported(reason)`, before they change anything, for a call they cannot run.

The choice, strongest first: `backend=` of the call, `use_backend(...)`, the DSK_BACKEND variable,
"auto". "auto" takes the first backend of AUTO_ORDER that has the op. The backend "cpu" is complete
by definition: an op without a native kernel runs the PyTorch reference, and `supports` says so.
Every other backend named explicitly either runs the op or raises BackendError with the reason.

The current backend is one plain module global, shared by all threads: `torch.compile` can guard on
it (a ContextVar breaks the graph), and an op receives it as a string argument. So `use_backend` in
one thread changes what every other thread's calls run on; threads that need different backends
pass `backend=`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

import torch

from . import env
from .types import Support, Unsupported

__all__ = [
    "BACKENDS",
    "OPS",
    "BackendError",
    "Unsupported",
    "backends",
    "chosen",
    "current_backend",
    "run",
    "supports",
    "use_backend",
]

Backend = Literal["auto", "cuda", "triton", "cpu", "emu", "ref"]
BACKENDS = ("cuda", "triton", "cpu", "emu", "ref")
_CHOICES = env.BACKEND_CHOICES

# What "auto" tries, by the device of the op's first tensor. The emulator is never chosen unasked:
# it is a proof, thousands of times slower than any other backend.
AUTO_ORDER = {"cpu": ("cpu", "ref"), "cuda": ("cuda", "triton", "ref")}
# Devices whose tensors a backend accepts; the reference runs wherever torch does.
_DEVICES = {"cuda": ("cuda",), "triton": ("cuda", "cpu"), "cpu": ("cpu",), "emu": ("cpu",)}

# Public op -> stem, and the letters of the sizes that `supports` takes for a stem.
OPS = {
    "quantize": "rowwise",
    "dequantize": "rowwise",
    "pack_e5m6": "rowwise",
    "unpack_e5m6": "rowwise",
    "rms_norm": "rowwise",
    "rms_norm_quantize": "rowwise",
    "rope": "rowwise",
    "swiglu": "rowwise",
    "swiglu_quantize": "rowwise",
    "gemm": "gemm",
    "grouped_gemm": "gemm",
    "grouped_gemm_k": "gemm",
    "mla_decode": "mla",
    "mla_cache_append": "mla",
    "mla_prefill": "mla",
    "mla_latents": "mla",
    "mla_absorb_queries": "mla",
    "mla_absorb_output": "mla",
    "moe_gate": "moe",
    "moe_permute": "moe",
    "moe_unpermute": "moe",
    "moe_experts": "moe",
    "moe_bias_update": "moe",
}
SHAPE_LETTERS = {
    "rowwise": ("m", "k", "t", "h", "d", "r", "i"),
    "gemm": ("m", "n", "k", "g"),
    "mla": ("b", "s", "t", "h", "d", "dl", "r", "v", "pages", "page"),
    "moe": ("t", "d", "e", "i", "k", "m", "n_group", "topk_group", "topk"),
}


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


_current: str = env.get("DSK_BACKEND")


def current_backend() -> str:
    """The backend of calls that name none: "auto" or one of BACKENDS."""
    return _current


def chosen(backend: str | None) -> str:
    """The backend of a call: its own argument if given, else the current one.

    Raises ValueError for a name that is not a backend.
    """
    if backend is None:
        return _current
    if backend not in _CHOICES:
        raise ValueError(f"backend: expected one of {_CHOICES}, got {backend!r}")
    return backend


class use_backend:
    """Context manager: calls inside that name no backend run on this one.

    backend  "auto", "cuda", "triton", "cpu", "emu" or "ref"; ValueError for anything else. One
             that cannot run is refused by the op call (BackendError), not here.

    It nests, and an instance may be entered again. Process-wide, not per thread: see the module's
    docstring. Compiled functions notice the change and are recompiled once per backend.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = chosen(backend)
        self.outer: list[str] = []

    def __enter__(self) -> None:
        global _current
        self.outer.append(_current)
        _current = self.backend

    def __exit__(self, *exception: object) -> None:
        global _current
        _current = self.outer.pop()


# ---- finding implementations -------------------------------------------------------------------

_support: dict[str, Support] = {}
_chains: dict[tuple[str, str, str], tuple[Callable, ...]] = {}


def _forget() -> None:
    """Drop what was learned about backends and implementations (tests plant their own)."""
    _support.clear()
    _chains.clear()


def _module(name: str) -> ModuleType | None:
    """The module dskernels.<name>, or None where this build has none; other errors are bugs."""
    full = f"{__package__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name is None or not full.startswith(error.name):
            raise
        return None


def compiled(part: str) -> ModuleType | None:
    """The submodule `part` of the compiled library, or None where there is no such library."""
    return getattr(_module("_C"), part, None)


def _probe(backend: str) -> Support:
    if backend == "ref":
        return Support(True, "plain PyTorch, the specification")
    if backend == "cpu":
        return _probe_cpu()
    package = _module(backend)
    probe = getattr(package, "available", None)
    if probe is None:
        return Support(False, f"this build has no {backend} ops")
    return probe()


def _probe_cpu() -> Support:
    if _module("_C") is None:
        reason = "the compiled library dskernels._C is missing (python setup.py build_ext)"
        return Support(False, reason)
    info = getattr(_module("cpu"), "info", None)
    if info is None:
        return Support(True, "no native kernels in this build: PyTorch reference path")
    # A forced target that does not exist raises here: it is the user's to correct, not to miss.
    return Support(True, f"native kernels, target {info()['target']}; other ops: PyTorch reference")


def _backend_support(backend: str) -> Support:
    if backend not in _support:
        _support[backend] = _probe(backend)
    return _support[backend]


def backends() -> dict[str, Support]:
    """Every backend, and whether (and why not) it runs on this machine."""
    return {name: _backend_support(name) for name in BACKENDS}


def _native(op: str, stem: str, backend: str) -> Callable | None:
    """The function `op` of the backend's own stem module, or None."""
    return getattr(_module(f"{backend}.{stem}"), op, None)


def _reference(op: str, stem: str) -> Callable:
    function = _native(op, stem, "ref")
    # Gradients have no place in the forward's specification; they live beside it.
    return function or getattr(_module(f"ref.{stem}_backward"), op)


def _stem(op: str) -> str:
    return OPS[op.removesuffix("_backward")]


def _candidates(op: str, backend: str, device: str) -> Iterator[Callable]:
    stem = _stem(op)
    for name in AUTO_ORDER.get(device, ("ref",)) if backend == "auto" else (backend,):
        if name == "ref":
            continue
        support = _backend_support(name)
        function = _native(op, stem, name) if support else None
        if function is not None and device in _DEVICES[name]:
            yield function
    if backend in ("auto", "cpu", "ref"):
        yield _reference(op, stem)


def _refusal(op: str, backend: str, device: str) -> str:
    """Why an explicitly named backend cannot run `op` on `device`; empty when it can."""
    support = _backend_support(backend)
    if not support:
        return support.reason
    if backend != "ref" and device not in _DEVICES[backend]:
        return f"expected tensors on {' or '.join(_DEVICES[backend])}, got {device}"
    if backend not in ("ref", "cpu") and _native(op, _stem(op), backend) is None:
        return "it has no implementation of this op"
    return ""


def _chain(op: str, backend: str, device: str) -> tuple[Callable, ...]:
    if backend != "auto":
        reason = _refusal(op, backend, device)
        if reason:
            raise BackendError(f"{op}: backend {backend!r} is not available: {reason}")
    return tuple(_candidates(op, backend, device))


def run(op: str, backend: str, device: str, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on the first implementation of `backend` that takes this call.

    device is the type of the op's tensors ("cpu", "cuda"). Raises BackendError when an explicitly
    named backend is not available, or cannot run these arguments.
    """
    key = (op, backend, device)
    chain = _chains.get(key)
    if chain is None:
        chain = _chains[key] = _chain(op, backend, device)
    for function in chain:
        try:
            return function(*args, **kwargs)
        except Unsupported as refusal:
            reason = str(refusal)
    raise BackendError(f"{op}: backend {backend!r} cannot run this call: {reason}")


# ---- questions about backends ------------------------------------------------------------------


def supports(op: str, backend: str | None = None, **shapes: Any) -> Support:
    """Whether `backend` (default: the current one) runs `op`, and why or why not.

    op      a public op name, e.g. "gemm", "mla_decode" (OPS lists them)
    shapes  sizes by the letters of the op's stem (SHAPE_LETTERS: m=, n=, k= for gemm), and
            dtype=; without them the answer is about the op in general

    For "auto" the answer names the backend that would run. Raises ValueError for an unknown op,
    backend or size.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {sorted(OPS)}, got {op!r}")
    letters = (*SHAPE_LETTERS[OPS[op]], "dtype")
    for name in shapes:
        if name not in letters:
            raise ValueError(f"shapes of {op}: expected names among {letters}, got {name!r}")
    name = chosen(backend)
    if name != "auto":
        return _op_support(op, name, shapes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for candidate in AUTO_ORDER[device]:
        answer = _op_support(op, candidate, shapes)
        if answer:
            break
    return Support(answer.ok, f"{candidate}: {answer.reason}")


def _op_support(op: str, backend: str, shapes: dict[str, Any]) -> Support:
    support = _backend_support(backend)
    if not support or backend == "ref":
        return support
    stem = OPS[op]
    native = _native(op, stem, backend) is not None
    if native:
        ask = getattr(_module(f"{backend}.{stem}"), "supports", None)
        answer = ask(op, **shapes) if ask else Support(True, f"native {backend} kernel")
        if answer or backend != "cpu":
            return answer
        return Support(True, f"PyTorch reference path ({answer.reason})")
    if backend == "cpu":
        return Support(True, "PyTorch reference path (no native kernel)")
    return Support(False, f"the {backend} backend has no implementation of {op}")
