"""The FP8 GEMM CUDA kernels in the emulator; see dskernels.cuda.gemm."""

from ..cuda.gemm import on

gemm, grouped_gemm, supports = on("emu")
