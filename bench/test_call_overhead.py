"""What a call of a public op costs beyond its implementation: at most 10 us.

    python -m pytest bench/test_call_overhead.py                   # the bound, op by op
    python -m pytest bench/test_call_overhead.py --benchmark-only  # pytest-benchmark's own table

The bound is taken with an implementation that returns ready-made results, so that what is left is
the op layer alone: the Python function, the dispatcher, validation, the choice of backend. Calls
with and without the layer alternate, in CPU time of this thread, and the best of many short rounds
counts: another process on the machine can only add to it. Both in inference mode and with gradients
enabled (but no tensor that requires one), from the second call of a signature on: the first one
validates it.
"""

import sys
import time
from pathlib import Path

import pytest
import torch

import dskernels as dsk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ops_cases import CASES, public, reference
from ops_support import planted_modules

LIMIT_US = 10.0
CALLS, ROUNDS = 100, 60
ids = [case.id for case in CASES]


def instant(case):
    """An implementation of the case's op that returns the right result at once."""
    result = case.call(reference(case))[0]

    def implementation(*args, **kwargs):
        return result

    return implementation


def best_us(*functions):
    """Microseconds per call of each function, the best round of each."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            start = time.thread_time()
            for _ in range(CALLS):
                function()
            best[i] = min(best[i], (time.thread_time() - start) / CALLS * 1e6)
    return best


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_overhead_is_at_most_ten_microseconds(case, record_property):
    direct = instant(case)
    op, args, kwargs = public(case), case.args, case.kwargs
    overheads = {}
    for mode in (torch.inference_mode, torch.enable_grad):
        with planted_modules("cpu", **{case.stem: {case.op: direct}}), mode():
            through, alone = best_us(
                lambda: op(*args, **kwargs, backend="cpu"), lambda: direct(*args, **kwargs)
            )
        overheads[mode.__name__] = through - alone
    record_property("overhead_us", overheads)
    inference, grad = overheads.values()
    print(f"{case.id:28s} {inference:5.1f} us in inference mode, {grad:5.1f} us with grad enabled")
    assert max(inference, grad) <= LIMIT_US


@pytest.mark.parametrize("case", [c for c in CASES if c.diff], ids=lambda c: c.id)
def test_forward_call(benchmark, case):
    """The op on its own backend, for pytest-benchmark's table."""
    benchmark(public(case), *case.args, **case.kwargs)


def test_training_call(benchmark):
    """With a gradient to record, torch.library's autograd layer is paid as well."""
    x = torch.randn(3, 8, requires_grad=True)
    benchmark(dsk.swiglu, x)
