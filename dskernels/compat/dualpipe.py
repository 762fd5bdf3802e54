"""deepseek-ai/DualPipe's names and call signatures on `dskernels.pipeline`'s runtime.

`DualPipe` and `DualPipeV` execute the action list that `pipeline.make` generates, so what the
simulator priced is what runs here. Beyond the original: CPU tensors and gloo work, ranks that die
are named, and communication shapes need not be set beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from dskernels.pipeline import make
from dskernels.pipeline.runtime import PipelineRuntime, StepResult, split_batch
from dskernels.pipeline.weightgrad import WeightGradStore, run_backward

__all__ = [
    "DualPipe",
    "DualPipeV",
    "WeightGradStore",
    "run_backward",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
]

_shapes: list[tuple[int, ...]] | None = None
_dtype: torch.dtype | None = None


def set_p2p_tensor_shapes(shapes: Sequence[tuple[int, ...]]) -> None:
    """Shapes of the tensors that every stage hands on. Optional here: without them the first
    micro-batch of each stage tells its own."""
    global _shapes
    _shapes = [tuple(s) for s in shapes]


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Their common dtype."""
    global _dtype
    _dtype = dtype


def _static_meta():
    if _shapes is None or _dtype is None:
        return None
    return tuple((_dtype, _dtype.is_floating_point, shape) for shape in _shapes)


class _Bidirectional(nn.Module):
    """What DualPipe and DualPipeV share: two modules a rank, one `step`."""

    schedule_name = ""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: list[int] | None = None,
        *,
        timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if len(modules) != 2:
            raise ValueError(f"modules must be two, one per direction; got {len(modules)}")
        self.module = nn.ModuleList(modules)
        self.batch_dim = batch_dim
        self.group = process_group or dist.group.WORLD
        self.num_ranks = dist.get_world_size(self.group)
        self.rank_mapping = rank_mapping
        own = dist.get_rank(self.group)
        self.rank = own if rank_mapping is None else rank_mapping[own]
        self.is_first_rank = self.rank == 0
        self.is_last_rank = self.rank == self.num_ranks - 1
        self.timeout = timeout
        self._runtimes: dict[tuple, PipelineRuntime] = {}

    def _stages(self) -> tuple[int, int]:
        """Stage of modules[0] and of modules[1]."""
        raise NotImplementedError

    def _runtime(self, num_chunks: int, forward_only: bool) -> PipelineRuntime:
        key = (num_chunks, forward_only, _static_meta())
        if key not in self._runtimes:
            schedule = make(self.schedule_name, self.num_ranks, num_chunks)
            self._runtimes[key] = PipelineRuntime(
                schedule.forwards() if forward_only else schedule,
                dict(zip(self._stages(), self.module, strict=True)),
                group=self.group,
                rank_mapping=self.rank_mapping,
                timeout=self.timeout,
                static_meta=_static_meta(),
            )
        return self._runtimes[key]

    def _run(
        self,
        inputs: list[tuple] | None,
        labels: list[tuple] | None,
        num_chunks: int,
        criterion: Callable | None,
        return_outputs: bool,
    ) -> StepResult:
        forward_only = not torch.is_grad_enabled()
        WeightGradStore.clear()
        runtime = self._runtime(num_chunks, forward_only)
        runtime.loss_fn = criterion
        return runtime.step(inputs, labels, return_outputs=return_outputs)

    def _collect(self, result: StepResult, criterion, return_outputs: bool):
        """(losses in micro-batch order, outputs joined along the batch)."""
        loss = outputs = None
        if criterion is not None:
            loss = torch.stack([result.losses[mb] for mb in sorted(result.losses)])
        if return_outputs:
            rows = [result.outputs[mb] for mb in sorted(result.outputs)]
            joined = tuple(torch.cat(column, self.batch_dim) for column in zip(*rows, strict=True))
            outputs = joined[0] if len(joined) == 1 else joined
        return loss, outputs

    def _chunks(self, tensors: Sequence[torch.Tensor | None], count: int) -> list[tuple]:
        """Micro-batches of several tensors: one tuple each."""
        columns = [split_batch(t, count, self.batch_dim) for t in tensors]
        if not columns:
            return [()] * count
        return [tuple(t for t in row if t is not None) for row in zip(*columns, strict=True)]


class DualPipe(_Bidirectional):
    """modules: this rank's stage of direction 0 (number `rank`) and of direction 1 (number
    `ranks - 1 - rank`); both copies of a stage must start with equal parameters."""

    schedule_name = "dualpipe"

    def _stages(self) -> tuple[int, int]:
        return self.rank, self.num_ranks - 1 - self.rank

    def step(
        self,
        *inputs: torch.Tensor | None,
        num_chunks: int = 0,
        criterion: Callable | None = None,
        labels: Sequence[torch.Tensor | None] = (),
        return_outputs: bool = False,
    ):
        """One training step, or inference under `torch.no_grad()`.

        Args:
            *inputs: on the first and the last rank, half of the batch each.
            num_chunks: micro-batches over both directions; even, at least twice the ranks.
            criterion: criterion(*outputs, *labels) -> loss, on the first and the last rank.
            labels: on the first rank those of the last rank's inputs, and the other way round.
            return_outputs: return the outputs too.
        Returns:
            (loss, outputs): on the first and last rank the losses [num_chunks / 2] of the other
            one's inputs, and the joined outputs; else None.
        """
        ends = self.is_first_rank or self.is_last_rank
        half = num_chunks // 2
        given = want = None
        if ends and num_chunks > 0:
            # The first rank feeds direction 0 and hears the losses of direction 1.
            mine, nothing = self._chunks(inputs, half), [()] * (num_chunks - half)
            given = mine + nothing if self.is_first_rank else nothing + mine
            answers = self._chunks(labels, half)
            want = nothing + answers if self.is_first_rank else answers + nothing
        result = self._run(given, want, num_chunks, criterion, return_outputs)
        return self._collect(result, criterion, return_outputs) if ends else (None, None)


class DualPipeV(_Bidirectional):
    """modules: this rank's stages number `rank` and `2 * ranks - 1 - rank`."""

    schedule_name = "dualpipev"

    def _stages(self) -> tuple[int, int]:
        return self.rank, 2 * self.num_ranks - 1 - self.rank

    def step(
        self,
        *inputs: torch.Tensor | None,
        num_chunks: int = 0,
        criterion: Callable | None = None,
        labels: Sequence[torch.Tensor | None] = (),
        return_outputs: bool = False,
    ):
        """One training step, or inference under `torch.no_grad()`.

        Inputs, criterion and labels are needed on the first rank, which also gets
        (loss [num_chunks], outputs); the other ranks get (None, None).
        """
        given = want = None
        if self.is_first_rank and num_chunks > 0:
            given = self._chunks(inputs, num_chunks)
            want = self._chunks(labels, num_chunks)
        result = self._run(given, want, num_chunks, criterion, return_outputs)
        if not self.is_first_rank:
            return None, None
        return self._collect(result, criterion, return_outputs)
