"""Benchmarks. PyTorch's threads stay awake for some 10 us between regions, as in `make`: libgomp's
default, milliseconds, takes the processors that the next candidate's threads need; sleeping at once
costs small models up to half of their speed (docs/cpu.md). OMP_WAIT_POLICY wins if it is set."""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read when torch is loaded, not later
