"""The row-wise reference: quantisation, RMSNorm, RoPE, SwiGLU."""

import torch

from dskernels.ref import rowwise


def test_quantize_ragged_row():
    torch.manual_seed(0)
    x = torch.randn(6, 576)
    q = rowwise.quantize(x)
    assert q.scale.shape == (6, 5) and q.scale.stride() == (1, 8)
    assert (q.dequantize() - x).abs().max() < x.abs().max() * 2**-4
