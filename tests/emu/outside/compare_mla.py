"""MLA decode beside FlashInfer's Hopper kernel, both in the emulator's timing model:

    python tests/emu/outside/compare_mla.py [--heads 16,32,128] [--tokens 4096]

Two SMs with two SMs' share of HBM and L2, one CTA each: up to 64 heads two requests, above one
request whose tiles of 64 heads share its keys. Nobody splits keys. So FlashInfer's CTAs reach the
barrier of the whole grid together; over a full grid, of which a few CTAs are sampled, the model
would take their polling for work. Where one of them does wait there, the time is not comparable:
each head count runs in a process of its own, which has avoided it so far.

"L2" is the same with the cache in L2 (latency and bandwidth of HBM out of the way). Neither kernel
was compared with a GPU; the model's held-out error is in bench/LOG.md. Needs nvcc and PyPI's
flashinfer-python.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import flashinfer_support as fi

from dskernels import emu
from dskernels.emu import mla

SMS, ALL_SMS = 2, 132
SHARE = {"num_sms": SMS, "hbm_gbytes": 3350 * SMS / ALL_SMS, "l2_bytes": 5500 * SMS / ALL_SMS}
IN_L2 = SHARE | {"hbm_gbytes": 33500, "hbm": 336}
PAGE = 64


def theirs(heads: int, tokens: int, requests: int) -> emu.LaunchProfile:
    case = fi.Case([1] * requests, [tokens] * requests, heads, PAGE, splits=1, causal=False, seed=0)
    with emu.profiling("h800", sample_ctas=None, **SHARE) as profile:
        case.run(0, check=False)
    out, _ = case.exact()
    assert (case.out.double() - out).abs().max() <= 2.0**-6 * out.abs().max()
    return profile.launches[-1]


def ours(heads: int, tokens: int, requests: int) -> emu.LaunchProfile:
    pages = requests * tokens // PAGE
    cache = torch.randn(pages, PAGE, 576).bfloat16()
    table = torch.arange(pages, dtype=torch.int32).view(requests, -1)
    lens = torch.full((requests,), tokens, dtype=torch.int32)
    schedule = mla.mla_schedule(lens, heads, num_sms=SMS)
    q = torch.randn(requests, 1, heads, 576).bfloat16()
    with emu.profiling("h800", sample_ctas=None, **SHARE) as profile:
        mla.mla_decode(q, cache, table, lens, schedule=schedule)
    return next(launch for launch in profile.launches if "decode" in launch.kernel)


def compare(heads: int, tokens: int) -> None:
    requests = SMS if heads <= fi.TILE_Q else 1
    pair = theirs(heads, tokens, requests), ours(heads, tokens, requests)
    for place, model in (("HBM", SHARE), ("L2", IN_L2)):
        their, our = (launch.time("h800", **model) for launch in pair)
        print(
            f"| {heads} | {place} | {their.modelled_us:.1f} ({their.busy['tensor']:.0%}, "
            f"{their.bottleneck}) | {our.modelled_us:.1f} ({our.busy['tensor']:.0%}, "
            f"{our.bottleneck}) | {their.modelled_us / our.modelled_us:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="16,32,128")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    heads = [int(h) for h in options.heads.split(",")]
    if len(heads) == 1:
        compare(heads[0], options.tokens)
        return
    print("| heads | cache in | FlashInfer us (tensor cores busy, bound by) | ours | ratio |")
    print("|---|---|---|---|---|", flush=True)
    for h in heads:
        command = [sys.executable, __file__, "--heads", str(h), "--tokens", str(options.tokens)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
