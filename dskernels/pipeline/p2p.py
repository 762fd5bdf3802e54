"""Messages between neighbouring stages, and what to say when one never comes.

A message is the tuple of tensors that one stage hands to the next, or of their gradients. Shapes
travel once: the first activation of each stage is preceded by a header, later ones must look
alike (or every message carries one: `dynamic_shapes`). Gradients have the shapes of the
activations that they belong to. Sends never wait before the end of the step; receives are posted
where the schedule says so and waited for where the data is used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from .actions import Action, Op

_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_HEADER = 128  # int64 words: count, then per tensor dtype, needs-grad, ndim, sizes
_STORE_KEY = "dskernels.pipeline/failure"

Meta = tuple[tuple[torch.dtype, bool, tuple[int, ...]], ...]


class PipelineError(RuntimeError):
    """A step failed. Attributes: rank, peer (or None), action (or None), first_failure (text)."""

    def __init__(self, text: str, rank: int, peer: int | None, action: Action | None, first: str):
        super().__init__(text)
        self.rank, self.peer, self.action, self.first_failure = rank, peer, action, first


def describe(action: Action) -> str:
    """An action in words."""
    what = {
        Op.RECV_F: "activation from stage {prev}",
        Op.RECV_B: "gradient from stage {next}",
        Op.SEND_F: "activation to stage {next}",
        Op.SEND_B: "gradient to stage {prev}",
    }.get(action.op, "{op} of stage {stage}")
    text = what.format(
        prev=action.stage - 1, next=action.stage + 1, op=action.op.value, stage=action.stage
    )
    return f"{action} ({text}, micro-batch {action.microbatch}, direction {action.direction})"


def meta_of(tensors: tuple[torch.Tensor, ...]) -> Meta:
    return tuple((t.dtype, t.requires_grad, tuple(t.shape)) for t in tensors)


def encode(meta: Meta, device: torch.device) -> torch.Tensor:
    words = [len(meta)]
    for dtype, needs_grad, shape in meta:
        if dtype not in _DTYPES:
            raise TypeError(f"a stage returned a tensor of {dtype}, which cannot be sent")
        words += [_DTYPES.index(dtype), int(needs_grad), len(shape), *shape]
    if len(words) > _HEADER:
        raise ValueError(f"a stage returned {len(meta)} tensors; their shapes exceed one header")
    words += [0] * (_HEADER - len(words))
    return torch.tensor(words, dtype=torch.int64, device=device)


def decode(header: torch.Tensor) -> Meta:
    words = iter(header.tolist())
    out = []
    for _ in range(next(words)):
        dtype, needs_grad, ndim = (next(words) for _ in range(3))
        out.append((_DTYPES[dtype], bool(needs_grad), tuple(next(words) for _ in range(ndim))))
    return tuple(out)


@dataclass
class _Pending:
    """A posted receive."""

    action: Action
    peer: int
    tensors: tuple[torch.Tensor, ...]
    works: list


@dataclass
class Mailbox:
    """All P2P traffic of one rank.

    group: process group; global_rank[r]: rank of pipeline rank r in the default group.
    timeout: seconds that any one wait may take.
    """

    rank: int
    group: dist.ProcessGroup
    global_rank: list[int]
    device: torch.device
    timeout: float
    dynamic_shapes: bool = False
    static_meta: Meta | None = None
    waited: float = 0.0  # seconds spent waiting for messages, since the last reset
    _known: dict[tuple[int, int, bool], Meta] = field(default_factory=dict)
    _sent: list[_Pending] = field(default_factory=list)

    # --- sending ---

    def send_forward(self, action: Action, peer: int, tensors: tuple[torch.Tensor, ...]) -> None:
        meta = meta_of(tensors)
        works = []
        held: tuple[torch.Tensor, ...] = tensors
        key = (action.stage, action.direction, True)
        known = self.static_meta or (None if self.dynamic_shapes else self._known.get(key))
        if known is None:
            header = encode(meta, self.device)
            works.append(self._isend(header, peer, action, 0))
            held = (*tensors, header)
            self._known[key] = meta
        elif [(d, s) for d, _, s in known] != [(d, s) for d, _, s in meta]:
            raise ValueError(
                f"rank {self.rank}, {describe(action)}: the stage returned {_looks(meta)} but its "
                f"first micro-batch, or set_p2p_tensor_shapes, said {_looks(known)}; pass "
                "dynamic_shapes=True if shapes differ between micro-batches"
            )
        contiguous = tuple(t.detach().contiguous() for t in tensors)
        works += [self._isend(t, peer, action, i + 1) for i, t in enumerate(contiguous)]
        self._sent.append(_Pending(action, peer, (*held, *contiguous), works))

    def send_backward(self, action: Action, peer: int, grads: tuple[torch.Tensor, ...]) -> None:
        contiguous = tuple(g.contiguous() for g in grads)
        works = [self._isend(g, peer, action, i + 1) for i, g in enumerate(contiguous)]
        self._sent.append(_Pending(action, peer, contiguous, works))

    def _isend(self, tensor: torch.Tensor, peer: int, action: Action, part: int):
        tag = self._tag(action.op is Op.SEND_B, action.stage, action.microbatch, part)
        return self._guard(
            action, peer,
            lambda: dist.isend(tensor, self.global_rank[peer], group=self.group, tag=tag),
        )  # fmt: skip

    # --- receiving ---

    def post_forward(self, action: Action, peer: int) -> _Pending:
        source = action._replace(stage=action.stage - 1)
        key = (source.stage, action.direction, False)
        meta = self.static_meta or (None if self.dynamic_shapes else self._known.get(key))
        if meta is None:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self.device)
            work = self._irecv(header, peer, action, False, source.stage, 0)
            self._wait(work, action, peer)
            meta = self._known[key] = decode(header)
        tensors = tuple(
            torch.empty(shape, dtype=dtype, device=self.device) for dtype, _, shape in meta
        )
        works = [
            self._irecv(t, peer, action, False, source.stage, i + 1) for i, t in enumerate(tensors)
        ]
        for tensor, (_, needs_grad, _) in zip(tensors, meta, strict=True):
            tensor.requires_grad_(needs_grad and torch.is_grad_enabled())
        return _Pending(action, peer, tensors, works)

    def post_backward(self, action: Action, peer: int, like: tuple[torch.Tensor, ...]) -> _Pending:
        tensors = tuple(torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in like)
        works = [
            self._irecv(t, peer, action, True, action.stage + 1, i + 1)
            for i, t in enumerate(tensors)
        ]
        return _Pending(action, peer, tensors, works)

    def _irecv(self, tensor, peer: int, action: Action, backward: bool, stage: int, part: int):
        tag = self._tag(backward, stage, action.microbatch, part)
        buffer = tensor.detach()
        return self._guard(
            action, peer,
            lambda: dist.irecv(buffer, self.global_rank[peer], group=self.group, tag=tag),
        )  # fmt: skip

    def complete(self, pending: _Pending) -> tuple[torch.Tensor, ...]:
        """Wait for a posted receive."""
        for work in pending.works:
            self._wait(work, pending.action, pending.peer)
        return pending.tensors

    def finish_sends(self) -> None:
        for pending in self._sent:
            for work in pending.works:
                self._wait(work, pending.action, pending.peer)
        self._sent.clear()

    @staticmethod
    def _tag(backward: bool, stage: int, microbatch: int, part: int) -> int:
        """Unique among the messages that can be on the way between two ranks."""
        return (((microbatch % 4096) * 512 + stage) * 2 + backward) * 32 + part

    # --- failure ---

    def _wait(self, work, action: Action, peer: int) -> None:
        begin = time.monotonic()
        self._guard(action, peer, lambda: work.wait(timedelta(seconds=self.timeout)))
        self.waited += time.monotonic() - begin

    def _guard(self, action: Action, peer: int, call):
        begin = time.monotonic()
        try:
            return call()
        except (RuntimeError, ValueError) as error:
            raise self.failure(action, peer, time.monotonic() - begin, error) from error

    def failure(self, action: Action, peer: int, seconds: float, error: Exception) -> PipelineError:
        """Report who is missed at which action; name the first failure of all ranks if known."""
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        lost = "Timed out" not in cause
        state = (
            "lost its connection to" if lost else f"got no answer within {self.timeout:g} s from"
        )
        text = (
            f"rank {self.rank} {state} rank {peer} while waiting {seconds:.1f} s for "
            f"{describe(action)}"
        )
        first = self.report(text)
        more = "" if first == text else f"; first failure: {first}"
        return PipelineError(f"{text}{more} [{cause}]", self.rank, peer, action, first)

    def report(self, text: str) -> str:
        """Tell the others; the first report of the job wins and is returned."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=2))
            return store.compare_set(_STORE_KEY, "", text).decode()
        except Exception:
            # The store lived in the rank that died: the local view has to do.
            return text


def _looks(meta: Meta) -> str:
    return ", ".join(f"{str(d).removeprefix('torch.')}{list(s)}" for d, _, s in meta) or "nothing"
