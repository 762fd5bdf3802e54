"""Plant bugs in the pipeline's schedules, validator, simulator, files and runtime, one at a time,
and see the tests fail.

    python tests/mutation/mutate_pipeline.py [--only NAME-PART] [--list]

Each mutant replaces one piece of source in a temporary copy and runs the tests that must notice.
Exit status 0 when every mutant is caught, 1 when one survives, 2 when a mutant no longer applies
(the source moved on: update the table).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FAST = ("tests/test_pipeline_simulate.py", "tests/test_pipeline_schedules.py")
SOUND = ("tests/test_pipeline_schedules.py",)
COST = ("tests/test_pipeline_cost.py",)
RUN = ("tests/test_pipeline_runtime.py",)


class Mutant(NamedTuple):
    name: str
    file: str  # dskernels/pipeline/<file>.py
    old: str
    new: str
    tests: tuple[str, ...] = FAST


MUTANTS = [
    # Schedules.
    Mutant("1f1b: one warm-up forward less", "schedules", "warmup = min(ranks - 1 - rank, microbatches)", "warmup = min(max(0, ranks - 2 - rank), microbatches)"),
    Mutant("zb1p: weight gradients not deferred", "schedules", "if out.pending > rank:", "if out.pending > 0:"),
    Mutant("zb1p: deferred by one more", "schedules", "if out.pending > rank:", "if out.pending > rank + 1:"),
    Mutant("zb1p: the last weights forgotten", "schedules", "        out.flush()\n", ""),
    Mutant("interleaved: backward chunks in forward order", "schedules", "virtual - 1 - chunk if backward else chunk", "chunk"),
    Mutant("interleaved: shorter warm-up", "schedules", "2 * (ranks - 1 - rank), total)", "(ranks - 1 - rank), total)"),
    Mutant("zbv: weights before gradients in the cool-down", "schedules", "    for _i in range(ranks - rank):\n        split_b(0, down_w)\n        out._emit(down_w.popleft())\n    for action in (*up_w, *down_w):", "    while down_w:\n        out._emit(down_w.popleft())\n    for _i in range(ranks - rank):\n        split_b(0, down_w)\n        out._emit(down_w.popleft())\n    for action in (*up_w, *down_w):"),
    Mutant("chimera: units overlap", "schedules", "base = 2 * ranks * unit + 2 * m", "base = (2 * ranks - 2) * unit + 2 * m"),
    Mutant("chimera: both directions alike", "schedules", "((0, rank), (1, ranks - 1 - rank))", "((0, rank), (1, rank))"),
    Mutant("dual step 1: half the fill", "schedules", "for _ in range(2 * outer):  # 1", "for _ in range(outer):  # 1"),
    Mutant("dual step 3: no early gradients", "schedules", "        out.b(1, split=True)\n        out.w()\n        out.f(1)\n", "        out.b(1)\n        out.f(1)\n"),
    Mutant("dual step 4: the middle overlaps its first pair", "schedules", "if i == 0 and turn:", "if False:"),
    Mutant("dual step 4: nobody overlaps the first pair", "schedules", "if i == 0 and turn:", "if i == 0:"),
    Mutant("dual step 6: never split", "schedules", "out.b(1, split=split)", "out.b(1, split=False)"),
    Mutant("dual step 6: split one backward early", "schedules", "i == inner // 2 and h % 2 == 0", "i == inner // 2 - 1 and h % 2 == 0"),
    Mutant("dual step 6: parity exchanged", "schedules", "split or (i == inner // 2 and h % 2 == 1)", "split or (i == inner // 2 and h % 2 == 0)"),
    Mutant("dual step 7: whole backwards", "schedules", "        out.w()\n        out.b(0, split=True)\n", "        out.w()\n        out.b(0)\n"),
    Mutant("dualpipe: directions not exchanged in the second half", "schedules", "((down, up) if rank < half else (up, down))", "(down, up)"),
    Mutant("dualpipev: no turn", "schedules", "turn=rank == ranks - 1", "turn=False"),
    Mutant("legality: odd ranks pass", "schedules", "if fam.even_ranks and ranks % 2:", "if False:"),
    Mutant("legality: too few micro-batches pass", "schedules", "if microbatches < least or", "if False or"),
    Mutant("legality: nearest is not legal", "schedules", "above = max(least, -(-microbatches // step) * step)", "above = max(least, microbatches // step * step)"),
    # Lowering.
    Mutant("comms: receive at the end of the list", "lower", "lists[recv.rank].append(recv)", "lists[recv.rank].insert(0, recv)"),
    Mutant("comms: starts before ends at equal times", "lower", "events.append((end, 0, rank, cursor[rank]))", "events.append((end, 2, rank, cursor[rank]))"),
    Mutant("comms: sent to the same rank", "lower", "if peer == action.rank:", "if False:"),
    Mutant("comms: gradients of stage 1 stay", "lower", "and action.stage > 0:", "and action.stage > 1:"),
    # Validator.
    Mutant("validator: no completeness", "validate", "    _check_complete(schedule, report)\n", ""),
    Mutant("validator: doubled forwards pass", "validate", "if f != 1:", "if f < 1:", SOUND),
    Mutant("validator: no order on a rank", "validate", "    _check_rank_order(schedule, report)\n", "", SOUND),
    Mutant("validator: W before its Bi passes", "validate", "if atom.op is Op.W and (Op.BI, *key) not in done:", "if False:", SOUND),
    Mutant("validator: no pairing", "validate", "        _check_pairing(schedule, report)\n", "", SOUND),
    Mutant("validator: order on a channel ignored", "validate", "            if s != r:\n", "            if False:\n", SOUND),
    Mutant("validator: sends before compute pass", "validate", "if message not in produced:", "if False:", SOUND),
    Mutant("validator: missing receives pass", "validate", "if remote and (op, atom.stage", "if False and (op, atom.stage", SOUND),
    Mutant("validator: missing sends pass", "validate", "for message in sorted(pending):", "for message in ():", SOUND),
    Mutant("validator: no rendezvous proof", "validate", "            _check_blocking(schedule, report)\n", "            pass\n", SOUND),
    Mutant("validator: no circular waits of compute", "validate", "        _check_causal(schedule, report)\n", "        pass\n", SOUND),
    Mutant("validator: directions not checked", "validate", "if atom.direction != direction:", "if False:", SOUND),
    Mutant("validator: placement not checked", "validate", "if home != rank:", "if False:", SOUND),
    # Simulator.
    Mutant("simulate: inputs not waited for", "simulate", "begin = free if free > there else there", "begin = free"),
    Mutant("simulate: latency forgotten", "simulate", "there = on_wire + self.costs.p2p_latency * slow", "there = on_wire"),
    Mutant("simulate: links carry many at once", "simulate", "self.link_free[link] = on_wire", "self.link_free[link] = begin"),
    Mutant("simulate: straggler's factor lost", "simulate", "scale = factor * noise[i] if noise is not None else factor", "scale = 1.0"),
    Mutant("simulate: slow link ignored", "simulate", "link_factor.get(link, 1.0)", "link_factor.get((0, 0), 1.0)"),
    Mutant("simulate: seed ignored", "simulate", "[self.costs.seed, rank]", "[rank]"),
    Mutant("simulate: bubble by span", "simulate", "[self.makespan - b for b in self.busy]", "[max(self.clock) - b for b in self.busy] if 0 else self.span_bubble"),
    Mutant("simulate: memory freed before W", "simulate", "kept = 1.0 if count else self.costs.retained", "kept = 0.0"),
    Mutant("simulate: retention ignored in bytes", "simulate", "kept = 1.0 if count else self.costs.retained", "kept = 1.0"),
    Mutant("simulate: static memory forgotten", "simulate", "[0.0 if count else _at(self.costs.static, rank)]", "[0.0]"),
    Mutant("simulate: memory allocated at the end of F", "simulate", "times.append(start)\n", "times.append(end)\n"),
    Mutant("costs: pair costs its backward only", "costs", "return _at(self.f, fwd.stage) + self._full_backward(bwd.stage) - deferred", "return self._full_backward(bwd.stage)"),
    Mutant("costs: short tables accepted", "costs", "and len(value) != want", "and len(value) < 0"),
    Mutant("overlap: no contention", "overlap", "rate = 1 / slowdown if always or comm is not None else 1.0", "rate = 1.0"),
    Mutant("overlap: dependencies ignored", "overlap", "all(a in end for a in tasks[task].after)", "True"),
    Mutant("overlap: exposed time not counted", "overlap", "exposed += step", "exposed += 0"),
    Mutant("formula: dualpipe of all ranks", "formulas", 'depth = p if name == "dualpipev" else p // 2', "depth = p"),
    # Files.
    Mutant("csv: pair written backwards", "actions", '";".join(map(str, self.parts))', '";".join(map(str, self.parts[::-1]))', SOUND),
    Mutant("csv: no REDUCE_GRAD", "files", "if left[atom.stage] == 0:", "if False:", SOUND),
    Mutant("csv: two directions exported", "files", "if schedule.num_directions > 1:", "if False:", SOUND),
    # Cost model.
    Mutant("cost: attention backward twice as cheap", "cost", "backward = 2.5 * core", "backward = 0.2 * core", COST),
    Mutant("cost: all-to-all to every expert", "cost", "copies = model.nodes_per_token(nodes)", "copies = model.topk", COST),
    Mutant("cost: multi-token prediction forgotten", "cost", "(m.mtp_layers if final else 0)", "0", COST),
    Mutant("cost: two copies' parameters once", "cost", "for s, _ in schedule.stages_of(rank)]", "for s, d in schedule.stages_of(rank) if d == 0]", COST),
    Mutant("rates: speed-up over CUTLASS ignored", "rates", "tflops * 1e12 / older", "tflops * 1e12", COST),
    Mutant("inference: one micro-batch only", "inference", "unit.batch * groups / seconds", "unit.batch / 2 * groups / seconds", COST),
    # Runtime.
    Mutant("runtime: W skipped", "runtime", "                    for closure in self._weights.pop(key):\n                        closure()\n", "                    self._weights.pop(key)\n", RUN),
    Mutant("runtime: split ignored", "runtime", "WeightGradStore.enabled = split", "WeightGradStore.enabled = False", RUN),
    Mutant("runtime: replicas not added", "runtime", "buffer.copy_(first + second)", "buffer.copy_(first)", RUN),
    Mutant("runtime: overlap hook not called", "runtime", "if hook is None or", "if True or", RUN),
    Mutant("weights: bias deferred but forgotten", "weightgrad", "accumulate(bias, rows.sum(0))", "pass", RUN),
    Mutant("weights: watched parameters deferred", "weightgrad", "p.is_leaf and not p._backward_hooks", "p.is_leaf", RUN),
    Mutant("p2p: shapes not compared", "p2p", "elif [(d, s) for d, _, s in known] != [(d, s) for d, _, s in meta]:", "elif False:", RUN),
    Mutant("p2p: waits for ever", "p2p", "work.wait(timedelta(seconds=self.timeout))", "work.wait()", RUN),
    Mutant("p2p: first failure not reported", "p2p", "first = self.report(text)", "first = text", RUN),
]  # fmt: skip


def _workdir(path: Path, *, light: bool) -> None:
    """A copy to mutate. `light`: without the package's own imports, so that nothing loads torch
    unless a test asks for it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_kernels")
    shutil.copytree(ROOT / "dskernels", path / "dskernels", ignore=ignored)
    if light:
        (path / "dskernels" / "__init__.py").write_text("")
    else:
        shutil.copytree(ROOT / "model", path / "model", ignore=ignored)
    (path / "tests").mkdir()
    for test in (ROOT / "tests").glob("*pipeline*.py"):
        shutil.copy(test, path / "tests")
    shutil.copy(ROOT / "pyproject.toml", path)


def run_mutant(mutant: Mutant, workdir: Path) -> tuple[str, str]:
    """'caught', 'SURVIVED' or 'STALE', and the first failing test."""
    source = Path("dskernels/pipeline") / f"{mutant.file}.py"
    original = (ROOT / source).read_text()
    if mutant.old not in original:
        return "STALE", f"not found in {source}: {mutant.old!r}"
    (workdir / source).write_text(original.replace(mutant.old, mutant.new))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-m", "not slow",
             *mutant.tests],
            cwd=workdir, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "caught", "ran for more than 300 s"
    finally:
        (workdir / source).write_text(original)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and failed:
        return "caught", failed[0].split(" - ")[0].removeprefix("FAILED ")
    if done.returncode == 0:
        return "SURVIVED", " ".join(mutant.tests)
    return (
        "STALE",
        f"pytest exit status {done.returncode}: {done.stdout[-200:]}{done.stderr[-200:]}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run mutants whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.list:
        print("\n".join(f"{mutant.file:10} {mutant.name}" for mutant in chosen))
        return 0
    outcomes: dict[str, int] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as light, tempfile.TemporaryDirectory() as full:
        _workdir(Path(light), light=True)
        _workdir(Path(full), light=False)
        for mutant in chosen:
            workdir = Path(full if mutant.tests == RUN else light)
            outcome, detail = run_mutant(mutant, workdir)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            print(f"{outcome:9} {mutant.name}: {detail}", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(chosen)} mutants in {minutes:.1f} min: {outcomes}")
    return 2 if "STALE" in outcomes else 1 if "SURVIVED" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
