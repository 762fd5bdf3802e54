"""CUTLASS example 67, FP8 GEMM with blockwise scaling for Hopper, in the emulator against fp64.

Cooperative warpgroups, clusters of 2 with multicast, scales by cp.async, a TMA epilogue. Slow:
compiling the example takes a minute.
"""

import cutlass_support as cutlass
import pytest
from outside_support import findings, need_nvcc

pytest.importorskip("dskernels.emu")
pytestmark = [
    pytest.mark.slow,
    need_nvcc(),
    pytest.mark.skipif(
        cutlass.FOLDER is None,
        reason="PyPI nvidia-cutlass is not installed (pip install --no-deps nvidia-cutlass)",
    ),
]


@pytest.mark.parametrize("seed", range(20))
def test_example_67(seed):
    case = cutlass.Case(200, 264, 400, seed)
    findings(case.run(seed), "cutlass example 67")
    exact, size = case.exact()
    # 13 fraction bits below the largest of 32 products, and fp32 sums of 4 blocks.
    assert ((case.d.double() - exact).abs() <= size * 2.0**-12).all()
