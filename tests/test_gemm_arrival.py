"""Experts whose rows another kernel brings while the GEMM runs: it waits for each one's signal, and
what the signal says is then seen by TMA. The exchange itself: test_ep_overlap.py."""

import struct

import torch
from backend_axis import need

import dskernels as dsk
from dskernels import _C, emu
from dskernels.cuda.gemm import GemmKernels
from dskernels.ref import gemm as ref
from dskernels.testing import assert_bitwise_equal

EXPERTS, ROWS, N, K = 4, 64, 128, 256

# One warp of another grid: idles, so that the GEMM is there first, then copies an expert's rows and
# only then says how many they are; expert after expert.
BRINGER = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry bring(.param .u64 from, .param .u64 to, .param .u32 words, .param .u64 arrived,
                      .param .u64 rows, .param .u32 experts) {
  .reg .pred %p<4>; .reg .b32 %r<12>; .reg .b64 %d<8>;
  ld.param.u64 %d1, [from];
  ld.param.u64 %d2, [to];
  ld.param.u32 %r1, [words];
  ld.param.u64 %d3, [arrived];
  ld.param.u64 %d4, [rows];
  ld.param.u32 %r2, [experts];
EXPERT:
  mov.u32 %r3, 0;
IDLE:
  add.u32 %r3, %r3, 1;
  setp.lt.u32 %p1, %r3, 20000;
  @%p1 bra IDLE;
  mov.u32 %r3, 0;
COPY:
  ld.global.u32 %r4, [%d1];
  st.global.u32 [%d2], %r4;
  add.s64 %d1, %d1, 4;
  add.s64 %d2, %d2, 4;
  add.u32 %r3, %r3, 1;
  setp.lt.u32 %p2, %r3, %r1;
  @%p2 bra COPY;
  ld.global.u32 %r5, [%d4];
  add.u32 %r5, %r5, 1;
  st.release.gpu.global.u32 [%d3], %r5;
  add.s64 %d3, %d3, 4;
  add.s64 %d4, %d4, 4;
  sub.u32 %r2, %r2, 1;
  setp.ne.u32 %p3, %r2, 0;
  @%p3 bra EXPERT;
  ret;
}
"""


def bring(stream, source, to, arrived, rows):
    """Queue the kernel above; the arrays must be lent."""
    module = emu.Module(BRINGER)
    params = struct.pack(
        "QQIxxxxQQI", source.data_ptr(), to.data_ptr(), source.numel() // EXPERTS // 4,
        arrived.data_ptr(), rows.data_ptr(), EXPERTS,
    )  # fmt: skip
    one = (1, 1, 1)
    _C.emu.launch(stream, module._handle, "bring", one, one, one, 0, params, 0, True, 0, False)
    return module


def test_each_expert_is_waited_for():
    """A GEMM queued first, and every expert's rows late. Nothing that it reads sooner is right:
    values are NaN until they come, and a word that is no count yet is zero or negative."""
    need("gemm", "emu")
    g = torch.Generator().manual_seed(0)
    x = dsk.quantize(torch.randn(EXPERTS * ROWS, K, generator=g))
    w = dsk.quantize(torch.randn(EXPERTS, N, K, generator=g), block=(128, 128))
    scale = x.scale.reshape(EXPERTS, ROWS, -1).transpose(1, 2).contiguous().transpose(1, 2)
    come = x.data.view(torch.uint8).reshape(EXPERTS, ROWS, K)
    data = torch.full_like(come, 0x7F)
    a = dsk.ScaledTensor(data.view(torch.float8_e4m3fn), scale, (1, 128))
    rows = torch.tensor([ROWS, 0, 5, 33], dtype=torch.int32)
    arrived = torch.tensor([0, -1, -(2**31), 0], dtype=torch.int32)
    out = torch.full((EXPERTS, ROWS, N), torch.nan).bfloat16()
    stream = _C.emu.create_stream(0)
    touched = GemmKernels("emu").grouped_gemm_on_arrival(
        a, w, arrived, out, on=(0, stream), expected_m=ROWS, num_sms=2
    )
    lent = [*touched, come, rows]
    for tensor in lent:
        _C.emu.lend(tensor.data_ptr(), tensor.nbytes, False, "tensor")
    try:
        module = bring(0, come, data, arrived, rows)
        _C.emu.synchronize()
        del module
    finally:
        for tensor in lent:
            _C.emu.take_back(tensor.data_ptr(), tensor.nbytes)
        _C.emu.destroy_stream(stream)
    assert arrived.tolist() == [n + 1 for n in rows.tolist()]
    for expert, n in enumerate(rows.tolist()):
        bits = x.data.view(torch.uint8)[expert * ROWS :][:n].view(torch.float8_e4m3fn)
        here = dsk.ScaledTensor(bits, x.scale[expert * ROWS :][:n], (1, 128))
        weight = dsk.ScaledTensor(w.data[expert], w.scale[expert], w.block)
        if n:
            want = ref.gemm(here, weight, accumulate="hopper")
            assert_bitwise_equal(out[expert, :n], want)
        assert out[expert, n:].isnan().all(), "rows behind the last were written"
