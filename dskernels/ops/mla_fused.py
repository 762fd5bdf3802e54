"""What surrounds latent attention in a decoding step: norms, rotation and cache append in one call,
and the up-projections absorbed into queries and outputs.

Dimension letters: t tokens, h heads, dq and dl query and key-value latent widths (1536, 512), r
RoPE width (64), n and v head widths without RoPE and of values (128, 128).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from . import _check as check
from . import _values as values
from ._registry import define
from .mla import CACHE_DTYPES, row_width

_chosen = _backend.chosen
_run = _backend.run


def _check_angles(op: str, cos: Tensor, sin: Tensor, tokens: int, half: int) -> None:
    for name, tensor in (("cos", cos), ("sin", sin)):
        check.shape(op, name, tensor, "[t, r / 2]", (tokens, half))
        check.dtype(op, name, tensor, (torch.float32,))


# ---- mla_latents -------------------------------------------------------------------------------


def mla_latents(
    q_a: Tensor | None,
    kv_a: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    backend: str | None = None,
) -> Tensor | None:
    """Everything between the down-projections and the cache, in one call.

    q_a       [t, dq], output of q_a_proj, or None with q_weight None: no query latent
    kv_a      [t, dl + r], output of kv_a_proj_with_mqa, q_a's dtype
    *_weight  [dq], [dl]: weights of the latents' RMSNorm
    cos, sin  fp32 [t, r / 2]; interleaved as in `rope`
    kv_cache  as in `mla_cache_append`: gets [RMSNorm(kv_a[:, :dl]); rotated kv_a[:, dl:]] at
              slots [t] (-1 skips a token; of two tokens with one slot the later stays). The
              normalised latent is rounded to kv_a's dtype before it is stored or quantised.

    Returns RMSNorm(q_a) * q_weight [t, dq], in q_a's dtype, or None. No gradient flows through the
    cache: arguments that require grad are refused where grad is enabled.
    Source: V2 paper 2.1.2 and 2.1.3.
    """
    if torch.is_grad_enabled():
        named = (("q_a", q_a), ("kv_a", kv_a), ("q_weight", q_weight), ("kv_weight", kv_weight))
        for name, tensor in (*named, ("kv_cache", kv_cache)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                expected = "a tensor that requires no grad (call under torch.no_grad())"
                check.bad_value("mla_latents", name, expected, "one that does")
    modes = (eps, interleaved, _chosen(backend))
    q = _latents(q_a, kv_a, q_weight, kv_weight, cos, sin, kv_cache, slots, *modes)
    return None if q_a is None else q


def _check_latents(q_a, kv_a, q_weight, kv_weight, cos, sin, kv_cache, slots):
    op = "mla_latents"
    check.rank(op, "kv_a", kv_a, "[t, dl + r]", 2, 2)
    check.dtype(op, "kv_a", kv_a, check.FLOATS)
    tokens, width = kv_a.shape
    check.rank(op, "kv_weight", kv_weight, "[dl]", 1, 1)
    latent = kv_weight.shape[0]
    rope = width - latent
    if latent < 1 or rope < 2 or rope % 2:
        expected = f"[dl], kv_a's width {width} being dl + r with an even r"
        check.bad_value(op, "kv_weight", expected, check.show(kv_weight.shape))
    check.dtype(op, "kv_weight", kv_weight, check.FLOATS)
    if (q_a is None) != (q_weight is None):
        given = "None" if q_weight is None else "a tensor"
        expected = "None" if q_a is None else "a tensor"
        check.bad_value(op, "q_weight", f"{expected}, as q_a is", given)
    _check_angles(op, cos, sin, tokens, rope // 2)
    check.rank(op, "kv_cache", kv_cache, "[pages, page, row]", 3, 3)
    check.dtype(op, "kv_cache", kv_cache, CACHE_DTYPES)
    row = row_width(kv_cache, latent, rope)
    if kv_cache.shape[2] != row:
        check.bad_value(op, "kv_cache", f"[pages, page, {row}]", check.show(kv_cache.shape))
    check.dtype(op, "slots", slots, check.INDEX)
    check.shape(op, "slots", slots, "[t]", (tokens,))
    like = [("kv_weight", kv_weight), ("cos", cos), ("sin", sin)]
    like += [("kv_cache", kv_cache), ("slots", slots)]
    if q_a is not None:
        check.rank(op, "q_a", q_a, "[t, dq]", 2, 2)
        check.shape(op, "q_a", q_a, "[t, dq]", (tokens, q_a.shape[1]))
        check.same_dtype(op, "q_a", q_a, "kv_a", kv_a)
        check.shape(op, "q_weight", q_weight, "[dq]", (q_a.shape[1],))
        check.dtype(op, "q_weight", q_weight, check.FLOATS)
        like += [("q_a", q_a), ("q_weight", q_weight)]
    for name, tensor in like:
        check.same_device(op, name, tensor, "kv_a", kv_a)


def _latents_kernel(
    q_a, kv_a, q_weight, kv_weight, cos, sin, kv_cache, slots, eps, interleaved, backend
):
    limit = kv_cache.shape[0] * kv_cache.shape[1]
    slots = values.index("mla_latents", "slots", slots, -1, limit)
    args = (q_a, kv_a, q_weight, kv_weight, cos, sin, kv_cache, slots)
    modes = dict(eps=eps, interleaved=interleaved)
    q = _run("mla_latents", backend, kv_a.device.type, *args, **modes)
    return kv_a.new_empty(0) if q is None else q.contiguous()


def _latents_fake(
    q_a, kv_a, q_weight, kv_weight, cos, sin, kv_cache, slots, eps, interleaved, backend
):
    return kv_a.new_empty(0 if q_a is None else q_a.shape)


_latents = define(
    "mla_latents(Tensor? q_a, Tensor kv_a, Tensor? q_weight, Tensor kv_weight, Tensor cos,"
    " Tensor sin, Tensor(a!) kv_cache, Tensor slots, float eps, bool interleaved, str backend)"
    " -> Tensor",
    _check_latents,
    _latents_kernel,
    _latents_fake,
)


# ---- mla_absorb_queries, mla_absorb_output -----------------------------------------------------


def mla_absorb_queries(
    q: Tensor,
    w_uk: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = True,
    backend: str | None = None,
) -> Tensor:
    """q [t, h, n + r] -> [q_nope W_uk | rotated q_rope] [t, h, dl + r], queries of `mla_decode`.

    w_uk      [h, n, dl], q's dtype: rows of kv_b_proj that make keys; a view of it is welcome
    cos, sin  fp32 [t, r / 2]; interleaved as in `rope`

    One batched product over the heads, sums in fp32, rounded once to q's dtype. Not
    differentiable. Source: V2 paper 2.1.2.
    """
    return _absorb_queries(q, w_uk, cos, sin, interleaved, _chosen(backend))


def _check_absorb_queries(q, w_uk, cos, sin):
    op = "mla_absorb_queries"
    check.rank(op, "q", q, "[t, h, n + r]", 3, 3)
    check.dtype(op, "q", q, check.FLOATS)
    tokens, heads, width = q.shape
    check.rank(op, "w_uk", w_uk, "[h, n, dl]", 3, 3)
    rope = width - w_uk.shape[1]
    if w_uk.shape[0] != heads or rope < 2 or rope % 2:
        expected = f"[h = {heads}, n, dl], q's width {width} being n + r with an even r"
        check.bad_value(op, "w_uk", expected, check.show(w_uk.shape))
    check.same_dtype(op, "w_uk", w_uk, "q", q)
    _check_angles(op, cos, sin, tokens, rope // 2)
    for name, tensor in (("w_uk", w_uk), ("cos", cos), ("sin", sin)):
        check.same_device(op, name, tensor, "q", q)


def _absorb_queries_kernel(q, w_uk, cos, sin, interleaved, backend):
    args = (q, w_uk, cos, sin)
    device = q.device.type
    return _run("mla_absorb_queries", backend, device, *args, interleaved=interleaved).contiguous()


def _absorb_queries_fake(q, w_uk, cos, sin, interleaved, backend):
    return q.new_empty(*q.shape[:2], w_uk.shape[2] + q.shape[2] - w_uk.shape[1])


_absorb_queries = define(
    "mla_absorb_queries(Tensor q, Tensor w_uk, Tensor cos, Tensor sin, bool interleaved,"
    " str backend) -> Tensor",
    _check_absorb_queries,
    _absorb_queries_kernel,
    _absorb_queries_fake,
)


def mla_absorb_output(o: Tensor, w_uv: Tensor, *, backend: str | None = None) -> Tensor:
    """Attended latents o [t, h, dl] -> [t, h, v] through w_uv [h, v, dl], o's dtype: rows of
    kv_b_proj that make values; a view of it is welcome.

    One batched product over the heads, sums in fp32, rounded once to o's dtype. Not
    differentiable. Source: V2 paper 2.1.2.
    """
    return _absorb_output(o, w_uv, _chosen(backend))


def _check_absorb_output(o, w_uv):
    op = "mla_absorb_output"
    check.rank(op, "o", o, "[t, h, dl]", 3, 3)
    check.dtype(op, "o", o, check.FLOATS)
    check.rank(op, "w_uv", w_uv, "[h, v, dl]", 3, 3)
    check.shape(op, "w_uv", w_uv, "[h, v, dl]", (o.shape[1], w_uv.shape[1], o.shape[2]))
    check.same_dtype(op, "w_uv", w_uv, "o", o)
    check.same_device(op, "w_uv", w_uv, "o", o)


def _absorb_output_kernel(o, w_uv, backend):
    return _run("mla_absorb_output", backend, o.device.type, o, w_uv).contiguous()


def _absorb_output_fake(o, w_uv, backend):
    return o.new_empty(*o.shape[:2], w_uv.shape[1])


_absorb_output = define(
    "mla_absorb_output(Tensor o, Tensor w_uv, str backend) -> Tensor",
    _check_absorb_output,
    _absorb_output_kernel,
    _absorb_output_fake,
)
