"""What the report says about the machine rather than the run: backends, gates, pipeline charts."""

import importlib
import importlib.util

import dskernels as dsk
from model.config import DeepseekConfig
from model.report import BackendRow

MODEL_OPS = (
    "gemm",
    "grouped_gemm",
    "mla_prefill",
    "mla_decode",
    "mla_cache_append",
    "moe_gate",
    "moe_experts",
    "moe_bias_update",
    "rms_norm",
    "rope",
    "swiglu",
)
# DualPipe as the V3 report draws it (figure 5), with its relative costs: an overlapped forward and
# backward takes less than the two after each other.
_RANKS, _MICROBATCHES = 8, 20
_COSTS = {"f": 1.0, "bi": 1.0, "w": 1.0, "fb": 2.7}


def backend_rows() -> list[BackendRow]:
    """One row per op of the model; every reason is what `dsk.supports` answers on this machine."""
    rows = []
    for op in MODEL_OPS:
        reasons = {}
        for name in dsk.backends():
            support = dsk.supports(op, backend=name)
            reasons[name] = (support.ok, support.reason)
        rows.append(BackendRow(op, dsk.supports(op).reason, reasons))
    return rows


def gate_names(config: DeepseekConfig) -> list[str]:
    """Labels of the gates in the order of `DeepseekV3.moe_gates()`."""
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    main = [f"layer {i}" for i in layers]
    return main + [f"MTP {k}" for k in range(1, config.num_nextn_predict_layers + 1)]


def dualpipe_charts() -> list[tuple[str, str]]:
    """(heading, SVG) of a simulated DualPipe schedule, where this build has the simulator."""
    if importlib.util.find_spec("dskernels.pipeline.draw") is None:
        return []
    pipeline = importlib.import_module("dskernels.pipeline")
    draw = importlib.import_module("dskernels.pipeline.draw")
    schedule = pipeline.make("dualpipe", ranks=_RANKS, microbatches=_MICROBATCHES)
    result = pipeline.simulate(schedule, pipeline.Costs(**_COSTS))
    heading = f"DualPipe, {_RANKS} ranks, {_MICROBATCHES} micro-batches (simulated)"
    return [(heading, draw.svg(result))]
