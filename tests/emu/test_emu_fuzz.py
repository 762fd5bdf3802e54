"""Malformed PTX never crashes the emulator: a few fixed mutants here, more at night, and
`python tests/emu/fuzz_ptx.py --seconds 600` for as long as one likes."""

import fuzz_ptx
import pytest


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (200, 10**6))]
)
def test_mutants_do_not_crash(first):
    code, lines = fuzz_ptx.child(first, 60)
    endings = [line.split()[1] for line in lines if line[:1].isdigit() and " " in line]
    assert code == 0, lines[-20:]
    assert len(endings) == 60 and len(set(endings)) >= 3, endings
