"""Linear layers trained in FP8: three FP8 products, gradients against fp64, torch.compile."""

import pytest
import torch
from backend_axis import interpret_once, need, on_cpu, on_device

import dskernels as dsk
from dskernels.nn import Fp8Linear, fp8_linear
from dskernels.testing import calc_diff, relative_error

# What quantising both operands to 3 mantissa bits costs: DeepGEMM's own bar for its results.
BOUND = 1e-3


def step(x, weight, grad, backend, **options):
    """(y, dx, dw) of one layer, on the CPU."""
    x = on_device(x.clone(), backend).requires_grad_()
    weight = on_device(weight.clone(), backend).requires_grad_()
    with dsk.use_backend(backend):
        y = fp8_linear(x, weight, **options)
        y.backward(on_device(grad, backend))
    return on_cpu(y.detach()), on_cpu(x.grad), on_cpu(weight.grad)


def exact(x, weight, grad):
    x, weight, grad = x.double(), weight.double(), grad.double()
    flat_x, flat_g = x.flatten(0, -2), grad.flatten(0, -2)
    return x @ weight.t(), grad @ weight, flat_g.t() @ flat_x


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("shape,n", [((48, 256), 144), ((3, 7, 144), 272)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_and_gradients_are_fp8_close_to_fp64(backend, shape, n, dtype, scale_format):
    need("gemm", backend, n=n, k=shape[-1])
    interpret_once(backend, dtype == torch.bfloat16 and (scale_format == "fp32") == (n == 144))
    x, weight = torch.randn(shape).to(dtype), (0.1 * torch.randn(n, shape[-1])).to(dtype)
    grad = torch.randn(*shape[:-1], n).to(dtype)
    got = step(x, weight, grad, backend, scale_format=scale_format)
    for name, actual, want in zip(("y", "dx", "dw"), got, exact(x, weight, grad)):
        assert actual.dtype == dtype and actual.shape == want.shape
        assert calc_diff(actual, want) < BOUND, name


def test_every_backend_gives_what_the_reference_gives(backend):
    """The quantised operands are the same bits, so only the order of sums is left."""
    need("gemm", backend, n=128, k=128)
    x, weight, grad = torch.randn(40, 256), torch.randn(144, 256), torch.randn(40, 144)
    want = step(x, weight, grad, "ref")
    got = step(x, weight, grad, backend)
    for actual, expected in zip(got, want):
        # Hopper's accumulator keeps about 14 bits within 128 of k.
        assert relative_error(actual, expected) < 2e-3


def test_outliers_stay_in_their_group():
    """Fine-grained scales: an outlier of 1000 costs its own 128 inputs, not its token."""
    x, weight = torch.randn(16, 512), torch.randn(64, 512)
    x[3, 5] = 1000.0
    y = fp8_linear(x, weight).double()
    rest = x.clone()
    rest[3, :128] = 0
    without = fp8_linear(rest, weight).double()
    assert calc_diff(without[3], rest[3].double() @ weight.double().t()) < BOUND
    assert calc_diff(y, x.double() @ weight.double().t()) < BOUND


def test_a_power_of_two_scale_makes_turning_an_activation_nearly_free():
    """V3 report 3.5.2: 1x128 to 128x1 adds an error with fp32 scales, and none within the format's
    normal range with powers of two."""
    x = torch.randn(256, 256)
    errors = {}
    for scale_format in ("fp32", "pow2"):
        q = dsk.quantize(x, (1, 128), scale_format)
        again = dsk.quantize(q, (1, 128), scale_format, transpose=True)
        errors[scale_format] = relative_error(again.dequantize().t(), q.dequantize())
    assert errors["pow2"] < 0.05 * errors["fp32"]


def test_frozen_fp8_weights_pass_gradients_on():
    x, weight = torch.randn(20, 256, requires_grad=True), torch.randn(144, 256)
    q = dsk.quantize(weight, (128, 128))
    y = fp8_linear(x, q)
    assert torch.equal(y, dsk.gemm(dsk.quantize(x.detach()), q, out_dtype=torch.float32))
    y.sum().backward()
    want = torch.ones(20, 144).double() @ q.dequantize(torch.float64)
    assert calc_diff(x.grad, want) < BOUND


def test_compiles_without_a_graph_break(backend):
    if backend not in ("ref", "cpu"):
        pytest.skip("what is compiled around the ops is the same for every backend")
    torch._dynamo.reset()
    layer = Fp8Linear(128, 64)
    x = torch.randn(5, 16, 128, requires_grad=True)
    with dsk.use_backend(backend):
        want = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(x).square().sum(), (x, layer.weight))
    for actual, expected in zip(got, want):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_learns():
    torch.manual_seed(1)
    target, layer = torch.randn(32, 128), Fp8Linear(128, 32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(120):
        x = torch.randn(64, 128)
        loss = (layer(x) - x @ target.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What is left is the noise of FP8: the products are of size 128.
    assert loss < 0.01 * 128
