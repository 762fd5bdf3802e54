"""Format conversions against an independent exact model and torch, exhaustively where possible."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from .conftest import NUM, available_isas

SMALL = {  # exponent bits, fraction bits, bias, has infinity, has NaN
    "e4m3": (4, 3, 7, False, True),
    "e5m2": (5, 2, 15, True, True),
    "e2m1": (2, 1, 1, False, False),
    "e2m3": (2, 3, 1, False, False),
    "e3m2": (3, 2, 3, False, False),
    "f16": (5, 10, 15, True, True),
    "bf16": (8, 7, 127, True, True),
}
ROUNDS = ("rn", "rz", "rm", "rp", "rna")


def values_of(name):
    """code -> Fraction for the finite non-negative codes, from the format's definition."""
    ebits, mbits, bias, has_inf, has_nan = SMALL[name]
    table = []
    top = (1 << ebits) - 1
    for code in range(1 << (ebits + mbits)):
        e, m = code >> mbits, code & ((1 << mbits) - 1)
        if has_inf and e == top:
            break
        if has_nan and not has_inf and code == (1 << (ebits + mbits)) - 1:
            break
        scale = Fraction(2) ** (max(e, 1) - bias - mbits)
        table.append((m + (1 << mbits if e else 0)) * scale)
    return table


def model_round(table, x, mode, negative):
    """Index of the rounded magnitude, len(table) meaning overflow. Ulp beyond the end as inside."""
    import bisect

    limit = table[-1] + (table[-1] - table[-2])  # what the next code would be worth
    if x >= limit:
        low, high, below, above = len(table) - 1, len(table), table[-1], limit
        up_by_nearest = True
    else:
        low = bisect.bisect_right(table, x) - 1
        if table[low] == x:
            return low
        high = low + 1
        below, above = table[low], table[high] if high < len(table) else limit
        twice = 2 * x - below - above
        up_by_nearest = twice > 0 or (twice == 0 and (mode == "rna" or low % 2 == 1))
    if mode in ("rn", "rna"):
        return high if up_by_nearest else low
    if mode == "rz":
        return low
    return high if (mode == "rp") != negative else low


def interesting(name):
    table = values_of(name)
    if len(table) > 600:
        step = len(table) // 300
        table = table[:40] + table[40:-40:step] + table[-40:]
    points = set()
    for a, b in zip(table, table[1:]):
        points |= {a, b, (a + b) / 2, (3 * a + b) / 4, (a + 3 * b) / 4}
    top, ulp = table[-1], table[-1] - table[-2]
    points |= {top + ulp / 4, top + ulp / 2, top + 3 * ulp / 4, top + ulp, top * 3}
    return sorted(points)


@pytest.mark.parametrize("mode", ROUNDS)
@pytest.mark.parametrize("name", SMALL)
def test_encode_against_exact_model(name, mode):
    ebits, mbits, _, has_inf, has_nan = SMALL[name]
    table = values_of(name)
    points = [p for p in interesting(name) if Fraction(float(p)) == p]
    assert len(points) > 20
    for negative in (False, True):
        for saturate in (False, True):
            xs = np.array([-float(p) if negative else float(p) for p in points])
            got = NUM.encode(name, xs, mode, saturate)
            sign = int(negative) << (ebits + mbits)
            for p, code in zip(points, got.tolist()):
                index = model_round(table, p, mode, negative)
                if index == len(table):
                    if saturate or not has_nan:
                        index = len(table) - 1
                    elif has_inf:
                        index = ((1 << ebits) - 1) << mbits
                    else:
                        assert code == 0x7F
                        continue
                assert code == sign | index, (name, mode, negative, saturate, float(p))


@pytest.mark.parametrize("name", SMALL)
def test_decode_every_code(name):
    ebits, mbits, *_ = SMALL[name]
    table = values_of(name)
    width = 1 + ebits + mbits
    codes = np.arange(1 << width, dtype=np.uint32)
    got = NUM.decode(name, codes)
    for code in range(len(table)):
        assert got[code] == float(table[code])
        assert got[code | 1 << (width - 1)] == -float(table[code])
    specials = got[len(table) : 1 << (width - 1)]
    assert not np.isfinite(specials).any()


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("e4m3", torch.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2),
        ("f16", torch.float16),
        ("bf16", torch.bfloat16),
    ],
)
def test_decode_equals_torch(name, dtype):
    wide = torch.int8 if name[0] == "e" else torch.int16
    count = 256 if name[0] == "e" else 65536
    codes = np.arange(count, dtype=np.uint32)
    want = torch.from_numpy(codes.astype(np.int64)).to(wide).view(dtype).double().numpy()
    np.testing.assert_array_equal(NUM.decode(name, codes), want)


def test_nan_inf_and_relu():
    specials = np.array([np.nan, np.inf, -np.inf, -1.0, -0.0])
    assert NUM.encode("f16", specials).tolist() == [0x7FFF, 0x7C00, 0xFC00, 0xBC00, 0x8000]
    assert NUM.encode("f16", specials, relu=True).tolist() == [0x7FFF, 0x7C00, 0, 0, 0]
    assert NUM.encode("bf16", specials).tolist() == [0x7FFF, 0x7F80, 0xFF80, 0xBF80, 0x8000]
    assert NUM.encode("e4m3", specials, satfinite=True).tolist() == [0x7F, 0x7E, 0xFE, 0xB8, 0x80]
    assert NUM.encode("e4m3", specials).tolist() == [0x7F, 0x7F, 0x7F, 0xB8, 0x80]
    assert NUM.encode("e5m2", specials, satfinite=True).tolist() == [0x7F, 0x7B, 0xFB, 0xBC, 0x80]
    assert NUM.encode("e5m2", specials, satfinite=True, relu=True).tolist() == [0x7F, 0x7B, 0, 0, 0]
    assert NUM.encode("e2m1", specials).tolist() == [7, 7, 15, 10, 8]
    assert NUM.encode("tf32", specials[:3]).tolist() == [0x7FFFFFFF, 0x7F800000, 0xFF800000]


def test_ue8m0():
    x = np.array([0.0, 2.0**-127, 2.0**-126, 1.0, 1.5, 2.0, 2.0**127, -1.0, np.nan, 2.0**127 * 1.5])
    assert NUM.encode("ue8m0", x, "rz").tolist() == [0, 0, 1, 127, 127, 128, 254, 255, 255, 254]
    assert NUM.encode("ue8m0", x, "rp").tolist() == [0, 0, 1, 127, 128, 128, 254, 255, 255, 255]
    assert NUM.encode("ue8m0", x, "rp", True)[-1] == 254
    got = NUM.decode("ue8m0", np.array([0, 1, 127, 254, 255], np.uint32))
    np.testing.assert_array_equal(got, [2.0**-127, 2.0**-126, 1.0, 2.0**127, np.nan])


def all_roundings_of_f32():
    """Floats around every boundary of the 8- and 16-bit formats, plus random patterns."""
    rng = np.random.default_rng(1)
    codes = np.arange(65536, dtype=np.uint32)
    bf16 = codes << 16
    near = (bf16[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).reshape(-1)
    f16 = NUM.f16_to_f32(codes.astype(np.uint16)).view(np.uint32)
    ties = (f16[:, None] + np.array([0, 0xFFF, 0x1000, 0x1001])).reshape(-1)
    randoms = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64)
    return np.concatenate([near, ties, randoms]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("isa", available_isas())
def test_array_forms_equal_the_generic_encoder(num, isa):
    num.force_isa(isa)
    x = all_roundings_of_f32()
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    halves = num.encode("f16", wide)
    bf = num.encode("bf16", wide)
    np.testing.assert_array_equal(num.f32_to_f16(x), halves)
    np.testing.assert_array_equal(num.f32_to_bf16(x), bf)
    e4 = num.encode("e4m3", wide, "rn", True)
    e5 = num.encode("e5m2", wide, "rn", True)
    np.testing.assert_array_equal(num.f32_to_e4m3(x), e4)
    np.testing.assert_array_equal(num.f32_to_e5m2(x), e5)
    y = np.ascontiguousarray(x[::-1])
    for name, want, shift in (("f16x2", halves, 16), ("bf16x2", bf, 16)):
        got = getattr(num, f"f32_to_{name}")(x, y)
        np.testing.assert_array_equal(got, (want << shift) | want[::-1])
    for name, want in (("e4m3x2", e4), ("e5m2x2", e5)):
        got = getattr(num, f"f32_to_{name}")(x, y)
        np.testing.assert_array_equal(got, (want << 8) | want[::-1])
    np.testing.assert_array_equal(num.f32_to_tf32_rna(x), num.encode("tf32", wide, "rna"))


@pytest.mark.parametrize("isa", available_isas())
def test_widening_forms_every_code(num, isa):
    num.force_isa(isa)
    halves = np.arange(65536, dtype=np.uint16)
    bytes_ = np.arange(256, dtype=np.uint8)
    want = num.decode("f16", halves.astype(np.uint32)).astype(np.float32)
    np.testing.assert_array_equal(num.f16_to_f32(halves), want)
    assert num.f16_to_f32(halves).view(np.uint32)[0x7C01] == 0x7FFFFFFF
    assert num.f16_to_f32(halves).view(np.uint32)[0x8000] == 0x80000000
    np.testing.assert_array_equal(
        num.bf16_to_f32(halves).view(np.uint32), halves.astype(np.uint32) << 16
    )
    for name in ("e4m3", "e5m2"):
        want = num.decode(name, bytes_.astype(np.uint32))
        got = getattr(num, f"{name}_to_f32")(bytes_)
        np.testing.assert_array_equal(got, want.astype(np.float32))
        assert np.signbit(got[0x80])
        packed = getattr(num, f"{name}x2_to_f16x2")(halves)
        low = num.encode("f16", want)[halves & 0xFF]
        high = num.encode("f16", want)[halves >> 8]
        np.testing.assert_array_equal(packed, (high << 16) | low)


def test_rn_equals_torch_on_fp8():
    x = all_roundings_of_f32()
    x = x[np.isfinite(x) & (np.abs(x) <= 448)]
    want = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(NUM.f32_to_e4m3(x), want)
    want = torch.from_numpy(x).to(torch.float8_e5m2).view(torch.uint8).numpy()
    np.testing.assert_array_equal(NUM.f32_to_e5m2(x), want)
