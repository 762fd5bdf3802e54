"""What surrounds latent attention, on sm_90a kernels: latents into the cache, absorbed products.

Dimension letters: t tokens, h heads, dq, dl latent widths (1536, 512), r RoPE width (64), n and v
head widths (128, 128).
"""

from __future__ import annotations

import torch

from ..types import Support, Unsupported
from . import launchers
from ._tensor import device_of, stream_of

QUERY, LATENT, ROPE, NOPE, VALUES = 1536, 512, 64, 128, 128
ROW = LATENT + ROPE
OPS = ("mla_latents", "mla_cache_append", "mla_absorb_queries", "mla_absorb_output")


def _need_bf16(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype != torch.bfloat16:
            raise Unsupported(f"{name}: expected torch.bfloat16, got {x.dtype}")


def _need_width(name: str, x: torch.Tensor, *shape: int) -> None:
    """The last dimensions of x are these; -1: any."""
    given = tuple(x.shape[-len(shape) :])
    if any(want not in (-1, size) for want, size in zip(shape, given)):
        raise Unsupported(f"{name}: expected [..., {', '.join(map(str, shape))}], got {given}")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [t, c] with rows of contiguous values that start at multiples of 16 bytes."""
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """x contiguous, at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _cache_place(kv_cache: torch.Tensor) -> dict:
    """Where a launcher finds the cache's rows; they are written in place, so no copy would do."""
    if kv_cache.dtype not in (torch.bfloat16, torch.uint8):
        raise Unsupported(f"kv_cache: expected torch.bfloat16 or torch.uint8, got {kv_cache.dtype}")
    pages, page, _ = kv_cache.shape
    size = kv_cache.itemsize
    ld_page, ld_token, one = (s * size for s in kv_cache.stride())
    if one != size or ld_page % 16 or ld_token % 16 or kv_cache.data_ptr() % 16:
        raise Unsupported(
            "kv_cache: expected 16-byte aligned rows of contiguous values, "
            f"got strides {kv_cache.stride()} at address {kv_cache.data_ptr():#x}"
        )
    last = max(pages - 1, 0) * ld_page + max(page - 1, 0) * ld_token
    return dict(
        cache=kv_cache.data_ptr(), cache_bytes=last + kv_cache.shape[2] * size, ld_page=ld_page,
        ld_token=ld_token, pages=pages, page=page, fp8=kv_cache.dtype == torch.uint8,
    )  # fmt: skip


def _weight(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None:
        return None
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise Unsupported(f"{name}: expected torch.bfloat16 or torch.float32, got {x.dtype}")
    return x.contiguous()


def _strided(x: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _typed(x: torch.Tensor | None) -> tuple[int, bool]:
    return (0, False) if x is None else (x.data_ptr(), x.dtype == torch.float32)


def _heads_apart(name: str, w: torch.Tensor) -> tuple[torch.Tensor, int]:
    """w [h, rows, 512] as the kernel reads it, and the rows between two heads."""
    heads, rows, _ = w.shape
    between = w.stride(0) // LATENT
    fits = w.stride(2) == 1 and w.stride(1) == LATENT and w.stride(0) % LATENT == 0
    if heads == 1 and w.stride(2) == 1 and w.stride(1) == LATENT:
        fits, between = True, rows
    if fits and between >= rows and w.data_ptr() % 16 == 0:
        return w, between
    return w.clone(memory_format=torch.contiguous_format), rows


class MlaFused:
    """The functions of this module on one machine, "cuda" or "emu", and on num_sms SMs (0: all)."""

    def __init__(self, machine: str, num_sms: int = 0) -> None:
        self.machine, self.num_sms = machine, num_sms

    def _on(self, x: torch.Tensor) -> tuple[str, int, int, int]:
        return self.machine, device_of(x), stream_of(x), self.num_sms

    def _store(self, q, latent, k_rope, q_weight, weight, angles, place, slots, eps, interleaved):
        q = None if q is None else _rows(q)
        latent, k_rope, slots = _rows(latent), _rows(k_rope), slots.to(torch.int64).contiguous()
        q_weight, weight = _weight("q_weight", q_weight), _weight("kv_weight", weight)
        out = None if q is None else q.new_empty(q.shape)
        cos, sin = (None if a is None else a.contiguous() for a in angles)
        if latent.shape[0]:
            launchers().mla_latents(
                self._on(latent), q=_strided(q), latent=_strided(latent), k_rope=_strided(k_rope),
                q_weight=_typed(q_weight), latent_weight=_typed(weight),
                cos=0 if cos is None else cos.data_ptr(), sin=0 if sin is None else sin.data_ptr(),
                slots=slots.data_ptr(), q_out=0 if out is None else out.data_ptr(),
                t=latent.shape[0], interleaved=interleaved, eps=eps, **place,
            )  # fmt: skip
        return out

    def mla_latents(
        self,
        q_a: torch.Tensor | None,
        kv_a: torch.Tensor,
        q_weight: torch.Tensor | None,
        kv_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
        *,
        eps: float = 1e-6,
        interleaved: bool = True,
    ) -> torch.Tensor | None:
        """As dskernels.ref.mla.mla_latents for bf16 latents of 1536 and 512 + 64, one launch.

        Slots are read on the device, where one outside the cache stops the kernel with a trap.
        """
        _need_bf16(q_a=q_a, kv_a=kv_a)
        _need_width("kv_a", kv_a, ROW)
        _need_width("kv_weight", kv_weight, LATENT)
        if q_a is not None:
            _need_width("q_a", q_a, QUERY)
        place = _cache_place(kv_cache)
        latent, k_rope = kv_a.split([LATENT, ROPE], dim=1)
        return self._store(
            q_a, latent, k_rope, q_weight, kv_weight, (cos, sin), place, slots, eps, interleaved
        )

    def mla_cache_append(
        self,
        kv_cache: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """As dskernels.ref.mla.mla_cache_append for bf16 latents of 512 + 64."""
        _need_bf16(latent=latent, k_rope=k_rope)
        _need_width("latent", latent, LATENT)
        _need_width("k_rope", k_rope, ROPE)
        place = _cache_place(kv_cache)
        self._store(None, latent, k_rope, None, None, (None, None), place, slots, 0.0, True)

    def mla_absorb_queries(
        self,
        q: torch.Tensor,
        w_uk: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        interleaved: bool = True,
    ) -> torch.Tensor:
        """As dskernels.ref.mla.mla_absorb_queries for bf16 q [t, h, 192], w_uk [h, 128, 512], which
        may be rows of kv_b_proj: one launch, no copy."""
        _need_bf16(q=q, w_uk=w_uk)
        _need_width("q", q, NOPE + ROPE)
        _need_width("w_uk", w_uk, NOPE, LATENT)
        t, h, _ = q.shape
        y = q.new_empty(t, h, ROW)
        w, apart = _heads_apart("w_uk", w_uk)
        if y.numel():
            q, cos, sin = _flat(q), cos.contiguous(), sin.contiguous()
            launchers().mla_absorb_queries(
                self._on(q), q=q.data_ptr(), w=w.data_ptr(), y=y.data_ptr(), cos=cos.data_ptr(),
                sin=sin.data_ptr(), t=t, h=h, w_rows=apart, interleaved=interleaved,
            )  # fmt: skip
        return y

    def mla_absorb_output(self, o: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
        """As dskernels.ref.mla.mla_absorb_output for bf16 o [t, h, 512], w_uv [h, 128, 512]."""
        _need_bf16(o=o, w_uv=w_uv)
        _need_width("o", o, LATENT)
        _need_width("w_uv", w_uv, VALUES, LATENT)
        t, h, _ = o.shape
        y = o.new_empty(t, h, VALUES)
        w, apart = _heads_apart("w_uv", w_uv)
        if y.numel():
            o = _flat(o)
            launchers().mla_absorb_output(
                self._on(o), o=o.data_ptr(), w=w.data_ptr(), y=y.data_ptr(), t=t, h=h, w_rows=apart
            )
        return y

    def supports(self, op: str, **shapes) -> Support:
        widths = {"dl": LATENT, "r": ROPE, "v": VALUES, "d": NOPE + ROPE}
        for letter, expected in widths.items():
            if shapes.get(letter, expected) != expected:
                return Support(False, f"expected {letter} = {expected}, got {shapes[letter]}")
        types = (torch.bfloat16, torch.uint8)[: 2 if op == "mla_cache_append" else 1]
        if shapes.get("dtype", torch.bfloat16) not in types:
            return Support(False, f"dtype: expected {types[0]}, got {shapes['dtype']}")
        return Support(True, f"{self.machine}: {op} (bf16, widths of DeepSeek-V3)")
