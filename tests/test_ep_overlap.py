"""Experts that start before all tokens have arrived, and exchange behind computation: virtual GPUs,
two streams each, every interleaving drawn by seed, bit-equal to doing one after the other."""

import os
import struct

import pytest
import torch
from ep_workers import routing, same

import dskernels as dsk
from dskernels.ref import ep as ref
from dskernels.types import ScaledTensor

emu = pytest.importorskip("dskernels.emu")
if not emu.available():
    pytest.skip(emu.available().reason, allow_module_level=True)
from dskernels import _C  # noqa: E402
from dskernels.cuda.ep import PeerGroup  # noqa: E402
from dskernels.cuda.gemm import GemmKernels, forced_kernel  # noqa: E402

pytestmark = pytest.mark.timeout(300)
K, T, H, LOCAL = 3, 8, 256, 3
kernels = GemmKernels("emu")


@pytest.fixture
def seed(monkeypatch):
    def set_seed(value):
        monkeypatch.setitem(os.environ, "DSK_EMU_SEED", str(value))

    set_seed(0)
    return set_seed


def weights_of(rank, n=H):
    g = torch.Generator().manual_seed(rank)
    return dsk.quantize(torch.randn(LOCAL, n, H, generator=g) * 0.1, block=(128, 128))


def make(ranks, max_tokens=T, num_sms=2):
    return PeerGroup(
        "emu", ranks, num_experts=LOCAL * ranks, max_tokens=max_tokens, hidden=H, topk=K,
        num_sms=num_sms,
    )  # fmt: skip


def problem(ranks, kind, n):
    return routing(kind, ranks, LOCAL * ranks, K, T, H, n)


def expected(ranks, case, tokens=T):
    """Per rank: counts, and the experts' results one after the other, on the same kernels."""
    xs, idxs, _ = case
    options = dict(max_tokens=tokens, num_experts=LOCAL * ranks, use_fp8=True)
    want = ref.low_latency_dispatch(xs, idxs, **options)
    ys = [kernels.grouped_gemm(w.x, weights_of(r), masked_m=w.count, expected_m=T)
          for r, w in enumerate(want)]  # fmt: skip
    return want, ys


def start_experts(group, got, outs):
    def launch(r, stream):
        return kernels.grouped_gemm_on_arrival(
            got[r].x, weights_of(r), got[r].arrived, outs[r], on=(r, stream), expected_m=T,
            num_sms=4,
        )  # fmt: skip

    group.beside(launch)


def same_rows(outs, ys, want):
    for out, y, w in zip(outs, ys, want):
        for expert, n in enumerate(w.count.tolist()):
            same(out[expert, :n], y[expert, :n], "experts")
            assert out[expert, n:].isnan().all(), "rows behind the last were written"


def poisoned(ranks, tokens=T):
    return [torch.full((LOCAL, ranks * tokens, H), torch.nan).bfloat16() for _ in range(ranks)]


@pytest.mark.parametrize(
    "ranks, kernel, tokens", [(2, "", 8), (4, "", 8), (4, "gemm_fp8_64x64", 16)]
)
def test_experts_start_on_arrival(ranks, kernel, tokens, seed):
    with forced_kernel(kernel):
        experts_start_on_arrival(ranks, seed, tokens)


def experts_start_on_arrival(ranks, seed, tokens):
    group = make(ranks, tokens, 2 * LOCAL)  # two CTAs bring an expert's rows
    for n, kind in enumerate(("even", "skewed", "one", "empty")):
        seed(n)
        case = problem(ranks, kind, n)
        want, ys = expected(ranks, case, tokens)
        got, hook = group.low_latency_dispatch(case[0], case[1], signal_arrival=True)
        outs = poisoned(ranks, tokens)
        if n % 2:  # whoever is queued first
            hook(wait=False)
            start_experts(group, got, outs)
        else:
            start_experts(group, got, outs)
            hook(wait=False)
        backs, done = group.low_latency_combine(ys, case[1], case[2], got)
        done()
        same_rows(outs, ys, want)
        back = ref.low_latency_combine(ys, case[1], case[2], want, max_tokens=tokens)
        for r in range(ranks):
            assert (got[r].arrived - 1).tolist() == want[r].count.tolist()
            same(backs[r], back[r], "combined")


# Waits until the first expert's results are there, and only then brings the last expert's rows.
LATE = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry late(.param .u64 result, .param .u64 from, .param .u64 to, .param .u32 words,
                     .param .u64 arrived, .param .u32 rows) {
  .reg .pred %p<3>; .reg .b16 %h<2>; .reg .b32 %r<8>; .reg .b64 %d<8>;
  ld.param.u64 %d1, [result];
POLL:
  ld.relaxed.sys.global.u16 %h1, [%d1];
  setp.eq.u16 %p1, %h1, 0x7fc0;
  @%p1 bra POLL;
  ld.param.u64 %d2, [from];
  ld.param.u64 %d3, [to];
  ld.param.u32 %r1, [words];
  mov.u32 %r2, 0;
COPY:
  setp.ge.u32 %p2, %r2, %r1;
  @%p2 bra DONE;
  ld.global.u32 %r3, [%d2];
  st.global.u32 [%d3], %r3;
  add.s64 %d2, %d2, 4;
  add.s64 %d3, %d3, 4;
  add.u32 %r2, %r2, 1;
  bra COPY;
DONE:
  ld.param.u64 %d4, [arrived];
  ld.param.u32 %r4, [rows];
  add.u32 %r4, %r4, 1;
  st.release.gpu.global.u32 [%d4], %r4;
  ret;
}
"""


def test_an_expert_is_computed_before_the_last_one_arrives(seed):
    """Were the first expert's GEMM to wait for the last signal, nothing would ever end."""
    seed(1)
    rows = 16
    x = dsk.quantize(torch.randn(LOCAL * rows, H, generator=torch.Generator().manual_seed(0)))
    w = weights_of(0)
    data = x.data.view(torch.uint8).view(LOCAL, rows, H).clone()
    # Scales [LOCAL, rows, H / 128], MN-major in each plane.
    planes = x.scale.reshape(LOCAL, rows, -1).transpose(1, 2).contiguous()
    a = ScaledTensor(data.view(torch.float8_e4m3fn), planes.transpose(1, 2), (1, 128))
    full = torch.full((LOCAL,), rows, dtype=torch.int32)
    want = kernels.grouped_gemm(a, w, masked_m=full, expected_m=rows)
    last = data[-1].clone()
    data[-1] = 0x7F  # NaN: not there yet
    arrived = torch.tensor([rows + 1] * (LOCAL - 1) + [0], dtype=torch.int32)
    out = torch.full((LOCAL, rows, H), torch.nan).bfloat16()
    stream = _C.emu.create_stream(0)
    late = emu.Module(LATE)
    touched = kernels.grouped_gemm_on_arrival(
        a, w, arrived, out, on=(0, stream), expected_m=rows, num_sms=1
    )
    params = struct.pack(
        "QQQIxxxxQI", out.data_ptr(), last.data_ptr(), data[-1].data_ptr(), last.numel() // 4,
        arrived[-1:].data_ptr(), rows,
    )  # fmt: skip
    lent = [(x.data_ptr(), x.nbytes) for x in (*touched, last)]
    for address, size in lent:
        _C.emu.lend(address, size, False, "tensor")
    try:
        one = (1, 1, 1)
        # Unchecked: it peeks at a result that nobody has released to it.
        _C.emu.launch(0, late._handle, "late", one, one, one, 0, params, 1, False, 0, False)
        _C.emu.synchronize()
    finally:
        for address, size in lent:
            _C.emu.take_back(address, size)
    _C.emu.destroy_stream(stream)
    same(out, want, "result")


def two_batches(group, cases, outs):
    """Queue dispatch, experts and combine of both; results are there after group.wait()."""
    got, backs = [], []
    for case, out in zip(cases, outs):
        received, hook = group.low_latency_dispatch(case[0], case[1], signal_arrival=True)
        hook(wait=False)
        got.append(received)
        if len(got) == 1:
            start_experts(group, received, out)
    group.order(second_waits=False)  # what follows needs the experts of A, and not those of B
    start_experts(group, got[1], outs[1])
    for case, out, received in zip(cases, outs, got):
        back, done = group.low_latency_combine(out, case[1], case[2], received)
        done(wait=False)
        group.order(second_waits=False)
        backs.append(back)
    return backs


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_micro_batches(ranks, seed):
    """While one micro-batch's experts run on the second stream, the first one exchanges the other:
    dispatch B behind experts A, combine A behind experts B. No host waits in between."""
    group = make(ranks)
    for n in range(3):
        seed(n)
        cases = [problem(ranks, "even", 2 * n), problem(ranks, "holes", 2 * n + 1)]
        wanted = [expected(ranks, case) for case in cases]
        outs = [poisoned(ranks), poisoned(ranks)]
        both = two_batches(group, cases, outs)
        group.wait()
        for case, (want, ys), out, backs in zip(cases, wanted, outs, both):
            same_rows(out, ys, want)
            back = ref.low_latency_combine(ys, case[1], case[2], want, max_tokens=T)
            for r in range(ranks):
                same(backs[r], back[r], "combined")


class NotRead(RuntimeError):
    pass


def test_the_host_reads_no_value(monkeypatch, seed):
    """From the first dispatch to the last combine the host only queues."""
    group = make(2)
    cases = [problem(2, "even", n) for n in (0, 1)]
    weights = [weights_of(r) for r in range(2)]
    outs = [poisoned(2), poisoned(2)]

    def refuse(self, *_, **__):
        raise NotRead("a value was read on the host")

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "weights_of", weights.__getitem__)
        for name in ("item", "tolist", "numpy", "__int__", "__float__", "__bool__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        with pytest.raises(NotRead):  # the trap works: the status is a value
            group._check()
        backs = two_batches(group, cases, outs)
    group.wait()
    for case, out, back in zip(cases, outs, backs):
        want, ys = expected(2, case)
        same_rows(out, ys, want)
        for r, b in enumerate(ref.low_latency_combine(ys, case[1], case[2], want, max_tokens=T)):
            same(back[r], b, "combined")


class Stalled(PeerGroup):
    """One rank sends nothing."""

    def _order(self):
        return [r for r in super()._order() if r != 1]


def test_a_silent_source_does_not_leave_the_experts_waiting(seed):
    seed(1)
    group = Stalled(
        "emu", 2, num_experts=2 * LOCAL, max_tokens=T, hidden=H, topk=K, num_sms=2, max_polls=2000
    )
    case = problem(2, "even", 0)
    got, hook = group.low_latency_dispatch(case[0], case[1], signal_arrival=True)
    outs = poisoned(2)
    start_experts(group, got, outs)
    with pytest.raises(dsk.ep.PeerSilent, match="rank 1 is silent"):
        hook()
    assert got[0].arrived.tolist() == [1] * LOCAL and outs[0].isnan().all()


def test_tiles_that_reach_into_the_next_expert_are_refused():
    """Its rows would be read while they are written."""
    group = make(2)
    got, hook = group.low_latency_dispatch(*problem(2, "even", 0)[:2], signal_arrival=True)
    hook()
    with forced_kernel("gemm_fp8_64x64"):
        with pytest.raises(_C.launch.DeviceError, match="expected groups of a multiple of 64 rows"):
            kernels.grouped_gemm_on_arrival(
                got[0].x, weights_of(0), got[0].arrived, poisoned(2)[0], on=(0, 0)
            )


@pytest.mark.parametrize("on_arrival", [False, True])
def test_the_schedules_that_the_benchmark_draws(on_arrival):
    """A stream does one thing at a time, experts wait for their rows, sums for the experts."""
    from bench.ep_overlap import Prices, apart, behind, length

    prices = Prices(send=5, receive=8, experts=100, give_back=7, reduce=6, bytes=0)
    bars = behind(prices, 20, 40, 4, on_arrival)
    for stream in ("exchange", "experts"):
        spans = sorted((b.begin, b.end) for b in bars if b.stream == stream)
        assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:]))
    at = {(b.name, b.batch): b for b in bars}
    for batch in range(2):
        receive, experts = at["receive", batch], at["experts", batch]
        packed = receive.begin + 2 if on_arrival else receive.end  # the first of 4 experts
        assert experts.begin >= packed and experts.end >= receive.end + 25
        assert experts.end - experts.begin >= 100
        assert at["return", batch].begin >= experts.end
        assert at["reduce", batch].begin >= at["return", batch].begin + 40
    alone = length(apart(prices, 20, 40))
    assert alone == 2 * (20 + 8 + 100 + 40 + 6 + 2 * 1.5)
    assert length(bars) < alone
    hidden = behind(Prices(0, 0, 100, 0, 0, 0), 0, 0, 4, on_arrival)
    assert length(hidden) == pytest.approx(200 + 2 * 1.5 + (1.5 if on_arrival else 0), abs=3)
