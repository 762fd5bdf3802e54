"""Shared pytest set-up: reproducible seeds, and CI fails where a laptop only skips."""

import random

import numpy as np
import pytest


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
