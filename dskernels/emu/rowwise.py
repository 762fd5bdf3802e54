"""The row-wise CUDA kernels in the emulator; see dskernels.cuda.rowwise."""

from ..cuda.rowwise import Rowwise

_emu = Rowwise("emu")
quantize, dequantize = _emu.quantize, _emu.dequantize
rms_norm, rms_norm_quantize, rope = _emu.rms_norm, _emu.rms_norm_quantize, _emu.rope
swiglu, swiglu_quantize = _emu.swiglu, _emu.swiglu_quantize
swiglu_backward = _emu.swiglu_backward
pack_e5m6, unpack_e5m6, supports = _emu.pack_e5m6, _emu.unpack_e5m6, _emu.supports
