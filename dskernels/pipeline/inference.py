"""Prefill and decode throughput of one deployment unit, two micro-batches overlapped.

One GPU's layer is timed as in `cost`; two micro-batches alternate on its computation and
communication lanes (DeepSeek-V3 report 3.4, inference system overview), so that one computes while
the other's tokens travel. Prefill's all-to-all kernels hold SMs; decode's are pure RDMA and hold
none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .actions import ScheduleError
from .cost import all_to_all, attention_bytes, mlp_bytes
from .hardware import Hardware
from .modelspec import ModelSpec
from .overlap import Task, Timeline, run_lanes
from .rates import Kernels, Rates


@dataclass(frozen=True)
class Unit:
    """A deployment unit.

    phase           "prefill" or "decode".
    gpus            of the unit; routed experts are spread over all of them (EP = gpus).
    tp              tensor parallelism of attention (with sequence parallelism); DP = gpus / tp.
    redundant       extra copies of heavily used routed experts.
    batch           prefill: tokens per data-parallel rank at a time, both micro-batches together;
                    decode: requests per data-parallel rank, likewise.
    context         prefill: prompt length; decode: mean KV length.
    shared_apart    the shared expert lives on its own GPUs, as one more routed expert.
    """

    name: str
    phase: str
    gpus: int
    tp: int
    redundant: int
    batch: float
    context: float
    shared_apart: bool = False
    model: ModelSpec = field(default_factory=ModelSpec)

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise ScheduleError(f"phase must be prefill or decode; got {self.phase!r}")
        if self.gpus < 1 or self.tp < 1 or self.gpus % self.tp:
            raise ScheduleError(
                f"gpus must be a multiple of tp; got gpus={self.gpus}, tp={self.tp}"
            )
        for name in ("batch", "context"):
            if not getattr(self, name) > 0:
                raise ScheduleError(f"{name} must be > 0; got {getattr(self, name)!r}")

    @property
    def experts_per_gpu(self) -> int:
        return -(-(self.model.experts + self.redundant) // self.gpus)


# Report 3.4 (paper-*) and the inference system overview of February 2025 (production-*).
# Batches: DeepSeek's published profiles use 16K tokens (prompts of 4K) and 128 requests per GPU.
UNITS = {
    u.name: u
    for u in (
        Unit("production-prefill", "prefill", 32, 1, 32, 16384, 4383),
        Unit("paper-prefill", "prefill", 32, 4, 32, 4 * 16384, 4383),
        Unit("production-decode", "decode", 144, 1, 32, 128, 4989),
        Unit("paper-decode", "decode", 320, 4, 64, 4 * 128, 4989, shared_apart=True),
    )
}
PUBLISHED = {
    "prefill": {
        "tokens_per_second_per_node": 73.7e3 * (1 - 0.563),
        "note": "73.7K input tokens/s per H800 node, 56.3% of them cache hits: 32.2K computed",
    },
    "decode": {
        "tokens_per_second_per_node": 14.8e3,
        "note": "14.8K output tokens/s per H800 node, mean KV length 4,989, 20-22 tokens/s a user",
    },
}
SOURCE = "DeepSeek, inference system overview (open-infra-index, February 2025), 24-hour means"


@dataclass(frozen=True)
class Parts:
    """Seconds of one layer of one micro-batch on one GPU."""

    attn: float
    mlp: float
    dispatch: float
    combine: float


def _prefill_parts(unit: Unit, kernels: Kernels) -> Parts:
    m, rates, hw = unit.model, kernels.rates, kernels.hw
    # DeepGEMM itself served inference: its rates are not scaled back.
    kernels = Kernels(hw, rates.with_value("gemm_predates_deepgemm", 0.0))
    group = unit.batch / 2  # tokens of one micro-batch of one attention group
    local = group / unit.tp  # rows of one GPU in the sequence-parallel parts
    gap = rates["kernel_gap"]
    core = group * m.attention_core_flops(unit.context / 2) / unit.tp
    attn = core / (hw.bf16 * rates["attention_forward"])
    latents, up_q, up_kv, out = m.attention_linears
    attn += kernels.gemm(local, *latents)
    # Heads are split over the tensor-parallel ranks: n of the up-projections, k of the output.
    attn += sum(kernels.gemm(group, n, k) for n, k in (up_q, up_kv, out)) / unit.tp
    attn += kernels.moved(local * attention_bytes(m)["f"]) + 14 * gap
    if unit.tp > 1:  # all-gather of the latents, reduce-scatter of the output
        moved = group * (unit.tp - 1) / unit.tp * (latents[0] + 2 * m.hidden)
        attn += moved / (hw.nvlink * 0.78)
    skew = rates["imbalance"]
    rows = local * m.topk * skew
    mlp = sum(kernels.gemm(rows, n, k, grouped=True) for n, k in m.expert_linears)
    mlp += sum(kernels.gemm(local, n, k) for n, k in m.expert_linears) * m.shared_experts
    moved = mlp_bytes(m, m.expert_inter, m.topk * skew + m.shared_experts, m.topk * skew)
    mlp += kernels.moved(local * moved["f"]) + 14 * gap
    return Parts(attn, mlp, *all_to_all(kernels, m, local, unit.gpus))


def _decode_parts(unit: Unit, kernels: Kernels) -> Parts:
    m, rates, hw = unit.model, kernels.rates, kernels.hw
    group = unit.batch / 2
    local = group / unit.tp
    gap = rates["kernel_gap"]
    # The absorbed form: all heads attend to one 576-wide latent whose first 512 are the value.
    width, value = m.kv_lora + m.qk_rope, m.kv_lora
    flops = 2 * group * unit.context * m.heads * (width + value) / unit.tp
    read = group * unit.context * 2 * width  # each tensor-parallel rank reads the whole cache
    attn = max(
        flops / (rates["attention_decode"] * hw.bf16 / 989e12),
        read / (rates["decode_hbm"] * hw.hbm / 3.35e12),
    )
    latents, up_q, up_kv, out = m.attention_linears
    attn += kernels.small_gemm(group, *latents)
    attn += (kernels.small_gemm(group, *up_q) + kernels.small_gemm(group, *out)) / unit.tp
    # Absorbed key and value up-projections: one BF16 product per head, bound by the weights.
    attn += kernels.moved(2 * up_kv[0] * up_kv[1]) / unit.tp
    attn += kernels.moved(group / unit.tp * attention_bytes(m)["f"]) + 14 * gap
    if unit.tp > 1:
        attn += 2 * 10e-6  # two small collectives inside the node, by latency
    skew = rates["imbalance"]
    copies = unit.experts_per_gpu
    rows = local * m.topk * skew / copies  # rows per expert: sources and homes are the same GPUs
    extra = local * unit.gpus / max(1, unit.redundant) if unit.shared_apart else 0.0
    mlp = sum(kernels.masked_gemm(rows, copies, n, k) for n, k in m.expert_linears)
    if unit.shared_apart:
        # GPUs with the shared expert see `extra` rows of it instead of routed ones: take the worse.
        apart = sum(kernels.masked_gemm(extra, 1, n, k) for n, k in m.expert_linears)
        mlp = max(mlp, apart)
    else:
        mlp += sum(kernels.small_gemm(local, n, k) for n, k in m.expert_linears)
    moved = mlp_bytes(m, m.expert_inter, m.topk * skew + m.shared_experts, m.topk * skew)
    mlp += kernels.moved(local * moved["f"]) + 12 * gap
    bandwidth = rates["low_latency_bandwidth"] * hw.rdma / 50e9
    sent = local * (m.topk + (1 if unit.shared_apart else 0)) * rates["imbalance"]
    dispatch = sent * m.hidden * (1 + 4 / 128) / bandwidth
    combine = sent * m.hidden * 2 / bandwidth
    return Parts(attn, mlp, dispatch, combine)


def overlap_two(parts: Parts, layers: int, slowdown: float) -> Timeline:
    """Two micro-batches through `layers` layers on two lanes; they alternate by half a layer."""
    tasks: list[Task] = []

    def add(name: str, lane: int, cost: float, after: int | None) -> int:
        tasks.append(Task(name, lane, cost, () if after is None else (after,)))
        return len(tasks) - 1

    home: list[int | None] = [None, None]
    sent: list[int | None] = [None, None]
    for layer in range(layers + 1):
        for mb in (0, 1):
            if layer:  # experts of the layer before, then the way home
                done = add(f"mlp {mb}", 0, parts.mlp, sent[mb])
                home[mb] = add(f"combine {mb}", 1, parts.combine, done)
        for mb in (0, 1):
            if layer < layers:
                attn = add(f"attn {mb}", 0, parts.attn, home[mb])
                sent[mb] = add(f"dispatch {mb}", 1, parts.dispatch, attn)
    return run_lanes(tasks, slowdown)


def throughput(unit: Unit, hw: Hardware, rates: Rates | None = None) -> dict:
    """Tokens per second and node, and where the time goes.

    The dense first layers are priced as mixture-of-experts layers (same FLOPs per token).
    """
    rates = rates or Rates()
    kernels = Kernels(hw, rates)
    m = unit.model
    prefill = unit.phase == "prefill"
    parts = (_prefill_parts if prefill else _decode_parts)(unit, kernels)
    slowdown = hw.sms / (hw.sms - rates["comm_sms"]) if prefill else 1.0
    line = overlap_two(parts, m.layers, slowdown)
    alone = 2 * m.layers * sum(vars(parts).values())
    head_rows = unit.batch / unit.context if prefill else unit.batch  # one row per request
    head_bytes = 2.0 * m.head_params / unit.tp
    head_flops = 2.0 * head_rows * m.head_params / unit.tp
    head = max(kernels.moved(head_bytes), head_flops / (hw.bf16 * rates["bf16_gemm"]))
    seconds = line.duration + head
    groups = unit.gpus / unit.tp
    per_second = unit.batch * groups / seconds
    per_node = per_second / unit.gpus * hw.gpus_per_node
    published = PUBLISHED[unit.phase]
    target = published["tokens_per_second_per_node"]
    comparable = hw.name == "h800"
    return {
        "unit": unit.name,
        "phase": unit.phase,
        "gpus": unit.gpus,
        "tp": unit.tp,
        "dp": int(groups),
        "ep": unit.gpus,
        "experts_per_gpu": unit.experts_per_gpu,
        "batch_per_dp_rank": unit.batch,
        "context": unit.context,
        "tokens_per_second_per_node": per_node,
        "seconds_per_pass": seconds,
        "layer_us": {k: 1e6 * v for k, v in vars(parts).items()},
        "exposed_communication_s": line.exposed,
        "gain_of_overlap": alone / line.duration,
        "published_tokens_per_second_per_node": target if comparable else None,
        "error_percent": 100 * (per_node / target - 1) if comparable else None,
        "published_note": f"{published['note']} ({SOURCE})",
    }


WHY_OFF = {
    "prefill": "The model prices full batches without pause; the published figure is a 24-hour "
    "mean over a fluctuating load, and its computed tokens attend to cached prefixes as well. "
    "Public full-load figures lie between: RTP-LLM 42.6K tokens/s per H800 node, SGLang 52.3K per "
    "H100 node (LMSYS, May 2025). Not modelled: request scheduling, uneven prompts between ranks, "
    "host gaps.",
    "decode": "The published figure is a 24-hour mean; 1,850 tokens/s per GPU at 20-22 tokens/s a "
    "user is about 88 requests per GPU, below the batch of 128 priced here (--requests 88). Not "
    "modelled: scheduling, sampling, uneven KV lengths between ranks. Others at full load: "
    "RTP-LLM 14.7K per H800 node at 50 ms, SGLang 22.3K per H100 node. The paper's TP4 unit is "
    "slower here because each of its four attention ranks reads the whole latent cache.",
}
