"""The row-wise CUDA kernels in the emulator; see dskernels.cuda.rowwise."""

from ..cuda.rowwise import on

quantize, supports = on("emu")
