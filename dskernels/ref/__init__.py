"""The specification: every op in plain PyTorch, one module per stem.

What these functions return is what every other backend must return: shapes, dtypes, padding, -1
entries, empty inputs, ties, NaN. They are written to be read, and run on any device torch runs on.

    rowwise   quantisation, RMSNorm, RoPE, SwiGLU        fp8         casts and number formats
    gemm      dense and grouped matrix products          tensorcore  Hopper's exact arithmetic
    mla       latent attention, paged cache
    moe       router, permutation, experts, balance losses
    ep        expert-parallel exchange, all ranks in one process
"""

from . import ep, fp8, gemm, mla, moe, rowwise, tensorcore

__all__ = ["ep", "fp8", "gemm", "mla", "moe", "rowwise", "tensorcore"]
