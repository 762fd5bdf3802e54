"""The FP8 GEMM CUDA kernels in the emulator; see dskernels.cuda.gemm."""

from ..cuda.gemm import GemmKernels

_kernels = GemmKernels("emu")
gemm, grouped_gemm = _kernels.gemm, _kernels.grouped_gemm
grouped_gemm_k, supports = _kernels.grouped_gemm_k, _kernels.supports
