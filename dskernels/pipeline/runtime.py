"""Execute a schedule with real modules, one process per rank.

    schedule = pipeline.add_comms(pipeline.make("zb1p", ranks=4, microbatches=8))
    runtime = PipelineRuntime(schedule, {rank: stage_module}, loss_fn)
    result = runtime.step(inputs, targets)      # lists with one entry per micro-batch
    optimizer.step()

Each process (started by torchrun, say) walks its rank's list of the schedule from the top: the
same list that `simulate` prices. There is no other control flow. gloo on CPU and nccl on GPU;
the latter is written for, but has not been run where these lines were written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .actions import Action, Op, Schedule, ScheduleError
from .lower import add_comms
from .p2p import Mailbox, Meta, PipelineError, describe
from .validate import validate
from .weightgrad import WeightGradStore, accumulate, defer_linears

__all__ = ["PipelineError", "PipelineRuntime", "StepResult", "split_batch"]

Key = tuple[int, int]  # (stage, micro-batch)


@dataclass
class StepResult:
    """What one rank has after a step; keys are micro-batches."""

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    # (action, start, end) in seconds since the step began, if recorded
    timeline: list[tuple[Action, float, float]] = field(default_factory=list)
    waited: float = 0.0  # seconds spent waiting for messages


@dataclass
class _Pass:
    """One micro-batch on one stage, between its forward and its backward."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...] = ()
    loss: torch.Tensor | None = None
    output_grads: tuple[torch.Tensor, ...] | None = None


def split_batch(tensor: torch.Tensor | None, count: int, dim: int = 0) -> list:
    """`count` equal micro-batches of a tensor along `dim` (None stays None).

    Raises ValueError if the size does not divide.
    """
    if tensor is None:
        return [None] * count
    if tensor.shape[dim] % count:
        raise ValueError(
            f"dimension {dim} of size {tensor.shape[dim]} does not split into {count} micro-batches"
        )
    return list(tensor.chunk(count, dim))


def as_tuple(value: Any) -> tuple:
    """A module's arguments or outputs as a tuple of tensors."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(value)
    raise TypeError(f"expected a tensor, or a tuple of tensors; got {type(value).__name__}")


def differentiable(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in tensors if t.requires_grad)


class PipelineRuntime:
    """Runs one rank of a schedule.

    Args:
        schedule: with or without communication; validated here.
        modules: {stage: module} of this rank's stages. A stage gets the outputs of the one before
            as positional arguments (stage 0 the step's inputs), and the micro-batch's keyword
            arguments; it returns a tensor or a tuple of tensors.
        loss_fn: loss_fn(*outputs, *targets) -> scalar, called on the last stage. Not scaled.
        group: process group of the pipeline (the default group if None).
        rank_mapping: rank in the group -> rank in the pipeline (the same if None).
        device: of activations; that of the first parameter if None.
        timeout: seconds that a wait for one message may take before the step fails.
        dynamic_shapes: shapes may differ between micro-batches (a header per message).
        static_meta: shapes of all activations, known beforehand: no headers at all.
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Mapping[int, nn.Module],
        loss_fn: Callable[..., torch.Tensor] | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        device: torch.device | None = None,
        timeout: float = 60.0,
        dynamic_shapes: bool = False,
        static_meta: Meta | None = None,
    ):
        self.schedule = add_comms(schedule)
        validate(self.schedule)
        self.modules, self.loss_fn = dict(modules), loss_fn
        group = group or dist.group.WORLD
        size = dist.get_world_size(group)
        if size != schedule.num_ranks:
            raise ScheduleError(
                f"schedule {schedule.name!r} needs {schedule.num_ranks} processes; the group has "
                f"{size}"
            )
        mapping = list(range(size)) if rank_mapping is None else list(rank_mapping)
        if sorted(mapping) != list(range(size)):
            raise ScheduleError(
                f"rank_mapping must be a permutation of 0..{size - 1}; got {mapping}"
            )
        self.rank = mapping[dist.get_rank(group)]
        wanted = sorted(s for s, _ in schedule.stages_of(self.rank))
        if sorted(self.modules) != wanted:
            raise ScheduleError(
                f"rank {self.rank} holds stages {wanted}; got modules for {sorted(self.modules)}"
            )
        self._last = schedule.num_stages - 1
        inverse = [mapping.index(r) for r in range(size)]
        self.group = group
        self.mail = Mailbox(
            self.rank,
            group,
            [dist.get_global_rank(group, r) for r in inverse],
            device or self._guess_device(),
            timeout,
            dynamic_shapes,
            static_meta,
        )

    def _guess_device(self) -> torch.device:
        for module in self.modules.values():
            for tensor in (*module.parameters(), *module.buffers()):
                return tensor.device
        return torch.device("cpu")

    # --- one step ---

    def step(
        self,
        inputs: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        kwargs: Sequence[Mapping[str, Any]] | None = None,
        return_outputs: bool = False,
        record: bool = False,
    ) -> StepResult:
        """Run this rank's list once; gradients add up in the parameters.

        Args:
            inputs: per micro-batch the arguments of stage 0 (needed where stage 0 is).
            targets: per micro-batch the further arguments of the loss (needed at the last stage).
            kwargs: per micro-batch keyword arguments for this rank's stages.
            return_outputs: keep the last stage's outputs.
            record: note when each action ran.
        Raises:
            PipelineError: a peer died or did not answer in time. Name of peer and action inside.
        """
        self._begin(inputs, targets, kwargs, return_outputs)
        result = self.result
        start = time.monotonic()
        action: Action | None = None
        try:
            for action in self.schedule.actions[self.rank]:
                began = time.monotonic()
                self._run(action)
                if record:
                    result.timeline.append((action, began - start, time.monotonic() - start))
            self.mail.finish_sends()
        except PipelineError:
            raise
        except Exception as error:
            at = describe(action) if action else "the start"
            self.mail.report(f"rank {self.rank} raised {error!r} at {at}")
            raise
        finally:
            WeightGradStore.enabled = False
        result.waited = self.mail.waited
        return result

    def _begin(self, inputs, targets, kwargs, return_outputs: bool) -> None:
        count = self.schedule.num_microbatches
        for name, value in (("inputs", inputs), ("targets", targets), ("kwargs", kwargs)):
            if value is not None and len(value) != count:
                raise ValueError(
                    f"{name} must have one entry per micro-batch ({count}); got {len(value)}"
                )
        holds = {s for s in self.modules}
        if 0 in holds and inputs is None:
            raise ValueError(f"rank {self.rank} holds stage 0: inputs are needed")
        if not self.schedule.forward_only and self._last in holds and self.loss_fn is None:
            raise ValueError(f"rank {self.rank} holds the last stage: loss_fn is needed")
        self._inputs, self._targets, self._kwargs = inputs, targets, kwargs
        self._return_outputs = return_outputs
        self.result = StepResult()
        self._passes: dict[Key, _Pass] = {}
        self._expected: dict[tuple[Op, int, int], Any] = {}
        self._local: dict[tuple[Op, int, int], tuple[torch.Tensor, ...]] = {}
        self._weights: dict[Key, list] = {}
        self._grads_out: dict[Key, tuple[torch.Tensor, ...]] = {}
        self.mail.waited = 0.0

    def _run(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        match action.op:
            case Op.F:
                self._forward(action)
            case Op.B | Op.BI:
                self._backward(action)
            case Op.W:
                with torch.no_grad():
                    for closure in self._weights.pop(key):
                        closure()
            case Op.FB:
                self._pair(*action.parts)
            case Op.SEND_F:
                self.mail.send_forward(action, self._peer(action, 1), self._passes[key].outputs)
                if self.schedule.forward_only:
                    del self._passes[key]
            case Op.SEND_B:
                self.mail.send_backward(action, self._peer(action, -1), self._grads_out.pop(key))
            case Op.RECV_F:
                self._expected[(action.op, *key)] = self.mail.post_forward(
                    action, self._peer(action, -1)
                )
            case Op.RECV_B:
                like = differentiable(self._passes[key].outputs)
                self._expected[(action.op, *key)] = self.mail.post_backward(
                    action, self._peer(action, 1), like
                )

    def _peer(self, action: Action, step: int) -> int:
        return self.schedule.placement[action.direction][action.stage + step]

    # --- computation ---

    def _arguments(self, action: Action) -> tuple[torch.Tensor, ...]:
        """The inputs of a forward: from the caller, from a local stage, or from a peer."""
        stage, mb = action.stage, action.microbatch
        if stage == 0:
            given = as_tuple(self._inputs[mb])
            if not given:
                raise ValueError(f"inputs[{mb}] is empty, but rank {self.rank} holds stage 0")
            return given
        if (Op.F, stage, mb) in self._local:
            handed = self._local.pop((Op.F, stage, mb))
            return tuple(t.detach().requires_grad_(t.requires_grad) for t in handed)
        return self.mail.complete(self._expected.pop((Op.RECV_F, stage, mb)))

    def _gradients(self, action: Action) -> tuple[torch.Tensor, ...]:
        key = (action.stage, action.microbatch)
        if (Op.B, *key) in self._local:
            return self._local.pop((Op.B, *key))
        return self.mail.complete(self._expected.pop((Op.RECV_B, *key)))

    def _labels(self, microbatch: int) -> tuple:
        return () if self._targets is None else as_tuple(self._targets[microbatch])

    def _forward(self, action: Action) -> None:
        run = _Pass(self._arguments(action))
        extra = self._kwargs[action.microbatch] if self._kwargs else {}
        with defer_linears():
            run.outputs = as_tuple(self.modules[action.stage](*run.inputs, **extra))
            if action.stage == self._last and self.loss_fn is not None:
                run.loss = self.loss_fn(*run.outputs, *self._labels(action.microbatch))
        self._after_forward(action, run)

    def _after_forward(self, action: Action, run: _Pass) -> None:
        stage, mb = action.stage, action.microbatch
        for i, output in enumerate(run.outputs):
            if not isinstance(output, torch.Tensor):
                raise TypeError(
                    f"stage {stage} returned {type(output).__name__} as output {i}; stages return "
                    "tensors"
                )
        if stage == self._last:
            if run.loss is not None:
                self.result.losses[mb] = run.loss.detach()
            if self._return_outputs:
                self.result.outputs[mb] = tuple(t.detach() for t in run.outputs)
            run.outputs = ()
        elif self._peer(action, 1) == self.rank:
            self._local[(Op.F, stage + 1, mb)] = run.outputs
        self._passes[stage, mb] = run
        if self.schedule.forward_only and (
            stage == self._last or self._peer(action, 1) == self.rank
        ):
            del self._passes[stage, mb]

    def _backward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        run = self._passes.pop(key)
        split = action.op is Op.BI
        WeightGradStore.enabled = split
        if action.stage == self._last:
            run.loss.backward()
        else:
            outputs = differentiable(run.outputs)
            if outputs:
                torch.autograd.backward(outputs, self._gradients(action))
        WeightGradStore.enabled = False
        if split:
            self._weights[key] = WeightGradStore.take()
        self._after_backward(action, run)

    def _after_backward(self, action: Action, run: _Pass) -> None:
        stage, mb = action.stage, action.microbatch
        if stage == 0:
            return
        wanted = differentiable(run.inputs)
        # An input that the stage did not use has no gradient: its producer gets zeros.
        grads = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in wanted)
        if self._peer(action, -1) == self.rank:
            self._local[(Op.B, stage - 1, mb)] = grads
        else:
            self._grads_out[stage, mb] = grads

    def _pair(self, fwd: Action, bwd: Action) -> None:
        """An overlapped F&B: the module's own way if it has one, else one after the other."""
        forward_module, backward_module = self.modules[fwd.stage], self.modules[bwd.stage]
        hook = getattr(type(forward_module), "overlapped_forward_backward", None)
        if hook is None or type(forward_module) is not type(backward_module):
            self._forward(fwd)
            self._backward(bwd)
            return
        ahead = _Pass(self._arguments(fwd))
        back = self._passes.pop((bwd.stage, bwd.microbatch))
        last_f, last_b = fwd.stage == self._last, bwd.stage == self._last
        outputs = differentiable(back.outputs)
        grads = () if last_b else self._gradients(bwd)
        with defer_linears():
            made, ahead.loss = hook(
                forward_module,
                list(ahead.inputs),
                self.loss_fn if last_f else None,
                list(self._labels(fwd.microbatch)) if last_f else [],
                backward_module,
                back.loss if last_b else None,
                [] if last_b else list(outputs),
                list(grads),
            )
        ahead.outputs = as_tuple(made)
        self._after_forward(fwd, ahead)
        self._after_backward(bwd, back)

    # --- the two copies of a bidirectional schedule ---

    def sync_replicas(self) -> None:
        """Add the gradients of each stage's two copies (Chimera, DualPipe); no-op otherwise.

        Both ranks form direction 0's gradient plus direction 1's, so the copies stay equal to the
        last bit. A parameter without a gradient counts as zeros.
        """
        if self.schedule.num_directions == 1:
            return
        mirror = self.schedule.num_ranks - 1 - self.rank
        own = {d: self.modules[s] for s, d in self.schedule.stages_of(self.rank)}
        mine = {d: _flat_gradients(module) for d, module in own.items()}
        # My direction-0 stage is the mirror's direction-1 stage: the buffers cross.
        theirs = {d: [torch.empty_like(b) for b in mine[d]] for d in own}
        peer = self.mail.global_rank[mirror]
        ops = []
        for d in sorted(own):
            # Both ranks list the exchange of direction 0's copy of the lower rank first.
            for buffer, space in zip(mine[d], theirs[d], strict=True):
                ops.append((d == 0, buffer, space))
        order = sorted(ops, key=lambda op: op[0] != (self.rank < mirror))
        works = []
        for _, buffer, space in order:
            works.append(dist.P2POp(dist.isend, buffer, peer, self.group))
            works.append(dist.P2POp(dist.irecv, space, peer, self.group))
        marker = Action(self.rank, Op.RECV_B, max(self.modules), 0)
        for work in dist.batch_isend_irecv(works) if works else ():
            self.mail._wait(work, marker, mirror)
        for d, module in own.items():
            for buffer, other in zip(mine[d], theirs[d], strict=True):
                first, second = (buffer, other) if d == 0 else (other, buffer)
                buffer.copy_(first + second)
            _spread_gradients(module, mine[d])


def _by_dtype(module: nn.Module) -> dict[torch.dtype, list[nn.Parameter]]:
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            groups.setdefault(p.dtype, []).append(p)
    return groups


def _flat_gradients(module: nn.Module) -> list[torch.Tensor]:
    """One flat buffer per dtype."""
    return [
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        for group in _by_dtype(module).values()
    ]


def _spread_gradients(module: nn.Module, buffers: list[torch.Tensor]) -> None:
    for group, buffer in zip(_by_dtype(module).values(), buffers, strict=True):
        at = 0
        for p in group:
            piece = buffer[at : at + p.numel()].view_as(p)
            at += p.numel()
            if p.grad is None:
                accumulate(p, piece.clone())
            else:
                p.grad.copy_(piece)
