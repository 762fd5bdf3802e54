"""dskernels: the kernels and systems behind DeepSeek-V3."""

from . import env, ep, eplb, nn, ops, ref
from .backend import (
    BackendError,
    Unsupported,
    backends,
    current_backend,
    supports,
    use_backend,
)
from .build import build_info
from .ops import *  # noqa: F403
from .types import ScaledTensor, Support

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ScaledTensor",
    "Support",
    "Unsupported",
    "backends",
    "build_info",
    "current_backend",
    "env",
    "ep",
    "eplb",
    "nn",
    "ops",
    "ref",
    "supports",
    "use_backend",
]
__all__ += ops.__all__
