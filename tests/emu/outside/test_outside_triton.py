"""What Triton's compiler makes of our Triton kernels, in the emulator against ref.

The kernels are ours, their PTX is not: layouts, swizzles, ldmatrix, cp.async pipelines, wgmma with
A from registers (sm_90) and mma.sync (sm_80, sm_89) are Triton's choice.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from mla_cases import LATENT, assert_decoded, assert_within, paged_case
from outside_support import findings, seeds_by_tier

emu = pytest.importorskip("dskernels.emu")
from dskernels.ref import gemm as ref_gemm  # noqa: E402
from dskernels.ref import mla as ref_mla  # noqa: E402
from dskernels.ref import moe as ref_moe  # noqa: E402
from dskernels.ref import rowwise  # noqa: E402
from dskernels.testing import assert_bitwise_equal, assert_close_to_exact  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SEEDS = seeds_by_tier()
SLOW = pytest.mark.slow
TARGETS = [pytest.param("sm_80", marks=SLOW), pytest.param("sm_89", marks=SLOW), "sm_90"]


class Compiled:
    """One kernel of one target, with what its launch needs."""

    def __init__(self, folder, name: str, target: str):
        self.label = f"triton {name} {target}"
        self.facts = json.loads((folder / f"{name}.{target}.json").read_text())
        self.constants = self.facts["constants"]
        module = emu.Module(folder / f"{name}.{target}.ptx")
        self.kernel = module.kernel(self.facts["name"])

    def __call__(self, grid, *args, seed):
        # Behind its parameters Triton adds pointers to scratch memory, null where it needs none.
        assert self.facts["global_scratch_size"] == 0
        extra = len(self.kernel.info["params"]) - len(args)
        assert 0 <= extra <= 2
        stats = self.kernel[grid, 32 * self.facts["num_warps"]](
            *args, *[None] * extra, shared=self.facts["shared"], seed=seed
        )
        findings(stats, self.label)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(name, target): built once, in a process whose Triton does not interpret."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = {}

    def get(name: str, target: str) -> Compiled:
        if (name, target) not in cache:
            command = [sys.executable, "-m", "dskernels.triton.compile", "--out", str(folder)]
            command += ["--target", target, "--kernel", name]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            cache[name, target] = Compiled(folder, name, target)
        return cache[name, target]

    return get


def normal(*shape: int, seed: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return (x * torch.exp2(torch.randn(*shape[:-1], 1, generator=generator) * 3)).to(dtype)


def quantize_on(compiled, x, k, seed):
    m = x.shape[0]
    rows = -(-m // 16) * 16  # the stride that the compiled variant takes for granted
    data = torch.zeros(m, k, dtype=torch.uint8)
    scale = torch.full((-(-k // 128), rows), torch.nan)
    grid = (-(-m // compiled.constants["ROWS"]), -(-k // 128))
    planes = (m, scale.numel())
    compiled(grid, x, data, scale, m, k, x.stride(0), scale.stride(0), *planes, seed=seed)
    return data.view(torch.float8_e4m3fn), scale[:, :m].t()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_quantize(compiled, target, seed):
    x = normal(37, 320, seed=seed)
    x[3] = 0
    x[5, 7] = torch.nan
    data, scale = quantize_on(compiled("quantize", target), x, 320, seed)
    want = rowwise.quantize(x)
    assert_bitwise_equal(data, want.data)
    assert_bitwise_equal(scale, want.scale)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_swiglu_quantize(compiled, target, seed):
    x = normal(21, 512, seed=seed)
    data, scale = quantize_on(compiled("swiglu_quantize", target), x, 256, seed)
    want = rowwise.swiglu_quantize(x, scale_format="pow2")
    assert_bitwise_equal(scale, want.scale)
    got = data.double() * scale.double().repeat_interleave(128, dim=1)
    exact = rowwise.swiglu(x.double())
    assert_close_to_exact(got, exact, want.dequantize(torch.float64), factor=1.05)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_rms_norm(compiled, target, seed):
    m, d = 3, 7168
    x, residual = normal(m, d, seed=seed), normal(m, d, seed=seed + 1)
    weight = normal(d, seed=seed + 2)
    y, total = torch.zeros_like(x), torch.zeros_like(x)
    kernel = compiled("rms_norm", target)
    kernel(m, x, residual, weight, y, total, None, d, 1e-6, 1, 0, 0, seed=seed)
    want_y, want_total = rowwise.rms_norm(x, weight, 1e-6, residual)
    assert_bitwise_equal(total, want_total)
    exact = rowwise.rms_norm(total.double(), weight.double(), 1e-6)
    assert_close_to_exact(y, exact, want_y, factor=1.05)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_swiglu(compiled, target, seed):
    m, k = 3, 1552
    x, y = normal(m, 2 * k, seed=seed), torch.zeros(m, k, dtype=torch.bfloat16)
    kernel = compiled("swiglu", target)
    kernel((m, -(-k // kernel.constants["BLOCK"])), x, y, k, seed=seed)
    assert_close_to_exact(y, rowwise.swiglu(x.double()), rowwise.swiglu(x), factor=1.05)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_rope(compiled, target, seed):
    t, h, r = 5, 3, 64
    x = normal(t, h, r, seed=seed)
    angle = torch.rand(t, r // 2, generator=torch.Generator().manual_seed(seed)) * 6.28
    y = torch.zeros_like(x)
    compiled("rope", target)(t * h, x, angle.cos(), angle.sin(), y, h, r // 2, seed=seed)
    exact = rowwise.rope(x.double(), angle.cos().double(), angle.sin().double())
    assert_close_to_exact(y, exact, rowwise.rope(x, angle.cos(), angle.sin()), factor=1.05)


def check_product(got, a, b, target, **how):
    """sm_90: the order and the arithmetic of wgmma are ref's, so the bits are. Older targets
    multiply in steps of 16 or 32 that ref does not model: within plain bf16's own error."""
    product = ref_gemm.grouped_gemm if how else ref_gemm.gemm
    if tuple(b.block) == (1, 128):
        product = ref_gemm.grouped_gemm_k
    if target == "sm_90":
        assert_bitwise_equal(got, product(a, b, accumulate="hopper", **how))
    else:
        exact = product(a, b, accumulate="fp64", out_dtype=torch.float64, **how)
        assert_close_to_exact(got, exact, product(a, b, **how), factor=1.1)


def mn_major(scale):
    """Scales [..., m, k blocks] as the compiled variant reads them: rows padded to 16 with zeros."""
    m = scale.shape[-2]
    rows = torch.zeros(*scale.shape[:-2], scale.shape[-1], -(-m // 16) * 16)
    rows[..., :m] = scale.transpose(-2, -1)
    return rows


def gemm_on(kernel, a, b, counts, seed, rows=None, c=None):
    """Launches the GEMM kernel on a [m, k] or [g, m, k]; counts as KIND of the kernel has them."""
    m, k = a.shape[-2:]
    n, groups = b.shape[-2], (1 if counts is None else counts.shape[0])
    sfa = mn_major(a.scale)
    kind, height = kernel.constants["KIND"], kernel.constants["BLOCK_M"]
    by_row = kernel.constants["BY_ROW"]
    sfb = mn_major(b.scale) if by_row else b.scale.contiguous()
    tiles = -(-m // height) * (groups if kind == 2 else 1) + (groups if kind == 1 else 0)
    lead = (groups,) if kind == 3 else ()
    dtype = torch.float32 if by_row else torch.bfloat16
    d = torch.full((*lead, *a.shape[:-1], n), torch.nan, dtype=dtype)
    kernel(
        (tiles, -(-n // kernel.constants["BLOCK_N"]), groups if kind == 3 else 1),
        a.data, sfa, b.data, sfb, d, counts, rows, c, None, m, n, k, groups, k, k,
        sfa.stride(-2), sfb.stride(-2), sfa.stride(0) if kind == 2 else 0, seed=seed,
    )  # fmt: skip
    return d


def operands(m: tuple, n: tuple, k: int, seed: int):
    a = rowwise.quantize(normal(*m, k, seed=seed, dtype=torch.float32))
    return a, rowwise.quantize(normal(*n, k, seed=seed + 1, dtype=torch.float32), (128, 128))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_gemm_dense(compiled, target, seed):
    a, b = operands((150,), (144,), 400, seed)
    got = gemm_on(compiled("gemm_dense", target), a, b, None, seed)
    check_product(got, a, b, target)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_gemm_contiguous(compiled, target, seed):
    a, b = operands((190,), (3, 144), 272, seed)
    sizes = torch.tensor([130, 0, 60], dtype=torch.int32)
    got = gemm_on(compiled("gemm_contiguous", target), a, b, sizes, seed)
    check_product(got, a, b, target, group_sizes=sizes)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_gemm_masked(compiled, target, seed):
    a, b = operands((3, 80), (3, 144), 272, seed)
    sizes = torch.tensor([70, 0, 33], dtype=torch.int32)
    got = gemm_on(compiled("gemm_masked", target), a, b, sizes, seed)
    inside = torch.arange(80)[None] < sizes[:, None]
    assert got[~inside].isnan().all()
    check_product(got.nan_to_num(nan=0.0), a, b, target, masked_m=sizes)


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_gemm_of_named_rows(compiled, target, seed):
    a, b = operands((190,), (3, 144), 272, seed)
    order = torch.randperm(190, generator=torch.Generator().manual_seed(seed))
    rows, sizes = order.int(), torch.tensor([130, 0, 50], dtype=torch.int32)
    groups = torch.full((190,), -1)
    groups[order[:180]] = torch.tensor([0, 2]).repeat_interleave(torch.tensor([130, 50]))
    got = gemm_on(compiled("gemm_rows", target), a, b, sizes, seed, rows)
    assert got[groups < 0].isnan().all()
    check_product(got.nan_to_num(nan=0.0), a, b, target, m_indices=groups)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=SLOW if s else ()) for s in range(20)])
@pytest.mark.parametrize("target", TARGETS)
def test_gemm_along_k(compiled, target, seed):
    """Weight gradients: scales of b by row, groups along k, C added in fp32."""
    m, n, sizes = 150, 144, torch.tensor([128, 0, 256], dtype=torch.int32)
    a = rowwise.quantize(normal(m, 384, seed=seed, dtype=torch.float32))
    b = rowwise.quantize(normal(n, 384, seed=seed + 1, dtype=torch.float32))
    c = normal(3, m, n, seed=seed + 2, dtype=torch.float32)
    got = gemm_on(compiled("gemm_along_k", target), a, b, sizes, seed, c=c)
    check_product(got, a, b, target, group_sizes=sizes, c=c)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_mla_decode(compiled, target, fp8, seed):
    """Two splits of every request, joined; NaN behind the lengths and table entries that crash."""
    q, cache, table, lens = case = paged_case([70, 1, 0, 33], 2, 7, page=16, seed=seed, fp8=fp8)
    splits, rows = 2, 14
    partial = torch.full((4, splits, rows, LATENT), torch.nan)
    partial_lse = torch.full((4, splits, rows), torch.nan)
    wide = cache.view(torch.float32) if fp8 else partial_lse
    compiled("mla_decode_fp8" if fp8 else "mla_decode", target)(
        (1, 4, splits),
        q, cache, cache.view(torch.bfloat16), wide, table, lens, partial, partial_lse,
        2, 7, 16, table.shape[1], 16, cache.shape[2], 0.1 * math.log2(math.e), seed=seed,
    )  # fmt: skip
    out = torch.full((4, 2, 7, LATENT), torch.nan, dtype=torch.bfloat16)
    lse = torch.full((4, 7, 2), torch.nan)
    compiled("mla_combine", target)(
        (rows, 4), partial, partial_lse, out, lse, 2, 7, splits, seed=seed
    )
    assert_decoded((out, lse), case, softmax_scale=0.1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_mla_prefill(compiled, target, seed):
    """Ragged requests with more keys than queries, and fewer; NaN behind both."""
    ends_q, ends_k = torch.tensor([0, 70, 70, 80]).int(), torch.tensor([0, 100, 130, 134]).int()
    heads = 2
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(85, heads, 192, generator=g).bfloat16()
    k = torch.randn(140, heads, 192, generator=g).bfloat16()
    v = (torch.randn(140, heads, 128, generator=g) / 10).bfloat16()
    q[80:], k[134:], v[134:] = torch.nan, torch.nan, torch.nan
    out = torch.full((85, heads, 128), torch.nan, dtype=torch.bfloat16)
    lse = torch.full((heads, 85), torch.nan)
    kernel = compiled("mla_prefill", target)
    kernel(
        (85 // kernel.constants["BLOCK_Q"] + 4, heads), q, k, v, ends_q, ends_k, out, lse, 85, heads, 3,
        192**-0.5 * math.log2(math.e), seed=seed,
    )  # fmt: skip
    want, want_lse = ref_mla.mla_prefill(q.double(), k.double(), v.double(), ends_q, ends_k)
    assert_within(out, want, 8e-4, 2.01 / 128, cosine=5e-6)
    assert_within(lse, want_lse, 1e-6, 8.01 / 65536)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_moe_count_copy_unpermute(compiled, target, seed):
    """Through a map of three replicas, some of which are not there, and with a shared expert."""
    t, k, e, d, logical = 70, 4, 34, 96, 11
    generator = torch.Generator().manual_seed(seed)
    named = torch.randint(-1, logical, (t, k - 1), generator=generator)
    table = torch.randperm(logical * 3, generator=generator).view(logical, 3)
    table[torch.rand(table.shape, generator=generator) < 0.3] = -1
    topk_idx, _ = ref_moe.expert_slots(named, torch.zeros(t, k - 1), e, table, 1)
    x = torch.randint(0, 256, (t, d), dtype=torch.uint8, generator=generator)
    x_perm, sizes, row_map = ref_moe.moe_permute(x, topk_idx, e)

    count = compiled("moe_count", target)
    chunks = -(-topk_idx.numel() // count.constants["CHUNK"])
    counts = torch.full((chunks, e), -7, dtype=torch.int32)
    blocks = -(-e // count.constants["BLOCK"])
    chosen, sizes_of = torch.full((t, k), -7), (topk_idx.numel(), k - 1, 1, 3, e)
    count((chunks, blocks), named, table, chosen, counts, *sizes_of, seed=seed)
    assert_bitwise_equal(chosen, topk_idx)
    assert_bitwise_equal(counts.sum(0), sizes)
    copied = torch.zeros_like(x_perm)
    copy = compiled("moe_copy_rows", target)
    copy((t * k, 1), x, row_map, copied, k, d, d, 1, d, 1, seed=seed)
    assert_bitwise_equal(copied, x_perm)

    y = normal(x_perm.shape[0], d, seed=seed)
    weights = torch.rand(t, k - 1, generator=generator)
    out = torch.full((t, d), torch.nan, dtype=torch.bfloat16)
    compiled("moe_unpermute", target)((t, 1), y, row_map, weights, out, k, 1, d, seed=seed)
    weights = torch.cat([weights, torch.ones(t, 1)], dim=1)
    assert_bitwise_equal(out, ref_moe.moe_unpermute(y, row_map, weights))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", TARGETS)
def test_moe_place(compiled, target, seed):
    """Three programs, the last one partly filled. All four warps store what they all hold."""
    t, k, e = 70, 4, 33
    topk_idx = torch.randint(-1, e, (t, k), generator=torch.Generator().manual_seed(seed))
    _, sizes, want = ref_moe.moe_permute(torch.zeros(t, 1), topk_idx, e)
    place = compiled("moe_place", target)
    chunks = torch.split(topk_idx.reshape(-1), place.constants["CHUNK"])
    counts = torch.stack([torch.bincount(c[c >= 0], minlength=e) for c in chunks])
    first_row = counts.cumsum(0) - counts + sizes.cumsum(0) - sizes
    row_map = torch.full((t * k,), -7)
    place(len(chunks), topk_idx, first_row, row_map, t * k, e, seed=seed)
    assert_bitwise_equal(row_map, want.reshape(-1))


@SLOW
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_moe_gate(compiled, target, seed):
    """V3's gate for 19 tokens: the last program is partly filled."""
    tokens, d, e, topk = 19, 64, 256, 8
    x, weight = normal(tokens, d, seed=seed), normal(e, d, seed=seed + 1).float() / 8
    bias = torch.rand(e, generator=torch.Generator().manual_seed(seed)) / 4
    limits = {"n_group": 8, "topk_group": 4, "topk": topk, "scale": 2.5}
    want = ref_moe.moe_gate(x, weight, bias, **limits)
    idx = torch.full((tokens, topk), -7)
    weights, scores = torch.full((tokens, topk), torch.nan), torch.full((tokens, e), torch.nan)
    gate = compiled("moe_gate", target)
    gate(
        -(-tokens // gate.constants["TOKENS"]), x, weight, bias, idx, weights, scores,
        tokens, d, e, d, 8, 4, topk, 2.5, seed=seed,
    )  # fmt: skip
    assert_bitwise_equal(idx, want[0])
    torch.testing.assert_close(weights, want[1], rtol=2**-18, atol=2**-20)
    torch.testing.assert_close(scores, want[2], rtol=2**-18, atol=2**-20)
