"""A launch's profile as text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dskernels.emu.stat import CALIBRATION

if TYPE_CHECKING:
    from dskernels.emu.stat import LaunchProfile

_STATES = {
    "issue": "issuing", "mbarrier": "waiting for an mbarrier", "barrier": "waiting at a barrier",
    "cluster barrier": "waiting at the cluster barrier", "wgmma": "waiting for wgmma",
    "copies": "waiting for copy groups", "memory": "waiting for a load",
    "result": "waiting for arithmetic", "busy": "held back by other warps",
    "fence": "waiting for a fence",
}  # fmt: skip


def _bytes(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def where(instruction: dict) -> str:
    """The place of an instruction for people: its source line if there is one."""
    file = instruction["source_file"].rsplit("/", 1)[-1]
    source = f", {file}:{instruction['source_line']}" if file else ""
    return f"{instruction['text']} (PTX line {instruction['ptx_line']}{source})"


def wait_name(state: str, detail: int) -> str:
    """ "waiting for an mbarrier at shared offset 512" and the like."""
    text = _STATES[state]
    if state == "mbarrier":
        return f"{text} at shared offset {detail}"
    return f"{text} {detail}" if state == "barrier" else text


def launch_report(launch: LaunchProfile) -> str:
    """Modelled time, what limits it, where warps wait, traffic, conflicts, coalescing, mix."""
    t, b = launch.timing, launch.bytes
    ran, total = launch.sampled
    lines = [
        f"{launch.kernel}",
        f"grid {launch.grid}, block {launch.block}; {ran} of {total} clusters ran, "
        f"{t.ctas_per_sm} CTAs fit an SM, {t.waves:g} waves",
        str(t),
        f"  ({CALIBRATION})",
        "  floors: "
        + ", ".join(f"{k} {v:.1f} us" for k, v in t.floors_us.items())
        + f"; {_bytes(t.hbm_bytes)} HBM, {_bytes(t.l2_bytes)} L2 (modelled)",
        "  busy: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in t.busy.items()),
        "  where warps are:",
    ]
    waits = sorted(t.waits.items(), key=lambda item: -item[1][1])
    for (state, detail), (times, cycles) in waits[:8]:
        share = _percent(cycles, t.warp_cycles)
        lines.append(f"    {share:>7}  {wait_name(state, detail)} ({times} times)")
    lines.append(
        f"  bytes: global read {_bytes(b['l2_read'])} ({_bytes(b['unique_read'])} unique), written "
        f"{_bytes(b['l2_written'])} ({_bytes(b['unique_written'])} unique); shared read "
        f"{_bytes(b['shared_read'])}, written {_bytes(b['shared_written'])}, wgmma operands "
        f"{_bytes(b['wgmma_operands'])}; other CTAs' shared memory {_bytes(b['dsmem'])}"
    )
    lines.append(
        f"  bank conflicts: {launch.bank_conflict_ways:.2f} cycles for each needed; global: "
        f"{launch.sectors_per_request:.1f} sectors per request"
    )
    for i in launch.conflicts(3):
        lines.append(f"    {i['wavefronts'] / i['requests']:.1f} cycles, {where(i)}")
    for i in launch.uncoalesced(3):
        lines.append(f"    {i['sectors'] / i['requests']:.1f} sectors, {where(i)}")
    count = Counter(launch.mix)
    every = count.total()
    mix = ", ".join(f"{k} {_percent(v, every)}" for k, v in count.most_common(8))
    lines.append(f"  instructions: {mix}")
    return "\n".join(lines)
