"""The command line: show, simulate, compare, tune, export, cost."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import formulas
from .actions import Schedule, ScheduleError
from .costs import Costs
from .files import FORMATS, load, to_csv, to_json
from .lower import add_comms
from .schedules import FAMILIES, NAMES, check_sizes, make
from .simulate import Result, simulate
from .validate import validate

_EXAMPLES = """examples:
  python -m dskernels.pipeline show --schedule dualpipe --ranks 4 --microbatches 8
  python -m dskernels.pipeline show --schedule zbv --ranks 4 --microbatches 12 --svg zbv.svg
  python -m dskernels.pipeline simulate --schedule dualpipe --ranks 8 --microbatches 20 \\
      --f 1 --bi 1 --w 1 --fb 3 --json
  python -m dskernels.pipeline simulate --file edited.csv --straggler 2=1.5 --p2p-latency 0.1
  python -m dskernels.pipeline compare --ranks 8 --microbatches 32 --fb 2.6
  python -m dskernels.pipeline export --schedule dualpipev --ranks 4 --microbatches 8 \\
      --format compute_comms --output dualpipev.csv
  python -m dskernels.pipeline export --format html --output pipeline.html
  python -m dskernels.pipeline cost --model deepseek-v3 --cluster h800 --gpus 2048 --json
  python -m dskernels.pipeline cost --inference decode --ep 144 --cluster h800
  python -m dskernels.pipeline tune --model deepseek-v3 --cluster h800 --gpus 2048

Costs are durations of one action on one stage, in any one unit. Bubble is makespan minus busy
time; the published formula is printed beside the simulated figure, which is the authority.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: refused input, with the reason on stderr)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ScheduleError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dskernels.pipeline",
        description="Pipeline schedules: show, simulate, compare, export, cost and tune them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_show(commands)
    _add_simulate(commands)
    _add_compare(commands)
    _add_export(commands)
    from .cli_cost import add_cost, add_tune

    add_cost(commands)
    add_tune(commands)
    return parser


def command(commands, name: str, text: str, run) -> argparse.ArgumentParser:
    """A subcommand with --json and the examples under its help."""
    sub = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of text")
    sub.set_defaults(run=run)
    return sub


def _schedule_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--schedule", choices=NAMES, default="dualpipe")
    sub.add_argument("--ranks", type=int, default=8, help="devices (also for dualpipev)")
    sub.add_argument("--microbatches", type=int, default=20, help="of one step")
    sub.add_argument("--virtual-stages", type=int, help="stages per rank of interleaved")
    sub.add_argument("--file", help="a schedule from a .csv (torch's form) or .json file instead")


def _cost_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("costs of one action on one stage")
    group.add_argument("--f", type=float, default=1.0, help="forward")
    group.add_argument("--bi", type=float, default=1.0, help="input gradient")
    group.add_argument("--w", type=float, default=1.0, help="weight gradient")
    group.add_argument("--b", type=float, help="full backward (default: bi + w)")
    group.add_argument("--fb", type=float, help="overlapped pair (default: f + b)")
    group.add_argument("--p2p-latency", type=float, default=0.0)
    group.add_argument("--p2p-bytes", type=float, default=0.0)
    group.add_argument("--p2p-bandwidth", type=float, default=float("inf"))
    group.add_argument("--activation", type=float, default=1.0, help="memory of one chunk")
    group.add_argument("--retained", type=float, default=1.0, help="share of it kept until W")
    group.add_argument("--static", type=float, default=0.0, help="memory each rank always holds")
    group.add_argument("--straggler", action="append", default=[], metavar="RANK=FACTOR")
    group.add_argument("--slow-link", action="append", default=[], metavar="SRC-DST=FACTOR")
    group.add_argument("--jitter", type=float, default=0.0, help="relative standard deviation")
    group.add_argument("--seed", type=int, default=0)


def _factors(items: list[str], what: str, parts: int) -> dict:
    out = {}
    for item in items:
        try:
            name, factor = item.split("=")
            key = tuple(int(x) for x in name.split("-"))
            if len(key) != parts:
                raise ValueError(name)
            out[key if parts > 1 else key[0]] = float(factor)
        except ValueError:
            raise ScheduleError(f"{what} must look like {'1-2' if parts > 1 else '1'}=1.5; "
                                f"got {item!r}") from None  # fmt: skip
    return out


def _costs(args: argparse.Namespace, share: float = 1.0) -> Costs:
    """Costs from the options, all durations and the activation times `share`."""

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * share

    return Costs(
        f=args.f * share,
        bi=args.bi * share,
        w=args.w * share,
        b=scaled(args.b),
        fb=scaled(args.fb),
        p2p_latency=args.p2p_latency,
        p2p_bytes=args.p2p_bytes,
        p2p_bandwidth=args.p2p_bandwidth,
        activation=args.activation * share,
        retained=args.retained,
        static=args.static,
        rank_factor=_factors(args.straggler, "--straggler", 1),
        link_factor=_factors(args.slow_link, "--slow-link", 2),
        jitter=args.jitter,
        seed=args.seed,
    )


def _schedule(args: argparse.Namespace) -> Schedule:
    if args.file:
        schedule = load(args.file)
        validate(schedule)
        return schedule
    return make(args.schedule, args.ranks, args.microbatches, args.virtual_stages)


def tidy(value):
    """Floats to 12 significant digits, for people: 3.0, not 2.999999999999993."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {k: tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    return value


def print_json(value) -> None:
    print(json.dumps(tidy(value), indent=2))


def table(rows: list[Sequence], header: Sequence[str]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [[f"{c:.5g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = ["  ".join(h.ljust(w) for h, w in zip(header, widths))]
    for row, source in zip(cells, rows):
        lines.append(
            "  ".join(
                c.rjust(w) if isinstance(v, (int, float)) else c.ljust(w)
                for c, w, v in zip(row, widths, source)
            )
        )
    return "\n".join(line.rstrip() for line in lines)


# --- show -----------------------------------------------------------------------------------------


def _add_show(commands) -> None:
    sub = command(commands, "show", "draw a schedule (terminal, SVG, PNG, trace)", _show)
    _schedule_options(sub)
    _cost_options(sub)
    sub.add_argument("--width", type=int, default=100, help="characters of the terminal chart")
    sub.add_argument("--color", action="store_true", help="ANSI colours")
    sub.add_argument("--actions", action="store_true", help="print the lists themselves too")
    sub.add_argument("--svg", metavar="FILE")
    sub.add_argument("--png", metavar="FILE")
    sub.add_argument("--trace", metavar="FILE", help="Chrome/Perfetto trace")


def _show(args: argparse.Namespace) -> None:
    from . import draw, raster, trace

    result = simulate(_schedule(args), _costs(args))
    for path, make_text in (
        (args.svg, lambda: draw.svg(result).encode()),
        (args.png, lambda: raster.png(result)),
        (args.trace, lambda: trace.dumps(result).encode()),
    ):
        if path:
            Path(path).write_bytes(make_text())
    if args.json:
        out = {"schedule": json.loads(to_json(result.schedule)), "start": result.start}
        print_json({**out, "end": result.end})
        return
    print(draw.ascii(result, width=args.width, colour=args.color))
    if args.actions:
        print(draw.listing(result.schedule))


# --- simulate -------------------------------------------------------------------------------------


def _add_simulate(commands) -> None:
    sub = command(commands, "simulate", "price a schedule", _simulate)
    _schedule_options(sub)
    _cost_options(sub)


def _simulate(args: argparse.Namespace) -> None:
    result = simulate(_schedule(args), _costs(args))
    if args.json:
        print_json(result.summary())
    else:
        print(report(result))


def report(result: Result) -> str:
    """Figures of one simulation as text, one line per rank."""
    s, formula = result.schedule, result.bubble_formula
    head = [
        f"{s.name}: {s.num_ranks} ranks, {s.num_stages} stages, {s.num_microbatches} micro-batches,"
        f" {s.num_actions} actions",
        f"makespan {result.makespan:.6g}; worst bubble {max(result.bubble):.6g} "
        f"({100 * max(result.bubble) / (result.makespan or 1):.2f}%), as makespan - busy",
    ]
    if s.name in FAMILIES:
        said = "no published value here" if formula is None else f"{formula:.6g}"
        head.append(f"formula {formulas.bubble_text(s.name)}: {said}")
    rows = [
        (r, result.busy[r], result.bubble[r], result.span_bubble[r], result.exposed_p2p[r],
         result.exposed_ep[r], result.peak_activations[r], result.peak_memory[r],
         result.peak_memory_time[r])
        for r in range(s.num_ranks)
    ]  # fmt: skip
    header = ("rank", "busy", "bubble", "span bubble", "exposed p2p", "exposed a2a",
              "peak chunks", "peak memory", "at")  # fmt: skip
    return "\n".join([*head, table(rows, header)])


# --- compare --------------------------------------------------------------------------------------


def _add_compare(commands) -> None:
    sub = command(
        commands, "compare", "all schedules on the same ranks, model and micro-batches", _compare
    )
    sub.add_argument("--ranks", type=int, default=8)
    sub.add_argument("--microbatches", type=int, default=32)
    sub.add_argument("--virtual-stages", type=int, help="of interleaved (default 2)")
    sub.add_argument(
        "--per-action",
        action="store_true",
        help="the costs are those of one action; by default they are those of 1/ranks of the "
        "model, and a schedule with V stages a rank pays 1/V of them per action",
    )
    _cost_options(sub)


def compare(args: argparse.Namespace) -> list[dict]:
    """One row per schedule; sizes that a schedule refuses are reported with the reason."""
    rows = []
    for name in NAMES:
        virtual = args.virtual_stages if name == "interleaved" else None
        try:
            stages = check_sizes(name, args.ranks, args.microbatches, virtual)
            schedule = make(name, args.ranks, args.microbatches, virtual)
        except ScheduleError as error:
            rows.append({"schedule": name, "refused": str(error)})
            continue
        share = 1.0 if args.per_action else 1.0 / stages
        result = simulate(schedule, _costs(args, share))
        rows.append({**result.summary(), "share_of_costs_per_action": share})
    return rows


def _compare(args: argparse.Namespace) -> None:
    rows = compare(args)
    if args.json:
        print_json(rows)
        return
    done = [r for r in rows if "refused" not in r]
    best = min((r["makespan"] for r in done), default=0.0)
    cells = [
        (
            r["schedule"],
            r["makespan"],
            f"{r['makespan'] / best:.3f}x",
            max(r["bubble"]),
            100 * r["bubble_ratio"],
            "-" if r["bubble_formula"] is None else f"{r['bubble_formula']:.5g}",
            max(r["peak_memory"]),
            f"{r['parameter_copies']}x",
        )
        for r in sorted(done, key=lambda r: r["makespan"])
    ]
    header = ("schedule", "makespan", "vs best", "bubble", "bubble %", "formula", "peak memory",
              "parameters")  # fmt: skip
    print(table(cells, header))
    for r in rows:
        if "refused" in r:
            print(f"{r['schedule']}: {r['refused']}")


# --- export ---------------------------------------------------------------------------------------


def _add_export(commands) -> None:
    sub = command(commands, "export", "write a schedule for other tools", _export)
    _schedule_options(sub)
    _cost_options(sub)
    sub.add_argument(
        "--format",
        choices=(*FORMATS, "json", "svg", "png", "trace", "html"),
        default="compute_only",
        help="compute_only, compute_comms: CSV of torch.distributed.pipelining; html: the "
        "interactive page",
    )
    sub.add_argument("--output", metavar="FILE", help="standard output if not given")


def _export(args: argparse.Namespace) -> None:
    data = _export_bytes(args)
    if args.output:
        Path(args.output).write_bytes(data)
        message = {"output": args.output, "format": args.format, "bytes": len(data)}
        if args.json:
            print_json(message)
        else:
            print(f"wrote {args.output} ({len(data)} bytes)")
    elif args.json:
        print_json({"format": args.format, "content": data.decode(errors="replace")})
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


def _export_bytes(args: argparse.Namespace) -> bytes:
    if args.format == "html":
        from .page import html

        return html().encode()
    schedule = _schedule(args)
    if args.format in FORMATS:
        return to_csv(schedule, args.format).encode()
    if args.format == "json":
        return (to_json(add_comms(schedule)) + "\n").encode()
    from . import draw, raster, trace

    result = simulate(schedule, _costs(args))
    if args.format == "svg":
        return draw.svg(result).encode()
    return raster.png(result) if args.format == "png" else trace.dumps(result).encode()
