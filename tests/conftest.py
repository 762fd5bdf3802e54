"""Shared pytest set-up: reproducible seeds, and the backend axis.

A test with a `backend` argument runs once for each of `--backend cpu,emu,...`. A backend that is
not there is skipped with its reason; under CI, one that must be there fails instead.
"""

import os
import random

import numpy as np
import pytest

# Without a GPU, Triton's kernels run in its interpreter; it reads this when it is first imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Our kernels have no reason for what other people's are forgiven (dskernels.env says what it is).
os.environ.setdefault("DSK_EMU_CHECK", "order")

DEFAULT_BACKENDS = "ref,cpu,emu,triton,cuda"
# What the README's table lists as executed in CI: skipping one of these there is a failure.
REQUIRED_IN_CI = ("ref", "cpu", "triton")


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        default=DEFAULT_BACKENDS,
        help=f"comma-separated backends for tests with a backend axis (default {DEFAULT_BACKENDS})",
    )


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend").split(",")
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request):
    """Name of a backend that runs on this machine."""
    import dskernels as dsk

    available = dsk.backends()
    if request.param not in available:
        raise pytest.UsageError(f"--backend: expected {sorted(available)}, got {request.param!r}")
    support = available[request.param]
    if not support:
        if os.environ.get("CI") and request.param in REQUIRED_IN_CI:
            pytest.fail(f"{request.param} must run in CI: {support.reason}")
        pytest.skip(f"{request.param}: {support.reason}")
    return request.param


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    try:
        import torch
    except ImportError:  # the schedule and emulator tests run without torch
        return
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request):
    """The models' matrices are far too small to share between cores: waiting costs more."""
    if not request.module.__name__.startswith("test_model_"):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
