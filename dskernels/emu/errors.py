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

# Formal findings that `check="strict"` raises: no shipping kernel needs to read what nobody wrote,
# but one that does and drops the value is right.
STRICT_KINDS = frozenset({"uninitialized-read"})


def raise_for(hazards: list, kinds: frozenset[str]) -> None:
    """Raises HazardError for the findings of these kinds, if there are any."""
    hits = [h for h in hazards if h.kind in kinds]
    if hits:
        error = HazardError("\n".join(repr(h) for h in hits))
        error.hazards = hits
        raise error
