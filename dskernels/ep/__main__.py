"""python -m dskernels.ep: print what `dskernels.ep.doctor` finds."""

import argparse

from .doctor import doctor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dskernels.ep", description=doctor.__doc__)
    for name, default in (("ranks", 8), ("experts", 256), ("max-tokens", 4096), ("hidden", 7168),
                          ("topk", 8)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(
        doctor(
            num_ranks=args.ranks,
            num_experts=args.experts,
            max_tokens=args.max_tokens,
            hidden=args.hidden,
            topk=args.topk,
        )
    )


if __name__ == "__main__":
    main()
