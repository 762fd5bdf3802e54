"""The latent-attention CUDA kernels in the emulator; see dskernels.cuda.mla."""

from ..cuda.mla import on
from ..cuda.mla_fused import MlaFused

mla_schedule, mla_decode, mla_prefill, mla_prefill_backward, supports = on("emu")
_fused = MlaFused("emu")
mla_latents, mla_cache_append = _fused.mla_latents, _fused.mla_cache_append
mla_absorb_queries, mla_absorb_output = _fused.mla_absorb_queries, _fused.mla_absorb_output
