"""The very same launches again and again, as a replayed CUDA graph makes them: parameters say
neither which call it is nor who is alive; both lie in the ranks' memory and are counted there."""

import os
import struct

import pytest
import torch
from ep_workers import routing, same

import dskernels as dsk
from dskernels.ref import ep as ref

emu = pytest.importorskip("dskernels.emu")
if not emu.available():
    pytest.skip(emu.available().reason, allow_module_level=True)
from dskernels.cuda.ep import PeerGroup  # noqa: E402

pytestmark = pytest.mark.timeout(300)
K, T, H = 3, 7, 256
LAUNCHES = ("ep_dispatch", "ep_combine", "ep_low_send", "ep_low_receive", "ep_low_return",
            "ep_low_reduce")  # fmt: skip


class Recorded(PeerGroup):
    """record(calls) keeps the launches of `calls` instead of making them; replay makes them."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._native, self.launches = _Recorder(self._native, self), None

    def record(self, calls):
        self.launches = launches = []
        result = calls()
        self.launches, tensors = None, list(self._machine.kept.values())
        self._machine.take_back()

        def replay():
            self._machine.lend(tensors)
            for launch, on, args, options in launches:
                if self.alive[on[1]]:
                    launch(on, *args, **options)
            self.wait()

        return result, replay


class _Recorder:
    def __init__(self, native, group):
        self._native, self._group = native, group

    def __getattr__(self, name):
        launch = getattr(self._native, name)
        if name not in LAUNCHES or self._group.launches is None:
            return launch
        return lambda on, *args, **options: self._group.launches.append((launch, on, args, options))


@pytest.fixture
def seed(monkeypatch):
    def set_seed(value):
        monkeypatch.setitem(os.environ, "DSK_EMU_SEED", str(value))

    set_seed(0)
    return set_seed


def cases(ranks):
    """Routings of T tokens a rank, one for every replay, and who is alive."""
    up, masked = [True] * ranks, [r != 1 for r in range(ranks)]
    for n, (kind, alive) in enumerate(
        [("even", up), ("skewed", up), ("even", masked), ("holes", masked), ("even", up)]
    ):
        g = torch.Generator().manual_seed(n)
        idx = torch.rand(ranks, T, 4 * ranks, generator=g).topk(K, dim=2).indices
        if kind == "holes":
            idx[torch.rand(idx.shape, generator=g) < 0.3] = -1
        if kind == "skewed":
            idx[..., 0] = 0
            idx[..., 1:] = idx[..., 1:].clamp(min=1)
            idx[..., 2][idx[..., 1] == idx[..., 2]] = -1
        xs = torch.randn(ranks, T, H, generator=g).bfloat16()
        yield n, list(xs), list(idx), list(torch.rand(ranks, T, K, generator=g)), alive


def fill(into, values):
    for tensor, value in zip(into, values):
        tensor.copy_(value)


def make(ranks, per_node=0):
    group = Recorded(
        "emu", ranks, num_experts=4 * ranks, max_tokens=T, hidden=H, topk=K, num_sms=2,
        ranks_per_node=per_node,
    )  # fmt: skip
    _, xs, idxs, weights, _ = next(cases(ranks))
    return group, [x.clone() for x in xs], [i.clone() for i in idxs], [w.clone() for w in weights]


@pytest.mark.parametrize("ranks, per_node", [(2, 0), (4, 2)])
def test_dispatch_and_combine(ranks, per_node, seed):
    group, xs, idxs, weights = make(ranks, per_node)
    got, dispatch = group.record(lambda: group.dispatch(xs, idxs, weights, sizes_on_host=False))
    ys = [group.result_buffer(r, ranks * T, H) for r in range(ranks)]
    (outs, _), combine = group.record(lambda: group.combine(ys, got, wait=False))
    for n, *values, alive in cases(ranks):
        seed(n)
        if tuple(alive) != group.alive:
            group.alive = alive
        for into, value in zip((xs, idxs, weights), values):
            fill(into, value)
        want = ref.dispatch(*values, num_experts=4 * ranks, alive=alive)
        dispatch()
        for r in range(ranks):
            if not alive[r]:
                continue
            rows = int(got[r].counts[0])
            same(got[r].x[:rows], want[r].x, "x")
            same(got[r].topk_idx[:rows], want[r].topk_idx, "topk_idx")
            same(got[r].topk_weights[:rows], want[r].topk_weights, "topk_weights")
            same(got[r].source[:rows], want[r].source, "source")
            assert got[r].counts[1:].tolist() == want[r].tokens_per_expert
            assert (got[r].topk_idx[rows:] == -1).all(), "rows behind the last name an expert"
        results = [(w.x.float() * (r + 1.25)).bfloat16() for r, w in enumerate(want)]
        for r in range(ranks):
            ys[r][: len(results[r])] = results[r]
            ys[r][len(results[r]) :] = torch.nan  # must not be read
        combine()
        back, _ = ref.combine(results, want, [T] * ranks, ranks_per_node=per_node)
        for r in range(ranks):
            if alive[r]:
                same(outs[r], back[r], "combined")


@pytest.mark.parametrize("ranks, per_node", [(2, 0), (3, 0), (4, 2)])
def test_dispatches_behind_each_other(ranks, per_node, seed, monkeypatch):
    """Nothing between two dispatches: a rank may send its next notice while others still run."""
    # The checker does not know that a launch follows what others told the launch before it.
    monkeypatch.setitem(os.environ, "DSK_EMU_CHECK", "0")
    group, *_ = make(ranks, per_node)
    (_, *first, _), (_, *second, _) = list(cases(ranks))[:2]
    for n in range(1, 7):
        seed(n)
        calls = [group.dispatch(*case, sizes_on_host=False) for case in (first, second)]
        group.wait()
        for case, got in zip((first, second), calls):
            want = ref.dispatch(*case, num_experts=4 * ranks)
            for r in range(ranks):
                counts = [len(want[r].source), *want[r].tokens_per_expert]
                assert got[r].counts.tolist() == counts
        for r in range(ranks):  # the second took the region of the first
            same(got[r].x[: len(want[r].source)], want[r].x, "x")


@pytest.mark.parametrize("ranks", [2, 4])
def test_low_latency(ranks, seed):
    group, xs, idxs, weights = make(ranks)

    def exchange():
        received, hook = group.low_latency_dispatch(xs, idxs)
        hook(wait=False)
        return received

    def give_back():
        backs, hook = group.low_latency_combine(ys, idxs, weights, got)
        hook(wait=False)
        return backs

    got, dispatch = group.record(exchange)
    ys = [torch.zeros(4, ranks * T, H).bfloat16() for _ in range(ranks)]
    outs, combine = group.record(give_back)
    for n, *values, alive in cases(ranks):
        seed(n)
        if tuple(alive) != group.alive:
            group.alive = alive
        for into, value in zip((xs, idxs, weights), values):
            fill(into, value)
        want = ref.low_latency_dispatch(
            values[0], values[1], max_tokens=T, num_experts=4 * ranks, alive=alive
        )
        dispatch()
        for r in range(ranks):
            if alive[r]:
                for name in ("count", "source", "layout_range"):
                    same(getattr(got[r], name), getattr(want[r], name), name)
                for expert, rows in enumerate(got[r].count.tolist()):
                    same(got[r].x.data[expert, :rows], want[r].x.data[expert, :rows], "data")
        results = [w.x.dequantize().bfloat16() for w in want]
        fill(ys, results)
        combine()
        back = ref.low_latency_combine(results, values[1], values[2], want, max_tokens=T)
        for r in range(ranks):
            if alive[r]:
                same(outs[r], back[r], "combined")


def test_a_launch_says_neither_which_call_it_is_nor_who_is_alive():
    """What makes a recorded launch good for any replay: the parameters' group cannot be changed."""
    group = PeerGroup("emu", 2, num_experts=2, max_tokens=T, hidden=H, topk=1)
    for name in ("epoch", "alive"):
        assert not hasattr(group.ranks[0].group, name)
    with pytest.raises(ValueError, match="alive: expected 2 entries, one of them True"):
        group.alive = [False, False]


OVERWRITE = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry overwrite(.param .u64 at, .param .u32 words) {
  .reg .pred %p<2>; .reg .b32 %r<3>; .reg .b64 %d<2>;
  ld.param.u64 %d1, [at];
  ld.param.u32 %r1, [words];
AGAIN:
  st.global.u32 [%d1], 0;
  add.s64 %d1, %d1, 4;
  sub.u32 %r1, %r1, 1;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra AGAIN;
  ret;
}
"""


def test_results_may_be_overwritten_behind_a_combine(seed):
    """It ends when everybody has read: the next kernel in the stream may write there."""
    from dskernels import _C

    module, one = emu.Module(OVERWRITE), (1, 1, 1)
    for n in range(4):
        seed(n)
        group = PeerGroup("emu", 2, num_experts=4, max_tokens=T, hidden=H, topk=2, num_sms=2)
        xs, idxs, weights = routing("even", 2, 4, 2, T, H, 1)
        want = ref.dispatch(xs, idxs, weights, num_experts=4)
        got = group.dispatch(xs, idxs, weights)
        ys = [group.result_buffer(r, *w.x.shape) for r, w in enumerate(want)]
        fill(ys, [w.x for w in want])
        back, _ = ref.combine([y.clone() for y in ys], want, [len(i) for i in idxs])
        outs, _ = group.combine(ys, got, wait=False)
        for r, y in enumerate(ys):
            params = struct.pack("QI", y.data_ptr(), y.numel() // 2)
            # Unchecked: what a grid learned of another GPU is not handed on to the next grid of its
            # stream by the checker, which would call this a race.
            _C.emu.launch(r, module._handle, "overwrite", one, one, one, 0, params, n, False, 0,
                          False)  # fmt: skip
        group.wait()
        for r in range(2):
            same(outs[r], back[r], "combined")
            assert not ys[r].any()


def test_hooks_come_in_order(seed):
    group = PeerGroup("emu", 2, num_experts=4, max_tokens=T, hidden=H, topk=K, num_sms=2)
    xs, idxs, _ = routing("even", 2, 4, K, T, H, 0)
    got, hook = group.low_latency_dispatch(xs, idxs)
    with pytest.raises(RuntimeError, match="expected the hook of the call before to be called"):
        group.low_latency_dispatch(xs, idxs)
    hook()
    with pytest.raises(RuntimeError, match=r"expected hook\(\) to be called once"):
        hook()
    want = ref.low_latency_dispatch(xs, idxs, max_tokens=T, num_experts=4)
    same(got[1].count, want[1].count, "count")
    assert isinstance(got[0].x, dsk.ScaledTensor)
