"""What the attention kernels in Triton share."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a b of bf16 operands in fp32. WIDE: Triton's interpreter cannot multiply bf16."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)
