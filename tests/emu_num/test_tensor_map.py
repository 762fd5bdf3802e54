"""Tensor maps: the driver's rules, the walk against a per-element model, tensormap.replace."""

import itertools

import numpy as np
import pytest

from .conftest import NUM

SIZES = [1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4]
F16, F32, F64, BF16, F32_FTZ, TF32 = 6, 7, 8, 9, 10, 11


def base(**changes):
    args = {
        "type": F16,
        "rank": 3,
        "address": 4096,
        "dims": [64, 10, 3],
        "strides": [128, 1280],
        "box": [32, 4, 2],
        "element_strides": [1, 1, 1],
        "swizzle": 2,
    }
    return {**args, **changes}


def test_a_legal_map_round_trips():
    for changes in ({}, {"rank": 1, "dims": [2**32], "strides": [], "box": [32]}, {"fill": 1}):
        args = base(**changes)
        assert NUM.check_tensor_map(args) == ""
        error, back = NUM.decode_tensor_map(NUM.encode_tensor_map(args))
        assert error == ""
        for name in ("type", "rank", "address", "swizzle"):
            assert back[name] == args[name]
        for name in ("dims", "strides", "box"):
            assert back[name] == args[name][: len(back[name])]
        assert back["fill"] == args.get("fill", 0)


REFUSED = [
    ({"type": 13}, "tensorDataType", "13"),
    ({"rank": 0}, "tensorRank: expected 1..5", "0"),
    ({"rank": 6}, "tensorRank: expected 1..5", "6"),
    ({"rank": 2, "interleave": 1}, "tensorRank: expected 3..5", "2"),
    ({"address": 4104}, "globalAddress: expected a multiple of 16", "4104"),
    ({"interleave": 2, "swizzle": 1, "address": 4112}, "multiple of 32", "4112"),
    ({"dims": [64, 0, 3]}, "globalDim[1]: expected 1..2^32", "0"),
    ({"dims": [2**32 + 1, 1, 1]}, "globalDim[0]", str(2**32 + 1)),
    ({"strides": [136, 1280]}, "globalStrides[0]: expected a multiple of 16", "136"),
    ({"strides": [128, 2**40]}, "globalStrides[1]: expected less than 2^40", str(2**40)),
    ({"interleave": 2, "swizzle": 1, "strides": [144, 1280]}, "multiple of 32", "144"),
    ({"box": [32, 257, 2]}, "boxDim[1]: expected 1..256", "257"),
    ({"box": [0, 4, 2]}, "boxDim[0]: expected 1..256", "0"),
    ({"box": [12, 4, 2]}, "multiple of 16 bytes", "24"),
    ({"box": [40, 4, 2]}, "at most the swizzle span of 64 bytes", "80"),
    ({"element_strides": [1, 9, 1]}, "elementStrides[1]: expected 1..8", "9"),
    ({"element_strides": [1, 1, 0]}, "elementStrides[2]: expected 1..8", "0"),
    ({"interleave": 3}, "interleave", "3"),
    ({"interleave": 2}, "swizzle: expected 32B (1) with interleave 32B", "2"),
    ({"swizzle": 4}, "swizzle", "4"),
    ({"l2": 4}, "l2Promotion", "4"),
    ({"fill": 2}, "oobFill", "2"),
    ({"type": 1, "fill": 1}, "oobFill: expected 0 for a type that is not floating", "1"),
]


@pytest.mark.parametrize("changes,expected,actual", REFUSED, ids=lambda x: str(x)[:30])
def test_illegal_maps_are_refused_by_name(changes, expected, actual):
    why = NUM.check_tensor_map(base(**changes))
    assert expected in why and why.endswith(f"got {actual}")
    with pytest.raises(ValueError, match="tensor map"):
        NUM.encode_tensor_map(base(**changes))


def test_limits_are_exact():
    assert NUM.check_tensor_map(base(box=[256, 256, 256], swizzle=0)) == ""
    assert NUM.check_tensor_map(base(dims=[2**32] * 3)) == ""
    assert NUM.check_tensor_map(base(strides=[2**40 - 16, 0])) == ""
    assert NUM.check_tensor_map(base(element_strides=[99, 8, 8])) == ""
    assert NUM.check_tensor_map(base(box=[64, 4, 2], swizzle=3)) == ""
    assert "im2col" in NUM.refuse_im2col()


def test_other_bytes_are_not_a_map():
    assert "not an encoded tensor map" in NUM.decode_tensor_map(bytes(128))[0]
    broken = bytearray(NUM.encode_tensor_map(base()))
    broken[7] = 9
    assert "swizzle" in NUM.decode_tensor_map(bytes(broken))[0]


def model_walk(args, coords, shared):
    """shared byte -> global byte (None: fill), element by element from the documentation."""
    size = SIZES[args["type"]]
    plain = args.get("interleave", 0) == 0
    steps = [1 if d == 0 and plain else args["element_strides"][d] for d in range(args["rank"])]
    counts = [-(-args["box"][d] // steps[d]) for d in range(args["rank"])]
    placed = {}
    linear = 0
    for index in itertools.product(*(range(c) for c in reversed(counts))):
        index = index[::-1]
        at = [coords[d] + index[d] * steps[d] for d in range(args["rank"])]
        inside = all(0 <= at[d] < args["dims"][d] for d in range(args["rank"]))
        where = args["address"] + at[0] * size
        where += sum(at[d] * args["strides"][d - 1] for d in range(1, args["rank"]))
        for byte in range(size):
            address = shared + linear + byte
            row = address >> 7 & (1 << args["swizzle"]) - 1
            placed[address ^ (row << 4)] = where + byte if inside else None
        linear += size
    return placed


def random_map(rng):
    rank = int(rng.integers(1, 6))
    kind = int(rng.integers(13))
    size = SIZES[kind]
    swizzle = int(rng.integers(4))
    span = 16 << swizzle if swizzle else 64
    inner = int(rng.integers(1, span // 16 + 1)) * 16 // size
    dims = [int(rng.integers(1, 40))] + [int(rng.integers(1, 7)) for _ in range(rank - 1)]
    strides = [16 * int(rng.integers(1, 60)) for _ in range(rank - 1)]
    box = [inner] + [int(rng.integers(1, 5)) for _ in range(rank - 1)]
    steps = [1] + [int(rng.integers(1, 4)) for _ in range(rank - 1)]
    args = dict(type=kind, rank=rank, address=1 << 20, dims=dims, strides=strides, box=box)
    args.update(element_strides=steps, swizzle=swizzle, interleave=0)
    if rank >= 3 and rng.integers(4) == 0:
        args.update(interleave=1, element_strides=[int(rng.integers(1, 4)), *steps[1:]])
    coords = [int(rng.integers(-6, d + 4)) for d in dims]
    return args, coords


@pytest.mark.parametrize("seed", range(60))
def test_walk_equals_the_per_element_model(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
        args, coords = random_map(rng)
        assert NUM.check_tensor_map(args) == ""
        shared = 128 * int(rng.integers(0, 40))
        got = {}
        for source, offset, length, fill in NUM.walk_box(args, coords, shared):
            assert length > 0
            for i in range(length):
                where = shared + offset + i
                assert where not in got, "two runs write one byte"
                got[where] = None if fill else source + i
        want = model_walk(args, coords, shared)
        assert got == want
        assert NUM.box_bytes(args) == len(want)


def test_far_coordinates_fill_everything():
    args = base()
    for coords in ([2**31 - 1] * 3, [-(2**31)] * 3, [0, -(2**31), 0], [0, 0, 2**31 - 1]):
        runs = NUM.walk_box(args, coords, 0)
        assert all(fill for *_, fill in runs)
        assert sum(length for _, _, length, _ in runs) == NUM.box_bytes(args)


@pytest.mark.parametrize("kind", range(13))
def test_fill_patterns(kind):
    assert NUM.fill_bytes(base(type=kind), 16) == bytes(16)
    if kind < F16:
        return
    raw = NUM.fill_bytes(base(type=kind, fill=1), 16)
    view = {2: np.float16, 4: np.float32, 8: np.float64}[SIZES[kind]]
    if kind == BF16:
        assert np.frombuffer(raw, np.uint16).tolist() == [0x7FFF] * 8
    else:
        assert np.isnan(np.frombuffer(raw, view)).all()


def test_replace_builds_a_map_from_zero():
    want = base(element_strides=[1, 2, 1], fill=1)
    raw = bytes(128)
    edits = [("global_address", 0, want["address"]), ("rank", 0, 2), ("elemtype", 0, 6)]
    edits += [("global_dim", i, v) for i, v in enumerate(want["dims"])]
    edits += [("global_stride", i, v) for i, v in enumerate(want["strides"])]
    edits += [("box_dim", i, v) for i, v in enumerate(want["box"])]
    edits += [("element_stride", i, v) for i, v in enumerate(want["element_strides"])]
    edits += [("interleave_layout", 0, 0), ("swizzle_mode", 0, 2), ("fill_mode", 0, 1)]
    for field, ordinal, value in edits:
        why, raw = NUM.replace_field(raw, field, ordinal, value)
        assert why == ""
    error, got = NUM.decode_tensor_map(raw)
    assert error == ""
    for name in ("type", "rank", "address", "dims", "strides", "box", "element_strides", "fill"):
        assert got[name] == want[name]


def test_replace_uses_ptx_numbers_for_types():
    order = [0, 1, 2, 3, 4, 5, F16, F32, F32_FTZ, F64, BF16, TF32, 12]
    raw = NUM.encode_tensor_map(base(box=[16, 1, 1], swizzle=0))
    for ptx, driver in enumerate(order):
        why, edited = NUM.replace_field(raw, "elemtype", 0, ptx)
        assert why == ""
        assert NUM.decode_tensor_map(edited)[1]["type"] == driver


@pytest.mark.parametrize(
    "field,ordinal,value",
    [
        ("rank", 0, 5),
        ("box_dim", 0, 257),
        ("box_dim", 0, 0),
        ("box_dim", 5, 1),
        ("global_dim", 0, 0),
        ("global_dim", 0, 2**32 + 1),
        ("global_stride", 4, 16),
        ("element_stride", 0, 9),
        ("elemtype", 0, 13),
        ("interleave_layout", 0, 3),
        ("swizzle_mode", 0, 4),
        ("fill_mode", 0, 2),
    ],
)
def test_replace_refuses(field, ordinal, value):
    raw = NUM.encode_tensor_map(base())
    why, after = NUM.replace_field(raw, field, ordinal, value)
    assert "tensormap.replace" in why and after == raw
    why, _ = NUM.replace_field(b"\x01" * 128, field, 0, 1)
    assert "neither" in why
