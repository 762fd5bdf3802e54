"""Error budgets: bitwise where the order of sums is pinned, else a multiple of the error that plain
low-precision PyTorch makes on the same input, both measured against fp64."""

from __future__ import annotations

import torch


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 sum(xy) / sum(x^2 + y^2) in fp64: 0 for equal tensors, about half the squared relative
    error for close ones. Two all-zero tensors differ by 0; a NaN in either gives NaN."""
    x, y = x.double(), y.double()
    energy = (x * x + y * y).sum()
    return 0.0 if energy == 0 else float(1 - 2 * (x * y).sum() / energy)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """max |got - exact| / max |exact|, in fp64; 0 for empty tensors, inf against an exact 0."""
    if not got.numel():
        return 0.0
    error = (got.double() - exact.double()).abs().max()
    if error == 0:
        return 0.0
    return float(error / exact.double().abs().max())


def assert_close_to_exact(
    got: torch.Tensor,
    exact: torch.Tensor,
    baseline: torch.Tensor,
    *,
    factor: float = 2.0,
    floor: float = 0.0,
) -> None:
    """Assert max |got - exact| <= factor * max |baseline - exact| + floor * max |exact|.

    exact is the result in fp64 of the SAME (already rounded) inputs, baseline what plain PyTorch
    computes in got's precision. Where exact is NaN or infinite got must be the very same; where it
    is finite, got must be. Shapes must agree. Raises AssertionError with both errors.
    """
    if not got.shape == exact.shape == baseline.shape:
        shapes = [tuple(t.shape) for t in (got, exact, baseline)]
        raise AssertionError(f"shapes of got, exact, baseline differ: {shapes}")
    finite = torch.isfinite(exact)
    special = got[~finite].double(), exact[~finite].double()
    if not torch.equal(special[0].nan_to_num(nan=0.5), special[1].nan_to_num(nan=0.5)):
        raise AssertionError("got differs from exact where exact is NaN or infinite")
    if not torch.isfinite(got[finite]).all():
        raise AssertionError("got is NaN or infinite where exact is finite")
    if not finite.any():
        return
    truth = exact[finite].double()
    error = (got[finite].double() - truth).abs().max()
    baseline_error = (baseline[finite].double() - truth).abs().max()
    budget = factor * baseline_error + floor * truth.abs().max()
    if not error <= budget:
        raise AssertionError(
            f"error {error:.3e} exceeds {budget:.3e} = {factor} x PyTorch's {baseline_error:.3e} "
            f"+ {floor} x max|exact| {truth.abs().max():.3e}"
        )


def assert_bitwise_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    """Assert the same dtype, shape and bits; -0 and +0 differ, every NaN equals every NaN."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(
            f"expected {want.dtype} {tuple(want.shape)}, got {got.dtype} {tuple(got.shape)}"
        )
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    same = got.contiguous().view(as_bits) == want.contiguous().view(as_bits)
    if got.dtype.is_floating_point:
        same |= got.float().isnan() & want.float().isnan()
    if not same.all():
        where = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} elements differ; first at {where}: "
            f"expected {want[where].item()!r}, got {got[where].item()!r}"
        )
