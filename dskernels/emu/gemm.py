"""The FP8 GEMM CUDA kernels in the emulator; see dskernels.cuda.gemm."""

from ..cuda.gemm import on

gemm, grouped_gemm, grouped_gemm_k, supports = on("emu")
