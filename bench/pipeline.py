"""How fast schedules are generated, given their communication, proved and priced.

    python -m bench.pipeline [--json] [--quick]

One core, processor time, best of the rounds; the time per action should not grow with the size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from dskernels.pipeline import Costs, add_comms, make, problems, simulate

CASES = [
    ("dualpipe", 8, 20),
    ("dualpipe", 16, 120),
    ("1f1b", 64, 1024),
    ("dualpipe", 64, 256),
    ("dualpipe", 64, 1024),
]


def best(call: Callable[[], object], rounds: int) -> tuple[float, object]:
    """(fewest seconds of processor time, the call's result)."""
    fewest, result = float("inf"), None
    for _ in range(rounds):
        begin = time.process_time()
        result = call()
        fewest = min(fewest, time.process_time() - begin)
    return fewest, result


def measure(name: str, ranks: int, microbatches: int, rounds: int) -> dict:
    seconds = {}
    seconds["generate"], plain = best(lambda: make(name, ranks, microbatches), rounds)
    seconds["communicate"], schedule = best(lambda: add_comms(plain), rounds)
    seconds["simulate"], _ = best(lambda: simulate(schedule, Costs(fb=3)), rounds)
    seconds["validate"], found = best(lambda: problems(schedule), rounds)
    if found:
        raise RuntimeError(f"{name} {ranks} x {microbatches} is not sound: {found[0]}")
    elementary = sum(len(a.atoms) for acts in schedule.actions for a in acts)
    return {
        "schedule": name,
        "ranks": ranks,
        "microbatches": microbatches,
        "entries": schedule.num_actions,
        "elementary_actions": elementary,
        "seconds": seconds,
        "simulate_us_per_entry": 1e6 * seconds["simulate"] / schedule.num_actions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the small cases, one round")
    options = parser.parse_args()
    cases, rounds = (CASES[:2], 1) if options.quick else (CASES, 3)
    rows = [measure(*case, rounds) for case in cases]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'schedule':10} {'ranks':>5} {'mb':>5} {'entries':>8} {'actions':>8} "
          f"{'make':>7} {'comms':>7} {'simulate':>8} {'validate':>8}  us/entry")  # fmt: skip
    for r in rows:
        s, each = r["seconds"], r["simulate_us_per_entry"]
        print(f"{r['schedule']:10} {r['ranks']:5} {r['microbatches']:5} {r['entries']:8} "
              f"{r['elementary_actions']:8} {s['generate']:7.3f} {s['communicate']:7.3f} "
              f"{s['simulate']:8.3f} {s['validate']:8.3f}  {each:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
