"""The MLA reference against a dense softmax in fp64."""

import torch

from dskernels.ref import mla


def test_decode_equals_dense_attention():
    torch.manual_seed(0)
    cache = torch.randn(4, 8, 24)
    q = torch.randn(1, 2, 3, 24)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    out, lse = mla.mla_decode(q, cache, table, torch.tensor([19]), head_dim_v=16)
    rows = torch.cat([cache[2], cache[0], cache[3]])[:19].double()
    for j in range(2):
        keys = rows[: 19 - 2 + j + 1]
        scores = q[0, j].double() @ keys.T * 24**-0.5
        want = scores.softmax(-1) @ keys[:, :16]
        torch.testing.assert_close(out[0, j].double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[0, :, j].double(), scores.logsumexp(-1))
