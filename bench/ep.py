"""Dispatch and combine between processes against gloo and MPI, and against a plain copy.

    python -m bench.ep                                   # 8 ranks, 4096 tokens x 7168, top-8 of 256
    python -m bench.ep --mpi DIR    # of `pip install --prefix DIR mpich mpi4py`
    python -m bench.ep --install-mpi                     # installs it into out/mpi first
    python -m bench.ep --json out/ep.json --rounds 9

All candidates run in the same processes, in turn, round by round. Each moves FP8 rows with their
scales one way and BF16 rows back. A peer packs its rows by destination (index_select), exchanges
the counts, then all-to-alls data and scales, and for combine sums what came back with index_add in
fp32; routing metadata, which dispatch carries along, is spared the peers. "copy" is what the memory
gives: every rank at once copies as many bytes as it sends with streaming stores.

Time is from the first rank's start to the last rank's end, the best and the median of the rounds;
GB/s count bytes of rows delivered, once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import dskernels as dsk
from dskernels import _C

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 1024  # rows converted at a time


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for name, default in (("ranks", 8), ("tokens", 4096), ("hidden", 7168), ("topk", 8),
                          ("experts", 256), ("rounds", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mpi", type=Path, help="prefix with mpich and mpi4py")
    parser.add_argument("--install-mpi", action="store_true", help="pip install them there")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# ---- the candidates: each is built per rank and offers named steps


class Ours:
    name = "dskernels"

    def __init__(self, case: Case) -> None:
        self.case, o = case, case.options
        self.group = dsk.ep.Group.from_process_group(
            num_experts=o.experts, max_tokens=o.tokens, hidden=o.hidden, topk=o.topk, timeout=120.0
        )
        self.out = torch.empty(o.tokens, o.hidden, dtype=torch.bfloat16)

    def dispatch(self) -> None:
        self.received = None
        self.received = dsk.ep.dispatch(self.group, self.case.x, self.case.idx, self.case.weights)

    def prepare_combine(self) -> None:
        """The experts' results, written where combine reads them; the peers send the same."""
        if self.case.y is None:
            rows = len(self.received.source)
            self.case.y = self.group.result_buffer(rows, self.case.options.hidden, torch.bfloat16)
            for begin in range(0, rows, CHUNK):
                got = self.received.x.data[begin : begin + CHUNK]
                self.case.y[begin : begin + CHUNK] = got.bfloat16()

    def combine(self) -> None:
        dsk.ep.combine(self.group, self.case.y, self.received, out=self.out)


class Peer:
    """Rows packed by destination, all-to-all, and the way back."""

    def __init__(self, case: Case) -> None:
        self.case, o = case, case.options
        rank_of = torch.where(case.idx >= 0, case.idx // (o.experts // o.ranks), -1)
        tokens = [(rank_of == r).any(1).nonzero().flatten() for r in range(o.ranks)]
        self.order = torch.cat(tokens)
        self.send = [len(t) for t in tokens]
        self.data = case.x.data.view(torch.uint8)
        self.scale = case.x.scale.contiguous().view(torch.uint8)

    def dispatch(self) -> None:
        self.receive = self.counts(self.send)
        packed = self.data.index_select(0, self.order)
        scales = self.scale.index_select(0, self.order)
        self.rows = self.exchange(packed, self.send, self.receive)
        self.scales = self.exchange(scales, self.send, self.receive)

    def prepare_combine(self) -> None:
        self.rows = self.scales = None

    def combine(self) -> None:
        o = self.case.options
        back = self.exchange(self.case.y.view(torch.uint8), self.receive, self.send)
        total = torch.zeros(o.tokens, o.hidden)
        for begin in range(0, len(back), CHUNK):
            rows = back[begin : begin + CHUNK].view(torch.bfloat16).float()
            total.index_add_(0, self.order[begin : begin + CHUNK], rows)
        self.out = total.bfloat16()


class Gloo(Peer):
    name = "gloo"

    def counts(self, send: list[int]) -> list[int]:
        got = torch.empty(len(send), dtype=torch.int64)
        dist.all_to_all_single(got, torch.tensor(send))
        return got.tolist()

    def exchange(self, rows, send, receive):
        got = torch.empty(sum(receive), rows.shape[1], dtype=torch.uint8)
        dist.all_to_all_single(got, rows, receive, send)
        return got


class Mpi(Peer):
    name = "mpi"

    def __init__(self, case: Case) -> None:
        from mpi4py import MPI

        self.mpi, self.world = MPI, MPI.COMM_WORLD
        super().__init__(case)

    def counts(self, send: list[int]) -> list[int]:
        got = torch.empty(len(send), dtype=torch.int64)
        self.world.Alltoall(torch.tensor(send).numpy(), got.numpy())
        return got.tolist()

    def exchange(self, rows, send, receive):
        got = torch.empty(sum(receive), rows.shape[1], dtype=torch.uint8)
        row = self.mpi.BYTE.Create_contiguous(rows.shape[1]).Commit()
        self.world.Alltoallv([rows.numpy(), send, row], [got.numpy(), receive, row])
        row.Free()
        return got


class Copy:
    """As many bytes as this rank's rows, from one buffer to another with streaming stores."""

    name = "copy"

    def __init__(self, case: Case, target: torch.Tensor, bytes_sent: int) -> None:
        self.case, self.target = case, target[:bytes_sent]

    def copy(self) -> None:
        source = self.case.y.view(torch.uint8).flatten()
        left = len(self.target)
        while left:  # ranks receive a little more or less than they send
            n = min(left, len(source))
            _C.comm.stream_copy(self.target[:n], source[:n])
            left -= n


class Case:
    def __init__(self, o: argparse.Namespace, rank: int) -> None:
        self.options = o
        g = torch.Generator().manual_seed(rank)
        x = torch.randn(o.tokens, o.hidden, generator=g, dtype=torch.float32)
        self.x = dsk.quantize(x.bfloat16())
        self.idx = torch.rand(o.tokens, o.experts, generator=g).topk(o.topk, dim=1).indices
        self.weights = torch.rand(o.tokens, o.topk, generator=g)
        self.y: torch.Tensor | None = None  # results of the experts

    def copies(self) -> int:
        """Rows that this rank sends."""
        o = self.options
        ranks = self.idx // (o.experts // o.ranks)
        return int(sum((ranks == r).any(1).sum() for r in range(o.ranks)))


# ---- one rank


def timed(step) -> tuple[float, float]:
    dist.barrier()
    began = time.monotonic()
    step()
    return began, time.monotonic()


def spans(mine: list[tuple[float, float]]) -> list[float]:
    """Seconds from the first start to the last end over all ranks, of every round."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [max(e for _, e in row) - min(b for b, _ in row) for row in zip(*everyone)]


def run_rank(o: argparse.Namespace) -> None:
    rank, ranks = int(os.environ["RANK"]), o.ranks
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    case = Case(o, rank)
    rows = case.copies()
    sent = rows * (o.hidden + case.x.scale.shape[1] * 4)
    candidates = [Ours(case), Gloo(case)]
    if o.mpi is not None:
        candidates.append(Mpi(case))
    target = torch.zeros(rows * o.hidden * 2, dtype=torch.uint8)
    copies = {"copy dispatch": Copy(case, target, sent),
              "copy combine": Copy(case, target, len(target))}  # fmt: skip
    times: dict[str, list] = {}
    for turn in range(o.rounds + 1):  # the first one touches the pages
        for c in candidates:
            d = timed(c.dispatch)
            if turn == 0 and c is not candidates[0]:
                check_arrival(candidates[0], c)
            c.prepare_combine()
            back = timed(c.combine)
            if turn:
                times.setdefault(f"{c.name} dispatch", []).append(d)
                times.setdefault(f"{c.name} combine", []).append(back)
        for name, copy in copies.items():
            t = timed(copy.copy)
            if turn:
                times.setdefault(name, []).append(t)
    for peer in candidates[1:]:
        check_sums(candidates[0], peer)
    total = torch.tensor([rows])
    dist.all_reduce(total)
    results = {name: spans(values) for name, values in times.items()}
    if rank == 0:
        report(o, int(total), case.x.scale.shape[1] * 4, results)
    dist.barrier()
    dist.destroy_process_group()


def check_arrival(ours: Ours, peer: Peer) -> None:
    """The same bytes arrived."""
    assert torch.equal(ours.received.x.data.view(torch.uint8), peer.rows), peer.name
    scales = ours.received.x.scale.contiguous().view(torch.uint8)
    assert torch.equal(scales.view(len(scales), -1), peer.scales), peer.name


def check_sums(ours: Ours, peer: Peer) -> None:
    """index_add sums in an order of its own choice: a rounding apart at most."""
    torch.testing.assert_close(ours.out, peer.out, rtol=2**-7, atol=1e-5)


def report(o, rows: int, scale_bytes: int, results: dict[str, list[float]]) -> None:
    size = {"dispatch": rows * (o.hidden + scale_bytes), "combine": rows * o.hidden * 2}
    figures = {}
    print(f"{o.ranks} ranks, {o.tokens} tokens x {o.hidden}, top-{o.topk} of {o.experts}; "
          f"{size['dispatch'] / 1e9:.2f} GB out, {size['combine'] / 1e9:.2f} GB back; "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"{'':12}{'dispatch best':>14}{'median':>10}{'GB/s':>8}{'combine best':>14}{'median':>10}"
          f"{'GB/s':>8}")  # fmt: skip
    for name in dict.fromkeys(key.split()[0] for key in results):
        line = f"{name:12}"
        for phase in ("dispatch", "combine"):
            seconds = results[f"{name} {phase}"]
            best, median = min(seconds), statistics.median(seconds)
            rate = size[phase] / best / 1e9
            figures[f"{name} {phase}"] = {"best_s": best, "median_s": median, "gb_s": rate,
                                          "rounds_s": seconds}  # fmt: skip
            line += f"{best * 1e3:11.1f} ms{median * 1e3:7.0f} ms{rate:8.2f}"
        print(line)
    for phase in ("dispatch", "combine"):
        ours = figures[f"dskernels {phase}"]["gb_s"]
        against = [f"{ours / f['gb_s']:.2f} x {name.split()[0]}" for name, f in figures.items()
                   if name.endswith(phase) and not name.startswith("dskernels")]  # fmt: skip
        print(f"{phase}: {', '.join(against)}")
    if o.json:
        o.json.parent.mkdir(parents=True, exist_ok=True)
        o.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(o).items()},
                                      "bytes": size, "load": os.getloadavg(),
                                      "results": figures}, indent=1))  # fmt: skip
    sys.stdout.flush()


# ---- starting the ranks


def mpi_folder(o: argparse.Namespace) -> Path | None:
    folder = o.mpi or ROOT / "out" / "mpi"
    if o.install_mpi and not (folder / "bin" / "mpiexec").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--prefix", str(folder)]
        subprocess.run([*command, "--ignore-installed", "mpich", "mpi4py"], check=True)
    return folder if (folder / "bin" / "mpiexec").exists() else None


def main() -> None:
    o = options()
    if "DSK_BENCH_EP_CHILD" in os.environ:
        os.environ.setdefault("RANK", os.environ.get("PMI_RANK", "0"))
        return run_rank(o)
    o.mpi = mpi_folder(o)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = dict(os.environ, DSK_BENCH_EP_CHILD="1", OMP_NUM_THREADS="1",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                       TORCHELASTIC_USE_AGENT_STORE="True", WORLD_SIZE=str(o.ranks))  # fmt: skip
    command = [sys.executable, "-m", "bench.ep", *sys.argv[1:]]
    if o.mpi is None:
        print("MPI: not found (--mpi DIR or --install-mpi); gloo and copy only")
        ranks = [subprocess.Popen(command, env=dict(environment, RANK=str(r)), cwd=ROOT)
                 for r in range(o.ranks)]  # fmt: skip
        if any([process.wait() for process in ranks]):
            raise SystemExit("bench.ep: a rank failed")
        return None
    if "--mpi" not in sys.argv:
        command += ["--mpi", str(o.mpi)]
    packages = next(o.mpi.glob("lib/python*/site-packages"))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), environment.get("PYTHONPATH", ""), str(packages)]
    )
    environment["MPI4PY_LIBMPI"] = str(o.mpi / "lib" / "libmpi.so.12")
    launch = [str(o.mpi / "bin" / "mpiexec"), "-n", str(o.ranks)]
    raise SystemExit(subprocess.run([*launch, *command], env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
