"""AdamW as the V3 report sets it (0.9, 0.95, decay 0.1), with FP32 masters for BF16 weights."""

from collections.abc import Iterable

import torch
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW whose arithmetic is FP32 whatever the parameters are stored in.

    A BF16 parameter gets an FP32 master copy: eight bits of mantissa swallow most updates. FP32
    parameters are their own masters. Matrices decay; vectors (norm weights) do not.

    Args:
        named_parameters: (name, parameter) pairs; names key the saved state.
        weight_decay: decoupled decay of the matrices.
        clip: bound on the global gradient norm, in every step.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float = 1.0,
        eps: float = 1e-8,
    ):
        self._params = {name: p for name, p in named_parameters if p.requires_grad}
        if not self._params:
            raise ValueError("named_parameters: expected at least one that requires a gradient")
        self._masters = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in self._params.items()
        }
        self._clip = clip
        matrices = [m for m in self._masters.values() if m.dim() > 1]
        vectors = [m for m in self._masters.values() if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True
        )

    def zero_grad(self) -> None:
        for p in self._params.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update, write masters back; returns the gradient norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; parameters are untouched.
        """
        for name, p in self._params.items():
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # an expert that saw no token decays like the others
            if self._masters[name] is not p:
                self._masters[name].grad = p.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self._masters.values(), self._clip))
        if not torch.isfinite(torch.tensor(norm)):
            raise FloatingPointError(f"gradient norm: expected a finite value, got {norm}")
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        for name, p in self._params.items():
            if self._masters[name] is not p:
                p.copy_(self._masters[name])
        return norm

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, the parameters themselves left out."""
        tensors = {}
        for name, master in self._masters.items():
            if master is not self._params[name]:
                tensors[f"master.{name}"] = master
            state = self._adamw.state.get(master)
            if state:
                tensors[f"step.{name}"] = state["step"]
                for moment in _MOMENTS:
                    tensors[f"{moment}.{name}"] = state[moment]
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave; names and shapes must match exactly."""
        expected = {f"master.{n}" for n, m in self._masters.items() if m is not self._params[n]}
        if any(name.startswith("step.") for name in tensors):
            expected |= {f"{kind}.{n}" for kind in ("step", *_MOMENTS) for n in self._masters}
        if expected != set(tensors):
            differing = sorted(expected ^ set(tensors))
            raise ValueError(f"optimizer state: names differ, first {differing[:3]}")
        for name, master in self._masters.items():
            if f"master.{name}" in tensors:
                master.copy_(tensors[f"master.{name}"])
            if f"step.{name}" in tensors:
                state = {"step": tensors[f"step.{name}"].clone()}
                for moment in _MOMENTS:
                    saved = tensors[f"{moment}.{name}"]
                    if saved.shape != master.shape:
                        raise ValueError(
                            f"{moment}.{name}: expected shape {tuple(master.shape)}, "
                            f"got {tuple(saved.shape)}"
                        )
                    state[moment] = saved.clone()
                self._adamw.state[master] = state
