"""MLA decode of whole batches beside FlashInfer's Hopper kernel, plans and joining included:

    python tests/emu/outside/compare_mla_batches.py [--heads 16,32] [--only ragged]

Both plans are made for 132 SMs, FlashInfer's by the rules of its own planner (MLAPlan in its
scheduler.cuh, which runs on the host), ours by mla_schedule. Of each the CTA with most work is run and
timed twice: with its share of L2 and HBM, one in so many as have work, and with all of it. In between,
CTAs that are done leave their share to the others (`drained`): so a plan that is out of balance costs
what the last CTAs cannot use. Then the joining
of partial results, which are still in L2: the busiest CTA of FlashInfer's merge, and our mla_combine,
which is launched even where nothing was split.
Left out, in FlashInfer's favour: waiting at its barrier of the whole grid. Left out on both sides:
making the plan, once for all layers of a model.

"floor" is the cache's bytes at 3.35 TB/s. Neither kernel was compared with a GPU; the model's
held-out error is in bench/LOG.md. Needs nvcc and PyPI's flashinfer-python.
"""

import argparse
import heapq
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import flashinfer_support as fi

from dskernels import emu
from dskernels.emu import mla

SMS, PAGE, TOKEN_BYTES, HBM = 132, 64, 1152, 3.35e6  # bytes per microsecond
IN_L2 = {"hbm_gbytes": 33500, "hbm": 336}
PIECE = 1.5  # blocks: what a piece of a request costs beside its tokens


def share(part: float) -> dict:
    """Of what all SMs have together."""
    return {"hbm_gbytes": 3350 * part, "l2_bytes": 5500 * part}


def drained(loads: list[float], shared: float, free: float) -> float:
    """When the last of CTAs with these loads ends, if the one with most would take `shared` with
    its share of memory all the time, and `free` with all of the memory."""
    left, most = sorted(x for x in loads if x > 0), max(loads)
    whole = len(left) * most / shared  # of the memory's speed, in load a microsecond
    time = done = 0.0
    for i, load in enumerate(left):
        time += (load - done) / min(most / free, whole / (len(left) - i))
        done = load
    return time


def batches() -> dict[str, tuple[list[int], int]]:
    """Lengths and query tokens of a request."""
    g = torch.Generator().manual_seed(0)

    def ragged(count, low, high):
        return torch.randint(low, high + 1, (count,), generator=g).tolist()

    return {
        "1 x 4096": ([4096], 1),
        "1 x 16384": ([16384], 1),
        "1 x 65536": ([65536], 1),
        "1 x 131072": ([131072], 1),
        "8 x 8192": ([8192] * 8, 1),
        "32 x 4096": ([4096] * 32, 1),
        "32 x 4096, 2 tokens": ([4096] * 32, 2),
        "128 x 512": ([512] * 128, 1),
        "128 x 1024": ([1024] * 128, 1),
        "128 x 2048": ([2048] * 128, 1),
        "ragged 128 x 512..2048": (ragged(128, 512, 2048), 1),
        "ragged 64 x 256..8192": (ragged(64, 256, 8192), 1),
        "ragged 48 x 100..4000, 2 tokens": (ragged(48, 100, 4000), 2),
    }


# ---- FlashInfer --------------------------------------------------------------------------------


@dataclass
class Plan:
    """Pieces (tokens, whether it is a part of a request) by cluster; merges (rows, parts)."""

    pieces: list[list[tuple[int, bool]]]
    merges: list[tuple[int, int]] = field(default_factory=list)


def planned(lengths: list[int], tokens: int, heads: int) -> Plan:
    """What FlashInfer's planner makes of it, for at most one cluster of row tiles a request."""
    rows = tokens * heads
    ctas = 2 if rows > fi.TILE_Q else 1
    clusters = SMS // ctas
    mean = -(-sum(lengths) // clusters)
    steps = [(8, 32), (16, 64), (32, 128), (64, 192)]
    limit = next((to for most, to in steps if mean <= most), -(-mean // 256) * 256)
    plan = Plan([[] for _ in range(clusters)])
    load = [(0, i) for i in range(clusters)]
    for length in lengths:
        parts = -(-length // limit)
        if parts > 1:
            chunks = max(length * ctas // limit, 1)
            step = -(-rows // chunks)
            plan.merges += [(min(step, rows - at), parts) for at in range(0, rows, step)]
        for at in range(0, length, limit):
            cost, cluster = heapq.heappop(load)
            taken = min(limit, length - at)
            plan.pieces[cluster].append((taken, parts > 1))
            heapq.heappush(load, (cost + 2 * ctas * fi.TILE_Q + taken, cluster))
    return plan


def run_theirs(pieces: list, merge: tuple[int, int] | None, tokens: int, heads: int, *models):
    """One cluster's launch: its pieces, as requests of their own, or one CTA's merge. Its time with
    the models given."""
    rows = tokens * heads
    lengths = [taken for taken, _ in pieces] or [PAGE]
    case = fi.Case([tokens] * len(lengths), lengths, heads, PAGE, 1, tokens > 1, seed=0)
    split = [is_part for _, is_part in pieces] or [False]
    parts = merge[1] if merge else len(lengths)
    case.partial_o = torch.zeros(parts * rows, fi.NOPE, dtype=torch.bfloat16)
    case.partial_lse = torch.zeros(parts * rows)
    columns = {
        "q_indptr": [i * tokens for i in range(len(lengths))],
        "kv_indptr": case.first_page,
        "partial_indptr": [i * rows if part else -1 for i, part in enumerate(split)],
        "q_len": case.q_len,
        "kv_len": lengths,
        "q_start": [0] * len(lengths),
        "kv_start": [0] * len(lengths),
        "kv_end": lengths,
        "work_indptr": [0, len(pieces)],
    }
    merged = (0, merge[0], 0, parts * rows) if merge else (0, 0, 0, 0)
    columns |= {f"merge_{i}": [merged[i], 0] for i in range(4)} | {"stride": [rows] * 2}
    lists = {name: torch.tensor(values, dtype=torch.int32) for name, values in columns.items()}
    case.plan = lambda: (lists, 1)
    with emu.profiling("h800", sample_ctas=None) as profile:
        case.run(0, check=False)
    launch = profile.launches[-1]
    return [launch.time("h800", num_sms=case.tiles, **m).modelled_us for m in models]


def theirs(lengths: list[int], tokens: int, heads: int) -> tuple[float, float, int]:
    """Microseconds of attention and of merging, and how many CTAs have work."""
    plan = planned(lengths, tokens, heads)
    loads = [sum(taken for taken, _ in p) / PAGE + PIECE * len(p) for p in plan.pieces]
    active = sum(bool(p) for p in plan.pieces)
    heaviest = plan.pieces[loads.index(max(loads))]
    attention = drained(loads, *run_theirs(heaviest, None, tokens, heads, share(1 / active), {}))
    merging = 0.0
    if plan.merges:
        most = max(plan.merges, key=lambda m: m[0] * m[1])
        (merging,) = run_theirs([], most, tokens, heads, IN_L2)
        merging -= run_theirs([], None, tokens, heads, IN_L2)[0]
    return attention, merging, active


# ---- ours --------------------------------------------------------------------------------------


def load_of(part: list[int], blocks: list[int]) -> float:
    """Blocks of a part, and something for each of its pieces."""
    request, block, end_request, end_block = part[:4]
    work = 0.0
    while (request, block) < (end_request, end_block):
        stop = blocks[request] if request < end_request else end_block
        work += stop - block + PIECE
        request, block = (request + 1, 0) if stop == blocks[request] else (request, stop)
    return work


def ours(lengths: list[int], tokens: int, heads: int) -> tuple[float, float, int]:
    """As theirs."""
    lens = torch.tensor(lengths, dtype=torch.int32)
    blocks = [-(-n // PAGE) for n in lengths]
    schedule = mla.mla_schedule(lens, tokens * heads)
    loads = [load_of(part, blocks) for part in schedule.parts.tolist()]
    heavy = schedule.parts[loads.index(max(loads))]
    parts = torch.zeros_like(schedule.parts)  # the others have nothing to do
    parts[0] = heavy
    used = sum(blocks[int(heavy[0]) : int(heavy[2]) + 1])
    cache = torch.randn(used, PAGE, 576).bfloat16()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    at = 0
    for request in range(int(heavy[0]), min(int(heavy[2]) + 1, len(lengths))):
        table[request, : blocks[request]] = torch.arange(at, at + blocks[request])
        at += blocks[request]
    q = torch.randn(len(lengths), tokens, heads, 576).bfloat16()
    with emu.profiling("h800", sample_ctas=None) as profile:
        mla.mla_decode(q, cache, table, lens, schedule=schedule._replace(parts=parts))
    decode, joining = profile.launches
    combine = joining.time("h800", **IN_L2).modelled_us
    active = sum(x > 0 for x in loads)
    # The grid has 132 CTAs of which one works: shares of it, and all of the memory for it.
    models = share(len(loads) / active), share(len(loads))
    times = [decode.time("h800", **m).modelled_us for m in models]
    return drained(loads, *times), combine, active


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="16,32")
    parser.add_argument("--only", default="", help="batches whose name has this in it")
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| heads | batch | floor us | FlashInfer us: attention + merge (parts) | ours ", end="")
    print("| ratio | attention alone |\n|---|---|---|---|---|---|---|", flush=True)
    for heads in map(int, options.heads.split(",")):
        for name, (lengths, tokens) in batches().items():
            if options.only not in name or tokens * heads > 2 * fi.TILE_Q:
                continue
            sides = [side(lengths, tokens, heads) for side in (theirs, ours)]
            shown = [f"{a + b:.1f}: {a:.1f} + {b:.1f} ({n})" for a, b, n in sides]
            ratio = sum(sides[0][:2]) / sum(sides[1][:2])
            alone = sides[0][0] / sides[1][0]
            floor = sum(lengths) * TOKEN_BYTES / HBM
            print(
                f"| {heads} | {name} | {floor:.1f} | {shown[0]} | {shown[1]} | {ratio:.2f} "
                f"| {alone:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
