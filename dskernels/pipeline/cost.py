"""From model, cluster and parallelism to step time, memory, GPU hours and dollars.

Every layer's parts are timed from kernel rates (`rates`), put on stages, and handed as
`overlap.Work` to the same simulator that prices any schedule: bubbles, hidden and exposed
all-to-all, and the contention for SMs come out of the simulation, not out of a factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .actions import COMPUTE, Schedule, ScheduleError
from .costs import Costs
from .hardware import Hardware
from .modelspec import ModelSpec
from .overlap import Op, Work
from .rates import Kernels, Rates
from .schedules import make
from .simulate import Result, simulate


@dataclass(frozen=True)
class Setup:
    """A training run. Defaults: DeepSeek-V3's (report 3.2 and 4.2).

    pp: pipeline ranks; ep: ranks that share one set of experts, within the gpus / pp ranks of a
    stage, which are data-parallel replicas otherwise (ZeRO-1).
    batch: sequences of one step over all GPUs; microbatch: sequences per micro-batch and rank.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    gpus: int = 2048
    pp: int = 16
    ep: int = 64
    schedule: str = "dualpipe"
    virtual_stages: int | None = None
    batch: int = 15360
    sequence: int = 4096
    microbatch: int = 1

    def check(self) -> None:
        """Refuse sizes that do not divide."""
        for name in ("gpus", "pp", "ep", "batch", "sequence", "microbatch"):
            if getattr(self, name) < 1:
                raise ScheduleError(f"{name} must be >= 1; got {getattr(self, name)}")
        self._divides("gpus", self.gpus, "pp", self.pp)
        self._divides("GPUs per stage (gpus / pp)", self.gpus // self.pp, "ep", self.ep)
        self._divides("experts", self.model.experts, "ep", self.ep)
        self._divides("batch", self.batch, "dp * microbatch", self.dp * self.microbatch)

    @staticmethod
    def _divides(what: str, value: int, name: str, by: int) -> None:
        if value % by:
            low, high = value // by * by, -(-value // by) * by
            raise ScheduleError(
                f"{what} must be a multiple of {name}={by}; got {value}, nearest: {low} or {high}"
            )

    @property
    def dp(self) -> int:
        """Replicas of the pipeline."""
        return self.gpus // self.pp

    @property
    def microbatches(self) -> int:
        """Of one pipeline in one step."""
        return self.batch // (self.dp * self.microbatch)

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one rank."""
        return self.microbatch * self.sequence


# --- one layer ------------------------------------------------------------------------------------


def attention_bytes(m: ModelSpec) -> dict[str, float]:
    """Bytes per token of the memory-bound kernels around attention, besides the GEMMs.

    bf16 values are 2 bytes, FP8 values 1; r: read, w: written.
    """
    d, q, kv = m.hidden, m.heads * m.qk_head, m.heads * (m.qk_nope + m.v_head)
    lora, out = m.q_lora + m.kv_lora + m.qk_rope, m.heads * m.v_head
    forward = (
        2 * d + d  # RMSNorm: r x, w FP8
        + 2 * lora + lora  # norms of the latents, FP8
        + 2 * 2 * q + 2 * kv + 2 * q  # RoPE on q in place; K assembled from kv and the rope part
        + 2 * out + out  # attention output to FP8
        + 2 * 3 * d  # residual
    )  # fmt: skip
    recompute = 2 * d + d + 3 * lora + 2 * 2 * q + 2 * kv + 2 * q
    backward = (
        2 * d + d  # gradient of the output projection's result to FP8
        + 2 * 2 * out  # dO . O of the attention backward
        + (2 + 1) * (q + kv + q)  # dQ, dK, dV through RoPE and split, to FP8
        + 3 * 3 * lora  # latents' norms backward
        + 2 * 4 * d  # RMSNorm backward and residual
        + recompute
    )  # fmt: skip
    # Transposed 128x1-scaled FP8 copies of inputs and gradients for the weight gradients.
    weight = 2 * (d + lora + out + d + lora + q + kv)
    return {"f": forward, "bi": backward, "w": weight}


def mlp_bytes(m: ModelSpec, inter: int, copies: float, routed: float) -> dict[str, float]:
    """The same around the MLP. copies: experts (or 1) per token; routed: how many of them came
    through the permutation."""
    d = m.hidden
    forward = (
        2 * d + d + 2 * d  # RMSNorm to FP8; residual read
        + 2 * routed * d  # permute FP8 rows
        + copies * (2 * 2 * inter + inter)  # SwiGLU: r gate and up, w FP8
        + 2 * routed * d + 2 * d  # weighted sum of the experts' outputs
        + 2 * 2 * d  # residual
    )  # fmt: skip
    backward = (
        2 * routed * d  # permute the incoming FP8 gradient
        + 2 * routed * d  # gradient of the routing weights: r the outputs
        + copies * (2 * 2 * inter + 2 * inter + 2 * inter + inter)  # SwiGLU and its recomputation
        + 2 * routed * d + 2 * d  # sum of the experts' input gradients
        + 2 * 4 * d + 3 * d  # RMSNorm backward, recomputation, residual
    )  # fmt: skip
    weight = 2 * copies * (d + 2 * inter + inter + d)
    return {"f": forward, "bi": backward, "w": weight}


# Kernels in a row per layer and pass, for the gaps between them.
_KERNELS = {"attn": {"f": 14, "bi": 30, "w": 9}, "mlp": {"f": 14, "bi": 22, "w": 8}}


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer's parts, without overlap."""

    attn: float
    attn_bi: float
    attn_w: float
    mlp: float
    mlp_bi: float
    mlp_w: float
    dispatch: float = 0.0
    combine: float = 0.0

    def total(self) -> float:
        parts = (self.attn, self.attn_bi, self.attn_w, self.mlp, self.mlp_bi, self.mlp_w)
        return sum(parts)


def _attention(kernels: Kernels, setup: Setup) -> tuple[float, float, float]:
    m, t = setup.model, setup.tokens
    rates, hw = kernels.rates, kernels.hw
    gap = rates["kernel_gap"]
    moved = attention_bytes(m)
    core = t * m.attention_core_flops(setup.sequence / 2)
    forward = core / (hw.bf16 * rates["attention_forward"])
    # Five products against the forward's two: 2.5 times the FLOPs.
    backward = 2.5 * core / (hw.bf16 * rates["attention_backward"])
    linears = m.attention_linears
    f = sum(kernels.gemm(t, n, k) for n, k in linears) + forward
    bi = sum(kernels.gemm(t, n, k, transposed=True) for n, k in linears) + backward
    bi += sum(kernels.gemm(t, n, k) for n, k in m.recomputed_linears)
    w = sum(kernels.wgrad(t, n, k) for n, k in linears)
    extra = {p: kernels.moved(t * moved[p]) + gap * _KERNELS["attn"][p] for p in ("f", "bi", "w")}
    return f + extra["f"], bi + extra["bi"], w + extra["w"]


def _mlp(kernels: Kernels, setup: Setup, *, moe: bool) -> tuple[float, float, float]:
    m, t = setup.model, setup.tokens
    gap, skew = kernels.rates["kernel_gap"], kernels.rates["imbalance"]
    gaps = {p: gap * _KERNELS["mlp"][p] for p in ("f", "bi", "w")}
    if not moe:
        moved = mlp_bytes(m, m.dense_inter, 1, 0)
        f = sum(kernels.gemm(t, n, k) for n, k in m.dense_linears)
        bi = sum(kernels.gemm(t, n, k, transposed=True) for n, k in m.dense_linears)
        w = sum(kernels.wgrad(t, n, k) for n, k in m.dense_linears)
        times = {"f": f, "bi": bi, "w": w}
        return tuple(times[p] + gaps[p] + kernels.moved(t * moved[p]) for p in times)
    local = m.experts // setup.ep
    rows = t * m.topk * skew  # the busiest rank's share of the routed rows
    moved = mlp_bytes(m, m.expert_inter, m.topk * skew + m.shared_experts, m.topk * skew)
    f = bi = w = 0.0
    for n, k in m.expert_linears:
        f += kernels.gemm(rows, n, k, grouped=True) + m.shared_experts * kernels.gemm(t, n, k)
        bi += kernels.gemm(rows, n, k, grouped=True, transposed=True)
        bi += m.shared_experts * kernels.gemm(t, n, k, transposed=True)
        w += kernels.wgrad(rows, n, k, groups=local) + m.shared_experts * kernels.wgrad(t, n, k)
    times = {"f": f, "bi": bi, "w": w}
    return tuple(times[p] + gaps[p] + kernels.moved(t * moved[p]) for p in times)


def all_to_all(kernels: Kernels, model: ModelSpec, tokens: float, ep: int) -> tuple[float, float]:
    """Seconds of one dispatch (FP8 with scales) and one combine (BF16)."""
    rates, hw = kernels.rates, kernels.hw
    nodes = -(-ep // hw.gpus_per_node)
    if nodes == 1:
        copies = min(model.topk, ep) * (1 - 1 / ep)
        rate = hw.nvlink * 0.78  # DeepEP V1: 153-158 of 200 GB/s inside a node
        pair = (rate, rate)
    else:
        copies = model.nodes_per_token(nodes)
        names = ("dispatch_bandwidth", "combine_bandwidth")
        if nodes == 2:
            names = ("bandwidth_ep16", "bandwidth_ep16")
        elif nodes <= 4:
            names = ("dispatch_bandwidth_ep32", "combine_bandwidth_ep32")
        pair = (rates[names[0]], rates[names[1]])
        pair = tuple(r * hw.rdma / 50e9 for r in pair)
    row = model.hidden * (1 + 4 / 128)  # an FP32 scale per 128 values
    sent = tokens * copies * rates["imbalance"]
    return sent * row / pair[0], sent * 2 * model.hidden / pair[1]


def layer_times(kernels: Kernels, setup: Setup, *, moe: bool) -> LayerTimes:
    attn = _attention(kernels, setup)
    mlp = _mlp(kernels, setup, moe=moe)
    if not moe or setup.ep == 1:
        return LayerTimes(*attn, *mlp)
    return LayerTimes(*attn, *mlp, *all_to_all(kernels, setup.model, setup.tokens, setup.ep))


def head_time(kernels: Kernels, setup: Setup) -> tuple[float, float]:
    """(forward, backward) of output head and loss: a BF16 GEMM and passes over the logits."""
    m, t = setup.model, setup.tokens
    flops = 2.0 * t * m.head_params
    rate = kernels.hw.bf16 * kernels.rates["bf16_gemm"]
    logits = kernels.moved(t * m.vocab * (2 + 4))  # w BF16, cross entropy in FP32
    return flops / rate + logits, 2 * flops / rate + logits


# --- stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds."""

    dense: int = 0
    moe: int = 0
    heads: int = 0
    embedding: bool = False

    @property
    def layers(self) -> int:
        return self.dense + self.moe


def place_layers(setup: Setup, kernels: Kernels, num_stages: int) -> list[Stage]:
    """Cut the model into contiguous stages so that the slowest one is as fast as can be.

    Items in order: dense layers, MoE layers, output head, then for multi-token prediction one MoE
    layer and its head, which stay on the last stage with the main head (they share it).
    """
    m = setup.model
    dense, moe = (layer_times(kernels, setup, moe=x).total() for x in (False, True))
    head = sum(head_time(kernels, setup))
    last = head + m.mtp_layers * (moe + head)
    weights = [dense] * m.dense_layers + [moe] * (m.layers - m.dense_layers)
    if num_stages > len(weights) + 1:
        raise ScheduleError(
            f"{num_stages} stages for {len(weights)} layers and a head: "
            f"nearest legal: {len(weights) + 1}"
        )

    def fill(limit: float) -> list[list[int]] | None:
        """Greedy from the end, so that the tail's stage takes only what fits beside it."""
        stages: list[list[int]] = [[]]
        load = last
        for i in reversed(range(len(weights))):
            if load + weights[i] > limit:
                if len(stages) == num_stages:
                    return None
                stages.append([])
                load = 0.0
            stages[-1].append(i)
            load += weights[i]
        return stages if load <= limit else None

    low, high = max(max(weights), last), last + sum(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle) else (middle, high)
    stages = list(reversed(fill(high) or []))
    while len(stages) < num_stages:  # fewer were enough: split the longest
        longest = max(range(len(stages)), key=lambda s: len(stages[s]))
        items = sorted(stages[longest])
        stages[longest : longest + 1] = [items[: len(items) // 2], items[len(items) // 2 :]]
    out = []
    for s, items in enumerate(stages):
        n_dense = sum(i < m.dense_layers for i in items)
        final = s == num_stages - 1
        out.append(
            Stage(
                n_dense,
                len(items) - n_dense + (m.mtp_layers if final else 0),
                1 + m.mtp_layers if final else 0,
                s == 0,
            )
        )
    return out


def stage_work(setup: Setup, kernels: Kernels, stages: list[Stage]) -> list[Work]:
    dense, moe = (layer_times(kernels, setup, moe=x) for x in (False, True))
    head_f, head_b = head_time(kernels, setup)
    comm_sms = int(kernels.rates["comm_sms"])
    out = []
    for stage in stages:
        a, b = stage.dense, stage.moe
        both = {
            name: a * getattr(dense, name) + b * getattr(moe, name)
            for name in ("attn", "mlp", "attn_bi", "attn_w", "mlp_bi", "mlp_w")
        }
        embedding = kernels.moved(setup.tokens * setup.model.hidden * 6) if stage.embedding else 0.0
        out.append(
            Work(
                **both,
                dispatch=b * moe.dispatch,
                combine=b * moe.combine,
                # Backward of a combine is a dispatch of FP8 gradients, and the other way round.
                combine_b=b * moe.dispatch,
                dispatch_b=b * moe.combine,
                tail=stage.heads * head_f + embedding,
                tail_b=stage.heads * head_b + embedding,
                layers=max(1, stage.layers),
                sms=kernels.hw.sms,
                comm_sms=comm_sms,
                reserved=True,
            )
        )
    return out


# --- memory ---------------------------------------------------------------------------------------


def activation_bytes(setup: Setup, stage: Stage) -> float:
    """Kept from forward to backward by one micro-batch on one stage.

    FP8 inputs of the linears; the attention output in BF16 and, for the next linear, in 12 bits
    (report, 3.3.3); no outputs of RMSNorm, of the up-projections or of SwiGLU (recomputed, 3.2.3).
    """
    m = setup.model
    out = m.heads * m.v_head
    per_attention = m.hidden + (m.q_lora + m.kv_lora + m.qk_rope) * 2 + out * 3.5 + 2 * m.hidden
    per_moe = m.topk * m.hidden + m.hidden + (m.topk + m.shared_experts) * 2 * m.expert_inter
    per_dense = m.hidden + 2 * m.dense_inter
    residual = 2 * m.hidden
    per_token = stage.layers * (per_attention + residual)
    per_token += stage.moe * per_moe + stage.dense * per_dense
    # The head is recomputed chunk by chunk: only its input is kept.
    per_token += stage.heads * 2 * m.hidden
    return setup.tokens * per_token


def stage_params(setup: Setup, stage: Stage) -> tuple[float, float]:
    """(replicated over all ranks of the stage, experts held by one rank), in parameters."""
    m = setup.model
    dense_layer = m.dense_params
    common = m.attention_params + m.gate_params + m.shared_experts * m.expert_params
    shared = stage.dense * dense_layer + stage.moe * common
    shared += m.head_params * (bool(stage.heads) + stage.embedding)
    return shared, stage.moe * m.experts / setup.ep * m.expert_params


def static_bytes(setup: Setup, stages: list[Stage], copies: int) -> float:
    """Parameters (BF16), gradients (FP32), and the rank's shard of master weights (FP32) and
    moments (BF16) under ZeRO-1, of all stages that one rank holds."""
    total = 0.0
    for stage in stages:
        common, expert = stage_params(setup, stage)
        expert_replicas = setup.dp // setup.ep * copies
        total += (common + expert) * (2 + 4)
        total += 8 * (common / (setup.dp * copies) + expert / max(1, expert_replicas))
    return total


# --- the optimiser step ---------------------------------------------------------------------------


def optimizer_time(setup: Setup, kernels: Kernels, stages: list[Stage], copies: int) -> float:
    """Reduce-scatter of FP32 gradients, AdamW on the shard, all-gather of BF16 parameters."""
    link = kernels.hw.rdma * kernels.rates["p2p_bandwidth"]
    seconds = 0.0
    for stage in stages:
        common, expert = stage_params(setup, stage)
        for params, ranks in ((common, setup.dp * copies), (expert, setup.dp // setup.ep * copies)):
            if ranks > 1:
                seconds += params * (4 + 2) * (ranks - 1) / ranks / link
            seconds += kernels.moved(params / max(1, ranks) * (4 + 2 * 8 + 2))
    return seconds


# --- the answer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingCost:
    """Result of `training`; times in seconds, memory in bytes."""

    setup: Setup
    hw: Hardware
    rates: Rates
    stages: list[Stage]
    result: Result
    optimizer: float

    @property
    def step_time(self) -> float:
        return self.result.makespan + self.optimizer

    @property
    def tokens_per_step(self) -> int:
        return self.setup.batch * self.setup.sequence

    def mfu(self, *, causal: bool = True) -> float:
        flops = self.setup.model.training_flops(self.setup.sequence, causal=causal)
        return flops * self.tokens_per_step / self.step_time / self.setup.gpus / self.hw.bf16

    @property
    def hours_per_trillion(self) -> float:
        return self.setup.gpus * self.step_time / 3600 * 1e12 / self.tokens_per_step

    def breakdown(self) -> dict[str, float]:
        """Mean seconds per rank spent in each kind of action, and idle."""
        sums: dict[str, float] = {}
        for rank, acts in enumerate(self.result.schedule.actions):
            for i, a in enumerate(acts):
                if a.op in COMPUTE:
                    name = {Op.FB: "1F1B", Op.F: "1F", Op.W: "1W"}.get(a.op, "1B")
                    spent = self.result.end[rank][i] - self.result.start[rank][i]
                    sums[name] = sums.get(name, 0.0) + spent
        ranks = self.result.schedule.num_ranks
        out = {name: value / ranks for name, value in sums.items()}
        out["bubble"] = sum(self.result.bubble) / ranks
        out["optimizer"] = self.optimizer
        return out


def priced_inputs(
    setup: Setup, hw: Hardware, rates: Rates, schedule: Schedule
) -> tuple[list[Stage], Costs, float]:
    """(stages, costs for the simulator, seconds of the optimiser)."""
    kernels = Kernels(hw, rates)
    stages = place_layers(setup, kernels, schedule.num_stages)
    copies = schedule.num_directions
    held = [[stages[s] for s, _ in schedule.stages_of(rank)] for rank in range(schedule.num_ranks)]
    costs = Costs(
        work=stage_work(setup, kernels, stages),
        p2p_latency=10e-6,
        p2p_bytes=2.0 * setup.tokens * setup.model.hidden,
        p2p_bandwidth=hw.rdma * rates["p2p_bandwidth"],
        activation=[activation_bytes(setup, s) for s in stages],
        retained=0.5,  # W needs the inputs of the linears, not the attention's
        static=[static_bytes(setup, h, copies) for h in held],
    )
    return stages, costs, max(optimizer_time(setup, kernels, h, copies) for h in held)


def schedule_of(setup: Setup) -> Schedule:
    return make(setup.schedule, setup.pp, setup.microbatches, setup.virtual_stages)


def training(setup: Setup, hw: Hardware, rates: Rates | None = None) -> TrainingCost:
    """Price one training step.

    Raises:
        ScheduleError: sizes that do not divide, or that the schedule refuses.
    """
    setup.check()
    rates = rates or Rates()
    schedule = schedule_of(setup)
    stages, costs, optimizer = priced_inputs(setup, hw, rates, schedule)
    return TrainingCost(setup, hw, rates, stages, simulate(schedule, costs), optimizer)
