"""The public functions: one typed Python function per op, whatever backend runs it.

Each takes `backend=` (see `dskernels.backend` for how the choice is made), validates its arguments
(TypeError or ValueError, naming op, argument, expected, actual), and calls an op registered with
`torch.library` as `torch.ops.dskernels.<name>`: fake kernels and gradients included, so that it
works under `torch.compile(fullgraph=True)`. The C-like forms of torch.ops take a ScaledTensor as
data, scale and block sizes, and the backend as a string.

Results are contiguous and never alias an argument (scales have the layout `quantize` documents);
only `out=`, `mla_cache_append` and `mla_latents` write to one. Non-contiguous arguments are
welcome.
"""

from .dequantize import dequantize, pack_e5m6, unpack_e5m6
from .experts import moe_experts
from .gemm import gemm
from .grouped import grouped_gemm, grouped_gemm_k
from .mla import mla_cache_append, mla_decode, mla_prefill
from .mla_fused import mla_absorb_output, mla_absorb_queries, mla_latents
from .moe import moe_bias_update, moe_gate, moe_permute, moe_unpermute
from .rowwise import (
    quantize,
    rms_norm,
    rms_norm_quantize,
    rope,
    swiglu,
    swiglu_quantize,
)

__all__ = [
    "dequantize",
    "gemm",
    "grouped_gemm",
    "grouped_gemm_k",
    "mla_absorb_output",
    "mla_absorb_queries",
    "mla_cache_append",
    "mla_decode",
    "mla_latents",
    "mla_prefill",
    "moe_bias_update",
    "moe_experts",
    "moe_gate",
    "moe_permute",
    "moe_unpermute",
    "pack_e5m6",
    "quantize",
    "rms_norm",
    "rms_norm_quantize",
    "rope",
    "swiglu",
    "swiglu_quantize",
    "unpack_e5m6",
]
