"""The GEMM reference: against fp64, and the pinned sums bit for bit."""

import torch

from dskernels.ref import gemm as ref
from dskernels.ref import rowwise


def test_scaled_gemm_on_ragged_blocks_matches_fp64():
    torch.manual_seed(0)
    a = rowwise.quantize(torch.randn(5, 576))
    b = rowwise.quantize(torch.randn(200, 576), (128, 128))
    exact = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    got = ref.gemm(a, b, out_dtype=torch.float32)
    assert (got - exact).abs().max() < 1e-6 * exact.abs().max()
    assert ref.gemm(a, b).dtype == torch.bfloat16
