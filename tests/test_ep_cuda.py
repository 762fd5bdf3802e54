"""The expert-parallel kernels on virtual GPUs: exactly the reference, no hazards, faults named."""

import os

import pytest
import torch
from ep_workers import KINDS, routing, same

import dskernels as dsk
from dskernels.ref import ep as ref

emu = pytest.importorskip("dskernels.emu")
if not emu.available():
    pytest.skip(emu.available().reason, allow_module_level=True)
from dskernels.cuda.ep import PeerGroup  # noqa: E402

pytestmark = pytest.mark.timeout(300)
K, T = 3, 9


@pytest.fixture
def seed(monkeypatch):
    def set_seed(value):
        monkeypatch.setitem(os.environ, "DSK_EMU_SEED", str(value))

    set_seed(0)
    return set_seed


def make(ranks, hidden=256, *, experts=None, num_sms=2, **options):
    experts = 4 * ranks if experts is None else experts
    return PeerGroup(
        "emu", ranks, num_experts=experts, max_tokens=T, hidden=hidden, topk=K, num_sms=num_sms,
        **options,
    )  # fmt: skip


def compare_normal(group, case, hidden, *, fp8=False, alive=None):
    xs, idxs, weights = case
    if fp8:
        xs = [dsk.quantize(x) for x in xs]
    experts = sum(group.experts_of_rank)
    want = ref.dispatch(xs, idxs, weights, num_experts=experts, expert_alignment=4, alive=alive)
    got = group.dispatch(xs, idxs, weights, expert_alignment=4)
    for r in range(group.num_ranks):
        if alive is not None and not alive[r]:
            continue
        if fp8:
            same(got[r].x.data, want[r].x.data, "data")
            same(got[r].x.scale, want[r].x.scale.contiguous(), "scale")
        else:
            same(got[r].x, want[r].x, "x")
        same(got[r].topk_idx, want[r].topk_idx, "topk_idx")
        same(got[r].topk_weights, want[r].topk_weights, "topk_weights")
        same(got[r].source, want[r].source, "source")
        assert got[r].tokens_per_expert == want[r].tokens_per_expert
    plain = [w.x.dequantize(torch.bfloat16) if fp8 else w.x for w in want]
    ys = [(p.float() * (r + 1.25)).bfloat16() for r, p in enumerate(plain)]
    biases = [torch.full((len(i), hidden), 0.5).bfloat16() for i in idxs]
    back, back_weights = ref.combine(
        ys, want, [len(i) for i in idxs], topk_weights=[w.topk_weights for w in want], bias=biases,
        ranks_per_node=group.ranks_per_node,
    )  # fmt: skip
    outs, out_weights = group.combine(
        ys, got, topk_weights=[w.topk_weights for w in want], bias=biases
    )
    for r in range(group.num_ranks):
        if alive is None or alive[r]:
            same(outs[r], back[r], "combined")
            same(out_weights[r], back_weights[r], "combined weights")


def compare_low_latency(group, case, *, alive=None, **options):
    xs, idxs, weights = case
    experts = sum(group.experts_of_rank)
    want = ref.low_latency_dispatch(
        xs, idxs, max_tokens=T, num_experts=experts, alive=alive, **options
    )
    got, hook = group.low_latency_dispatch(xs, idxs, **options)
    hook()
    for r in range(group.num_ranks):
        if alive is not None and not alive[r]:
            continue
        for name in ("count", "source", "layout_range"):
            same(getattr(got[r], name), getattr(want[r], name), name)
        for expert, n in enumerate(got[r].count.tolist()):
            if options["use_fp8"]:
                same(got[r].x.data[expert, :n], want[r].x.data[expert, :n], "data")
                same(got[r].x.scale[expert, :n], want[r].x.scale[expert, :n], "scale")
            else:
                same(got[r].x[expert, :n], want[r].x[expert, :n], "x")
    ys = [(w.x.dequantize() if options["use_fp8"] else w.x.float()).bfloat16() for w in want]
    for y, w in zip(ys, want):
        for expert, n in enumerate(w.count.tolist()):
            y[expert, n:] = torch.nan  # must not be read
    back = ref.low_latency_combine(ys, idxs, weights, want, max_tokens=T)
    outs, hook = group.low_latency_combine(ys, idxs, weights, got)
    hook()
    for r in range(group.num_ranks):
        if alive is None or alive[r]:
            same(outs[r], back[r], "combined")


def run_case(group, ranks, n, hidden):
    kind = KINDS[n % len(KINDS)]
    case = routing(kind, ranks, sum(group.experts_of_rank), K, T, hidden, n)
    compare_normal(group, case, hidden, fp8=n % 2 == 1)
    options = [dict(use_fp8=False), dict(use_fp8=True), dict(use_fp8=True, round_scale=True)]
    compare_low_latency(group, case, **options[n % 3])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_equal_to_the_reference(ranks, seed):
    group = make(ranks)
    for n in range(6 if ranks < 8 else 3):
        seed(n % 3)
        run_case(group, ranks, n, 256)


@pytest.mark.parametrize("ranks, per_node", [(8, 4), (4, 2), (3, 1), (6, 2)])
def test_several_nodes(ranks, per_node, seed):
    """One copy of a token per node, passed on there: the same rows in the same places. One sum of
    its results per node, in the order of the reference."""
    group = make(ranks, ranks_per_node=per_node)
    for n in range(6):
        seed(n % 3)
        case = routing(KINDS[n], ranks, 4 * ranks, K, T, 256, n)
        compare_normal(group, case, 256, fp8=n % 2 == 1)
    alive = group.alive = [r != 1 for r in range(ranks)]
    case = routing("even", ranks, 4 * ranks, K, T, 256, 9)
    compare_normal(group, case, 256, alive=alive)


def test_several_nodes_of_ragged_width(seed):
    """272 values: 544 bytes, more than a warp moves at a time, and the rest of two lanes."""
    group = make(4, 272, ranks_per_node=2)
    for n in (0, 1):
        seed(n)
        compare_normal(group, routing("even", 4, 16, K, T, 272, n), 272, fp8=n == 1)


@pytest.mark.parametrize("token", [0, 1])
def test_a_single_token_crosses(token, seed):
    group = make(4, ranks_per_node=2)
    xs, idxs, weights = routing("even", 4, 16, K, T, 256, 1)
    for r, idx in enumerate(idxs):  # everybody stays in its node, but for one token of rank 0
        idx.copy_(idx % 8 + r // 2 * 8)
    idxs[0][token, 0] = 9
    compare_normal(group, (xs, idxs, weights), 256)


@pytest.mark.slow
def test_as_many_ranks_as_there_can_be(seed):
    """64: the masks are full, and so are the rows of a notice."""
    group = PeerGroup("emu", 64, num_experts=64, max_tokens=2, hidden=16, topk=2, num_sms=1)
    xs, idxs, weights = routing("even", 64, 64, 2, 2, 16, 0)
    compare_normal(group, (xs, idxs, weights), 16)
    want = ref.low_latency_dispatch(xs, idxs, max_tokens=2, num_experts=64, use_fp8=False)
    got, hook = group.low_latency_dispatch(xs, idxs, use_fp8=False)
    hook()
    for g, w in zip(got, want):
        same(g.source, w.source, "source")
        same(g.x[0, : int(g.count)], w.x[0, : int(w.count)], "x")


@pytest.mark.parametrize("ranks, per_node", [(3, 0), (4, 2), (6, 2)])
def test_a_rank_masked_between_dispatch_and_combine(ranks, per_node, seed):
    """Its results are left out; whom it would have summed for reads its node's rows itself."""
    group = make(ranks, ranks_per_node=per_node)
    xs, idxs, weights = routing("even", ranks, 4 * ranks, K, T, 256, 4)
    want = ref.dispatch(xs, idxs, weights, num_experts=4 * ranks)
    got = group.dispatch(xs, idxs, weights)
    ys = [(w.x.float() * (r + 1.25)).bfloat16() for r, w in enumerate(want)]
    alive = group.alive = [r != 1 for r in range(ranks)]
    back, _ = ref.combine(
        ys, want, [len(i) for i in idxs], ranks_per_node=per_node, alive=alive
    )  # fmt: skip
    outs, _ = group.combine(ys, got)
    for r in range(ranks):
        if alive[r]:
            same(outs[r], back[r], "combined")


def test_sums_cross_once_per_node(seed):
    """Results of another node's ranks off the rail are read by nobody but their node: with their
    sums wrong there, every token of the other node is."""
    group = make(4, ranks_per_node=2)
    xs, idxs, weights = routing("even", 4, 16, K, T, 256, 0)
    got = group.dispatch(xs, idxs, weights)
    ys = [torch.ones(len(g.x), 256).bfloat16() for g in got]
    # Rank 2 passes on what rank 0 sends to node 1, and returns the sums: forget that it does.
    places = got[2].forwarded
    assert (places[0, : int(got[2].num_forwarded[0])] >= 0).any()
    places[0] = -1
    outs, out_weights = group.combine(ys, got, topk_weights=[g.topk_weights for g in got])
    hosts = (idxs[0] // 4).unsqueeze(2) == torch.arange(4)
    own_node = hosts[:, :, :2].any(1).sum(1)
    same(outs[0], own_node[:, None].expand(-1, 256).bfloat16(), "own node's sums only")
    same(out_weights[0], weights[0] * (idxs[0] < 8), "own node's weights only")


@pytest.mark.slow
@pytest.mark.parametrize("ranks, per_node", [(8, 4), (6, 3), (4, 2), (3, 1), (6, 2)])
def test_fifty_random_routings_over_nodes(ranks, per_node, seed):
    group = make(ranks, ranks_per_node=per_node)
    for n in range(50):
        seed(n)
        case = routing(KINDS[n % len(KINDS)], ranks, 4 * ranks, K, T, 256, n)
        compare_normal(group, case, 256, fp8=n % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_fifty_random_routings(ranks, seed):
    group = make(ranks)
    for n in range(50):
        seed(n)
        run_case(group, ranks, n, 256)


def test_ragged_width_and_many_ctas(seed):
    """2320 = 18 groups of 128 and 16 values, 4640 bytes: more pieces than a lane loads at a time,
    the last ones not whole; several CTAs of each kernel, more of some than there are tokens."""
    group = make(2, 2320, num_sms=5)
    for n in (1, 5):
        seed(n)
        run_case(group, 2, n, 2320)


def test_unequal_experts_and_a_rank_without_any(seed):
    """The reference knows equal shares only: rows are derived here. Low-latency calls that nobody
    combines: the rank without experts must not run ahead of those that still unpack."""
    counts = [5, 0, 7]
    group = make(3, experts=counts)
    begin = [0, 5, 5, 12]
    for n in range(4):
        seed(n)
        xs, idxs, weights = routing("holes", 3, 12, K, T, 256, n)
        got = group.dispatch(xs, idxs, weights)
        for r in range(3):
            mine = range(begin[r], begin[r + 1])
            rows = [[s, t] for s in range(3) for t, row in enumerate(idxs[s].tolist())
                    if any(e in mine for e in row)]  # fmt: skip
            assert got[r].source.tolist() == rows
            for i, (s, t) in enumerate(rows):
                same(got[r].x[i], xs[s][t], "x")
        outs, _ = group.combine([g.x for g in got], got)
        for r, idx in enumerate(idxs):
            hosts = [len({0 if e < 5 else 2 for e in row if e >= 0}) for row in idx.tolist()]
            times = torch.tensor(hosts, dtype=torch.float32)[:, None]
            same(outs[r], (xs[r].float() * times + 0.0).bfloat16(), "combined")
        low, hook = group.low_latency_dispatch(xs, idxs, use_fp8=False)
        hook(wait=n % 2 == 1)
        if n % 2 == 0:
            group.wait()
        for r in range(3):
            for e in range(counts[r]):
                rows = [(s, t) for s in range(3) for t, row in enumerate(idxs[s].tolist())
                        if begin[r] + e in row]  # fmt: skip
                assert low[r].count[e] == len(rows)
                for i, (s, t) in enumerate(rows):
                    same(low[r].x[e, i], xs[s][t], "low-latency x")


def test_more_choices_than_loads_at_a_time(seed):
    group = PeerGroup(
        "emu", 2, num_experts=24, max_tokens=T, hidden=256, topk=11, num_sms=2
    )  # fmt: skip
    for kind in ("even", "holes"):
        case = routing(kind, 2, 24, 11, T, 256, 3)
        compare_normal(group, case, 256)
        compare_low_latency(group, case, use_fp8=True)


def test_dead_ranks_are_masked(seed):
    group = make(3)
    alive = group.alive = [True, False, True]
    for n in (0, 1):
        case = routing("even", 3, 12, K, T, 256, n)
        compare_normal(group, case, 256, alive=alive)
        compare_low_latency(group, case, use_fp8=True, alive=alive)


class Stalled(PeerGroup):
    """One rank does not launch."""

    stalled = None

    def _order(self):
        return [r for r in super()._order() if r != self.stalled]


def test_a_rank_that_stays_away_is_reported_and_masked(seed):
    seed(1)  # one host thread takes turns: how often a wait polls does not depend on the machine
    group = Stalled(
        "emu", 3, num_experts=12, max_tokens=T, hidden=256, topk=K, num_sms=2, max_polls=20000
    )
    case = routing("even", 3, 12, K, T, 256, 0)
    compare_normal(group, case, 256)
    group.stalled = 1
    with pytest.raises(dsk.ep.PeerSilent, match="rank 1 is silent") as caught:
        group.dispatch(case[0], case[1], case[2])
    report = caught.value.report
    assert report["phase"] == "notice" and caught.value.ranks == [1]
    assert report["counters"]["notice"] == [3, 1, 3]  # the epochs of dispatch, combine, dispatch
    group.alive = [True, False, True]
    compare_normal(group, case, 256, alive=group.alive)


def written(exchange):
    """How many bytes of each rank's window exchange(group), of 3 ranks, writes: those that are not
    what lay there before, with one of two fillings."""
    changed = []
    for filling in (0x5A, 0xA5):
        group = make(3)
        for rank in group.ranks:
            rank.window.fill_(filling)
        exchange(group)
        changed.append([rank.window != filling for rank in group.ranks])
    return [int((a | b).sum()) for a, b in zip(*changed)]


def test_a_call_writes_its_rows_and_nothing_else(seed):
    ranks, local, hidden = 3, 4, 256
    xs, idxs, weights = routing("even", ranks, local * ranks, K, T, hidden, 0)

    def dispatch(group):
        group.dispatch(xs, idxs, weights, sizes_on_host=False)
        group.wait()

    def send(group):
        group.low_latency_dispatch(xs, idxs, use_fp8=True)[1]()

    want = ref.dispatch(xs, idxs, weights, num_experts=local * ranks)
    notices = ranks * (44 + 4 * ranks + 4 * local)
    record = K * (8 + 4) + 16  # and -1 for each expert of a row that nobody sent
    assert written(dispatch) == [
        notices + n * (2 * hidden + record) + (ranks * T - n) * K * 8
        for n in (len(w.source) for w in want)
    ]
    low = ref.low_latency_dispatch(xs, idxs, max_tokens=T, num_experts=local * ranks)
    assert written(send) == [
        4 * ranks * local + int(w.count.sum()) * (hidden + hidden // 128 * 4 + 8) for w in low
    ]


def test_rows_of_zeros_are_cast(seed):
    xs, idxs, weights = routing("even", 2, 8, K, T, 256, 0)
    for x in xs:
        x[::2] = 0
    compare_low_latency(make(2), (xs, idxs, weights), use_fp8=True)
