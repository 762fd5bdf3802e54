"""What a priced training step says to people: figures, published ones beside them, sensitivity."""

from __future__ import annotations

from .cost import Setup, TrainingCost, layer_times, priced_inputs, schedule_of, training
from .hardware import Hardware
from .rates import Kernels, Rates

# Seconds of a step by kind of action, same source and column; the pair is called 1F1B there.
PUBLISHED_BREAKDOWN = {
    "1F": 1.13,
    "1B": 1.99,
    "1W": 0.48,
    "1F1B": 13.95,
    "bubble": 2.06,
    "optimizer": 0.29,
}
# The published run, for comparison only. Report: DeepSeek-V3 technical report (arXiv 2412.19437),
# table 1 and 4.2; ISCA: "Insights into DeepSeek-V3" (arXiv 2505.09343), table 4, the MPFT column.
PUBLISHED = {
    "gpu_hours_per_trillion_tokens": (180e3, "report, section 1"),
    "pretraining_gpu_hours": (2.664e6, "report, table 1"),
    "total_gpu_hours": (2.788e6, "report, table 1"),
    "total_dollars": (5.576e6, "report, table 1"),
    "step_time_s": (19.926, "ISCA, table 4"),
    "tflops_per_gpu": (385.0, "ISCA, table 4, causal"),
    "mfu": (0.3894, "ISCA, table 4, causal"),
    "mfu_non_causal": (0.4373, "ISCA, table 4"),
}
_PRETRAINING_TOKENS = 14.8e12
# Context extension and post-training are taken from the report: the model prices pre-training.
_OTHER_HOURS = 119e3 + 5e3


def summary(cost: TrainingCost) -> dict:
    """Figures, published ones beside them with the error, and every assumption."""
    step, hours = cost.step_time, cost.hours_per_trillion
    pretraining = hours * _PRETRAINING_TOKENS / 1e12
    total = pretraining + _OTHER_HOURS
    flops = cost.setup.model.training_flops(cost.setup.sequence) * cost.tokens_per_step
    figures = {
        "gpu_hours_per_trillion_tokens": hours,
        "mfu": cost.mfu(),
        "mfu_non_causal": cost.mfu(causal=False),
        "step_time_s": step,
        "tokens_per_second": cost.tokens_per_step / step,
        "tflops_per_gpu": flops / step / cost.setup.gpus / 1e12,
        "pretraining_gpu_hours": pretraining,
        "total_gpu_hours": total,
        "total_dollars": total * cost.hw.dollars,
    }
    s = cost.setup
    peak = max(cost.result.peak_memory)
    kernels = Kernels(cost.hw, cost.rates)
    return {
        **figures,
        "bubble_s": max(cost.result.bubble),
        "breakdown_s": cost.breakdown(),
        "peak_memory_gb": peak / 1e9,
        "fits": peak <= cost.hw.memory,
        "setup": {
            "model": s.model.name,
            "cluster": cost.hw.name,
            "gpus": s.gpus,
            "pp": s.pp,
            "ep": s.ep,
            "dp": s.dp,
            "schedule": s.schedule,
            "microbatches": s.microbatches,
            "microbatch": s.microbatch,
            "batch": s.batch,
            "sequence": s.sequence,
            "dollars_per_gpu_hour": cost.hw.dollars,
        },
        "stages": [vars(stage) for stage in cost.stages],
        "layer_ms": {
            name: {k: 1e3 * v for k, v in vars(layer_times(kernels, s, moe=moe)).items()}
            for name, moe in (("dense", False), ("moe", True))
        },
        "published": {
            name: {
                "published": value,
                "model": figures[name],
                "error_percent": 100 * (figures[name] / value - 1),
                "source": source,
            }
            for name, (value, source) in PUBLISHED.items()
        }
        if is_v3_run(cost)
        else None,
        "published_breakdown_s": PUBLISHED_BREAKDOWN if is_v3_run(cost) else None,
        "assumptions": {
            name: {"value": a.value, "unit": a.unit, "source": a.source}
            for name, a in cost.rates.items()
        },
    }


def is_v3_run(cost: TrainingCost) -> bool:
    return cost.hw.name == "h800" and cost.setup == Setup()


def sensitivity(setup: Setup, hw: Hardware, rates: Rates | None = None) -> list[dict]:
    """GPU hours per trillion tokens with each assumption 10% lower and higher (a switch: off)."""
    rates = rates or Rates()
    base = training(setup, hw, rates).hours_per_trillion
    schedule = schedule_of(setup)
    unmoved = priced_inputs(setup, hw, rates, schedule)
    rows = []
    for name, assumption in rates.items():
        if name == "gemm_predates_deepgemm":
            trials = [0.0, 1.0]
        else:
            trials = [assumption.value * 0.9, assumption.value * 1.1]
        changed = [rates.with_value(name, v) for v in trials]
        if all(priced_inputs(setup, hw, r, schedule) == unmoved for r in changed):
            continue  # an assumption about inference, or about another number of nodes
        found = [training(setup, hw, r).hours_per_trillion for r in changed]
        rows.append(
            {
                "assumption": name,
                "value": assumption.value,
                "low": trials[0],
                "high": trials[1],
                "change_low_percent": 100 * (found[0] / base - 1),
                "change_high_percent": 100 * (found[1] / base - 1),
            }
        )
    return sorted(
        rows,
        key=lambda r: -max(abs(r["change_low_percent"]), abs(r["change_high_percent"])),
    )
