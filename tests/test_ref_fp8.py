"""The casts against tables of every representable value, built from the formats' definitions."""

import numpy as np
import pytest
import torch

from dskernels.ref import fp8

FORMATS = {  # exponent bits, mantissa bits, bias, largest finite code, cast, code of a result
    "e4m3": (4, 3, 7, 0x7E, fp8.cast_e4m3, lambda y: y.view(torch.uint8).numpy().astype(int)),
    "e5m6": (5, 6, 15, (30 << 6) | 63, fp8.cast_e5m6, lambda y: e5m6_codes(y)),
}


def e5m6_codes(y):
    bits = y.view(torch.int16).numpy().astype(int) & 0xFFFF
    nan = np.isnan(y.float().numpy())
    assert not (bits & 15)[~nan].any(), "the 4 lowest bits of the float16 container must be 0"
    return bits >> 4


def values_of(mantissa_bits, bias, last):
    """The positive values by code, from sign/exponent/mantissa, as exact fp64."""
    table = []
    for code in range(last + 1):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if exponent:
            mantissa += 1 << mantissa_bits
        table.append(mantissa * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
    return np.array(table)


def nearest_code(x, table, sign_bit):
    """Round to nearest, ties to the even code, saturating: by search, with no rounding anywhere."""
    magnitude = np.abs(x).astype(np.float64)
    upper = np.searchsorted(table, magnitude).clip(1, len(table) - 1)
    middle = (table[upper - 1] + table[upper]) / 2  # exact: neighbours differ by a power of two
    up = (magnitude > middle) | ((magnitude == middle) & (upper % 2 == 0))
    return np.where(up, upper, upper - 1) | (np.signbit(x) * sign_bit)


def relevant_values(table):
    """All bf16 and fp16 values, every value of the format, every tie, and their neighbours."""
    sixteen = np.arange(1 << 16, dtype=np.uint16)
    bf16 = (sixteen.astype(np.uint32) << 16).view(np.float32)
    fp16 = sixteen.view(np.float16).astype(np.float32)
    ties = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    special = np.concatenate([table.astype(np.float32), ties])
    special = np.concatenate([special, -special])
    near = [np.nextafter(special, np.float32(direction)) for direction in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = np.concatenate([bf16, fp16, special, *near, bits.view(np.float32)])
    return values[~np.isnan(values)]


@pytest.mark.parametrize("name", FORMATS)
def test_cast_is_round_to_nearest_even_and_saturates(name):
    exponent_bits, mantissa_bits, bias, last, cast, codes = FORMATS[name]
    table = values_of(mantissa_bits, bias, last)
    assert table[-1] == fp8.FORMAT_MAX[name]
    x = relevant_values(table)
    got = codes(cast(torch.from_numpy(x)))
    want = nearest_code(x, table, 1 << (exponent_bits + mantissa_bits))
    wrong = np.flatnonzero(got != want)
    assert not len(wrong), f"{x[wrong[0]]!r}: code {got[wrong[0]]}, expected {want[wrong[0]]}"


@pytest.mark.parametrize("name", FORMATS)
def test_cast_of_infinities_nan_and_carries(name):
    cast = FORMATS[name][4]
    top = fp8.FORMAT_MAX[name]
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -0.0, 0.0])
    y = cast(x).float()
    assert y[:2].tolist() == [top, -top] and y[2].isnan() and y[3] == top
    assert torch.signbit(y[4]) and not torch.signbit(y[5])
    with pytest.raises(TypeError, match="expected torch.float32, got torch.bfloat16"):
        cast(x.bfloat16())


def test_casts_known_by_heart():
    assert fp8.cast_e4m3(torch.tensor([124.3, 15.5, 2**-10, 3 * 2**-10])).float().tolist() == [
        128.0,  # carry into the exponent
        16.0,  # carry
        0.0,  # tie between 0 and the smallest subnormal: even
        2**-8,  # tie between codes 1 and 2: even
    ]
    # Through float16 this would be rounded twice: 1 + 2^-7 + 2^-12 is above the tie, not on it.
    assert fp8.cast_e5m6(torch.tensor([1 + 2**-7 + 2**-12])).item() == 1 + 2**-6


def test_pack_e5m6_round_trip():
    codes = torch.arange(1 << 12, dtype=torch.int32)
    signed = torch.where(codes >= 0x800, (codes << 4) - 0x10000, codes << 4).to(torch.int16)
    every = signed.view(torch.float16)
    packed = fp8.pack_e5m6(every)
    assert packed.shape == (3 << 11,)
    assert torch.equal(fp8.unpack_e5m6(packed, 1 << 12).view(torch.int16), signed)
    assert packed[3:6].tolist() == [0x02, 0x30, 0x00]  # 0x002 and 0x003, little-endian
    odd = every[:21].view(3, 7)
    assert torch.equal(fp8.unpack_e5m6(fp8.pack_e5m6(odd), 7), odd)
    with pytest.raises(ValueError, match=r"expected uint8 \[..., 12\] for k = 7"):
        fp8.unpack_e5m6(packed, 7)


def test_ceil_pow2_on_every_exponent():
    bits = np.arange(1, 255, dtype=np.uint32) << 23  # 2^-126 .. 2^127
    for mantissa in (0, 1, 0x400000, 0x7FFFFF):
        x = torch.from_numpy((bits | np.uint32(mantissa)).view(np.float32))
        # One more in the exponent field when any mantissa bit is set; 2^127 is E8M0's last.
        want = np.minimum(bits + (np.uint32(1 << 23) if mantissa else np.uint32(0)), 254 << 23)
        assert torch.equal(fp8.ceil_pow2(x), torch.from_numpy(want.view(np.float32)))
    low = torch.tensor([2**-149, 2**-127, 1.5 * 2**-127])
    assert fp8.ceil_pow2(low).tolist() == [2**-127, 2**-127, 2**-126]
    assert fp8.ceil_pow2(torch.tensor([torch.inf, torch.nan])).tolist()[0] == torch.inf
