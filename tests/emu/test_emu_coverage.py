"""Every row of the instruction table is executed by a test of this folder."""

from pathlib import Path

import pytest

emu = pytest.importorskip("dskernels.emu")

# Row pattern -> why no test here executes it.
NOT_EXECUTED: dict[str, str] = {}


def test_every_row_is_executed(request, record_rows, record_property):
    """Runs last; needs the other files of this folder in the same session."""
    here = Path(__file__).parent
    collected = {Path(item.path).name for item in request.session.items}
    missing = {p.name for p in here.glob("test_emu_*.py")} - collected
    if missing:
        pytest.skip(f"runs with all of tests/emu: {sorted(missing)} were not collected")
    rows = [row["pattern"] for row in emu.instruction_table()]
    unused = [rows[k] for k in range(len(rows)) if k not in record_rows]
    record_property("rows", f"{len(rows) - len(unused)} of {len(rows)}")
    assert sorted(unused) == sorted(NOT_EXECUTED), "\n".join(unused)
