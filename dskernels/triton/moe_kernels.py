"""The Triton kernels of moe.py.

Letters: t tokens, d model width, e experts, k chosen experts per token, m permuted rows. A slot is
one (token, choice), numbered token * k + choice.
"""

import triton
import triton.language as tl

from .cast import cast_to


@triton.jit
def take_best(value, index, taken):
    """The largest value of each row that is not taken, the lowest index of equal ones.

    value, taken [rows, columns], index [1, columns] -> (indices [rows, 1], taken with them)
    """
    left = tl.where(taken != 0, float("-inf"), value)
    best = tl.max(left, axis=1)[:, None]
    candidates = tl.where((value == best) & (taken == 0), index, 1 << 30)
    chosen = tl.min(candidates, axis=1)[:, None]
    return chosen, taken | (index == chosen).to(tl.int32)


@triton.jit
def group_scores(key, expert, num_groups, size, TOP2: tl.constexpr, GROUPS: tl.constexpr):
    """[rows, GROUPS]: how good each group is, by the sum of its two best keys or by its best."""
    group = tl.arange(0, GROUPS)[None, :]
    scores = tl.zeros((key.shape[0], GROUPS), tl.float32)
    for g in range(0, num_groups):
        member = tl.where(expert // size == g, key, float("-inf"))
        first = tl.max(member, axis=1)[:, None]
        if TOP2:
            at = tl.min(tl.where(member == first, expert, 1 << 30), axis=1)[:, None]
            second = tl.max(tl.where(expert == at, float("-inf"), member), axis=1)[:, None]
            first += tl.where(size > 1, second, 0.0)
        scores = tl.where(group == g, first, scores)
    return scores


@triton.jit
def gate_kernel(
    x_ptr, weight_ptr, bias_ptr, topk_idx_ptr, topk_weights_ptr, scores_ptr,
    tokens, depth, experts, ld_x, num_groups, topk_group, topk, scale,
    SOFTMAX: tl.constexpr, HAS_BIAS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOPK: tl.constexpr,
    SLAB: tl.constexpr,
):  # fmt: skip
    """Hidden states to chosen experts, their weights and all scores; a program takes TOKENS tokens.

    fp32 throughout: a rounded score would choose other experts than the reference.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    at = tl.arange(0, SLAB)
    x_at = x_ptr + token.to(tl.int64) * ld_x + at[None, :]
    weight_at = weight_ptr + expert.to(tl.int64) * depth + at[:, None]
    logits = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for k in range(0, depth, SLAB):
        inside = at < depth - k
        x = tl.load(x_at + k, mask=(token < tokens) & inside[None, :], other=0.0)
        weight = tl.load(weight_at + k, mask=(expert < experts) & inside[:, None], other=0.0)
        logits += tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")

    if SOFTMAX:
        logits = tl.where(expert < experts, logits, float("-inf"))
        power = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        total = tl.sum(power, axis=1)[:, None]
        score = tl.math.div_rn(power, tl.broadcast_to(total, power.shape))
    else:
        score = tl.math.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    row = token.to(tl.int64)
    tl.store(
        scores_ptr + row * experts + expert, score, mask=(token < tokens) & (expert < experts)
    )  # fmt: skip

    biased = score
    if HAS_BIAS:
        biased += tl.load(bias_ptr + expert, mask=expert < experts, other=0.0)
    largest = 3.4028234663852886e38  # a NaN ranks behind every number, infinities are finite
    key = tl.where(biased != biased, -largest, tl.minimum(tl.maximum(biased, -largest), largest))
    taken = tl.zeros((TOKENS, EXPERTS), tl.int32) + (expert >= experts).to(tl.int32)
    if GROUPS > 1:
        size = experts // num_groups
        group = tl.arange(0, GROUPS)[None, :]
        value = group_scores(key, expert, num_groups, size, TOP2, GROUPS)
        gone = tl.zeros((TOKENS, GROUPS), tl.int32) + (group >= num_groups).to(tl.int32)
        allowed = tl.zeros((TOKENS, EXPERTS), tl.int32)
        for _ in range(0, topk_group):
            chosen, gone = take_best(value, group, gone)
            allowed = allowed | (expert // size == chosen).to(tl.int32)
        taken = taken | (1 - allowed)

    choice = tl.arange(0, TOPK)[None, :]
    indices = tl.zeros((TOKENS, TOPK), tl.int32)
    weights = tl.zeros((TOKENS, TOPK), tl.float32)
    total = tl.zeros((TOKENS, 1), tl.float32)
    for i in range(0, topk):
        chosen, taken = take_best(key, expert, taken)
        own = tl.sum(tl.where(expert == chosen, score, 0.0), axis=1)[:, None]
        total += own  # in the order of the choices
        indices = tl.where(choice == i, chosen, indices)
        weights = tl.where(choice == i, own, weights)
    if RENORMALIZE:
        weights = tl.math.div_rn(weights, tl.broadcast_to(total + 1e-20, weights.shape))
    inside = (token < tokens) & (choice < topk)
    tl.store(topk_idx_ptr + row * topk + choice, indices.to(tl.int64), mask=inside)
    tl.store(topk_weights_ptr + row * topk + choice, weights * scale, mask=inside)


@triton.jit
def replica_of(named, token, expert_map_ptr, replicas):
    """The replica that stands for an expert at a token: see ref.moe.choose_replicas."""
    row = expert_map_ptr + named.to(tl.int64) * replicas
    count = tl.zeros(named.shape, tl.int32)
    for r in range(0, replicas):
        count += (tl.load(row + r, mask=named >= 0, other=-1) >= 0).to(tl.int32)
    turn = token.to(tl.uint32) * 2654435769
    number = tl.umulhi(turn, count.to(tl.uint32)).to(tl.int32)
    chosen = tl.full(named.shape, -1, tl.int32)
    for r in range(0, replicas):
        replica = tl.load(row + r, mask=named >= 0, other=-1).to(tl.int32)
        chosen = tl.where((replica >= 0) & (number == 0), replica, chosen)
        number -= (replica >= 0).to(tl.int32)
    return chosen


@triton.jit
def count_kernel(
    topk_idx_ptr, expert_map_ptr, chosen_ptr, counts_ptr, slots, topk, shared, replicas, experts,
    MAPPED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [chunks, experts] int32: each expert's slots in each chunk of CHUNK slots.

    A token has `topk` slots of its choice, or of its choice's replicas if MAPPED, and one for each
    of the last `shared` experts: chosen [slots].
    """
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = slot // (topk + shared)
    choice = slot % (topk + shared)
    at = topk_idx_ptr + token.to(tl.int64) * topk + choice
    named = tl.load(at, mask=(slot < slots) & (choice < topk), other=-1).to(tl.int32)
    if MAPPED:
        named = replica_of(named, token, expert_map_ptr, replicas)
    always = (slot < slots) & (choice >= topk)
    named = tl.where(always, experts - shared - topk + choice, named)
    if tl.program_id(1) == 0:
        tl.store(chosen_ptr + slot, named.to(tl.int64), mask=slot < slots)
    count = tl.sum((named[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * experts + expert, count, mask=expert < experts)


@triton.jit
def place_kernel(topk_idx_ptr, first_row_ptr, row_map_ptr, slots, experts, CHUNK: tl.constexpr):
    """row_map [slots]: first_row [chunks, experts] plus equal experts before it in its chunk."""
    first = tl.program_id(0) * CHUNK
    slot = first + tl.arange(0, CHUNK)
    named = tl.load(topk_idx_ptr + slot, mask=slot < slots, other=-1).to(tl.int32)
    other = first + tl.arange(0, CHUNK)
    theirs = tl.load(topk_idx_ptr + other, mask=other < slots, other=-1).to(tl.int32)
    earlier = (theirs[None, :] == named[:, None]) & (other[None, :] < slot[:, None])
    at = tl.program_id(0) * experts + named
    row = tl.load(first_row_ptr + at, mask=named >= 0, other=0)
    row += tl.sum(earlier.to(tl.int64), axis=1)
    tl.store(row_map_ptr + slot, tl.where(named >= 0, row, -1), mask=slot < slots)


@triton.jit
def copy_rows_kernel(
    x_ptr, row_map_ptr, out_ptr, topk, columns, x_row, x_column, out_row, out_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each slot's row of x [t, columns] to its place in out [m, columns], any strides."""
    slot = tl.program_id(0)
    row = tl.load(row_map_ptr + slot)
    token = (slot // topk).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if row >= 0:
        value = tl.load(x_ptr + token * x_row + column * x_column, mask=column < columns)
        tl.store(out_ptr + row * out_row + column * out_column, value, mask=column < columns)


@triton.jit
def unpermute_kernel(
    y_ptr, row_map_ptr, weights_ptr, out_ptr, topk, shared, depth,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's rows, weighted and summed in fp32 in the order of its choices, rounded once.
    The last `shared` of them have the weight 1.

    To be compiled without fusing multiplications and additions: product and sum round apart.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(0, topk):
        row = tl.load(row_map_ptr + token * topk + choice)
        if row >= 0:
            value = tl.load(y_ptr + row * depth + column, mask=column < depth, other=0.0)
            if WEIGHTED and choice < topk - shared:
                at = token * (topk - shared) + choice
                total += value.to(tl.float32) * tl.load(weights_ptr + at)
            else:
                total += value.to(tl.float32)
    like = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * depth + column, cast_to(total, like), mask=column < depth)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr, y_ptr, row_map_ptr, weights_ptr, dy_ptr, dweights_ptr, topk, depth,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot: dy = weight * grad, d weight = <grad, y>."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(row_map_ptr + slot)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + slot)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.where(row >= 0, depth, 0), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < depth
        grad = tl.load(grad_ptr + slot // topk * depth + column, mask=inside, other=0.0)
        y = tl.load(y_ptr + row * depth + column, mask=inside, other=0.0).to(tl.float32)
        wide = grad.to(tl.float32)
        dot += wide * y
        tl.store(dy_ptr + row * depth + column, cast_to(wide * weight, grad.dtype), mask=inside)
    tl.store(dweights_ptr + slot, tl.sum(dot, axis=0))
