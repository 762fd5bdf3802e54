"""The MLA stem on every backend, against the reference in fp64."""

import importlib
import itertools
import re

import pytest
import torch
from backend_axis import need, on_cpu, on_device
from executed_work import executed, work_of
from mla_cases import LATENT, assert_decoded, paged_case

import dskernels as dsk
from dskernels.testing import assert_bitwise_equal


def decode(case, backend, **how):
    """mla_decode on a backend, results on the CPU."""
    got = dsk.mla_decode(*(on_device(x, backend) for x in case), backend=backend, **how)
    return tuple(on_cpu(x) for x in got)


def check(backend, case, **how):
    q, cache = case[:2]
    need("mla_decode", backend, b=q.shape[0], s=q.shape[1], h=q.shape[2], page=cache.shape[1])
    assert_decoded(decode(case, backend, **how), case, rounds(backend), **how)


def rounds(backend):
    """Whether latents of an FP8 cache become bf16: where they meet a tensor core."""
    if backend == "cpu":
        return dsk.build_info()["cpu"]["target"] == "amx"
    return backend != "ref"


BOUNDARIES = [0, 1, 2, 15, 16, 63, 64, 65, 127, 128, 130, 257]


# Pages with heads: 6, 30 and 70 query rows run on different CUDA kernels.
PAGES_AND_HEADS = [(16, 3), (32, 15), (64, 35), (128, 3), (16, 35), (64, 15)]


@pytest.mark.parametrize("page,heads", PAGES_AND_HEADS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_pages_lengths_and_query_tokens(backend, page, heads, causal):
    """Lengths around every boundary; 2 query tokens, so that length 1 has one that sees nothing."""
    check(backend, paged_case(BOUNDARIES, 2, heads, page), causal=causal)


# 70, 6, 40 and 30 rows: two CTAs that share the dequantising, and the kernels of one.
@pytest.mark.parametrize("page,heads", [(16, 35), (32, 3), (64, 20), (128, 15)])
def test_fp8_cache(backend, page, heads):
    check(backend, paged_case(BOUNDARIES, 2, heads, page, fp8=True))


def test_fp8_cache_of_many_heads(backend):
    check(backend, paged_case([200, 0, 65], 1, 126, fp8=True))


# FlashMLA's grid. What would cost the emulator more than a minute runs with fewer requests.
HEADS = (1, 3, 9, 63, 64, 126, 128)
GRID = list(itertools.product((1, 2, 6, 64), (1, 2, 4), (20, 140, 4096), HEADS))
QUICK = [(1, 1, 140, 1), (2, 4, 20, 9), (2, 1, 140, 63), (2, 1, 140, 128), (6, 2, 20, 3)]
MAX_BLOCKS = 2000  # row blocks times token blocks: some 10 s


def affordable(b, s, s_k, h):
    return min(b, max(1, MAX_BLOCKS // (-(-s * h // 64) * -(-s_k // 64))))


@pytest.mark.parametrize(
    "b,s,s_k,h",
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in GRID],
)
def test_flash_mla_grid(backend, b, s, s_k, h):
    """Half of the requests have random lengths, some of them 0."""
    b = affordable(b, s, s_k, h)
    g = torch.Generator().manual_seed(b)
    lengths = [s_k] * ((b + 1) // 2)
    lengths += torch.randint(0, s_k + 1, (b // 2,), generator=g).tolist()
    if b > 4:
        lengths[-1] = 0
    check(backend, paged_case(lengths, s, h, seed=s_k), causal=s % 2 == 0)


@pytest.mark.parametrize("heads", [20, 40])
@pytest.mark.parametrize("sharpness,scale", [(60.0, 0.5), (300.0, 0.03)])
def test_sharp_attention_and_a_scale(backend, heads, sharpness, scale):
    """Scores of some hundreds, so that maxima move and old sums vanish; or of thousands that the
    scale brings down."""
    check(backend, paged_case([300, 65], 1, heads, sharpness=sharpness), softmax_scale=scale)


@pytest.mark.parametrize("heads,fp8", [(3, False), (20, True), (35, False), (35, True)])
def test_nothing_is_read_behind_the_cache_or_the_table(backend, heads, fp8):
    """The last page is full and ends where the cache does; the last request ends in the middle of
    a block, with the table."""
    check(backend, paged_case([64, 80], 1, heads, page=16, fp8=fp8, spare=0))


def test_no_requests_and_no_pages(backend):
    q, cache, table, lens = paged_case([5], 1, 4)
    need("mla_decode", backend)
    out, lse = decode((q[:0], cache, table[:0], lens[:0]), backend)
    assert out.shape == (0, 1, 4, LATENT) and lse.shape == (0, 4, 1)
    out, lse = decode((q, cache[:0], table[:, :0], lens * 0), backend)
    assert not out.any() and (lse == torch.inf).all()


@pytest.mark.parametrize("heads,fp8", [(4, False), (4, True), (18, False)])
def test_the_same_request_gives_the_same_bits_whatever_the_batch(backend, heads, fp8):
    lengths = [1100, 5, 1030]
    case = paged_case(lengths, 2, heads, fp8=fp8)
    if backend == "triton" and heads > 16:
        pytest.skip("a quarter of a minute in the interpreter")
    need("mla_decode", backend, b=3, s=2, h=heads, page=64)
    out, lse = decode(case, backend, deterministic=True)
    assert_decoded((out, lse), case, rounds(backend))
    q, cache, table, lens = case
    for batch in ([0], [2, 1], [1, 0, 2, 2]):
        part = q[batch], cache, table[batch], lens[batch]
        got = decode(part, backend, deterministic=True)
        assert_bitwise_equal(got[0], out[batch])
        assert_bitwise_equal(got[1], lse[batch])


# ---- what only the CUDA kernels have -----------------------------------------------------------


@pytest.fixture
def machine(backend):
    """The CUDA kernels' own Python functions, on a GPU or in the emulator."""
    if backend not in ("cuda", "emu"):
        pytest.skip("schedules belong to the CUDA kernels")
    return importlib.import_module(f"dskernels.{backend}.mla")


@pytest.mark.parametrize("heads,requests", [(16, 40), (64, 8)])
def test_two_weights_are_as_exact_as_many(machine, backend, heads, requests):
    """What rounding a weight costs does not average out over two tokens."""
    need("mla_decode", backend)
    case = paged_case([2] * requests, 1, heads, seed=3)
    assert_decoded(decode(case, backend), case)


@pytest.mark.parametrize("heads", [3, 35])
def test_a_token_that_outweighs_all_others_gives_its_value(machine, backend, heads):
    """In a request of one block, a full one too, its weight is 1: exactly."""
    q, cache, table, lens = paged_case([64, 1, 63], 1, heads)
    chosen = [int(lens[request]) * 2 // 3 for request in range(3)]
    q[..., LATENT:] = 8
    for request, token in enumerate(chosen):
        cache[table[request, 0], token, LATENT:] = 4.1
    out, _ = decode((q, cache, table, lens), backend)
    for request, token in enumerate(chosen):
        want = cache[table[request, 0], token, :LATENT]
        assert_bitwise_equal(out[request, 0], want.expand(heads, -1).contiguous())


def test_two_ctas_that_share_a_cache_give_the_bits_of_one(machine, backend):
    """FP8 rows that the other CTA has dequantised are what this one would have made of them."""
    need("mla_decode", backend)
    q, cache, table, lens = (on_device(x, backend) for x in paged_case([200, 65], 1, 128, fp8=True))
    schedule = machine.mla_schedule(lens, 128, num_sms=6)
    out, lse = (on_cpu(x) for x in machine.mla_decode(q, cache, table, lens, schedule=schedule))
    for half in (slice(0, 64), slice(64, 128)):
        one = machine.mla_decode(q[:, :, half], cache, table, lens, schedule=schedule)
        assert_bitwise_equal(on_cpu(one[0]), out[:, :, half].contiguous())
        assert_bitwise_equal(on_cpu(one[1]), lse[:, half].contiguous())


@pytest.mark.parametrize("length,heads,splits", [(150, 3, 2), (150, 35, 2), (4096, 3, 32)])
def test_splits_are_joined_without_the_neighbours(machine, backend, length, heads, splits):
    """The next request's weights are 2^300 times this one's."""
    case = paged_case([length, 150], 1, heads)
    case[0][1] *= 1500
    q, cache, table, lens = (on_device(x, backend) for x in case)
    schedule = machine.mla_schedule(lens, heads, num_sms=40)
    assert schedule.num_splits[1] == splits
    got = machine.mla_decode(q, cache, table, lens, schedule=schedule)
    out, lse = (on_cpu(x) for x in got)
    assert lse[1].min() > lse[0].max() + 200
    assert_decoded((out[:1], lse[:1]), (case[0][:1], case[1], case[2][:1], case[3][:1]))


@pytest.mark.parametrize("heads,kernel", [(3, "mla_decode_bf16_16"), (35, "mla_decode_bf16")])
def test_a_full_block_is_neither_masked_nor_cleared(heads, kernel):
    need("mla_decode", "emu")
    partly, fully = (
        work_of(lambda n=n: decode(paged_case([n], 1, heads), "emu"))[kernel] for n in (63, 64)
    )
    scores = 64 * (64 if heads > 32 else 16)
    assert partly["logic"] - fully["logic"] >= scores / 32  # a thread selects each of its own
    assert partly["sync"] - fully["sync"] >= 8  # eight warps meet


def decode_pieces(pieces, **how):
    """Attends a request of four blocks cut into so many pieces."""
    machine = importlib.import_module("dskernels.emu.mla")
    q, cache, table, lens = paged_case([256], 1, 3, **how)
    schedule = machine.mla_schedule(lens, 3, num_sms=pieces)
    assert schedule.num_splits[1] == pieces
    return lambda: machine.mla_decode(q, cache, table, lens, schedule=schedule)


@pytest.mark.parametrize("pieces", [1, 2])
def test_fp8_blocks_behind_a_piece_are_not_prefetched(pieces):
    need("mla_decode", "emu")
    blocks, warps, lines = 4, 4, 3
    ran = executed(decode_pieces(pieces, fp8=True), "prefetch")
    assert ran == (blocks - pieces) * warps * lines


def test_fp8_rope_values_behind_a_request_are_not_fetched():
    need("mla_decode", "emu")
    partly, fully = (
        executed(lambda n=n: decode(paged_case([n], 1, 3, fp8=True), "emu"), "cp.async.cg")
        for n in (48, 64)
    )
    assert fully - partly == 16 / 4  # the last warp's tokens, four at a time


@pytest.mark.parametrize("pieces", [1, 2])
def test_pieces_of_a_request_are_not_stored_as_its_result(pieces):
    need("mla_decode", "emu")
    sides, tiles = 2, 4
    ran = executed(decode_pieces(pieces), "cp.async.bulk.tensor.3d.global")
    assert ran == (sides * tiles if pieces == 1 else 0)


def test_more_splits_than_a_warp_has_lanes(machine, backend):
    case = paged_case([4300, 70], 1, 3)
    q, cache, table, lens = (on_device(x, backend) for x in case)
    schedule = machine.mla_schedule(lens, 3, num_sms=80)
    assert schedule.num_splits.diff()[0] > 32
    got = machine.mla_decode(q, cache, table, lens, schedule=schedule)
    assert_decoded(tuple(on_cpu(x) for x in got), case)


# Split rows are shared out among the warps that the schedule's SMs hold, 128 requests at a time.
@pytest.mark.parametrize(
    "lengths,heads,num_sms,splits",
    [
        ([300, *[0] * 31], 33, 36, {0: 3}),
        ([0, 500, *[0] * 12, 300, 0], 33, 6, {1: 2, 14: 2}),
        ([*[0] * 16, 64 * 57], 64, 2, {16: 2}),
        ([640, *[0] * 134, 640, *[0] * 4], 4, 20, {0: 2, 135: 2}),
    ],
    ids=["a row a warp", "two requests", "two rows a warp", "140 requests"],
)
def test_many_rows_are_joined_by_a_warp_each(machine, backend, lengths, heads, num_sms, splits):
    case = paged_case(lengths, 1, heads)
    q, cache, table, lens = (on_device(x, backend) for x in case)
    schedule = machine.mla_schedule(lens, heads, num_sms=num_sms)
    made = enumerate(schedule.num_splits.diff().tolist())
    assert {request: count for request, count in made if count > 1} == splits
    got = machine.mla_decode(q, cache, table, lens, schedule=schedule)
    assert_decoded(tuple(on_cpu(x) for x in got), case)


@pytest.mark.parametrize("heads,fp8", [(13, False), (13, True), (70, False)])
def test_any_number_of_parts_changes_at_most_one_bit(machine, backend, heads, fp8):
    case = paged_case([700, 64, 0, 65, 130], 1, heads, fp8=fp8)
    q, cache, table, lens = (on_device(x, backend) for x in case)
    results = []
    ctas = -(-heads // 64)  # that share a part
    for num_parts in (1, 3, 7, 66):
        schedule = machine.mla_schedule(lens, heads, num_sms=num_parts * ctas)
        assert schedule.parts.shape == (num_parts, 8)
        got = machine.mla_decode(q, cache, table, lens, schedule=schedule)
        got = tuple(on_cpu(x) for x in got)
        assert_decoded(got, case)
        results.append(got[0])
    for other in results[1:]:
        ulp = (results[0].view(torch.int16).int() - other.view(torch.int16).int()).abs()
        # Sums that cancel to 1e-4 of their usual 1e-2 have fp32's last bits among bf16's.
        cancelled = torch.maximum(results[0].abs(), other.abs()) < 2e-6
        assert ulp[~cancelled].max() <= 1 and (ulp[cancelled] > 0).sum() < 1e-4 * ulp.numel()


def test_fixed_splits_do_not_depend_on_who_works_on_them(machine, backend):
    """One part of all splits, or a part each: the same pieces, so the same bits."""
    case = paged_case([1100, 5, 1030], 2, 4)
    q, cache, table, lens = (on_device(x, backend) for x in case)
    results = []
    for num_sms in (1, 4):
        schedule = machine.mla_schedule(lens, 8, deterministic=True, num_sms=num_sms)
        got = machine.mla_decode(q, cache, table, lens, schedule=schedule)
        results.append(tuple(on_cpu(x) for x in got))
    assert_decoded(results[0], case)
    for one, other in zip(*results, strict=True):
        assert_bitwise_equal(one, other)


def walk(parts, num_splits, lengths, split_blocks):
    """The pieces of a schedule as the kernel walks them: (request, begin, end, split) of each."""
    blocks = [-(-length // 64) for length in lengths]
    assert num_splits[0] == 0
    for begin_request, begin, end_request, end, split, *_ in parts:
        request, block = begin_request, begin
        while (request, block) < (end_request, end):
            stop = blocks[request] if request < end_request else end
            if split_blocks:
                stop = min(stop, block + split_blocks)
            yield request, block, stop, split
            block, split = stop, split + 1
            if block == blocks[request]:
                request, block, split = request + 1, 0, 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_sms", [1, 7, 132])
def test_schedules_cover_every_block_once(machine, deterministic, num_sms):
    g = torch.Generator().manual_seed(num_sms)
    for count in (1, 2, 40):
        for longest in (1, 300, 20000):
            lens = torch.randint(0, longest + 1, (count,), generator=g).int()
            made = machine.mla_schedule(lens, 64, deterministic=deterministic, num_sms=num_sms)
            num_splits = made.num_splits.tolist()
            pieces = list(walk(made.parts.tolist(), num_splits, lens.tolist(), made.split_blocks))
            for request, length in enumerate(lens.tolist()):
                mine = [p for p in pieces if p[0] == request]
                assert [p[3] for p in mine] == list(range(len(mine)))
                assert num_splits[request + 1] - num_splits[request] == len(mine)
                ends = [p[2] for p in mine]
                assert [p[1] for p in mine] == [0, *ends[:-1]] and ends[-1] == -(-length // 64)
                if deterministic:
                    assert all(end % made.split_blocks == 0 for end in ends[:-1])


PIECE_COST = 3  # of 64 rows, in blocks


def greedy(blocks, num_parts, split_blocks):
    """What the schedule has to be: every part takes pieces in order while they fit its share, the
    smallest one for which the parts suffice and a piece is not too small."""
    pieces = sum(max(1, -(-n // split_blocks)) if split_blocks else 1 for n in blocks)
    total = sum(blocks) + PIECE_COST * pieces
    least = next(n for n in itertools.count(2) if n * n * 20 * len(blocks) >= total)
    share = max(-(-total // num_parts), PIECE_COST + least)
    while True:
        parts, num_splits = dealt(blocks, num_parts, split_blocks, share)
        if len(num_splits) == len(blocks) + 1:
            return parts, num_splits
        share += 1


def dealt(blocks, num_parts, split_blocks, share, piece_cost=PIECE_COST):
    parts, num_splits = [], [0]
    request = block = split = 0
    for _ in range(num_parts):
        begin, left = (request, block, split), share
        while request < len(blocks) and left >= piece_cost:
            todo = blocks[request] - block
            take = min(todo, split_blocks or left - piece_cost)
            if take > left - piece_cost or (take == 0 and todo > 0):
                break
            left -= take + piece_cost
            block, split = block + take, split + 1
            if block == blocks[request]:
                num_splits.append(num_splits[-1] + split)
                request, block, split = request + 1, 0, 0
        parts.append([*begin[:2], request, block, begin[2]])
    return parts, num_splits


@pytest.mark.parametrize("deterministic", [False, True])
def test_schedules_are_the_greedy_ones(machine, backend, deterministic):
    g = torch.Generator().manual_seed(5)
    for num_parts in (*range(1, 12), 32):
        for count, longest in ((40, 400), (40, 400), (70, 400), (3, 9000), (40, 4000), (100, 2000)):
            lens = torch.randint(0, longest, (count,), generator=g).int()
            lens *= torch.randint(0, 2, (count,), generator=g).int()  # half of them empty
            assert_greedy(machine, backend, lens, num_parts, deterministic)


@pytest.mark.parametrize(
    "lengths,num_parts,steps",
    [
        ([128], 132, 4 * 32),  # four shares; whose parts suffice is seen every 32 parts
        ([128], 10, 4 * 11),  # the start behind the last part is its end
        ([64] * 62, 2, 4 * (3 + 1)),  # lanes know 32 requests, the next 31 when a part ends there
    ],
)
def test_schedules_take_one_reduction_a_part(lengths, num_parts, steps):
    need("mla_decode", "emu")
    machine = importlib.import_module("dskernels.emu.mla")
    lens = torch.tensor(lengths).int()
    ran = executed(lambda: machine.mla_schedule(lens, 64, num_sms=num_parts), "redux")
    assert ran == steps


def test_schedules_take_a_negative_length_for_none(machine, backend):
    """On a GPU nobody has looked at the values."""
    made, want = (
        machine.mla_schedule(on_device(torch.tensor(lens).int(), backend), 64, num_sms=5)
        for lens in ([700, -3000, -1, 90], [700, 0, 0, 90])
    )
    assert on_cpu(made.parts).tolist() == on_cpu(want.parts).tolist()
    assert on_cpu(made.num_splits).tolist() == on_cpu(want.num_splits).tolist()


@pytest.mark.parametrize("lengths", [[130], [77 * 64], [78 * 64], [30000], [7000, 100, 20000]])
def test_schedules_cut_no_crumbs(machine, backend, lengths):
    assert_greedy(machine, backend, torch.tensor(lengths, dtype=torch.int32), 132, False)


def assert_greedy(machine, backend, lens, num_parts, deterministic):
    made = machine.mla_schedule(
        on_device(lens, backend), 64, deterministic=deterministic, num_sms=num_parts
    )
    blocks = [-(-n // 64) for n in lens.tolist()]
    parts, num_splits = greedy(blocks, num_parts, made.split_blocks)
    assert on_cpu(made.parts)[:, :5].tolist() == parts
    assert on_cpu(made.num_splits).tolist() == num_splits


@pytest.mark.parametrize("lengths", [[20000] * 8, [64] * 500, [50000, *[100] * 60]], ids=len)
def test_schedules_balance(machine, lengths):
    """No part has more than an equal share and what one piece costs beside."""
    lens = torch.tensor(lengths, dtype=torch.int32)
    made = machine.mla_schedule(lens, 64, num_sms=132)
    pieces = walk(made.parts.tolist(), made.num_splits.tolist(), lengths, 0)
    total = sum(end - begin for _, begin, end, _ in pieces)
    work = []
    for part in made.parts.tolist():
        mine = walk([part], [0], lengths, 0)
        work.append(sum(end - begin + PIECE_COST for _, begin, end, _ in mine))
    assert max(work) <= (total + PIECE_COST * len(lengths)) / 132 + PIECE_COST + 1


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", [5, 12, 20, 35])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_schedules_of_the_machine(machine, backend, monkeypatch, seed, heads, fp8):
    """Another order of warps, CTAs and copies: no hazard, the same bits."""
    if backend != "emu":
        pytest.skip("the emulator's schedules")
    case = paged_case([140, 64, 0, 300, 65], 2, heads, page=32, fp8=fp8)
    schedule = machine.mla_schedule(case[3], 2 * heads, num_sms=4)
    want = machine.mla_decode(*case, schedule=schedule)
    monkeypatch.setenv("DSK_EMU_SEED", str(seed))
    got = machine.mla_decode(*case, schedule=schedule)
    assert_bitwise_equal(got[0], want[0])
    assert_bitwise_equal(got[1], want[1])


def test_more_requests_than_the_schedule_holds(machine):
    lens = torch.ones(30000, dtype=torch.int32)
    with pytest.raises(ValueError, match="seq_lens: expected at most 28... requests, got 30000"):
        machine.mla_schedule(lens, 1, num_sms=132)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(page=48), "kv_cache: expected pages of 16, 32, or a multiple of 64 tokens, got 48"),
        (
            dict(dtype=torch.float16),
            "q, kv_cache: expected torch.bfloat16 and torch.bfloat16 or torch.uint8, "
            "got torch.float16 and torch.float16",
        ),
        (dict(scale=-1.0), "softmax_scale: expected a positive number, got -1.0"),
        (dict(width=128), "q, head_dim_v: expected widths 576 and 512, got 128 and 64"),
        (dict(stride=True), "kv_cache: expected 16-byte aligned rows of contiguous values"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_refusals_name_what_is_given(machine, backend, change, message):
    q, cache, table, lens = paged_case([70], 1, 4, page=change.get("page", 64))
    how = dict(softmax_scale=change.get("scale", 0.1))
    if "dtype" in change:
        q, cache = q.to(change["dtype"]), cache.to(change["dtype"])
    if "width" in change:
        q, cache = q[..., :128], cache[..., :128].contiguous()
        how["head_dim_v"] = 64
    if "stride" in change:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(dsk.BackendError, match=re.escape(message)):
        dsk.mla_decode(q, cache, table, lens, backend=backend, **how)
    if "page" in change:
        assert message in dsk.supports("mla_decode", backend=backend, page=48).reason
