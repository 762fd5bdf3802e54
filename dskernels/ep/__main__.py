"""python -m dskernels.ep: print what `dskernels.ep.doctor` finds.

torchrun --nproc-per-node 4 -m dskernels.ep --exchange --max-tokens 128: one dispatch and one
combine between the processes that torchrun starts, compared with the reference bit for bit.
"""

import argparse

import torch
import torch.distributed as dist

from ..ref import ep as ref
from .doctor import doctor
from .exchange import combine, dispatch
from .group import Group


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dskernels.ep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, default in (("ranks", 8), ("experts", 256), ("max-tokens", 4096), ("hidden", 7168),
                          ("topk", 8)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--exchange", action="store_true", help="under torchrun: try one exchange")
    args = parser.parse_args()
    if args.exchange:
        exchange(args.experts, args.max_tokens, args.hidden, args.topk)
        return
    print(
        doctor(
            num_ranks=args.ranks,
            num_experts=args.experts,
            max_tokens=args.max_tokens,
            hidden=args.hidden,
            topk=args.topk,
        )
    )


def exchange(experts: int, tokens: int, hidden: int, topk: int) -> None:
    """Dispatch random tokens of every rank, and bring them back."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    options = dict(num_experts=experts, max_tokens=tokens, hidden=hidden, topk=topk)
    group = Group.from_process_group(**options)
    random = torch.Generator().manual_seed(0)  # the same on every rank, for the reference
    xs = torch.randn(ranks, tokens, hidden, generator=random).bfloat16()
    idx = torch.rand(ranks, tokens, experts, generator=random).topk(topk, dim=-1).indices
    want = ref.dispatch(list(xs), list(idx), None, num_experts=experts)
    got = dispatch(group, xs[rank], idx[rank])
    out, _ = combine(group, got.x, got)
    back, _ = ref.combine([w.x for w in want], want, [tokens] * ranks)
    for name, ours, theirs in (("rows", got.x, want[rank].x), ("sums", out, back[rank])):
        if not torch.equal(ours.view(torch.int16), theirs.view(torch.int16)):
            raise SystemExit(f"rank {rank}: {name} differ from the reference")
    print(f"rank {rank} of {ranks}: {len(got.source)} rows received, {tokens} tokens summed, "
          "equal to the reference", flush=True)  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
