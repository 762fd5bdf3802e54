"""Benchmarks. PyTorch's threads wait asleep, as with `make`: spinning ones take the processors that
the threads of dskernels' pool need (docs/cpu.md). A setting of OMP_WAIT_POLICY wins."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded, not later
