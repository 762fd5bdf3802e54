"""pytest-benchmark's table of the CPU ops, native and on the reference.

    python -m pytest bench/test_cpu_ops.py --benchmark-only

Small shapes: what an op costs beyond its products shows here. `python -m bench.report` compares
real shapes with the peers.
"""

import pytest
import torch

import dskernels as dsk

T, D, E, K, I = 32, 1024, 16, 4, 256  # tokens, width, experts, experts of a token, their width


def bf16(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def routed():
    idx = torch.rand(T, E, generator=torch.Generator().manual_seed(1)).topk(K).indices
    return idx, torch.full((T, K), 1 / K)


def gate():
    x, weight, bias = bf16(T, D), bf16(E, D), torch.zeros(E)
    return lambda: dsk.moe_gate(x, weight, bias, n_group=4, topk_group=2, topk=K)


def permute_and_back():
    x, (idx, weights) = bf16(T, D), routed()

    def both():
        rows, _, row_map = dsk.moe_permute(x, idx, E)
        return dsk.moe_unpermute(rows, row_map, weights)

    return both


def experts():
    x, (idx, weights) = bf16(T, D), routed()
    w13, w2 = (dsk.quantize(bf16(*shape), (128, 128)) for shape in ((E, 2 * I, D), (E, D, I)))
    return lambda: dsk.moe_experts(x, w13, w2, idx, weights)


def product():
    a, b = dsk.quantize(bf16(T, D)), dsk.quantize(bf16(512, D), (128, 128))
    return lambda: dsk.gemm(a, b)


def weight_gradient():
    a, b = (dsk.quantize(bf16(rows, 256)) for rows in (512, D))
    return lambda: dsk.gemm(a, b)


def decode():
    cache, table = bf16(64, 16, 576), torch.arange(64, dtype=torch.int32).view(1, 64)
    q, lens = bf16(1, 1, 16, 576), torch.tensor([1000], dtype=torch.int32)
    return lambda: dsk.mla_decode(q, cache, table, lens)


def quantised_swiglu():
    x = bf16(T, 2 * D)
    return lambda: dsk.swiglu_quantize(x)


def norm():
    x, weight = bf16(T, D), torch.ones(D)
    return lambda: dsk.rms_norm(x, weight)


CASES = [gate, permute_and_back, experts, product, weight_gradient, decode, quantised_swiglu, norm]


@pytest.mark.parametrize("backend", ["cpu", "ref"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_op(benchmark, case, backend):
    call = case()
    with dsk.use_backend(backend):
        benchmark.pedantic(call, rounds=15, warmup_rounds=1)
