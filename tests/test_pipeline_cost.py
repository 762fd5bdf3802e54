"""The cost model against published figures, its parts by hand, and its refusals."""

from dataclasses import replace

import pytest

from dskernels.pipeline import ScheduleError
from dskernels.pipeline.cost import Setup, all_to_all, layer_times, place_layers, training
from dskernels.pipeline.cost_report import PUBLISHED, sensitivity, summary
from dskernels.pipeline.hardware import PRESETS, hardware
from dskernels.pipeline.inference import UNITS, overlap_two, throughput
from dskernels.pipeline.inference import Parts as InferenceParts
from dskernels.pipeline.modelspec import ModelSpec, model_spec
from dskernels.pipeline.rates import Kernels, Rates

H800 = PRESETS["h800"]


@pytest.fixture(scope="module")
def v3():
    return summary(training(Setup(), H800))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_run_within_10_percent(v3, name):
    entry = v3["published"][name]
    assert abs(entry["error_percent"]) < 10, entry


def test_every_assumption_has_value_unit_and_source(v3):
    assert len(v3["assumptions"]) >= 15
    for name, a in v3["assumptions"].items():
        assert a["value"] > 0 and a["unit"] and len(a["source"]) > 10, name


def test_no_single_assumption_decides_the_answer():
    rows = sensitivity(Setup(), H800)
    assert len(rows) >= 10
    worst = max(max(abs(r["change_low_percent"]), abs(r["change_high_percent"])) for r in rows)
    assert 1 < worst < 10  # ten percent of one assumption never moves the answer by ten


def test_parameter_and_flop_counts_of_v3():
    m = ModelSpec()
    assert m.total_params / 1e9 == pytest.approx(671, abs=0.5)
    assert m.active_params / 1e9 == pytest.approx(37, abs=0.5)
    # 385 TFLOP/s per GPU and 19.926 s a step are published together: they imply the same count.
    implied = 385e12 * 2048 * 19.926 / (15360 * 4096)
    assert m.training_flops(4096) == pytest.approx(implied, rel=0.01)


def test_node_limited_routing():
    m = ModelSpec()
    # 8 of 128 experts on 4 nodes: the chance to miss one node is C(96, 8) / C(128, 8).
    assert m.nodes_per_token(8) == pytest.approx(4 * (1 - 0.0930), abs=2e-3)
    assert m.nodes_per_token(1) == pytest.approx(1)
    assert m.nodes_per_token(2) <= 2


def test_gemm_time_is_the_measured_rate():
    plain = Rates().with_value("gemm_predates_deepgemm", 0.0)
    k = Kernels(H800, plain)
    assert k.gemm(4096, 7168, 16384) == pytest.approx(2 * 4096 * 7168 * 16384 / 1358e12)
    older = Kernels(H800, Rates())
    assert older.gemm(4096, 7168, 16384) == pytest.approx(1.2 * k.gemm(4096, 7168, 16384))
    accumulate = 8 * 7168 * 16384 / (3.35e12 * 0.8)
    assert k.wgrad(4096, 7168, 16384) - accumulate == pytest.approx(
        2 * 4096 * 7168 * 16384 / 994e12
    )
    assert k.small_gemm(96, 7168, 16384) == pytest.approx(
        (2 * 64 * 7168 * 16384 / 336e12 + 2 * 128 * 7168 * 16384 / 645e12) / 2
    )


def test_all_to_all_reproduces_deepep_s_setting():
    kernels = Kernels(H800, Rates().with_value("imbalance", 1.0))
    dispatch, combine = all_to_all(kernels, ModelSpec(), 4096, 64)
    copies = ModelSpec().nodes_per_token(8)
    assert dispatch == pytest.approx(4096 * copies * 7168 * (1 + 4 / 128) / 51e9)
    assert combine == pytest.approx(4096 * copies * 7168 * 2 / 50e9)


def test_stages_hold_the_whole_model_once():
    kernels = Kernels(H800, Rates())
    for stages in (4, 8, 16, 31):
        placed = place_layers(Setup(), kernels, stages)
        assert len(placed) == stages
        assert sum(s.dense for s in placed) == 3
        assert sum(s.moe for s in placed) == 58 + 1  # and one for multi-token prediction
        assert [s.heads for s in placed] == [0] * (stages - 1) + [2]
        assert [s.embedding for s in placed] == [True] + [False] * (stages - 1)
    with pytest.raises(ScheduleError, match="nearest legal: 62"):
        place_layers(Setup(), kernels, 80)


def test_overlap_beats_schedules_without_pairs():
    base = training(Setup(), H800).step_time
    for schedule in ("1f1b", "zb1p"):
        assert training(replace(Setup(), schedule=schedule), H800).step_time > 1.05 * base


def test_memory_of_the_published_run_fits_80_gb(v3):
    assert v3["fits"] and 60 < v3["peak_memory_gb"] < 80


def test_more_ranks_per_expert_group_cost_parameters():
    few = training(replace(Setup(), ep=32), H800)
    assert max(few.result.peak_memory) > max(training(Setup(), H800).result.peak_memory)


def test_backward_costs_twice_the_forward_flops():
    times = layer_times(Kernels(H800, Rates()), Setup(), moe=True)
    assert 1.5 < (times.attn_bi + times.attn_w) / times.attn < 4
    assert 1.5 < (times.mlp_bi + times.mlp_w) / times.mlp < 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gpus": 2049}, "gpus must be a multiple of pp=16; got 2049, nearest: 2048 or 2064"),
        ({"ep": 48}, "multiple of ep=48"),
        ({"batch": 1000}, "batch must be a multiple of dp"),
        ({"batch": 2048}, "microbatches at least 32"),
        ({"sequence": 0}, "sequence must be >= 1"),
    ],
)
def test_setups_that_do_not_divide_are_refused(change, words):
    with pytest.raises(ScheduleError, match=words):
        training(replace(Setup(), **change), H800)


def test_hardware_files(tmp_path):
    json_file = tmp_path / "mine.json"
    json_file.write_text('{"base": "h800", "rdma": 1e11, "dollars": 3}')
    mine = hardware(str(json_file))
    assert mine.rdma == 1e11 and mine.bf16 == H800.bf16 and mine.name == "mine"
    faster = training(Setup(), mine)
    assert faster.step_time < training(Setup(), H800).step_time
    toml = tmp_path / "mine.toml"
    toml.write_text('base = "h100"\nhbm = 4e12\n')
    pytest.importorskip("tomllib", reason="TOML needs Python 3.11")
    assert hardware(str(toml)).hbm == 4e12
    toml.write_text('base = "h100"\nflops = 4e12\n')
    with pytest.raises(ScheduleError, match=r"unknown hardware fields \['flops'\]"):
        hardware(str(toml))
    toml.write_text('base = "h800"\nhbm = -1\n')
    with pytest.raises(ScheduleError, match="hbm must be > 0"):
        hardware(str(toml))
    with pytest.raises(ScheduleError, match="cluster must be one of h800"):
        hardware("a100")


def test_hugging_face_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 2048, "num_hidden_layers": 27, "q_lora_rank": 1024}')
    spec = model_spec(str(path))
    assert (spec.hidden, spec.layers, spec.q_lora, spec.heads) == (2048, 27, 1024, 128)


# --- inference ------------------------------------------------------------------------------------


def test_two_microbatches_overlap():
    parts = InferenceParts(attn=2, mlp=2, dispatch=1, combine=1)
    line = overlap_two(parts, 50, 1.0)
    assert 2 * 50 * 4 <= line.duration < 2 * 50 * 4 * 1.05  # communication hides entirely
    bound = overlap_two(InferenceParts(1, 1, 3, 3), 50, 1.0)
    assert 2 * 50 * 6 <= bound.duration < 2 * 50 * 6 * 1.05  # the wire is the limit
    slow = overlap_two(parts, 50, 1.25)
    assert line.duration < slow.duration < 1.25 * line.duration + 10


def test_inference_units_and_published_figures():
    rows = {name: throughput(unit, H800) for name, unit in UNITS.items()}
    assert rows["production-prefill"]["experts_per_gpu"] == 9
    assert rows["production-decode"]["experts_per_gpu"] == 2
    assert rows["paper-decode"]["dp"] == 80 and rows["paper-decode"]["ep"] == 320
    assert rows["paper-prefill"]["dp"] == 8
    # A model of full load: at or above the published 24-hour means, not beyond the roofline.
    decode = rows["production-decode"]["tokens_per_second_per_node"]
    assert 14.8e3 < decode < 1.5 * 14.8e3
    prefill = rows["production-prefill"]["tokens_per_second_per_node"]
    roofline = 8 * H800.fp8 / ModelSpec().forward_flops(4383)
    assert 32.2e3 < prefill < 0.5 * roofline
    assert all(r["gain_of_overlap"] > 1.2 for r in rows.values())


def test_decode_at_the_published_mean_load():
    """About 88 requests a GPU are what the published rate and user speed imply."""
    unit = replace(UNITS["production-decode"], batch=88)
    row = throughput(unit, H800)
    assert row["tokens_per_second_per_node"] == pytest.approx(14.8e3, rel=0.25)


def test_bad_units_are_refused():
    with pytest.raises(ScheduleError, match="multiple of tp"):
        replace(UNITS["paper-prefill"], tp=5)
    with pytest.raises(ScheduleError, match="batch must be > 0"):
        replace(UNITS["paper-prefill"], batch=0)
