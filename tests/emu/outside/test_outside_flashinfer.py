"""FlashInfer's Hopper MLA kernel (PyPI flashinfer-python) in the emulator against fp64.

cp.async copies that arrive on mbarriers, wgmma with a transposed B, two warpgroups that exchange
scales over named barriers, and a merge of partial results behind a barrier of the whole grid.

It breaks four rules of PTX without harm, which must be found as formal and as nothing worse.
"""

import flashinfer_support as fi
import pytest
import torch
from outside_support import findings, need_nvcc, seeds_by_tier

emu = pytest.importorskip("dskernels.emu")
pytestmark = [
    need_nvcc(),
    pytest.mark.skipif(
        fi.FOLDER is None,
        reason="PyPI flashinfer-python is not installed (pip install --no-deps flashinfer-python)",
    ),
]


# Probabilities that warps write with stmatrix are read by wgmma two barriers later, without a proxy
# fence; a shuffle names one lane in four while all execute it; outputs staged in shared memory are
# read by other lanes of the warp without a __syncwarp; threads that merged the same row all store
# its logarithm.
FORMAL = {"missing-proxy-fence", "member-mask", "missing-warp-sync"}


def check(case: fi.Case, seed: int, formal: set[str] = FORMAL) -> None:
    found = findings(case.run(seed), "flashinfer mla")
    assert {kind for _, kind, _ in found} == formal
    out, lse = case.exact()
    # bf16 probabilities and a bf16 result: each relative 2^-8, of sums of values of order 1.
    size = out.abs().amax()
    assert ((case.out.double() - out).abs() <= 2.0**-6 * size).all()
    assert ((case.lse.double() - lse).abs() <= 2.0**-7).all()
    assert not torch.isnan(case.out).any()


@pytest.mark.parametrize("seed", seeds_by_tier())
def test_decode(seed):
    check(fi.Case([1, 1], [37, 150], heads=16, page=16, splits=1, causal=False, seed=seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_split_keys_are_merged(seed):
    case = fi.Case([1, 1], [70, 300], heads=64, page=64, splits=3, causal=False, seed=seed)
    check(case, seed, FORMAL | {"equal-stores"})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_tiles_of_queries(seed):
    check(fi.Case([1, 1], [70, 150], heads=128, page=64, splits=1, causal=False, seed=seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_causal_with_several_queries(seed):
    check(fi.Case([3, 2], [90, 133], heads=16, page=1, splits=1, causal=True, seed=seed), seed)
