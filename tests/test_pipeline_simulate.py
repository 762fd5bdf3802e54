"""The simulator: known figures, bounds that hold for any costs, disturbances, memory, speed."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_schedules import sizes

from dskernels.pipeline import Costs, Op, ScheduleError, Work, add_comms, formulas, make, simulate
from dskernels.pipeline.lower import needs

KNOWN = Costs(f=1, bi=1, w=1, fb=3)


@pytest.mark.parametrize("name, bubble", [("1f1b", 21), ("zb1p", 7), ("dualpipe", 6)])
def test_published_bubbles_at_8_ranks_20_microbatches(name, bubble):
    result = simulate(make(name, 8, 20), KNOWN)
    assert result.bubble == [bubble] * 8
    assert result.bubble_formula == bubble


def test_dualpipe_makespan_and_memory():
    result = simulate(make("dualpipe", 8, 20), KNOWN)
    assert result.makespan == 66
    assert result.peak_activations == [9] * 8
    assert result.span_bubble == [6, 5, 4, 3, 3, 4, 5, 6]


def test_dualpipe_formula_is_not_general():
    overlapped = simulate(make("dualpipe", 8, 20), Costs(fb=2.4))
    assert overlapped.bubble == pytest.approx([3.0, 3.6, 4.2, 4.2, 4.2, 4.2, 3.6, 3.0])
    assert overlapped.bubble_formula == pytest.approx(4.2)
    skewed = simulate(make("dualpipe", 8, 20), Costs(f=1, bi=1.5, w=0.9, fb=3))
    assert max(skewed.bubble) == pytest.approx(7.1)
    assert skewed.bubble_formula == pytest.approx(8.1)


@pytest.mark.parametrize("ranks, microbatches", [(2, 8), (4, 10), (6, 24)])
def test_formulas_of_the_other_schedules(ranks, microbatches):
    costs = Costs(f=1, bi=1, w=1, fb=3)
    for name in ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "chimera"):
        m = microbatches
        if name == "interleaved":
            m = -(-m // ranks) * ranks
        if name == "dualpipev":
            m = max(m, 2 * ranks)
        if name == "chimera":
            m = ranks
        result = simulate(make(name, ranks, m), costs)
        assert result.bubble == pytest.approx([result.bubble_formula] * ranks), name
        peak = formulas.peak_activations(name, ranks, m, result.schedule.virtual_stages)
        if peak is not None:
            assert result.peak_activations == peak, name


def test_chimera_peak_is_between_half_and_all():
    result = simulate(make("chimera", 8, 8))
    assert result.peak_activations == [5, 6, 7, 8, 8, 7, 6, 5]
    assert simulate(make("chimera", 8, 8), Costs(b=1)).bubble == [6] * 8


@pytest.mark.parametrize("ranks, units", [(4, 2), (4, 3), (8, 2)])
def test_chimera_units_follow_without_a_gap(ranks, units):
    """With F = B the bubble of many units is that of one: they tile."""
    result = simulate(make("chimera", ranks, ranks * units), Costs(b=1))
    assert result.makespan == 2 * ranks * units + ranks - 2
    assert result.peak_activations == simulate(make("chimera", ranks, ranks)).peak_activations


def test_zbv_has_no_bubble_within_a_rank_s_span():
    result = simulate(make("zbv", 4, 20), KNOWN)
    assert result.span_bubble == [0] * 4
    assert result.bubble == [3] * 4


# --- properties over random sizes and costs -------------------------------------------------------

positive = st.floats(0.05, 10, allow_nan=False)


@st.composite
def random_costs(draw, schedule):
    def table():
        if draw(st.booleans()):
            return draw(positive)
        n = schedule.num_stages
        return draw(st.lists(positive, min_size=n, max_size=n))

    return Costs(
        f=table(),
        bi=table(),
        w=table(),
        fb=draw(st.none() | positive),
        p2p_latency=draw(st.just(0.0) | positive),
        p2p_bytes=draw(st.just(0.0) | positive),
        p2p_bandwidth=draw(positive),
        activation=table(),
        retained=draw(st.floats(0, 1)),
        static=draw(st.floats(0, 5)),
        rank_factor={draw(st.integers(0, schedule.num_ranks - 1)): draw(st.floats(0.5, 3))},
        jitter=draw(st.sampled_from([0.0, 0.1])),
        seed=draw(st.integers(0, 5)),
    )


def _critical_path(result):
    """Longest chain of one micro-batch: F through all stages, and the gradients back."""
    schedule, longest = result.schedule, 0.0
    duration = {}
    for rank, acts in enumerate(schedule.actions):
        for i, a in enumerate(acts):
            for atom in a.atoms:
                duration[atom.op, atom.stage, atom.microbatch] = (
                    result.end[rank][i] - result.start[rank][i]
                )
    for mb in range(schedule.num_microbatches):
        chain = 0.0
        for stage in range(schedule.num_stages):
            chain += duration[Op.F, stage, mb]
            back = duration.get((Op.B, stage, mb))
            chain += duration[Op.BI, stage, mb] if back is None else back
        longest = max(longest, chain)
    return longest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_hold_for_any_costs(data):
    schedule = make(*data.draw(sizes(max_ranks=4)))
    costs = data.draw(random_costs(schedule))
    result = simulate(schedule, costs)
    slack = 1e-9 * result.makespan
    assert result.makespan >= max(result.busy) - slack
    if not any(a.op is Op.FB for acts in schedule.actions for a in acts):
        assert result.makespan >= _critical_path(result) - slack
    assert min(result.span_bubble) >= -slack
    for bubble, span in zip(result.bubble, result.span_bubble):
        assert bubble >= span - slack
    for rank, (times, curve) in enumerate(result.memory):
        assert curve.min() >= 0
        assert (times[1:] >= times[:-1]).all()
        assert curve[-1] == pytest.approx(costs.static, abs=1e-6), rank
    for _, curve in result.activations:
        assert curve.min() >= 0 and curve[-1] == 0
    _check_causality(result)


def _check_causality(result):
    """Independent of the simulator's bookkeeping: every input had arrived, no rank overlapped."""
    schedule = result.schedule
    arrival, made = {}, {}
    for rank, acts in enumerate(schedule.actions):
        for i, a in enumerate(acts):
            if a.op in (Op.SEND_F, Op.SEND_B):
                arrival[a.op is Op.SEND_B, a.stage, a.microbatch] = result.end[rank][i]
            for atom in a.atoms:
                if atom.op in (Op.F, Op.B, Op.BI):
                    made[atom.op is not Op.F, atom.stage, atom.microbatch] = result.end[rank][i]
    for rank, acts in enumerate(schedule.actions):
        free = 0.0
        for i, a in enumerate(acts):
            if a.op in (Op.SEND_F, Op.SEND_B):
                assert result.start[rank][i] >= made[a.op is Op.SEND_B, a.stage, a.microbatch]
            if a.op not in (Op.F, Op.B, Op.BI, Op.W, Op.FB):
                continue
            assert result.start[rank][i] >= free
            free = result.end[rank][i]
            for atom in a.atoms:
                need = needs(atom, schedule.num_stages)
                if need is not None:
                    key = (*need, atom.microbatch)
                    home = schedule.placement[atom.direction][need[1]]
                    ready = made[key] if home == rank else arrival[key]
                    assert result.start[rank][i] >= ready


# --- disturbances ---------------------------------------------------------------------------------


def test_transfer_costs_by_hand():
    """Two stages, one micro-batch: F, wire 2 + latency 0.5, F B, wire, B."""
    costs = Costs(p2p_latency=0.5, p2p_bytes=4, p2p_bandwidth=2)
    result = simulate(make("1f1b", 2, 1), costs)
    assert result.makespan == pytest.approx(1 + 2.5 + 1 + 2 + 2.5 + 2)
    assert result.exposed_p2p == pytest.approx([2.5, 2.5])
    slow = Costs(p2p_latency=0.5, p2p_bytes=4, p2p_bandwidth=2, link_factor={(0, 1): 3})
    assert simulate(make("1f1b", 2, 1), slow).makespan == pytest.approx(16.0)


def test_messages_of_one_link_queue():
    """Three forwards of 1 behind a wire of 2: the last arrives after 1 + 3*2."""
    result = simulate(make("gpipe", 2, 3).forwards(), Costs(p2p_bytes=2, p2p_bandwidth=1))
    assert result.makespan == pytest.approx(1 + 3 * 2 + 1)


def test_a_straggler_slows_everybody_and_only_its_own_work():
    calm = simulate(make("1f1b", 4, 8))
    slow = simulate(make("1f1b", 4, 8), Costs(rank_factor={2: 2.0}))
    assert slow.busy == [calm.busy[0], calm.busy[1], 2 * calm.busy[2], calm.busy[3]]
    assert slow.makespan >= slow.busy[2] > calm.makespan


def test_jitter_is_reproducible_by_seed():
    schedule = make("dualpipe", 4, 8)
    one, same, other = (simulate(schedule, Costs(jitter=0.1, seed=s)) for s in (1, 1, 2))
    assert one.end == same.end
    assert one.end != other.end
    assert one.makespan != simulate(schedule).makespan


def test_retention_until_w_costs_memory():
    """ZB1P keeps inputs for late weight gradients: P chunks everywhere if W frees them."""
    schedule = make("zb1p", 8, 20)
    assert simulate(schedule, Costs(retained=1.0)).peak_memory == [8] * 8
    assert simulate(schedule, Costs(retained=0.0)).peak_memory == [8, 7, 6, 5, 4, 3, 2, 1]
    half = simulate(schedule, Costs(retained=0.5, static=[10] * 8))
    assert all(a <= b - 10 <= 8 for a, b in zip([8, 7, 6, 5, 4, 3, 2, 1], half.peak_memory))
    assert 0 < half.peak_memory_time[0] < half.makespan


def test_cost_tables_must_fit():
    with pytest.raises(ScheduleError, match="f needs 4 entries; got 3"):
        simulate(make("1f1b", 4, 8), Costs(f=[1, 2, 3]))
    with pytest.raises(ScheduleError, match="w must be >= 0; got -1"):
        Costs(w=-1)
    with pytest.raises(ScheduleError, match="f must be >= 0"):
        Costs(f=float("nan"))
    with pytest.raises(ScheduleError, match="retained must be in 0..1; got 2"):
        Costs(retained=2)
    with pytest.raises(ScheduleError, match="p2p_bandwidth must be > 0; got 0"):
        Costs(p2p_bandwidth=0)
    with pytest.raises(ScheduleError, match=r"rank_factor\[1\] must be > 0"):
        Costs(rank_factor={1: 0})


def test_costs_from_arrays_and_per_pair():
    table = simulate(make("1f1b", 4, 8), Costs(f=np.array([1.0, 2, 1, 1])))
    assert table.makespan == simulate(make("1f1b", 4, 8), Costs(f=[1.0, 2, 1, 1])).makespan
    schedule = make("dualpipe", 2, 4)
    pairs = {(a, b): 2.0 + a for a in range(2) for b in range(2)}
    assert simulate(schedule, Costs(fb=pairs)).makespan > simulate(schedule, Costs(fb=2)).makespan
    with pytest.raises(ScheduleError, match=r"fb has no entry for the pair \(1, 0\)"):
        simulate(schedule, Costs(fb={(0, 1): 3.0}))
    with pytest.raises(ScheduleError, match="fb must be >= 0; got -3"):
        Costs(fb=-3)


def test_a_pair_without_a_price_costs_its_halves():
    schedule = make("dualpipe", 4, 8)
    costs = Costs(f=[1, 2, 3, 4], bi=0.5, w=0.25)
    assert simulate(schedule, costs).busy == pytest.approx(
        [4 * (a + b) + 8 * 0.75 for a, b in ((1, 4), (2, 3), (3, 2), (4, 1))]
    )


# --- expert-parallel communication inside F and B -------------------------------------------------

LAYER = Work(
    attn=2,
    mlp=3,
    dispatch=1,
    combine=2,
    attn_bi=2,
    attn_w=2,
    mlp_bi=3,
    mlp_w=3,
    combine_b=1,
    dispatch_b=2,
    layers=1,
    sms=132,
    comm_sms=0,
)


def test_alone_a_forward_exposes_its_all_to_all():
    line = LAYER.alone(Op.F)
    assert line.duration == 2 + 1 + 3 + 2
    assert line.exposed == 3
    assert [s.name for s in line.segments] == ["attn", "dispatch", "mlp", "combine", "tail"]


def test_a_full_backward_hides_weight_gradients_beside_its_all_to_all():
    line = LAYER.alone(Op.B)
    # combine 1, mlp B 3, [dispatch 2 beside mlp W 3], attn B 2, attn W 2
    assert line.duration == 1 + 3 + 3 + 2 + 2
    assert line.exposed == 1
    assert LAYER.alone(Op.BI).duration == 1 + 3 + 2 + 2
    assert LAYER.alone(Op.W).duration == 5


def test_a_pair_hides_most_all_to_alls():
    pair = LAYER.pair(LAYER, False)
    computation = 2 + 3 + 2 + 2 + 3 + 3
    assert computation <= pair.duration < LAYER.alone(Op.F).duration + LAYER.alone(Op.B).duration
    many = Work(**{**vars(LAYER), "layers": 8})
    assert many.pair(many, False).exposed < pair.exposed


def test_communication_takes_sms_from_computation():
    contended = Work(**{**vars(LAYER), "comm_sms": 33})
    slow = contended.pair(contended, False)
    assert contended.slowdown == pytest.approx(132 / 99)
    assert slow.duration > LAYER.pair(LAYER, False).duration
    # Alone, nothing runs beside a forward's all-to-all: no contention.
    assert contended.alone(Op.F).duration == LAYER.alone(Op.F).duration
    with pytest.raises(ValueError, match="comm_sms < sms"):
        Work(sms=10, comm_sms=10)


def test_simulation_with_parts_reports_exposed_all_to_all():
    schedule = make("dualpipe", 4, 8)
    result = simulate(schedule, Costs(work=[LAYER] * 4))
    plain = simulate(make("1f1b", 4, 8), Costs(work=[LAYER] * 4))
    assert min(result.exposed_ep) > 0
    # F and B alone expose everything but what W hides; pairs expose less.
    assert plain.exposed_ep == [8 * (3 + 1)] * 4
    assert max(result.exposed_ep) < 2 * 8 * (3 + 1) * 0.75


# --- speed ----------------------------------------------------------------------------------------


def _seconds(schedule):
    best = float("inf")
    for _ in range(2):
        begin = time.process_time()
        simulate(schedule, KNOWN)
        best = min(best, time.process_time() - begin)
    return best


def test_dualpipe_of_64_ranks_and_1024_microbatches_in_under_5_seconds():
    begin = time.process_time()
    schedule = add_comms(make("dualpipe", 64, 1024))
    result = simulate(schedule, KNOWN)
    assert time.process_time() - begin < 5
    elementary = sum(len(a.atoms) for acts in schedule.actions for a in acts)
    assert elementary > 390_000
    assert result.bubble == pytest.approx([(32 - 1) * 2] * 64)


def test_time_grows_linearly():
    small, large = (add_comms(make("dualpipe", 16, m)) for m in (128, 1024))
    per_action = [_seconds(s) / s.num_actions for s in (small, large)]
    assert per_action[1] < 2 * per_action[0]
