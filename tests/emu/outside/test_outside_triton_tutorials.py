"""Softmax, matrix product and flash-attention as Triton's tutorials write them, in the emulator.

The kernels are ours (triton_kernels.py), their PTX is the compiler's: wgmma and mbarriers for
sm_90, mma.sync, ldmatrix and cp.async pipelines for sm_80. Against fp64.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outside_support import findings, seeds_by_tier

emu = pytest.importorskip("dskernels.emu")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SEEDS = seeds_by_tier()
TARGETS = [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"]
SCRIPT = Path(__file__).with_name("triton_kernels.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, target, grid, *args, seed=...): compiled once a name and target."""
    folder = tmp_path_factory.mktemp("tutorials")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = {}

    def call(name, target, grid, *args, seed):
        if (name, target) not in cache:
            command = [sys.executable, str(SCRIPT), str(folder), name, target]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            facts = json.loads((folder / f"{name}.{target}.json").read_text())
            assert facts["global_scratch_size"] == 0
            module = emu.Module(folder / f"{name}.{target}.ptx")
            cache[name, target] = module.kernel(facts["name"]), facts
        kernel, facts = cache[name, target]
        scratch = [None] * (len(kernel.info["params"]) - len(args))
        stats = kernel[grid, 32 * facts["num_warps"]](
            *args, *scratch, shared=facts["shared"], seed=seed
        )
        findings(stats, f"triton tutorial {name} {target}")

    return call


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_softmax(run, target, seed):
    x = normal(5, 784, seed=seed) * 4
    y = torch.full_like(x, torch.nan)
    run("softmax", target, 5, x, y, 784, 784, seed=seed)
    exact = torch.softmax(x.double(), -1)
    # The exponent, below 64 in size, is rounded twice: 2^-19 absolute, times ln 2, and once more.
    assert ((y.double() - exact).abs() <= 2.0**-18 * exact + 1e-30).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_matmul(run, target, seed):
    m, n, k = 70, 144, 208
    a, b = normal(m, k, seed=seed).bfloat16(), normal(k, n, seed=seed + 1).bfloat16()
    d = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    run("matmul", target, (2, 3), a, b, d, m, n, k, seed=seed)
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    assert ((d.double() - exact).abs() <= exact.abs() * 2.0**-8 + size * 2.0**-20).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_attention(run, target, seed):
    heads, s, t, d = 2, 70, 150, 64
    q = normal(heads, s, d, seed=seed).bfloat16()
    k = normal(heads, t, d, seed=seed + 1).bfloat16()
    v = normal(heads, t, d, seed=seed + 2).bfloat16()
    o = torch.full_like(q, torch.nan)
    scale = d**-0.5
    run("attention", target, (2, heads), q, k, v, o, s, t, scale, seed=seed)
    scores = q.double() @ k.double().transpose(1, 2) * scale
    seen = torch.arange(t)[None, :] <= torch.arange(s)[:, None] + t - s
    exact = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v.double()
    # Probabilities and result are rounded to bf16, relative 2^-9 each.
    weight = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v.double().abs()
    assert ((o.double() - exact).abs() <= 2.0**-8 * (weight + exact.abs())).all()
