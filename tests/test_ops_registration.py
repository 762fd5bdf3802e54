"""Every registered op: equal to the reference, opcheck, torch.compile, switching backends."""

import copy

import pytest
import torch
import torch._dynamo.testing
from ops_cases import CASES, public, reference, same, tensors
from ops_support import planted_modules
from torch.utils._python_dispatch import TorchDispatchMode

import dskernels as dsk
from dskernels import backend as dsk_backend
from dskernels.ops._registry import SCHEMAS

by_id = {"argvalues": CASES, "ids": [case.id for case in CASES]}


class Recorder(TorchDispatchMode):
    """Notes every dskernels op with a copy of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "dskernels":
            # A detached copy: opcheck runs the op again, and some ops write.
            kept = [_detached(a) for a in args]
            self.calls.setdefault(op, []).append((kept, dict(kwargs or {})))
        return op(*args, **(kwargs or {}))


def _detached(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def recorded_calls():
    """Every op call, forward and backward, that the cases make: op -> [(args, kwargs)]."""
    recorder = Recorder()
    with recorder:
        for case in CASES:
            case = case.requiring_grad()
            outputs = tensors(case.call(public(case), backend="ref"))
            outputs = [out for out in outputs if out.requires_grad]
            if outputs:
                grads = [torch.ones_like(out) for out in outputs]
                torch.autograd.grad(outputs, case.leaves(), grads, allow_unused=True)
    return recorder.calls


CALLS = recorded_calls()
# Tensor arguments that an op treats as constants, and says so when asked for their gradient.
CONSTANT = {"rope": ("cos", "sin"), "grouped_gemm": ("bias",)}


def test_every_op_has_a_case():
    assert {op._schema.name for op in CALLS} == {f"dskernels::{name}" for name in SCHEMAS}


def test_every_public_op_has_a_case():
    assert {case.op for case in CASES} == set(dsk_backend.OPS) == set(dsk.ops.__all__)


@pytest.mark.parametrize("case", **by_id)
def test_result_is_the_reference(case, backend):
    """Bitwise where the reference runs; native kernels have their own tests of values, and must
    agree here in form."""
    _skip_unsupported(case, backend)
    result, expected = case.call(public(case), backend=backend), case.call(reference(case))
    if backend == "ref" or "reference path" in dsk.supports(case.op, backend).reason:
        same(result, expected)
    assert [_form(t) for t in tensors(result)] == [_form(t) for t in tensors(expected)]


def _skip_unsupported(case, backend):
    """Backends are not all complete, and may refuse what a kernel does not cover; that must come
    as a BackendError with its reason."""
    try:
        case.call(public(case), backend=backend)
    except dsk.BackendError as refusal:
        assert backend not in ("ref", "cpu", "auto")
        pytest.skip(str(refusal))


def _form(t):
    return t.dtype, t.shape, t.device


@pytest.mark.parametrize("case", **by_id)
def test_results_own_their_memory(case, backend):
    _skip_unsupported(case, backend)
    given = {t.untyped_storage().data_ptr() for t in tensors([*case.args, *case.kwargs.values()])}
    result, *_ = case.call(public(case), backend=backend)
    if case.writes:
        return
    for out in tensors(result):
        assert out.numel() == 0 or out.untyped_storage().data_ptr() not in given
        assert out.is_contiguous() or out.dtype == torch.float32  # MN-major scales


UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


EACH = 2  # calls of an op that the default tests give to opcheck, of the up to eight there are


def _utils(args):
    """opcheck's schema test adds up its arguments, which torch cannot do in FP8; for those
    test_no_argument_is_written stands in."""
    fp8 = any(getattr(arg, "dtype", None) == torch.float8_e4m3fn for arg in args)
    return UTILS[1:] if fp8 else UTILS


@pytest.mark.parametrize("op", list(CALLS), ids=[op._schema.name for op in CALLS])
def test_opcheck(op):
    for args, kwargs in CALLS[op][:EACH]:
        torch.library.opcheck(op, args, kwargs, test_utils=_utils(args))


@pytest.mark.slow
@pytest.mark.parametrize("op", list(CALLS), ids=[op._schema.name for op in CALLS])
def test_opcheck_of_the_other_calls(op):
    for args, kwargs in CALLS[op][EACH:]:
        torch.library.opcheck(op, args, kwargs, test_utils=_utils(args))


@pytest.mark.parametrize("op", list(CALLS), ids=[op._schema.name for op in CALLS])
def test_no_argument_is_written(op):
    for args, kwargs in CALLS[op]:
        before = [_detached(arg) for arg in args]
        op(*args, **kwargs)
        for argument, old, new in zip(op._schema.arguments, before, args):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if isinstance(old, torch.Tensor) and not written:
                same(new, old)


def _has_gradient(op):
    name = op._schema.name
    return not op._schema.is_mutable and "backward" not in name and "quant" not in name


DIFFERENTIABLE = [op for op in CALLS if _has_gradient(op)]


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=[op._schema.name for op in DIFFERENTIABLE])
def test_opcheck_requiring_grad(op):
    name = op._schema.name.removeprefix("dskernels::")
    if name in ("mla_decode", "mla_absorb_queries", "mla_absorb_output", "moe_bias_update"):
        pytest.skip("no gradient is defined; test_ops_grad.py holds the error")
    names = [argument.name for argument in op._schema.arguments]
    constants = (*CONSTANT.get(name, ()), "bias" if name.startswith("moe_gate") else "")
    checked = 0
    for args, kwargs in CALLS[op]:
        values = dict(zip(names, args))
        scales = ("a_scale", "w13_scale")
        scaled = any(values.get(scale) is not None for scale in scales)
        if scaled or values.get("form", "group_sizes") != "group_sizes":
            continue
        leaves = [
            arg.clone().requires_grad_()
            if isinstance(arg, torch.Tensor) and arg.is_floating_point() and n not in constants
            else arg
            for n, arg in zip(names, args)
        ]
        # opcheck adds its outputs' sums into the first one's, here an integer's: torch refuses.
        # test_compiled_gradients covers what is left out.
        utils = UTILS[:3] if name.startswith("moe_gate") else UTILS
        torch.library.opcheck(op, leaves, kwargs, test_utils=utils)
        checked += 1
        if checked == EACH:
            break
    assert checked


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", **by_id)
def test_compiles_without_graph_break(case, fresh_compiler):
    compiled = torch.compile(public(case), fullgraph=True, backend="aot_eager")
    same(case.call(compiled), case.call(public(case)))


@pytest.mark.parametrize("case", [c for c in CASES if c.diff], ids=lambda c: c.id)
def test_compiled_gradients(case, fresh_compiler):
    compiled = torch.compile(public(case), fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, public(case)):
        leafy = case.requiring_grad()
        outputs = [o for o in tensors(leafy.call(function)) if o.requires_grad]
        finite = [torch.where(o.isinf(), 0, o) for o in outputs]  # lse of what attends nothing
        total = sum((o.float() ** 2).sum() for o in finite)
        grads.append(torch.autograd.grad(total, leafy.leaves()))
    same(*grads)


@pytest.fixture
def planted():
    """A cpu kernel of rms_norm that adds this much, to tell who ran."""

    def rms_norm(x, weight, eps=1e-6, residual=None):
        return dsk.ref.rowwise.rms_norm(x, weight, eps) + 1024.0

    with planted_modules("cpu", rowwise={"rms_norm": rms_norm}):
        yield 1024.0


def test_switching_backend_recompiles(fresh_compiler, planted):
    """The compiled function runs on the backend in force at the call, not the one it was traced
    with; `planted` marks the results of a fake cpu kernel."""
    x, weight = torch.randn(3, 8), torch.randn(8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: dsk.rms_norm(x, weight), fullgraph=True, backend=counter)
    expected = dsk.rms_norm(x, weight, backend="ref")
    for name, offset in (("ref", 0.0), ("cpu", planted), ("ref", 0.0), ("auto", planted)):
        with dsk.use_backend(name):
            torch.testing.assert_close(compiled(x), expected + offset, rtol=0, atol=0)
    assert counter.frame_count == 3


def test_backend_inside_a_compiled_function(fresh_compiler, planted):
    x, weight = torch.randn(3, 8), torch.randn(8)

    def both(x):
        with dsk.use_backend("cpu"):
            first = dsk.rms_norm(x, weight)
        with dsk.use_backend("ref"):
            second = dsk.rms_norm(x, weight)
        return first, second, dsk.rms_norm(x, weight, backend="cpu")

    results = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    same(results, both(x))
    assert torch.equal(results[0], results[1] + planted)
    assert torch.equal(results[2], results[0])
    assert dsk.current_backend() == "auto"


def test_dynamic_shapes_compile_once(fresh_compiler):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dsk.rms_norm, fullgraph=True, dynamic=True, backend=counter)
    weight = torch.randn(8)
    compiled(torch.randn(3, 8), weight)
    frames = counter.frame_count
    for rows in (5, 9):
        x = torch.randn(rows, 8)
        same(compiled(x, weight), dsk.rms_norm(x, weight))
    assert counter.frame_count == frames


def test_a_chain_of_ops_through_inductor(fresh_compiler):
    """The real compiler: quantise, multiply, and go on with the result."""
    weight = dsk.quantize(torch.randn(32, 160), (128, 128))

    def chain(x, residual):
        y, residual = dsk.rms_norm(x, torch.ones(160), residual=residual)
        return dsk.gemm(dsk.quantize(y), weight).float() * 2 + residual[:, :32]

    x, residual = torch.randn(4, 160), torch.randn(4, 160)
    same(torch.compile(chain, fullgraph=True)(x, residual), chain(x, residual))
