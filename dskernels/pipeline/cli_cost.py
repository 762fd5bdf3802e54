"""The commands `cost` and `tune`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from .schedules import NAMES


def _cluster_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="deepseek-v3", help="deepseek-v3, or a config.json")
    sub.add_argument(
        "--cluster", default="h800", help="h800, h100, h200, b200, or a .toml/.yaml/.json file"
    )
    sub.add_argument("--gpus", type=int, default=2048)
    sub.add_argument("--batch", type=int, default=15360, help="sequences of one step")
    sub.add_argument("--sequence", type=int, default=4096)
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                     help="replace an assumption")  # fmt: skip


def rates_of(args: argparse.Namespace):
    """The assumptions, with those of --set replaced."""
    from .actions import ScheduleError
    from .rates import Rates

    rates = Rates()
    known = dict(rates.items())
    for item in args.set:
        name, _, value = item.partition("=")
        if name not in known:
            raise ScheduleError(f"--set: {name!r} is none of {', '.join(known)}")
        rates = rates.with_value(name, float(value))
    return rates


def _setup(args: argparse.Namespace):
    from .cost import Setup
    from .modelspec import model_spec

    return Setup(
        model=model_spec(args.model),
        gpus=args.gpus,
        pp=args.pp,
        ep=args.ep,
        schedule=args.schedule,
        batch=args.batch,
        sequence=args.sequence,
        microbatch=args.microbatch,
    )


# --- cost -----------------------------------------------------------------------------------------


def add_cost(commands) -> None:
    from .cli import command

    sub = command(
        commands, "cost", "time, memory and dollars of a training run, or inference", _cost
    )
    _cluster_options(sub)
    sub.add_argument("--pp", type=int, default=16)
    sub.add_argument("--ep", type=int, default=64)
    sub.add_argument("--microbatch", type=int, default=1, help="sequences")
    sub.add_argument("--schedule", choices=NAMES, default="dualpipe")
    sub.add_argument("--sensitivity", action="store_true", help="each assumption 10%% off")
    sub.add_argument(
        "--inference",
        choices=("prefill", "decode", "all"),
        help="throughput of the paper's and of the production deployment units instead",
    )
    sub.add_argument("--requests", type=float, help="requests (decode) or tokens (prefill) per GPU")
    sub.add_argument("--context", type=float, help="prompt or mean KV length")


def _cost(args: argparse.Namespace) -> None:
    from .cli import print_json
    from .cost import training
    from .cost_report import sensitivity, summary
    from .hardware import hardware

    if args.inference:
        _inference(args)
        return
    setup, hw, rates = _setup(args), hardware(args.cluster), rates_of(args)
    out = summary(training(setup, hw, rates))
    if args.sensitivity:
        out["sensitivity"] = sensitivity(setup, hw, rates)
    if args.json:
        print_json(out)
    else:
        _print_cost(out)


def _print_cost(out: dict) -> None:
    from .cli import table

    s = out["setup"]
    print(
        f"{s['model']} on {s['gpus']} {s['cluster']}: PP{s['pp']} EP{s['ep']} DP{s['dp']}, "
        f"{s['schedule']}, {s['microbatches']} micro-batches of {s['microbatch']} x {s['sequence']}"
    )
    published = out["published"] or {}
    names = ("gpu_hours_per_trillion_tokens", "step_time_s", "mfu", "mfu_non_causal",
             "tflops_per_gpu", "tokens_per_second", "pretraining_gpu_hours", "total_gpu_hours",
             "total_dollars")  # fmt: skip
    rows = []
    for name in names:
        p = published.get(name)
        known = ("-", "-", "") if p is None else (
            float(p["published"]), f"{p['error_percent']:+.1f}%", p["source"])  # fmt: skip
        rows.append((name, float(out[name]), *known))
    print(table(rows, ("figure", "model", "published", "error", "source")))
    measured = out["published_breakdown_s"] or {}
    print()
    rows = [(k, float(v), measured.get(k, "-")) for k, v in out["breakdown_s"].items()]
    print(table(rows, ("seconds of a step, mean over ranks", "model", "ISCA table 4")))
    fits = "fits" if out["fits"] else "DOES NOT FIT"
    print(f"\npeak memory {out['peak_memory_gb']:.1f} GB: {fits}")
    rows = [
        (name, *[f"{v:.2f}" for v in times.values()]) for name, times in out["layer_ms"].items()
    ]
    print()
    print(table(rows, ("layer, ms", *out["layer_ms"]["moe"])))
    print("\nassumptions")
    for name, a in out["assumptions"].items():
        print(f"  {name} = {a['value']:g} {a['unit']}\n      {a['source']}")
    if "sensitivity" in out:
        print()
        rows = [
            (r["assumption"], f"{r['low']:g} .. {r['high']:g}",
             f"{r['change_low_percent']:+.1f}%", f"{r['change_high_percent']:+.1f}%")
            for r in out["sensitivity"]
        ]  # fmt: skip
        print(table(rows, ("GPU hours if", "is", "at low", "at high")))


def _inference(args: argparse.Namespace) -> None:
    from .cli import print_json, table
    from .hardware import hardware
    from .inference import UNITS, WHY_OFF, throughput
    from .modelspec import model_spec

    hw, rates = hardware(args.cluster), rates_of(args)
    rows = []
    for unit in UNITS.values():
        if args.inference not in (unit.phase, "all"):
            continue
        unit = replace(
            unit,
            model=model_spec(args.model),
            batch=args.requests * unit.tp if args.requests else unit.batch,
            context=args.context or unit.context,
        )
        rows.append(throughput(unit, hw, rates))
    if args.json:
        print_json({"units": rows, "why_off": WHY_OFF,
                    "assumptions": {n: vars(a) for n, a in rates.items()}})  # fmt: skip
        return
    cells = [
        (r["unit"], r["gpus"], r["tp"], r["experts_per_gpu"], r["batch_per_dp_rank"],
         r["tokens_per_second_per_node"], 1e3 * r["seconds_per_pass"],
         *[f"{v:.0f}" for v in r["layer_us"].values()], f"{r['gain_of_overlap']:.2f}x",
         r["published_tokens_per_second_per_node"] or "-",
         "-" if r["error_percent"] is None else f"{r['error_percent']:+.0f}%")
        for r in rows
    ]  # fmt: skip
    header = ("unit", "GPUs", "TP", "experts", "batch", "tokens/s/node", "pass ms", "attn us",
              "mlp us", "dispatch us", "combine us", "overlap", "published", "error")  # fmt: skip
    print(table(cells, header))
    for phase in dict.fromkeys(r["phase"] for r in rows):
        print(f"\n{phase}: {WHY_OFF[phase]}")


# --- tune -----------------------------------------------------------------------------------------


def add_tune(commands) -> None:
    from .cli import command

    sub = command(commands, "tune", "search the fastest setup that fits into memory", _tune)
    _cluster_options(sub)
    sub.add_argument("--schedules", default=",".join(NAMES), help="comma-separated names to try")
    sub.add_argument("--memory", type=float, help="GB per GPU (default: the device's)")
    sub.add_argument("--microbatch-sizes", default="1,2,4", help="sequences, comma-separated")
    sub.add_argument("--keep", type=int, default=10, help="rows of the table")


def _tune(args: argparse.Namespace) -> None:
    from .cli import print_json, table
    from .cost import Setup
    from .hardware import hardware
    from .modelspec import model_spec
    from .schedules import family
    from .tune import explain, row, tune

    names = tuple(args.schedules.split(","))
    for name in names:
        family(name)
    base = Setup(
        model=model_spec(args.model), gpus=args.gpus, batch=args.batch, sequence=args.sequence
    )
    search = tune(
        base,
        hardware(args.cluster),
        rates_of(args),
        schedules=names,
        memory=None if args.memory is None else args.memory * 1e9,
        microbatches=tuple(int(x) for x in args.microbatch_sizes.split(",")),
        keep=args.keep,
    )
    best = row(search.best)  # raises, with the reasons, if nothing fits
    rows = [row(c) for c in search.found]
    if args.json:
        print_json(
            {
                "best": best,
                "found": rows,
                "too_large": [row(c) for c in search.too_large],
                "refused": dict(search.refused),
                "candidates": search.candidates,
                "simulated": search.simulated,
                "explanation": explain(search),
            }
        )
        return
    header = {
        "schedule": "schedule", "pp": "PP", "ep": "EP", "dp": "DP", "microbatch": "mb",
        "microbatches": "count", "step_time_s": "step s",
        "gpu_hours_per_trillion_tokens": "GPU h/T", "mfu": "MFU", "work_s": "work",
        "exposed_all_to_all_s": "a2a", "bubble_s": "bubble", "optimizer_s": "opt",
        "peak_memory_gb": "GB",
    }  # fmt: skip
    print(table([[r[k] for k in header] for r in rows], tuple(header.values())))
    print(f"\n{explain(search)}")
    print(
        f"{search.candidates} candidates, {search.simulated} simulated (the rest cannot beat "
        f"these by their computation alone); refused: {dict(search.refused)}"
    )
