"""The latent-attention CUDA kernels in the emulator; see dskernels.cuda.mla."""

from ..cuda.mla import on

mla_schedule, mla_decode, mla_prefill, mla_prefill_backward, supports = on("emu")
