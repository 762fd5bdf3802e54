"""A call whose signature is remembered skips its checks: no bad call may pass that way.

And the compiled answers about index values (`_C.ops.*_fit`) agree with the rules in Python.
"""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CASES, Case, bits, public, tensors

import dskernels as dsk
from dskernels import _C
from dskernels.ops import _values
from dskernels.ops._registry import SIGNATURES

PLAIN = (torch.Tensor, torch.nn.Parameter)


def forget():
    for signatures in SIGNATURES.values():
        signatures.clear()


# ---- the signature itself ----------------------------------------------------------------------


def new():
    return _C.ops.Signatures(PLAIN, torch.dtype)


def known_after(remembered, asked, grad=False):
    signatures = new()
    signatures.remember(tuple(remembered))
    return signatures.known(tuple(asked), grad)


X = torch.zeros(4, 6)
DIFFERENT = {
    "shape": (X, torch.zeros(6, 4)),
    "rank": (X, torch.zeros(4, 6, 1)),
    "strides": (X, torch.zeros(6, 4).t()),
    "broadcast": (X, torch.zeros(4, 1).expand(4, 6)),
    "dtype": (X, X.double()),
    "same width": (X.half(), X.bfloat16()),
    "signedness": (X.byte(), X.char()),
    "meta": (X, X.to("meta")),
    "bool, int": (True, 1),
    "int, float": (1, 1.0),
    "zero, None": (0, None),
    "false, None": (False, None),
    "int": (1, 2),
    "float": (1e-6, 1e-5),
    "sign of zero": (0.0, -0.0),
    "str": ("ref", "cpu"),
    "dtype argument": (torch.float32, torch.float64),
    "list, tuple": ([1, 128], (1, 128)),
    "list": ([1, 128], [128, 128]),
    "length": ([1, 1], [1]),
    "tensor, None": (X, None),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_another_signature(pair):
    one, other = pair
    for a, b in ((one, other), (other, one)):
        assert not known_after([a], [b])
        assert not known_after([X, a, "ref"], [X, b, "ref"])
    assert known_after([one, 3], [one, 3])


def test_arguments_do_not_run_into_each_other():
    assert not known_after(["ab", "c"], ["a", "bc"])
    assert not known_after([[1], [2, 3]], [[1, 2], [3]])
    assert not known_after([X], [X, None])
    assert not known_after([None, X], [X, None])


DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@pytest.mark.filterwarnings("ignore:.*(ComplexHalf|quantize).*")
def test_every_dtype_is_told_apart():
    """Also torch.uint1 .. uint7, of which DLPack says what it says of uint8."""
    made = {}
    for dtype in DTYPES:
        try:
            tensor = torch.empty(2, dtype=dtype)
        except (RuntimeError, NotImplementedError):  # torch cannot make one
            continue
        if known_after([tensor], [tensor]):
            made[dtype] = tensor
    assert {torch.float32, torch.float8_e4m3fn, torch.uint8, torch.uint7} <= set(made)
    signatures = new()
    for dtype, remembered in made.items():
        signatures.clear()
        signatures.remember((remembered,))
        assert [d for d, t in made.items() if signatures.known((t,), False)] == [dtype]


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("value", [
    X.as_subclass(Subclass), X.to("meta"), X.to_sparse(), 2**70, "\ud800", [1.0], [True], {}, dir,
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_what_has_no_signature_is_never_known(value):
    assert not known_after([value], [value])


def test_equal_arguments_are_the_same_signature():
    again = torch.ones(4, 6)
    assert known_after([X, 3, None, "ref"], [again, 3, None, "".join("ref")])
    assert known_after([X], [torch.nn.Parameter(X, requires_grad=False)])


def test_gradients_and_lazy_negation_go_to_torch():
    leaf = torch.zeros(4, 6, requires_grad=True)
    assert not known_after([X], [leaf], grad=True)
    assert known_after([X], [leaf], grad=False)
    assert not known_after([X], [torch._neg_view(X)])


def test_memory_is_bounded():
    signatures = new()
    for size in range(_C.ops.Signatures.CAPACITY + 10):
        signatures.remember((size,))
        assert signatures.known((size,), False)
    assert len(signatures) <= _C.ops.Signatures.CAPACITY


# ---- through the public functions --------------------------------------------------------------


def outcome(case):
    """What a call does, as something to compare: its results' bits, or its error."""
    try:
        results = tensors(case.call(public(case), backend="ref"))
    except Exception as error:
        return type(error), str(error)
    return [(t.dtype, t.shape, t.requires_grad, _bytes(t)) for t in results]


def _bytes(t):
    return None if t.is_meta else bytes(bits(t).numpy())


def variants(value):
    """Values near a good one: most of them are bad, some are good, all may follow it."""
    if isinstance(value, dsk.ScaledTensor):
        return [_rebuilt(value, data=d) for d in variants(value.data)] + [
            _rebuilt(value, scale=s) for s in variants(value.scale)
        ]
    if isinstance(value, torch.Tensor):
        return _tensor_variants(value)
    if isinstance(value, bool):
        return [not value, int(value), None]
    if isinstance(value, int):
        return [value + 1, 0, -value, float(value), str(value), None, 2**70]
    if isinstance(value, float):
        return [value * 2, int(value), "x", None]
    if isinstance(value, (list, tuple)):
        return [type(value)(v) for v in ([], [*value, 1], [-1] * len(value), ["x"])]
    return ["nonsense", None, 1]


def _tensor_variants(t):
    yield_ = [t.double() if t.is_floating_point() else t.float(), t.to("meta"), t.unsqueeze(0)]
    yield_ += [t.clone(), torch.stack((t, t), -1)[..., 0], t.as_subclass(Subclass), None]
    if t.dim():
        yield_ += [t[:-1], t.transpose(0, -1), t[:1].expand(t.shape), torch.cat((t, t))]
    if t.is_floating_point() and t.element_size() > 1:
        yield_ += [torch._neg_view(t.clone()), t.clone().requires_grad_()]
    elif not t.is_floating_point():
        yield_ += [t.int(), t.long(), t + 1, t - 3, t * 1000, torch.zeros_like(t)]
    return yield_


def _rebuilt(q, **parts):
    """A ScaledTensor past its own validation."""
    new = object.__new__(dsk.ScaledTensor)
    new.__dict__.update({**vars(q), **parts})
    return new


def changed(case, key, value):
    args, kwargs = list(case.args), dict(case.kwargs)
    if isinstance(key, int):
        args[key] = value
    else:
        kwargs[key] = value
    return Case(case.id, case.op, tuple(args), kwargs, case.diff, case.writes)


def changes(case):
    for key, value in [*enumerate(case.args), *case.kwargs.items()]:
        for other in variants(value):
            # What a case writes to is cloned by it, so it must be a tensor.
            if other is not None or key not in case.writes:
                yield changed(case, key, other)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_good_call_lets_no_bad_one_pass(case):
    """After the good call, each call that differs in one argument does what it does with nothing
    remembered."""
    bad = 0
    for call in changes(case):
        forget()
        expected = outcome(call)
        forget()
        case.call(public(case), backend="ref")
        case.call(public(case), backend="ref")
        assert outcome(call) == expected
        bad += isinstance(expected, tuple)
    assert bad > 0


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_any_history_of_calls_changes_nothing(data):
    """The same with two arguments changed, after a history of good and bad calls of one op."""
    case = data.draw(st.sampled_from(CASES), "case")
    several = st.sampled_from(list(changes(case)))
    history = data.draw(st.lists(several, max_size=6), "history")
    call = data.draw(st.sampled_from(list(changes(data.draw(several)))), "call")
    forget()
    expected = outcome(call)
    forget()
    for earlier in (case, *history, case):
        outcome(earlier)
    assert outcome(call) == outcome(call) == expected


def test_the_second_call_is_remembered():
    """The point of it all; and the dispatcher's way, which remembers nothing, is still checked."""
    forget()
    x = torch.randn(3, 8)
    dsk.swiglu(x, backend="ref")
    assert len(SIGNATURES["swiglu"]) == 1
    assert SIGNATURES["swiglu"].known((torch.randn(3, 8), "ref"), True)
    with pytest.raises(ValueError, match="an even last dimension"):
        torch.ops.dskernels.swiglu(x[:, :7], "ref")


def test_a_refused_call_is_not_remembered():
    forget()
    for _ in range(3):
        with pytest.raises(ValueError, match="an even last dimension"):
            dsk.swiglu(torch.randn(3, 7), backend="ref")
    assert len(SIGNATURES["swiglu"]) == 0


# ---- values of index tensors -------------------------------------------------------------------

RULES = {
    "index": lambda t: _values.index("op", "t", t, -1, 5),
    "row_groups": lambda t: _values.row_groups("op", t, 3),
    "sizes_of_parts": lambda t: _values.sizes_of_parts("op", t, 9),
    "sizes_of_parts-2": lambda t: _values.sizes_of_parts("op", t, 12, 2),
    "sizes_within": lambda t: _values.sizes_within("op", t, 6),
    "ends": lambda t: _values.ends("op", "t", t, 7),
}


def answer(rule, *args):
    try:
        results = rule(*args)
    except ValueError as error:
        return str(error)
    results = results if isinstance(results, tuple) else (results,)
    return [(t.dtype, t.tolist()) for t in results]


def both(monkeypatch_context, rule, *args):
    """(with the compiled library, without it)."""
    compiled = answer(rule, *args)
    with monkeypatch_context() as patch:
        patch.setattr(_values, "_native", None)
        return compiled, answer(rule, *args)


EXTREMES = (-(2**63), 2**63 - 1, 2**62, -(2**31), 2**31 - 1)
WIDTHS = st.sampled_from((torch.int32, torch.int64))


def integers(dtype):
    small = st.integers(-3, 13)
    limit = torch.iinfo(dtype)
    far = st.sampled_from([v for v in EXTREMES if limit.min <= v <= limit.max])
    return st.one_of(small, small, st.integers(0, 4), far)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_compiled_rules_are_the_python_rules(rule, data):
    dtype = data.draw(WIDTHS)
    # ends() has at least one element: its op's check sees to that.
    values = data.draw(st.lists(integers(dtype), min_size=1, max_size=6))
    if data.draw(st.booleans()):
        values.sort()
    if data.draw(st.booleans()):
        values[0] = 0
    t = torch.tensor(values, dtype=dtype)
    if data.draw(st.booleans()):
        t = torch.stack((t, torch.full_like(t, 99)), 1)[:, 0]  # strided, over poison
    compiled, python = both(pytest.MonkeyPatch.context, rule, t)
    assert compiled == python


@pytest.mark.parametrize(
    "pages,length,fits",
    [
        ([2, 9], 4, True),  # the second page is not read
        ([2, 9], 5, False),
        ([2, 0], 8, True),
        ([2, 0], 9, False),
        ([3, 0], 1, False),  # pages are 0 .. 2
        ([3, 0], 0, True),
        ([-1, 0], 1, False),
        ([0, 0], -1, False),
    ],
)
def test_edges_of_the_page_rule(pages, length, fits):
    table, lens = torch.tensor([[0, 1], pages]), torch.tensor([8, length])
    assert _C.ops.pages_fit(table, lens, 4, 3) is fits
    native, python = both(
        pytest.MonkeyPatch.context, _values.pages, "op", torch.empty(3, 4, 8), table, lens
    )
    assert native == python and isinstance(native, list) is fits


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_compiled_page_rule_is_the_python_rule(data):
    batch, columns = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    page, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    dtype = data.draw(WIDTHS)
    # Mostly in range: one bad value hides what the rule does with the others.
    cells = st.one_of(
        *[st.integers(0, max(count - 1, 0))] * 4, st.integers(0, count), integers(dtype)
    )
    cell_values = data.draw(
        st.lists(cells, min_size=batch * columns, max_size=batch * columns), "table"
    )
    table = torch.tensor(cell_values, dtype=dtype).view(batch, columns)
    if data.draw(st.booleans()):
        table = table.t().contiguous().t()
    lengths = st.one_of(*[st.integers(0, columns * page)] * 4, st.integers(-1, columns * page + 1))
    length_values = data.draw(st.lists(lengths, min_size=batch, max_size=batch), "lens")
    lens = torch.tensor(length_values, dtype=data.draw(WIDTHS))
    cache = torch.empty(count, page, 8)
    rule = _values.pages
    compiled, python = both(pytest.MonkeyPatch.context, rule, "op", cache, table, lens)
    assert compiled == python


@pytest.mark.parametrize("question", ["indices_fit", "sizes_fit", "ends_fit", "pages_fit"])
def test_only_small_integers_on_the_cpu_are_read(question):
    numbers = {"indices_fit": 2, "sizes_fit": 3, "ends_fit": 1, "pages_fit": 2}[question]
    given = [torch.zeros(2)] if question != "pages_fit" else [torch.zeros(2, 2), torch.zeros(2)]
    with pytest.raises(ValueError, match="expected int32 or int64, got DLPack type code 2"):
        getattr(_C.ops, question)(*given, *[1] * numbers)


WITHOUT = """
import sys
sys.modules["dskernels._C"] = None
import torch
import dskernels as dsk
from dskernels.ops._registry import SIGNATURES
assert set(SIGNATURES.values()) == {None}
x = torch.randn(3, 4)
perm, sizes, row_map = dsk.moe_permute(x, torch.tensor([[0], [2], [1]]), 3)
assert torch.equal(perm[row_map[:, 0]], x) and sizes.tolist() == [1, 1, 1]
for _ in range(2):
    try:
        dsk.moe_permute(x, torch.tensor([[0], [3], [1]]), 3)
    except ValueError as error:
        assert str(error) == "moe_permute: topk_idx: expected indices in [-1, 3), got 3"
    else:
        raise AssertionError("accepted")
"""


def test_ops_work_without_the_compiled_library():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)
