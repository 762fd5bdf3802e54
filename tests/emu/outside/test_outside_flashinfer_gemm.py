"""FlashInfer's FP8 block-scale GEMM for Hopper (PyPI flashinfer-python) in the emulator, bit for bit
against ref: its kernel for few tokens, which swaps the operands, and its kernel for more."""

import flashinfer_gemm_support as fg
import pytest
import torch
from outside_support import findings, need_nvcc, seeds_by_tier

emu = pytest.importorskip("dskernels.emu")

from dskernels.ref import gemm as ref_gemm  # noqa: E402
from dskernels.ref import rowwise  # noqa: E402
from dskernels.testing import assert_bitwise_equal  # noqa: E402

pytestmark = [
    need_nvcc(),
    pytest.mark.skipif(
        fg.FOLDER is None,
        reason="PyPI flashinfer-python is not installed (pip install --no-deps flashinfer-python)",
    ),
]
# (m, n, k): tokens with and without a tail, columns with a tail, k of one round of the ring and more.
SHAPES = [(5, 256, 384), (24, 192, 1152), (40, 192, 1152)]


@pytest.mark.parametrize(
    "m,n,k", [SHAPES[0], *(pytest.param(*s, marks=pytest.mark.slow) for s in SHAPES[1:])]
)
@pytest.mark.parametrize("seed", seeds_by_tier())
def test_dense(m, n, k, seed):
    instances = tuple(fg.choose(*shape) for shape in SHAPES)
    torch.manual_seed(seed)
    a, b = rowwise.quantize(torch.randn(m, k)), rowwise.quantize(torch.randn(n, k), (128, 128))
    got, stats = fg.run(fg.build(instances), fg.choose(m, n, k), a, b, seed=seed)
    findings(stats, "flashinfer gemm")
    assert_bitwise_equal(got, ref_gemm.gemm(a, b, accumulate="hopper"))
