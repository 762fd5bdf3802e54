"""What the emulator raises. Every error is an `EmuError`.

HazardError.hazards: list of Hazard (kind, severity, kernel, block, warp, role, lanes, ptx_line,
source_file, source_line, message). DeadlockError.warps: list of StuckWarp (kernel, device, block,
warp, role, lanes, ptx_line, source_file, source_line, state). PtxError.line: the PTX line refused.
"""

from dskernels._C import emu as _emu

EmuError = _emu.EmuError
PtxError = _emu.PtxError
HazardError = _emu.HazardError
DeadlockError = _emu.DeadlockError
Hazard = _emu.Hazard
StuckWarp = _emu.StuckWarp
