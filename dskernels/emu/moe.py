"""The mixture-of-experts CUDA kernels in the emulator; see dskernels.cuda.moe."""

from ..cuda.moe import Moe

_emu = Moe("emu")
moe_gate, moe_permute, moe_unpermute = _emu.moe_gate, _emu.moe_permute, _emu.moe_unpermute
moe_unpermute_backward = _emu.moe_unpermute_backward
moe_experts, supports = _emu.moe_experts, _emu.supports
