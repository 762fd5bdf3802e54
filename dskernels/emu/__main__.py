"""`python -m dskernels.emu`: run, check, time and trace kernels of a .ptx or .cu file.

    python -m dskernels.emu check FILE [--kernel K --grid 4 --block 128 ARG...]
    python -m dskernels.emu run FILE --kernel K --grid 4,1,1 --block 128 ARG...
    python -m dskernels.emu stat FILE --kernel K --grid 4 --block 128 [--part h800] ARG...
    python -m dskernels.emu trace FILE --kernel K --out t.json [--png t.png] ARG...
    python -m dskernels.emu table

ARG: `i:5`, `f:0.5` (scalars), `f32:1024`, `i32:64`, ... (an array of that many elements, 0, 1, 2,
... as values), `null`. `check` without a kernel only loads the file: unsupported instructions are
reported with their lines. `stat` prints the launch's profile with its modelled time, `trace` writes
the modelled timeline of one CTA for Perfetto (ui.perfetto.dev) and, with --png, as a picture.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import dskernels.emu as emu
from dskernels.emu.findings import error_dict, launch_dict, launch_text

_DTYPES = {
    "f32": np.float32, "f64": np.float64, "f16": np.float16, "i8": np.int8, "u8": np.uint8,
    "i16": np.int16, "u16": np.uint16, "i32": np.int32, "u32": np.uint32, "i64": np.int64,
    "u64": np.uint64,
}  # fmt: skip


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 256 bytes, as memory of a GPU is: coalescing depends on it."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    copy = memory[-memory.ctypes.data % 256 :][: array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def _argument(text: str):
    if text == "null":
        return None
    kind, _, value = text.partition(":")
    if kind == "i":
        return int(value, 0)
    if kind == "f":
        return float(value)
    if kind in _DTYPES and value:
        return _aligned(np.arange(int(value)).astype(_DTYPES[kind]))
    raise argparse.ArgumentTypeError(f"expected i:N, f:X, TYPE:COUNT or null, got {text!r}")


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dskernels.emu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", help="print the supported instructions as Markdown")
    for name in ("run", "check", "stat", "trace"):
        sub = commands.add_parser(name)
        sub.add_argument("file", type=Path)
        sub.add_argument("args", nargs="*", type=_argument)
        sub.add_argument("--kernel")
        sub.add_argument("--grid", type=_dims, default=(1,))
        sub.add_argument("--block", type=_dims, default=(32,))
        sub.add_argument("--cluster", type=_dims, default=(1,))
        sub.add_argument("--shared", type=int, default=0)
        sub.add_argument("--json", action="store_true", help="results and findings as JSON")
        if name in ("run", "check"):
            sub.add_argument("--seeds", type=int, default=8 if name == "check" else 0)
        else:
            sub.add_argument("--part", choices=tuple(emu.PARTS), default="h800")
            sub.add_argument("--clock", type=float, help="GHz")
            sub.add_argument("--sample", type=int, help="CTAs that run; default: all")
        if name == "trace":
            sub.add_argument("--out", type=Path, help="Chrome trace, JSON")
            sub.add_argument("--png", type=Path, help="picture: .png, .svg or .pdf")
            sub.add_argument("--window", type=_dims, help="cycles shown in detail: BEGIN,END")
            sub.add_argument("--cta", type=int, default=0, help="rank in the cluster")
    return parser


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments in one piece only; here ARGs may follow the options."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    for text in rest:
        if text.startswith("-") or options.command == "table":
            parser.error(f"unrecognized argument: {text}")
        try:
            options.args.append(_argument(text))
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    return options


def _copy(args: list) -> list:
    return [_aligned(a) if isinstance(a, np.ndarray) else a for a in args]


def _profile(options: argparse.Namespace, module: emu.Module) -> None:
    """`stat` and `trace`."""
    overrides = {} if options.clock is None else {"clock_ghz": options.clock}
    launch = module.kernel(options.kernel)[options.grid, options.block]
    with emu.profiling(options.part, sample_ctas=options.sample, **overrides) as profile:
        launch(*options.args, cluster=options.cluster, shared=options.shared)
    (result,) = profile.launches
    if options.command == "trace":
        timeline = result.timeline(options.cta)
        if options.out is not None:
            timeline.save(options.out)
        if options.png is not None:
            timeline.draw(options.png, window=options.window)
    print(json.dumps(result.to_dict()) if options.json else result.report())


def _schedules(options: argparse.Namespace, launch) -> tuple:
    """The fixed schedule's arrays and statistics, with every schedule's formal findings."""
    first, seen = None, set()
    for seed in [None, *range(options.seeds)]:
        args = _copy(options.args)
        stats = launch(*args, seed=seed, cluster=options.cluster, shared=options.shared)
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        first = first or (arrays, stats)
        for k, (a, b) in enumerate(zip(arrays, first[0], strict=True)):
            if a.tobytes() != b.tobytes():
                raise emu.EmuError(f"array {k} depends on the schedule: seed {seed} differs")
        fresh = [h for h in stats.hazards if (h.kind, h.ptx_line) not in seen]
        seen.update((h.kind, h.ptx_line) for h in fresh)
        if stats is not first[1]:
            first[1].hazards.extend(fresh)
    return first


def _execute(options: argparse.Namespace) -> None:
    text = options.file.read_text()
    if options.file.suffix == ".cu":  # reports name the user's file, not the compiler's copy
        text = emu.compile(
            f'#line 1 "{options.file}"\n{text}', options=(f"-I{options.file.parent}",)
        )
    module = emu.Module(text, options.file.name)
    if options.command in ("stat", "trace") and options.kernel is None:
        raise emu.EmuError(f"--kernel: expected one of {', '.join(module.kernels)}")
    if options.command == "trace" and options.out is None and options.png is None:
        raise emu.EmuError("trace: expected --out FILE.json, --png FILE.png, or both")
    if options.command in ("stat", "trace"):
        return _profile(options, module)
    if options.kernel is None:
        found = {"ok": True, "kernels": module.kernels}
        words = f"{options.file}: {len(module.kernels)} kernels load: {', '.join(module.kernels)}"
        print(json.dumps(found) if options.json else words)
        return
    arrays, stats = _schedules(options, module.kernel(options.kernel)[options.grid, options.block])
    if options.json:
        print(json.dumps(launch_dict(stats, options.seeds + 1)))
        return
    if options.command == "run":
        for k, a in enumerate(arrays):
            print(f"array {k}: {a}")
    print(launch_text(stats, options.seeds + 1))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a finding of the emulator, 2 bad arguments."""
    options = _parse(argv)
    if options.command == "table":
        print(emu.instruction_table_markdown(), end="")
        return 0
    try:
        _execute(options)
    except emu.EmuError as error:
        if options.json:
            print(json.dumps(error_dict(error)))
        else:
            print(error, file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError) as error:  # the file, or what the launch was given
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
