"""Bad calls: each is refused with an error that names the op, the argument, what was expected and
what came; in eager mode, through torch.ops' kernels and under torch.compile alike."""

from dataclasses import dataclass

import pytest
import torch
from ops_cases import CASES

import dskernels as dsk

f32, bf16, f64, i64, i32 = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
)


def T(*shape, dtype=f32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def meta(*shape, dtype=f32):
    return T(*shape, dtype=dtype, device="meta")


def scaled(m, k, block=(1, 128), dtype="e4m3"):
    return dsk.ref.rowwise.quantize(torch.ones(m, k), block, dtype=dtype)


def scaled_groups(g, n, k):
    return dsk.ref.rowwise.quantize(torch.ones(g, n, k), (128, 128))


@dataclass
class Bad:
    call: object
    error: type
    message: str


def decode(**changed):
    given = {
        "q": T(2, 1, 3, 20),
        "kv_cache": T(4, 8, 20),
        "block_table": T(2, 3, dtype=i32),
        "seq_lens": torch.tensor([5, 24], dtype=i32),
        "head_dim_v": 16,
        **changed,
    }
    return dsk.mla_decode(**given)


def append(**changed):
    given = {
        "kv_cache": T(4, 8, 20),
        "latent": T(3, 16),
        "k_rope": T(3, 4),
        "slots": torch.tensor([0, 1, -1]),
        **changed,
    }
    return dsk.mla_cache_append(**given)


def latents(**changed):
    given = {
        "q_a": T(3, 6),
        "kv_a": T(3, 20),
        "q_weight": T(6),
        "kv_weight": T(16),
        "cos": T(3, 2),
        "sin": T(3, 2),
        "kv_cache": T(4, 8, 20),
        "slots": torch.tensor([0, 1, -1]),
        **changed,
    }
    return dsk.mla_latents(**given)


def absorb(**changed):
    given = {"q": T(5, 3, 8), "w_uk": T(3, 4, 16), "cos": T(5, 2), "sin": T(5, 2), **changed}
    return dsk.mla_absorb_queries(**given)


def prefill(**changed):
    given = {
        "q": T(6, 2, 4),
        "k": T(7, 2, 4),
        "v": T(7, 2, 3),
        "cu_seqlens_q": torch.tensor([0, 6], dtype=i32),
        "cu_seqlens_k": torch.tensor([0, 7], dtype=i32),
        **changed,
    }
    return dsk.mla_prefill(**given)


def gate(**changed):
    given = {"x": T(5, 6), "weight": T(8, 6), "bias": T(8), "topk": 2, **changed}
    return dsk.moe_gate(**given)


def experts(**changed):
    given = {
        "x": T(3, 6),
        "w13": T(4, 10, 6),
        "w2": T(4, 6, 5),
        "topk_idx": T(3, 2, dtype=i64),
        "topk_weights": T(3, 2),
        **changed,
    }
    return dsk.moe_experts(**given)


def permute(**changed):
    given = {"x": T(3, 6), "topk_idx": T(3, 2, dtype=i64), "num_experts": 4, **changed}
    return dsk.moe_permute(**given)


def grouped(a=None, b=None, **changed):
    a, b = T(6, 12) if a is None else a, T(3, 8, 12) if b is None else b
    return dsk.grouped_gemm(a, b, **(changed or {"group_sizes": [1, 2, 3]}))


def leaf(*shape):
    return T(*shape).requires_grad_()


BAD = [
    # rowwise
    Bad(lambda: dsk.quantize(T(8)), ValueError,
        "quantize: x: expected shape [..., m, k], got [8]"),
    Bad(lambda: dsk.quantize(T(2, 8, dtype=i64)), TypeError,
        "quantize: x: expected dtype float32 or bfloat16 or float16 or float64, got int64"),
    Bad(lambda: dsk.quantize(T(2, 8), (1, 0)), ValueError,
        "quantize: block: expected (rows, columns), both positive, got (1, 0)"),
    Bad(lambda: dsk.quantize(T(2, 8), (128,)), ValueError,
        "quantize: block: expected (rows, columns), both positive, got (128,)"),
    Bad(lambda: dsk.quantize(T(2, 8), scale_format="e8m0"), ValueError,
        "quantize: scale_format: expected one of ['fp32', 'ue8m0', 'pow2'], got 'e8m0'"),
    Bad(lambda: dsk.quantize(T(2, 8), dtype="e5m2"), ValueError,
        "quantize: dtype: expected one of ['e4m3', 'e5m6'], got 'e5m2'"),
    Bad(lambda: dsk.quantize(scaled(2, 8), dtype="fp8"), ValueError,
        "quantize: dtype: expected one of ['e4m3', 'e5m6'], got 'fp8'"),
    Bad(lambda: dsk.quantize([1.0]), TypeError, "quantize: x: expected Tensor, got list"),
    Bad(lambda: dsk.rms_norm(T(()), T(1)), ValueError,
        "rms_norm: x: expected shape [..., d], got []"),
    Bad(lambda: dsk.rms_norm(T(2, 8), T(7)), ValueError,
        "rms_norm: weight: expected [d] = [8], got [7]"),
    Bad(lambda: dsk.rms_norm(T(2, 8), T(8, dtype=i32)), TypeError,
        "rms_norm: weight: expected dtype float32 or bfloat16 or float16 or float64, got int32"),
    Bad(lambda: dsk.rms_norm(T(2, 8), meta(8)), ValueError,
        "rms_norm: weight: expected x's device cpu, got meta"),
    Bad(lambda: dsk.rms_norm(T(2, 8), T(8), residual=T(1, 8)), ValueError,
        "rms_norm: residual: expected x's shape = [2, 8], got [1, 8]"),
    Bad(lambda: dsk.rms_norm(T(2, 8), T(8), residual=T(2, 8, dtype=bf16)), TypeError,
        "rms_norm: residual: expected x's dtype float32, got bfloat16"),
    Bad(lambda: dsk.rms_norm(T(2, 8), T(8), eps="small"), TypeError,
        "rms_norm: eps: expected float, got str"),
    Bad(lambda: dsk.rms_norm(leaf(2, 8), None), TypeError,
        "rms_norm: weight: expected Tensor, got NoneType"),
    Bad(lambda: dsk.rope(T(4, 8), T(4, 4), T(4, 4)), ValueError,
        "rope: x: expected shape [..., t, h, r], got [4, 8]"),
    Bad(lambda: dsk.rope(T(4, 2, 7), T(4, 3), T(4, 3)), ValueError,
        "rope: x: expected an even last dimension r, got [4, 2, 7]"),
    Bad(lambda: dsk.rope(T(4, 2, 8), T(4, 8), T(4, 8)), ValueError,
        "rope: cos: expected [..., t, r/2] that broadcasts to [4, 4], got [4, 8]"),
    Bad(lambda: dsk.rope(T(4, 2, 8), T(5, 4), T(5, 4)), ValueError,
        "rope: cos: expected [..., t, r/2] that broadcasts to [4, 4], got [5, 4]"),
    Bad(lambda: dsk.rope(T(1, 2, 8), T(5, 4), T(5, 4)), ValueError,
        "rope: cos: expected [..., t, r/2] that broadcasts to [1, 4], got [5, 4]"),
    Bad(lambda: dsk.rope(T(4, 2, 8), T(4, 4), T(4, 1)), ValueError,
        "rope: sin: expected cos's shape = [4, 4], got [4, 1]"),
    Bad(lambda: dsk.rope(T(4, 2, 8), T(4, 4, dtype=bf16), T(4, 4)), TypeError,
        "rope: cos: expected dtype float32 or float64, got bfloat16"),
    Bad(lambda: dsk.swiglu(T(2, 7)), ValueError,
        "swiglu: x: expected an even last dimension [gate; up], got [2, 7]"),
    Bad(lambda: dsk.swiglu(T(2, 8, dtype=torch.float8_e4m3fn)), TypeError,
        "swiglu: x: expected dtype float32 or bfloat16 or float16 or float64, got float8_e4m3fn"),
    Bad(lambda: dsk.swiglu_quantize(T(8)), ValueError,
        "swiglu_quantize: x: expected shape [..., m, k], got [8]"),
    Bad(lambda: dsk.rms_norm_quantize(T(2, 8), T(9)), ValueError,
        "rms_norm_quantize: weight: expected [d] = [8], got [9]"),
    # gemm
    Bad(lambda: dsk.gemm(T(2, 3, 8), T(4, 8)), ValueError,
        "gemm: a: expected shape [m, k], got [2, 3, 8]"),
    Bad(lambda: dsk.gemm(T(3, 8), T(8)), ValueError, "gemm: b: expected shape [n, k], got [8]"),
    Bad(lambda: dsk.gemm(T(3, 8), T(8, 4)), ValueError,
        "gemm: b: expected last dimension k = 8 as in a, got [8, 4]"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8, dtype=bf16)), TypeError,
        "gemm: b: expected a's dtype float32, got bfloat16"),
    Bad(lambda: dsk.gemm(T(3, 8, dtype=torch.int8), T(4, 8, dtype=torch.int8)), TypeError,
        "gemm: a: expected dtype float32 or bfloat16 or float16 or float64, got int8"),
    Bad(lambda: dsk.gemm(T(3, 8), meta(4, 8)), ValueError,
        "gemm: b: expected a's device cpu, got meta"),
    Bad(lambda: dsk.gemm(T(3, 8), scaled(4, 8)), TypeError,
        "gemm: a: expected a ScaledTensor like the other operand, got Tensor"),
    Bad(lambda: dsk.gemm(scaled(3, 8), T(4, 8)), TypeError,
        "gemm: b: expected a ScaledTensor like the other operand, got Tensor"),
    Bad(lambda: dsk.gemm(scaled(3, 8, (128, 128)), scaled(4, 8, (128, 128))), ValueError,
        "gemm: block: expected (1, c) for a and (r, c) for b, such as (1, 128) and (128, 128), "
        "got (128, 128) and (128, 128)"),
    Bad(lambda: dsk.gemm(scaled(3, 80), scaled(4, 80, (128, 64))), ValueError,
        "gemm: block: expected (1, c) for a and (r, c) for b, such as (1, 128) and (128, 128), "
        "got (1, 128) and (128, 64)"),
    Bad(lambda: dsk.gemm(scaled(3, 8, dtype="e5m6"), scaled(4, 8)), TypeError,
        "gemm: a.data: expected dtype float8_e4m3fn, got float16"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), c=T(3, 5)), ValueError,
        "gemm: c: expected [m, n] = [3, 4], got [3, 5]"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), c=T(3, 4, dtype=i64)), TypeError,
        "gemm: c: expected dtype float32 or bfloat16 or float16 or float64, got int64"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), bias=T(3)), ValueError,
        "gemm: bias: expected [n] = [4], got [3]"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), epilogue="gelu"), ValueError,
        "gemm: epilogue: expected one of [None, 'swiglu', 'swiglu_quant'], got 'gelu'"),
    Bad(lambda: dsk.gemm(T(3, 8), T(5, 8), epilogue="swiglu"), ValueError,
        "gemm: b: expected an even n for epilogue 'swiglu', got n = 5"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out_dtype=i32), ValueError,
        "gemm: out_dtype: expected fp32, bf16, fp16, fp64 or None, got torch.int32"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), num_sms=0), ValueError,
        "gemm: num_sms: expected a positive integer, got 0"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out=T(4, 3)), ValueError,
        "gemm: out: expected the result's shape = [3, 4], got [4, 3]"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out=T(3, 4), out_dtype=bf16), ValueError,
        "gemm: out_dtype: expected None or out's torch.float32, got torch.bfloat16"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out="here"), TypeError,
        "gemm: out: expected Tensor, got str"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out=T(3, 4, dtype=i32)), TypeError,
        "gemm: out: expected dtype float32 or bfloat16 or float16 or float64, got int32"),
    Bad(lambda: dsk.gemm(None, T(4, 8)), TypeError, "gemm: a: expected Tensor, got NoneType"),
    Bad(lambda: dsk.gemm(T(3, 8), [1.0]), TypeError, "gemm: b: expected Tensor, got list"),
    Bad(lambda: dsk.gemm(leaf(3, 8), T(4, 8), out=T(3, 4)), ValueError,
        "gemm: out: expected None while an argument requires grad, got a tensor"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out=T(3, 2), epilogue="swiglu_quant"), ValueError,
        "gemm: out: expected None with epilogue 'swiglu_quant', got a tensor"),
    Bad(lambda: dsk.gemm(T(3, 8), T(4, 8), out_dtype=bf16, epilogue="swiglu_quant"), ValueError,
        "gemm: out_dtype: expected None with epilogue 'swiglu_quant', got torch.bfloat16"),
    # grouped_gemm
    Bad(lambda: dsk.grouped_gemm(T(6, 12), T(3, 8, 12)), ValueError,
        "grouped_gemm: grouping: expected exactly one of ['group_sizes', 'm_indices', 'masked_m'],"
        " got []"),
    Bad(lambda: grouped(group_sizes=[6], masked_m=T(3, dtype=i32)), ValueError,
        "grouped_gemm: grouping: expected exactly one of ['group_sizes', 'm_indices', 'masked_m'],"
        " got ['group_sizes', 'masked_m']"),
    Bad(lambda: grouped(b=T(8, 12)), ValueError,
        "grouped_gemm: b: expected shape [g, n, k], got [8, 12]"),
    Bad(lambda: grouped(a=T(3, 6, 12)), ValueError,
        "grouped_gemm: a: expected shape [m, k], got [3, 6, 12]"),
    Bad(lambda: grouped(a=T(2, 6, 12), masked_m=T(3, dtype=i32)), ValueError,
        "grouped_gemm: a: expected [g = 3, max_m, k], got [2, 6, 12]"),
    Bad(lambda: grouped(group_sizes=[1, 2]), ValueError,
        "grouped_gemm: group_sizes: expected [g] = [3], got [2]"),
    Bad(lambda: grouped(group_sizes=T(3)), TypeError,
        "grouped_gemm: group_sizes: expected dtype int64 or int32, got float32"),
    Bad(lambda: grouped(group_sizes=["a"]), TypeError,
        "grouped_gemm: group_sizes: expected integers, got ['a']"),
    Bad(lambda: grouped(group_sizes=[1, 2, 4]), ValueError,
        "grouped_gemm: group_sizes: expected sizes >= 0 with a sum of at most 6, got [1, 2, 4]"),
    Bad(lambda: grouped(group_sizes=[1, -1, 4]), ValueError,
        "grouped_gemm: group_sizes: expected sizes >= 0 with a sum of at most 6, got [1, -1, 4]"),
    Bad(lambda: grouped(a=T(3, 4, 12), masked_m=torch.tensor([0, 5, 1])), ValueError,
        "grouped_gemm: masked_m: expected sizes >= 0 with each of at most 4, got [0, 5, 1]"),
    Bad(lambda: grouped(m_indices=torch.tensor([0, 1, 2, 3, -1, 0])), ValueError,
        "grouped_gemm: m_indices: expected indices in [-1, 3), got 3"),
    Bad(lambda: grouped(m_indices=torch.tensor([0, 1, 2, -2, -1, 0])), ValueError,
        "grouped_gemm: m_indices: expected indices in [-1, 3), got -2"),
    Bad(lambda: grouped(m_indices=torch.tensor([0, 1, 2])), ValueError,
        "grouped_gemm: m_indices: expected [m] = [6], got [3]"),
    Bad(lambda: grouped(group_sizes=[1, 2, 3], bias=T(8)), ValueError,
        "grouped_gemm: bias: expected [g, n] = [3, 8], got [8]"),
    Bad(lambda: grouped(group_sizes=[1, 2, 3], c=T(8, 6)), ValueError,
        "grouped_gemm: c: expected [..., n] = [6, 8], got [8, 6]"),
    Bad(lambda: grouped(group_sizes=[1, 2, 3], expected_m=-1), ValueError,
        "grouped_gemm: expected_m: expected a size, got -1"),
    Bad(lambda: grouped(group_sizes=[1, 2, 3], out=T(6, 9)), ValueError,
        "grouped_gemm: out: expected the result's shape = [6, 8], got [6, 9]"),
    Bad(lambda: dsk.grouped_gemm_k(T(4, 9), T(5, 8), [9]), ValueError,
        "grouped_gemm_k: b: expected last dimension k = 9 as in a, got [5, 8]"),
    Bad(lambda: dsk.grouped_gemm_k(T(4, 9), T(5, 9), [4, 6]), ValueError,
        "grouped_gemm_k: group_sizes: expected sizes >= 0 with a sum of at most 9, got [4, 6]"),
    Bad(lambda: dsk.grouped_gemm_k(T(4, 9), T(5, 9), [[9]]), ValueError,
        "grouped_gemm_k: group_sizes: expected shape [g], got [1, 1]"),
    Bad(lambda: dsk.grouped_gemm_k(T(4, 9), T(5, 9), [9], c=T(4, 5)), ValueError,
        "grouped_gemm_k: c: expected [g, m, n] = [1, 4, 5], got [4, 5]"),
    Bad(lambda: dsk.grouped_gemm_k(scaled(4, 256), scaled(5, 256), [200, 56]), ValueError,
        "grouped_gemm_k: group_sizes: expected multiples of 128, got [200, 56]"),
    Bad(lambda: dsk.grouped_gemm_k(scaled(4, 256), scaled(5, 256, (128, 128)), [256]), ValueError,
        "grouped_gemm_k: b.block: expected (1, 128), got (128, 128)"),
    Bad(lambda: dsk.grouped_gemm_k(T(4, 9), T(5, 9), [9], out=T(1, 5, 4)), ValueError,
        "grouped_gemm_k: out: expected the result's shape = [1, 4, 5], got [1, 5, 4]"),
    Bad(lambda: grouped(group_sizes=T(3, dtype=i64, device="meta")), ValueError,
        "grouped_gemm: group_sizes: expected a's device cpu or cpu, got meta"),
    # mla
    Bad(lambda: decode(q=T(2, 3, 20)), ValueError,
        "mla_decode: q: expected shape [b, s, h, dl + r], got [2, 3, 20]"),
    Bad(lambda: decode(kv_cache=T(4, 8, 24)), ValueError,
        "mla_decode: kv_cache: expected [pages, page, 20], got [4, 8, 24]"),
    Bad(lambda: decode(kv_cache=T(4, 8, 20, dtype=torch.uint8)), ValueError,
        "mla_decode: kv_cache: expected [pages, page, 28], got [4, 8, 20]"),
    Bad(lambda: decode(kv_cache=T(4, 8, 20, dtype=torch.int8)), TypeError,
        "mla_decode: kv_cache: expected dtype float32 or bfloat16 or float16 or float64 or uint8, "
        "got int8"),
    Bad(lambda: decode(head_dim_v=21), ValueError,
        "mla_decode: head_dim_v: expected 1 .. 20 (q's width), got 21"),
    Bad(lambda: decode(block_table=T(2, 3)), TypeError,
        "mla_decode: block_table: expected dtype int64 or int32, got float32"),
    Bad(lambda: decode(block_table=T(3, 3, dtype=i32)), ValueError,
        "mla_decode: block_table: expected [b = 2, max_pages], got [3, 3]"),
    Bad(lambda: decode(seq_lens=T(3, dtype=i32)), ValueError,
        "mla_decode: seq_lens: expected [b] = [2], got [3]"),
    Bad(lambda: decode(seq_lens=torch.tensor([-1, 3])), ValueError,
        "mla_decode: seq_lens: expected 0 .. 24 (max_pages * page), got [-1, 3]"),
    Bad(lambda: decode(seq_lens=torch.tensor([0, 25])), ValueError,
        "mla_decode: seq_lens: expected 0 .. 24 (max_pages * page), got [0, 25]"),
    Bad(lambda: decode(block_table=torch.tensor([[0, -9, -9], [1, 2, 4]])), ValueError,
        "mla_decode: block_table: expected pages in [0, 4), got 4"),
    Bad(lambda: decode(block_table=torch.tensor([[-1, 9, 9], [1, 2, 3]])), ValueError,
        "mla_decode: block_table: expected pages in [0, 4), got -1"),
    Bad(lambda: decode(seq_lens=T(2, dtype=i32, device="meta")), ValueError,
        "mla_decode: seq_lens: expected q's device cpu, got meta"),
    Bad(lambda: append(slots=torch.tensor([0, 1, 32])), ValueError,
        "mla_cache_append: slots: expected indices in [-1, 32), got 32"),
    Bad(lambda: append(slots=torch.tensor([0, 1, -2])), ValueError,
        "mla_cache_append: slots: expected indices in [-1, 32), got -2"),
    Bad(lambda: append(slots=T(3)), TypeError,
        "mla_cache_append: slots: expected dtype int64 or int32, got float32"),
    Bad(lambda: append(slots=T(4, dtype=i64)), ValueError,
        "mla_cache_append: slots: expected [t] = [3], got [4]"),
    Bad(lambda: append(k_rope=T(2, 4)), ValueError,
        "mla_cache_append: k_rope: expected [t = 3, r], got [2, 4]"),
    Bad(lambda: append(latent=T(3, 15)), ValueError,
        "mla_cache_append: kv_cache: expected [pages, page, 19], got [4, 8, 20]"),
    Bad(lambda: append(latent=leaf(3, 16)), ValueError,
        "mla_cache_append: latent: expected a tensor that requires no grad (call under "
        "torch.no_grad()), got one that does"),
    Bad(lambda: latents(slots=torch.tensor([0, 1, 32])), ValueError,
        "mla_latents: slots: expected indices in [-1, 32), got 32"),
    Bad(lambda: latents(slots=T(4, dtype=i64)), ValueError,
        "mla_latents: slots: expected [t] = [3], got [4]"),
    Bad(lambda: latents(slots=T(3)), TypeError,
        "mla_latents: slots: expected dtype int64 or int32, got float32"),
    Bad(lambda: latents(q_a=T(2, 6)), ValueError,
        "mla_latents: q_a: expected [t, dq] = [3, 6], got [2, 6]"),
    Bad(lambda: latents(q_a=T(3, 6, dtype=f64)), TypeError,
        "mla_latents: q_a: expected kv_a's dtype float32, got float64"),
    Bad(lambda: latents(q_a=None), ValueError,
        "mla_latents: q_weight: expected None, as q_a is, got a tensor"),
    Bad(lambda: latents(q_weight=None), ValueError,
        "mla_latents: q_weight: expected a tensor, as q_a is, got None"),
    Bad(lambda: latents(q_weight=T(5)), ValueError,
        "mla_latents: q_weight: expected [dq] = [6], got [5]"),
    Bad(lambda: latents(kv_weight=T(17)), ValueError,
        "mla_latents: kv_weight: expected [dl], kv_a's width 20 being dl + r with an even r, "
        "got [17]"),
    Bad(lambda: latents(cos=T(3, 4)), ValueError,
        "mla_latents: cos: expected [t, r / 2] = [3, 2], got [3, 4]"),
    Bad(lambda: latents(sin=T(3, 2, dtype=f64)), TypeError,
        "mla_latents: sin: expected dtype float32, got float64"),
    Bad(lambda: latents(kv_cache=T(4, 8, 21)), ValueError,
        "mla_latents: kv_cache: expected [pages, page, 20], got [4, 8, 21]"),
    Bad(lambda: latents(kv_cache=meta(4, 8, 20)), ValueError,
        "mla_latents: kv_cache: expected kv_a's device cpu, got meta"),
    Bad(lambda: latents(kv_weight=leaf(16)), ValueError,
        "mla_latents: kv_weight: expected a tensor that requires no grad (call under "
        "torch.no_grad()), got one that does"),
    Bad(lambda: absorb(w_uk=T(2, 4, 16)), ValueError,
        "mla_absorb_queries: w_uk: expected [h = 3, n, dl], q's width 8 being n + r with an "
        "even r, got [2, 4, 16]"),
    Bad(lambda: absorb(w_uk=T(3, 8, 16)), ValueError,
        "mla_absorb_queries: w_uk: expected [h = 3, n, dl], q's width 8 being n + r with an "
        "even r, got [3, 8, 16]"),
    Bad(lambda: absorb(w_uk=T(3, 4, 16, dtype=f64)), TypeError,
        "mla_absorb_queries: w_uk: expected q's dtype float32, got float64"),
    Bad(lambda: absorb(cos=T(4, 2)), ValueError,
        "mla_absorb_queries: cos: expected [t, r / 2] = [5, 2], got [4, 2]"),
    Bad(lambda: dsk.mla_absorb_output(T(5, 3, 16), T(3, 4, 15)), ValueError,
        "mla_absorb_output: w_uv: expected [h, v, dl] = [3, 4, 16], got [3, 4, 15]"),
    Bad(lambda: dsk.mla_absorb_output(T(5, 48), T(3, 4, 16)), ValueError,
        "mla_absorb_output: o: expected shape [t, h, dl], got [5, 48]"),
    Bad(lambda: prefill(k=T(7, 3, 4)), ValueError,
        "mla_prefill: k: expected [t, h, dqk] = [7, 2, 4], got [7, 3, 4]"),
    Bad(lambda: prefill(v=T(6, 2, 3)), ValueError,
        "mla_prefill: v: expected [t, h, dv] = [7, 2, 3], got [6, 2, 3]"),
    Bad(lambda: prefill(v=T(7, 2, 3, dtype=f64)), TypeError,
        "mla_prefill: v: expected q's dtype float32, got float64"),
    Bad(lambda: prefill(cu_seqlens_q=torch.tensor([0, 4, 3]), cu_seqlens_k=T(3, dtype=i64)),
        ValueError,
        "mla_prefill: cu_seqlens_q: expected non-decreasing values from 0 to at most 6, "
        "got [0, 4, 3]"),
    Bad(lambda: prefill(cu_seqlens_k=torch.tensor([0, 8])), ValueError,
        "mla_prefill: cu_seqlens_k: expected non-decreasing values from 0 to at most 7, "
        "got [0, 8]"),
    Bad(lambda: prefill(cu_seqlens_q=torch.tensor([1, 6])), ValueError,
        "mla_prefill: cu_seqlens_q: expected non-decreasing values from 0 to at most 6, "
        "got [1, 6]"),
    Bad(lambda: prefill(cu_seqlens_k=T(3, dtype=i32)), ValueError,
        "mla_prefill: cu_seqlens_k: expected cu_seqlens_q's shape = [2], got [3]"),
    Bad(lambda: prefill(cu_seqlens_q=T(0, dtype=i32), cu_seqlens_k=T(0, dtype=i32)), ValueError,
        "mla_prefill: cu_seqlens_q: expected [b + 1], at least one element, got [0]"),
    Bad(lambda: prefill(cu_seqlens_k=T(2, dtype=i32, device="meta")), ValueError,
        "mla_prefill: cu_seqlens_k: expected q's device cpu or cpu, got meta"),
    # moe
    Bad(lambda: gate(weight=T(8, 5)), ValueError,
        "moe_gate: weight: expected [e, d] = [8, 6], got [8, 5]"),
    Bad(lambda: gate(bias=T(7)), ValueError, "moe_gate: bias: expected [e] = [8], got [7]"),
    Bad(lambda: gate(n_group=3), ValueError,
        "moe_gate: n_group: expected a divisor of e = 8, got 3"),
    Bad(lambda: gate(n_group=4, topk_group=5), ValueError,
        "moe_gate: topk_group: expected 1 .. 4 (n_group), got 5"),
    Bad(lambda: gate(topk=0), ValueError,
        "moe_gate: topk: expected 1 .. 8 (experts in topk_group groups), got 0"),
    Bad(lambda: gate(topk=5, n_group=4, topk_group=2), ValueError,
        "moe_gate: topk: expected 1 .. 4 (experts in topk_group groups), got 5"),
    Bad(lambda: gate(score="relu"), ValueError,
        "moe_gate: score: expected one of ['sigmoid', 'softmax'], got 'relu'"),
    Bad(lambda: gate(group_score="sum"), ValueError,
        "moe_gate: group_score: expected one of ['top2', 'max'], got 'sum'"),
    Bad(lambda: gate(sequences=2), ValueError,
        "moe_gate: sequences: expected a divisor of t = 5 tokens, got 2"),
    Bad(lambda: gate(sequences=0), ValueError,
        "moe_gate: sequences: expected a divisor of t = 5 tokens, got 0"),
    Bad(lambda: gate(topk="two"), TypeError, "moe_gate: topk: expected int, got str"),
    Bad(lambda: dsk.moe_permute(T(3, 6), T(4, 2, dtype=i64), 4), ValueError,
        "moe_permute: topk_idx: expected [t = 3, k], got [4, 2]"),
    Bad(lambda: dsk.moe_permute(T(3, 6), T(3, 2, dtype=i64) + 4, 4), ValueError,
        "moe_permute: topk_idx: expected indices in [-1, 4), got 4"),
    Bad(lambda: dsk.moe_permute(T(3, 6), T(3, 2), 4), TypeError,
        "moe_permute: topk_idx: expected dtype int64 or int32, got float32"),
    Bad(lambda: dsk.moe_permute(T(3, 6), T(3, 2, dtype=i64), -1), ValueError,
        "moe_permute: num_experts: expected a size, got -1"),
    Bad(lambda: dsk.moe_permute(T(3, 6), T(3, 2, dtype=i64), 4, alignment=0), ValueError,
        "moe_permute: alignment: expected a positive integer, got 0"),
    Bad(lambda: permute(expert_map=T(3, 2)), TypeError,
        "moe_permute: expert_map: expected dtype int64 or int32, got float32"),
    Bad(lambda: permute(expert_map=T(3, dtype=i64)), ValueError,
        "moe_permute: expert_map: expected shape [l, r], got [3]"),
    Bad(lambda: permute(expert_map=T(3, 0, dtype=i64)), ValueError,
        "moe_permute: expert_map: expected [l, r], not empty, got [3, 0]"),
    Bad(lambda: permute(expert_map=T(3, 2, dtype=i64) + 4), ValueError,
        "moe_permute: expert_map: expected indices in [-1, 4), got 4"),
    Bad(lambda: permute(topk_idx=T(3, 2, dtype=i64) + 3, expert_map=T(3, 2, dtype=i64)), ValueError,
        "moe_permute: topk_idx: expected indices in [-1, 3), got 3"),
    Bad(lambda: dsk.moe_unpermute(T(4, 6), T(3, 2, dtype=i64) + 4, None), ValueError,
        "moe_unpermute: row_map: expected indices in [-1, 4), got 4"),
    Bad(lambda: dsk.moe_unpermute(T(4, 6), T(3, 2, dtype=i64), T(3, 3)), ValueError,
        "moe_unpermute: topk_weights: expected row_map's shape = [3, 2], got [3, 3]"),
    Bad(lambda: experts(w13=T(4, 9, 6)), ValueError,
        "moe_experts: w13: expected [e, 2i, d = 6], got [4, 9, 6]"),
    Bad(lambda: experts(w2=T(4, 5, 6)), ValueError,
        "moe_experts: w2: expected [e, d, i] = [4, 6, 5], got [4, 5, 6]"),
    Bad(lambda: experts(w2=T(4, 6, 5, dtype=bf16)), TypeError,
        "moe_experts: w2: expected x's dtype float32, got bfloat16"),
    Bad(lambda: experts(w13=scaled_groups(4, 10, 6)), TypeError,
        "moe_experts: w13, w2: expected two plain tensors or two ScaledTensors, "
        "got ScaledTensor and Tensor"),
    Bad(lambda: experts(topk_idx=T(3, 2, dtype=i64) - 2), ValueError,
        "moe_experts: topk_idx: expected indices in [-1, 4), got -2"),
    Bad(lambda: experts(topk_weights=T(2, 3)), ValueError,
        "moe_experts: topk_weights: expected [t, k] = [3, 2], got [2, 3]"),
    Bad(lambda: experts(num_shared=5), ValueError,
        "moe_experts: num_shared: expected 0 .. 4 (e), got 5"),
    Bad(lambda: experts(num_shared=2, topk_idx=T(3, 2, dtype=i64) + 2), ValueError,
        "moe_experts: topk_idx: expected indices in [-1, 2), got 2"),
    Bad(lambda: experts(num_shared=1, expert_map=T(2, 1, dtype=i64) + 3), ValueError,
        "moe_experts: expert_map: expected indices in [-1, 3), got 3"),
    Bad(lambda: experts(layout="sparse"), ValueError,
        "moe_experts: layout: expected one of [None, 'contiguous', 'masked'], got 'sparse'"),
    Bad(lambda: experts(layout="masked"), ValueError,
        "moe_experts: topk_idx: expected no index twice in a row, with the masked layout, "
        "got 0 twice in row 0"),
    Bad(lambda: dsk.moe_bias_update(T(4), T(4), 0.1), TypeError,
        "moe_bias_update: counts: expected dtype int64 or int32, got float32"),
    Bad(lambda: dsk.moe_bias_update(T(4), T(5, dtype=i64), 0.1), ValueError,
        "moe_bias_update: counts: expected [e] = [4], got [5]"),
    # narrow formats
    Bad(lambda: dsk.dequantize(T(3, 4)), TypeError,
        "dequantize: x: expected ScaledTensor, got Tensor"),
    Bad(lambda: dsk.dequantize(scaled(3, 4, (1, 128)), torch.int32), ValueError,
        "dequantize: dtype: expected fp32, bf16, fp16 or fp64, got torch.int32"),
    Bad(lambda: dsk.pack_e5m6(T(3, 4)), TypeError,
        "pack_e5m6: data: expected dtype float16, got float32"),
    Bad(lambda: dsk.unpack_e5m6(torch.zeros(3, 4, dtype=torch.uint8), 4), ValueError,
        "unpack_e5m6: packed: expected [..., 3 * ceil(k / 2)] = [3, 6], got [3, 4]"),
    # backends
    Bad(lambda: dsk.swiglu(T(2, 8), backend="gpu"), ValueError,
        "backend: expected one of ('auto', 'cuda', 'triton', 'cpu', 'emu', 'ref'), got 'gpu'"),
    Bad(lambda: dsk.use_backend("CUDA"), ValueError,
        "backend: expected one of ('auto', 'cuda', 'triton', 'cpu', 'emu', 'ref'), got 'CUDA'"),
    Bad(lambda: dsk.supports("relu"), ValueError, "op: expected one of ['dequantize', 'gemm', "),
    Bad(lambda: dsk.supports("gemm", rows=3), ValueError,
        "shapes of gemm: expected names among ('m', 'n', 'k', 'g', 'dtype'), got 'rows'"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_message_names_argument_expected_and_actual(bad):
    with pytest.raises(bad.error) as raised:
        bad.call()
    assert type(raised.value) is bad.error
    message = str(raised.value)
    assert message == bad.message or (
        bad.message.endswith(", ") and message.startswith(bad.message)
    )


def test_the_table_is_long_enough_and_covers_every_op():
    assert len(BAD) >= 60
    named = {bad.message.split(":")[0] for bad in BAD}
    assert {case.op for case in CASES} <= named


def test_the_dispatcher_itself_validates():
    """torch.ops goes past the Python functions, not past the checks."""
    with pytest.raises(ValueError, match=r"rms_norm: weight: expected \[d\] = \[8\], got \[7\]"):
        torch.ops.dskernels.rms_norm(T(2, 8), T(7), 1e-6, "ref")
    with pytest.raises(ValueError, match="gemm: out: expected the result's shape"):
        torch.ops.dskernels.gemm_out(
            T(3, 3), T(3, 8), T(4, 8), None, None, [], None, None, None, False, None, "ref"
        )
    with pytest.raises(ValueError, match="gemm: blocks: expected two scales and 4 block sizes"):
        torch.ops.dskernels.gemm(
            T(3, 8), T(4, 8), T(3, 1), None, [], None, None, None, None, False, None, "ref"
        )


def test_fake_kernels_validate():
    with torch.device("meta"), pytest.raises(ValueError, match="swiglu: x: expected an even last"):
        dsk.swiglu(torch.empty(2, 7))


def test_compiled_call_reports_the_same_error():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dsk.swiglu(x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="swiglu: x: expected an even last dimension") as raised:
        compiled(T(2, 7))
    assert "got [2, 7]" in str(raised.value)


def test_nothing_is_written_when_a_call_is_refused():
    cache = torch.ones(4, 8, 20)
    with pytest.raises(ValueError, match="slots"):
        append(kv_cache=cache, slots=torch.tensor([0, 1, 99]))
    assert torch.equal(cache, torch.ones(4, 8, 20))


def test_unused_page_numbers_may_be_anything():
    table = torch.tensor([[0, 2147480000, 2147480000], [1, 2, 3]], dtype=i32)
    out, lse = decode(block_table=table)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
