"""What the command line says about a launch: as text, or as one JSON document with `--json`."""

from typing import Any

from dskernels.emu.errors import DeadlockError, EmuError, HazardError, PtxError

_PLACE = ("kernel", "block", "warp", "role", "lanes", "ptx_line", "source_file", "source_line")


def hazard_dict(hazard: Any) -> dict:
    """One finding: kind, severity, where, and what (message)."""
    return {f: getattr(hazard, f) for f in ("kind", "severity", *_PLACE, "message")}


def error_dict(error: EmuError) -> dict:
    """{ok: False, error, message} and `hazards`, `warps` or `line`, by the error's type."""
    out = {"ok": False, "error": type(error).__name__, "message": str(error)}
    if isinstance(error, HazardError):
        out["hazards"] = [hazard_dict(h) for h in error.hazards]
    if isinstance(error, DeadlockError):
        out["warps"] = [
            {f: getattr(w, f) for f in ("device", *_PLACE, "state")} for w in error.warps
        ]
    if isinstance(error, PtxError):
        out["line"] = error.line
    return out


def launch_dict(stats: Any, schedules: int) -> dict:
    """A launch without errors: counts of the fixed schedule, and the formal findings of all."""
    fields = ("warp_instructions", "thread_instructions", "async_operations", "wgmma", "seconds")
    return {
        "ok": True,
        "kernel": stats.kernel,
        "schedules": schedules,
        **{f: getattr(stats, f) for f in fields},
        "hazards": [hazard_dict(h) for h in stats.hazards],
    }


def launch_text(stats: Any, schedules: int) -> str:
    """The same for people."""
    lines = [repr(h) for h in stats.hazards]
    lines.append(
        f"{stats.kernel}: {stats.warp_instructions} warp-instructions, "
        f"{stats.async_operations} asynchronous operations, {stats.wgmma} wgmma groups, "
        f"{stats.seconds * 1e3:.2f} ms on the host; {schedules} schedules, no error"
        + (f", {len(stats.hazards)} formal findings" if stats.hazards else "")
    )
    return "\n".join(lines)
