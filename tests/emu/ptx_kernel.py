"""Small PTX kernels around a few instructions: registers, parameters and shared memory declared."""

import numpy as np

from dskernels import emu


def text(body, params, shared=0, target="sm_90a", extra=""):
    """A kernel `k`. In `body`: %t thread, %c cluster rank, %P0.. the pointers given, %h %r %d 16-,
    32- and 64-bit registers, %p predicates, `sm` the shared array, %s its address."""
    loads = "\n".join(f"ld.param.u64 %P{k}, [p{k}];" for k in range(params))
    names = ", ".join(f".param .u64 p{k}" for k in range(params))
    array = f".shared .align 1024 .b8 sm[{shared}];" if shared else ""
    address = "mov.u32 %s, sm;" if shared else ""
    return f"""
.version 8.6
.target {target}
.address_size 64
{extra}
.visible .entry k({names}) {{
.reg .b16 %h<40>; .reg .b32 %r<300>; .reg .b64 %d<40>; .reg .b64 %P<8>; .reg .pred %p<12>;
.reg .b32 %t, %c, %s; .reg .b64 %A<8>;
{array}
mov.u32 %t, %tid.x;
mov.u32 %c, %cluster_ctarank;
{address}
{loads}
{body}
ret;
}}
"""


def run(body, *args, threads=32, grid=1, shared=0, target="sm_90a", extra="", **options):
    """Builds and launches; the arrays in `args` hold the results."""
    module = emu.Module(text(body, len(args), shared, target, extra))
    return module.kernel("k")[grid, threads](*args, **options)


def load(reg, pointer, bits=32, index="%t"):
    """PTX that loads element `index` of the array at parameter `pointer`."""
    return (
        f"mad.wide.u32 %A{pointer}, {index}, {bits // 8}, %P{pointer};"
        f"ld.global.b{bits} {reg}, [%A{pointer}];\n"
    )


def store(reg, pointer, bits=32, index="%t"):
    """PTX that stores to element `index` of the array at parameter `pointer`."""
    return (
        f"mad.wide.u32 %A{pointer}, {index}, {bits // 8}, %P{pointer};"
        f"st.global.b{bits} [%A{pointer}], {reg};\n"
    )


def fill_shared(pointer, size, threads):
    """PTX that copies `size` bytes from a parameter's array to shared memory, visible to all."""
    out = []
    for start in range(0, size // 4, threads):
        last = size // 4 - start < threads
        guard = f"setp.lt.u32 %p0, %t, {size // 4 - start}; @%p0 " if last else ""
        out.append(
            f"add.u32 %r0, %t, {start}; mad.wide.u32 %A0, %r0, 4, %P{pointer};"
            f"mad.lo.u32 %r1, %r0, 4, %s;"
            f"{'@%p0 ' if guard else ''}ld.global.b32 %r2, [%A0];"
        )
        if guard:
            out[-1] = guard.split("@")[0] + out[-1]
        out.append(f"{'@%p0 ' if guard else ''}st.shared.b32 [%r1], %r2;")
    return "\n".join(out) + "\nfence.proxy.async; bar.sync 0;\n"


def results(n, dtype=np.uint32):
    """An array for results, full of ones so that a missing store shows."""
    out = np.empty(n, dtype)
    out.view(np.uint8)[...] = 0xEE
    return out
