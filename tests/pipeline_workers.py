"""What the processes of the pipeline runtime's tests run, and the stages they hold.

The processes are forked from a server that has imported torch once: starting one takes
milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.pipelining.schedules
import torch.fx.experimental.symbolic_shapes
import torch.nn.functional as F
from pipeline_stages import HIDDEN, TOKENS, ManyTensors, batches, build_stages
from torch import nn

from dskernels.pipeline import add_comms, make
from dskernels.pipeline.runtime import PipelineRuntime
from dskernels.pipeline.weightgrad import WeightGradStore, run_backward


def run_ranks(function, ranks: int, *args, timeout: float = 120.0, expect_dead=()) -> list:
    """Run function(rank, ranks, *args) in `ranks` processes over gloo; results by rank.

    The store lives in this process, as torchrun's lives in its agent. A process that raises fails
    the test with its traceback, one that dies without a word too, unless it is in `expect_dead`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline_workers"])
    _teach_forkserver_our_path()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(
            target=_child, args=(function, r, ranks, store.port, results, args), daemon=True
        )
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    got: dict[int, object] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(got) < ranks - len(expect_dead):
            try:
                rank, ok, value = results.get(timeout=0.2)
            except queue.Empty:
                assert time.monotonic() < deadline, f"ranks {sorted(got)} of {ranks} answered"
                dead = [
                    r for r, p in enumerate(processes)
                    if p.exitcode not in (None, 0) and r not in got and r not in expect_dead
                ]  # fmt: skip
                assert not dead, f"ranks {dead} died without a word"
                continue
            assert ok, f"rank {rank} raised:\n{value}"
            got[rank] = value
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return [got.get(r) for r in range(ranks)]


def _teach_forkserver_our_path() -> None:
    """The server starts once, with our environment but not our sys.path."""
    here = Path(__file__).parent
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wanted = [str(here), str(here.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(wanted + [p for p in parts if p and p not in wanted])


@contextmanager
def one_thread():
    """Reductions split over threads round differently: compare like with like."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _child(function, rank, ranks, port, results, args) -> None:
    import traceback

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        results.put((rank, True, function(rank, ranks, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # leave at once: a peer may be dead, and destructors would wait for it


# --- what the ranks do ----------------------------------------------------------------------------


def train_all(rank, ranks, cases) -> list:
    """Run each case (name, kind, microbatches, dtype, virtual, layers); per case the gradients of
    this rank's stages, and the losses it saw."""
    out = []
    for name, kind, microbatches, dtype, virtual, layers in cases:
        schedule = make(name, ranks, microbatches, virtual)
        stages = build_stages(kind, schedule.num_stages, dtype, layers)
        own = {s: stages[s] for s, _ in schedule.stages_of(rank)}
        runtime = PipelineRuntime(schedule, own, F.mse_loss, timeout=30)
        inputs, targets = batches(microbatches, dtype)
        result = runtime.step(inputs, targets)
        runtime.sync_replicas()
        grads = {s: [p.grad for p in m.parameters()] for s, m in own.items()}
        out.append((grads, result.losses))
    # Plain numbers travel; shared-memory tensors would outlive their process.
    return [
        (
            {s: [g.numpy() for g in gs] for s, gs in grads.items()},
            {mb: loss.item() for mb, loss in losses.items()},
        )
        for grads, losses in out
    ]


def watch_weights(rank, ranks) -> list[tuple[str, bool]]:
    """(op, whether the linear weights' gradient changed) of every compute action of ZB1P."""
    schedule = make("zb1p", ranks, 4)
    stage = build_stages("mlp", ranks, torch.float64)[rank]
    runtime = PipelineRuntime(schedule, {rank: stage}, F.mse_loss, timeout=30)
    weight = next(m for m in stage.modules() if isinstance(m, nn.Linear)).weight
    seen, run = [], runtime._run

    def watched(action):
        before = None if weight.grad is None else weight.grad.clone()
        run(action)
        same = (before is None and weight.grad is None) or (
            before is not None and torch.equal(before, weight.grad)
        )
        seen.append((action.op.value, not same))

    runtime._run = watched
    runtime.step(*batches(4, torch.float64))
    return [(op, changed) for op, changed in seen if op in "FIW"]


def two_steps_and_inference(rank, ranks) -> tuple:
    """Optimiser steps, then a forward-only run; stages with a signature of their own."""
    torch.manual_seed(3)
    stages = [ManyTensors().double() for _ in range(ranks)]
    schedule = add_comms(make("zb1p", ranks, 6))
    g = torch.Generator().manual_seed(5)
    xs = [torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64) for _ in range(6)]
    data = [(x, torch.zeros(HIDDEN, dtype=torch.float64), torch.tensor([0, 2])) for x in xs]
    kwargs = [{"gain": 1.0 + mb / 10} for mb in range(6)]

    def loss_fn(y, side, index):
        return y.square().sum() + side.square().sum() + index.sum()

    runtime = PipelineRuntime(schedule, {rank: stages[rank]}, loss_fn, timeout=30)
    losses = []
    for _ in range(2):
        result = runtime.step(data, kwargs=kwargs)
        # torch.optim would import its compiler first, for seconds in each process.
        for p in stages[rank].parameters():
            p.data.sub_(p.grad, alpha=1e-4)
            p.grad = None
        losses.append([result.losses[mb].item() for mb in sorted(result.losses)])
    with torch.no_grad():
        forward = PipelineRuntime(make("zb1p", ranks, 6).forwards(), {rank: stages[rank]})
        outputs = forward.step(data, kwargs=kwargs, return_outputs=True).outputs
    weights = [p.detach().numpy() for p in stages[rank].parameters()]
    return losses, {mb: [t.numpy() for t in ts] for mb, ts in outputs.items()}, weights


# --- failures -------------------------------------------------------------------------------------


class Trap(nn.Module):
    """Works until its `calls`-th forward, then does what `how` says."""

    def __init__(self, how: str, calls: int):
        super().__init__()
        self.inner, self.how, self.left = nn.Linear(HIDDEN, HIDDEN), how, calls

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(8)
            if self.how == "raise":
                raise ArithmeticError("the trap went off")
        return self.inner(x)


def fail_in_step(rank, ranks, name, bad, how) -> tuple:
    """(seconds until the error, its type, its text) of each surviving rank."""
    microbatches = 2 * ranks
    schedule = make(name, ranks, microbatches)
    torch.manual_seed(0)
    own = {
        s: Trap(how if rank == bad else "work", 3) for s, _ in schedule.stages_of(rank)
    }  # fmt: skip
    runtime = PipelineRuntime(schedule, own, F.mse_loss, timeout=4)
    inputs, targets = batches(microbatches, torch.float32)
    begin = time.monotonic()
    try:
        runtime.step(inputs, targets)
    except Exception as error:
        return time.monotonic() - begin, type(error).__name__, str(error)
    return time.monotonic() - begin, "nothing", ""


def change_shapes(rank, ranks, dynamic) -> str:
    """Micro-batches of different lengths: refused by name, or allowed."""
    schedule = make("1f1b", ranks, 4)
    runtime = PipelineRuntime(
        schedule, {rank: nn.Linear(4, 4)}, lambda y: y.sum(), timeout=10, dynamic_shapes=dynamic
    )
    try:
        result = runtime.step([(torch.ones(2 + mb, 4),) for mb in range(4)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"losses {sorted(result.losses)}"


def bad_arguments(rank, ranks) -> list[str]:
    texts = []
    for build in (
        lambda: PipelineRuntime(make("1f1b", 4, 4), {rank: nn.Identity()}),
        lambda: PipelineRuntime(make("1f1b", 2, 4), {1 - rank: nn.Identity()}),
        lambda: PipelineRuntime(make("1f1b", 2, 4), {rank: nn.Identity()}, F.mse_loss).step(
            [1] * 3
        ),
        lambda: PipelineRuntime(make("1f1b", 2, 4), {rank: nn.Identity()}, rank_mapping=[0, 0]),
        lambda: PipelineRuntime(make("1f1b", 2, 4), {0: nn.Identity()}, F.mse_loss).step(),
    ):
        try:
            build()
            texts.append("nothing was refused")
        except ValueError as error:
            texts.append(str(error))
    return texts


# --- deepseek-ai/DualPipe's own way of using it ---------------------------------------------------


class PeerLinear(torch.autograd.Function):
    """A user's linear that knows the store."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)

        def later():
            weight.grad += grad.flatten(0, -2).T @ x.flatten(0, -2)

        if WeightGradStore.enabled:
            WeightGradStore.put(later)
        else:
            later()
        return grad @ weight, None


class PeerStage(nn.Module):
    """With an overlapped_forward_backward of its own, counted."""

    pairs = 0

    def __init__(self, hidden):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2 * hidden, hidden) / hidden**0.5)
        self.b = nn.Parameter(torch.randn(hidden, 2 * hidden) / hidden**0.5)

    def forward(self, x):
        return PeerLinear.apply(F.gelu(PeerLinear.apply(x, self.a)), self.b)

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        cls.pairs += 1
        outputs0 = [module0(*inputs0)]
        loss0 = criterion0(*outputs0, *labels0) if criterion0 is not None else None
        if loss1 is not None:
            loss1.backward()
        else:
            run_backward(outputs1, output_grads1)
        return outputs0, loss0


def use_compat(rank, ranks, cls_name, overlapped) -> dict:
    """The peer's example: a training step, gradients against one process, then inference."""
    from dskernels.compat import dualpipe

    two_way = cls_name == "DualPipe"
    chunks, rows, hidden = 2 * ranks + 2, 3, 8
    dualpipe.set_p2p_tensor_shapes([(rows, hidden)])
    dualpipe.set_p2p_tensor_dtype(torch.float64)
    torch.manual_seed(233)
    count = ranks if two_way else 2 * ranks
    full = [PeerStage(hidden).double() for _ in range(count)]
    x = torch.randn(chunks * rows, hidden, dtype=torch.float64)
    y = torch.randn(chunks * rows, hidden, dtype=torch.float64)
    loss_ref, out_ref = _peer_reference(full, x, y, chunks)
    mine = (rank, count - 1 - rank)
    local = [PeerStage(hidden).double() for _ in mine]
    for module, stage in zip(local, mine, strict=True):
        module.load_state_dict(full[stage].state_dict())
    if not overlapped:
        del PeerStage.overlapped_forward_backward
    model = getattr(dualpipe, cls_name)(local)
    first, last = rank == 0, rank == ranks - 1
    give = take = label = None
    if two_way and (first or last):
        give, take = (0, 1) if first else (1, 0)
        half = lambda t, i: t.chunk(2)[i]  # noqa: E731
        data, label = half(x, give), half(y, take)
        loss_ref, out_ref = half(loss_ref, take), half(out_ref, take)
    else:
        data, label = (x, y) if first and not two_way else (None, None)
    ends = (first or last) if two_way else first
    options = {"num_chunks": chunks, "criterion": F.mse_loss if ends else None}
    loss, outputs = model.step(data, labels=(label,), **options)
    assert outputs is None
    if ends:
        assert torch.equal(loss, loss_ref)
    else:
        assert loss is None
    worst = 0.0
    if two_way:
        model._runtime(chunks, False).sync_replicas()
    for module, stage in zip(local, mine, strict=True):
        for p, q in zip(module.parameters(), full[stage].parameters(), strict=True):
            worst = max(worst, ((p.grad - q.grad).norm() / q.grad.norm()).item())
    with torch.no_grad():
        loss, outputs = model.step(data, labels=(label,), return_outputs=True, **options)
    if ends:
        assert torch.equal(loss, loss_ref)
        assert torch.equal(outputs, out_ref)
    return {"worst": worst, "pairs": PeerStage.pairs}


def _peer_reference(full, x, y, chunks):
    losses, outs = [], []
    for xs, ys in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        for stage in full:
            xs = stage(xs)
        loss = F.mse_loss(xs, ys)
        loss.backward()
        losses.append(loss.detach())
        outs.append(xs.detach())
    return torch.stack(losses), torch.cat(outs)


# --- our lists in PyTorch's own engine ------------------------------------------------------------


def run_in_torch_engine(rank, ranks, csv_text, form, stages_total, microbatches, directory) -> list:
    """torch.distributed.pipelining executes our CSV; the gradients of this rank's stages."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    from dskernels.pipeline.files import from_csv

    schedule = from_csv(csv_text)
    stages = build_stages("mlp", stages_total, torch.float64)
    own = [s for s, _ in schedule.stages_of(rank)]
    sample = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    held = [
        PipelineStage(
            stages[s], s, stages_total, torch.device("cpu"), input_args=(sample,),
            output_args=(sample,),
        )
        for s in own
    ]  # fmt: skip
    path = Path(directory) / f"rank{rank}.csv"
    path.write_text(csv_text)
    engine = _PipelineScheduleRuntime(held, microbatches, loss_fn=F.mse_loss, scale_grads=False)
    engine._load_csv(str(path), format=form)
    inputs, targets = batches(microbatches, torch.float64)
    x, y = (torch.cat([t[0] for t in column]) for column in (inputs, targets))
    engine.step(*((x,) if 0 in own else ()), target=y if stages_total - 1 in own else None)
    return [[p.grad.numpy() for p in stages[s].parameters()] for s in own]


# --- time -----------------------------------------------------------------------------------------


class Timed(torch.autograd.Function):
    """Identity whose forward and backward take a set time, by sleeping or by multiplying."""

    @staticmethod
    def forward(ctx, x, weight, work):
        ctx.work = work
        work("f")
        return x + weight

    @staticmethod
    def backward(ctx, grad):
        ctx.work("b")
        return grad, grad.sum().reshape(1), None


class TimedStage(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.weight, self.work = nn.Parameter(torch.zeros(1)), work

    def forward(self, x):
        return Timed.apply(x, self.weight, self.work)


def measure(rank, ranks, name, microbatches, kind, size) -> tuple:
    """(seconds of a step, {op: mean seconds}) of this rank, best of three steps."""
    if kind == "sleep":

        def work(which): time.sleep(size * {"f": 1, "b": 2}[which])  # fmt: skip
    else:
        a = torch.randn(size, size)

        def work(which): [a @ a for _ in range({"f": 2, "b": 4}[which])]  # fmt: skip

    schedule = make(name, ranks, microbatches)
    own = {s: TimedStage(work) for s, _ in schedule.stages_of(rank)}
    runtime = PipelineRuntime(schedule, own, lambda y: y.sum(), timeout=60)
    data = [(torch.zeros(4),)] * microbatches
    best = None
    for _ in range(3):
        dist.barrier()
        begin = time.monotonic()
        result = runtime.step(data, record=True)
        dist.barrier()
        seconds = time.monotonic() - begin
        if best is None or seconds < best[0]:
            best = (seconds, result.timeline)
    return best[0], [(str(a.op), b, e) for a, b, e in best[1]], runtime.result.waited
