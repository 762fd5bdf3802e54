"""Row-wise CUDA kernels: quantisation, RMSNorm, RoPE, SwiGLU, their fusions, dequantisation.

Names, arguments and meaning are those of dskernels.ref.rowwise; what a kernel does not cover raises
Unsupported. Dimension letters: m rows, k columns, t tokens, h heads, r RoPE width, i expert width.
"""

from __future__ import annotations

import math

import torch

from ..types import FORMAT_STORAGE, ScaledTensor, Support, Unsupported, scale_shape
from . import launchers
from ._tensor import device_of, stream_of

GROUP = 128
TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _type(name: str, x: torch.Tensor) -> str:
    if not isinstance(x, torch.Tensor) or x.dtype not in TYPES:
        raise Unsupported(f"{name}: expected bf16 or fp32, got {getattr(x, 'dtype', type(x))}")
    return TYPES[x.dtype]


def _need_groups(name: str, block: tuple[int, int]) -> None:
    if tuple(block) != (1, GROUP):
        raise Unsupported(f"{name}: expected block (1, {GROUP}), got {tuple(block)}")


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x [..., c] as rows, each contiguous; a copy only where there is no such view."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _planes(shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """[..., m, k] -> planes, m, k."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _group_scales(shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, dict]:
    """Empty MN-major scales of [..., m, k] in groups of 1 x 128, and where a launcher finds them.

    The padding up to a multiple of 4 rows is 0."""
    *lead, m, k = shape
    groups, ld = -(-k // GROUP), -(-m // 4) * 4
    storage = torch.zeros(*lead, groups, ld, dtype=torch.float32, device=device)
    where = dict(scale=storage.data_ptr(), ld_scale=ld, plane_scale=groups * ld)
    return storage.transpose(-2, -1)[..., :m, :], where


class Rowwise:
    """The functions of this module on one machine, "cuda" or "emu", and on num_sms SMs (0: all)."""

    def __init__(self, machine: str, num_sms: int = 0) -> None:
        self.machine, self.num_sms = machine, num_sms

    def _on(self, x: torch.Tensor) -> tuple[str, int, int, int]:
        """The launchers' `on`: x's device, in torch's current stream."""
        return self.machine, device_of(x), stream_of(x), self.num_sms

    def quantize(
        self,
        x: torch.Tensor | ScaledTensor,
        block: tuple[int, int] = (1, 128),
        scale_format: str = "fp32",
        dtype: str = "e4m3",
        transpose: bool = False,
    ) -> ScaledTensor:
        """As dskernels.ref.rowwise.quantize: x [..., m, k] bf16 or fp32 in blocks (1, 128), to
        e4m3 or e5m6, or (128, 128); transposed x [m, k] in (1, 128), which may be e4m3 itself."""
        ue8m0 = scale_format != "fp32"
        if transpose:
            return self._quantize_transposed(x, block, ue8m0, dtype)
        if isinstance(x, ScaledTensor):
            raise Unsupported("x: expected a plain tensor unless transposed, got a ScaledTensor")
        type_ = _type("x", x)
        if tuple(block) == (GROUP, GROUP) and dtype == "e4m3":
            return self._quantize_blocks(x, type_, ue8m0)
        _need_groups("quantize", block)
        rows = _matrix(x)
        planes, m, k = _planes(x.shape)
        data = torch.empty(x.shape, dtype=FORMAT_STORAGE[dtype], device=x.device)
        scale, where = _group_scales(x.shape, x.device)
        launchers().rowwise_quantize(
            self._on(x), x=rows.data_ptr(), type=type_, data=data.data_ptr(), data_type=dtype,
            planes=planes, rows=m, cols=k, ld_x=rows.stride(0), ue8m0=ue8m0, **where,
        )  # fmt: skip
        return ScaledTensor(data, scale, (1, GROUP), dtype)

    def _quantize_blocks(self, x: torch.Tensor, type_: str, ue8m0: bool) -> ScaledTensor:
        x = x.contiguous()
        planes, m, k = _planes(x.shape)
        data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        shape = scale_shape(x.shape, (GROUP, GROUP))
        scale = torch.empty(shape, dtype=torch.float32, device=x.device)
        launchers().rowwise_quantize_block(
            self._on(x), x=x.data_ptr(), type=type_, data=data.data_ptr(),
            scale=scale.data_ptr(), planes=planes, rows=m, cols=k, ue8m0=ue8m0,
        )  # fmt: skip
        return ScaledTensor(data, scale, (GROUP, GROUP), "e4m3")

    def _quantize_transposed(self, x, block, ue8m0: bool, dtype: str) -> ScaledTensor:
        _need_groups("quantize, transposed", block)
        if dtype != "e4m3" or len(x.shape) != 2:
            raise Unsupported(
                f"x: expected [m, k] to e4m3 when transposed, got {tuple(x.shape)} to {dtype}"
            )
        scaled = isinstance(x, ScaledTensor)
        if scaled and (x.dtype != "e4m3" or x.block[1] != GROUP):
            raise Unsupported(
                f"x: expected e4m3 in blocks of (r, {GROUP}), got {x.dtype} in {x.block}"
            )
        type_ = "e4m3" if scaled else _type("x", x)
        rows = _matrix(x.data if scaled else x)
        m, k = rows.shape
        data = torch.empty(k, m, dtype=torch.float8_e4m3fn, device=x.device)
        scale, where = _group_scales((k, m), x.device)
        launchers().rowwise_quantize_transpose(
            self._on(rows), x=rows.data_ptr(), type=type_, data=data.data_ptr(),
            scale=where["scale"], rows=m, cols=k, ld_x=rows.stride(0), ld_scale=where["ld_scale"],
            x_scale=x.scale.data_ptr() if scaled else 0,
            x_scale_row=x.scale.stride(0) if scaled else 0,
            x_scale_col=x.scale.stride(1) if scaled else 0,
            x_block_rows=x.block[0] if scaled else 1, ue8m0=ue8m0,
        )  # fmt: skip
        return ScaledTensor(data, scale, (1, GROUP), "e4m3")

    def _norm(self, x, weight, eps, residual, quantized: bool, scale_format: str = "fp32"):
        type_, weight_type = _type("x", x), _type("weight", weight)
        limit = launchers().kRmsNormMaxColumns
        if x.shape[-1] > limit:
            raise Unsupported(f"x: expected at most {limit} columns, got {x.shape[-1]}")
        x, weight = x.contiguous(), weight.contiguous()
        total = None if residual is None else torch.empty_like(x)
        rest = None if residual is None else residual.contiguous()
        out_dtype = torch.float8_e4m3fn if quantized else x.dtype
        y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        scale, where = None, dict(scale=0, ld_scale=0, plane_scale=0)
        plane_rows = max(1, x.numel() // max(1, x.shape[-1]))
        if quantized:
            scale, where = _group_scales(x.shape, x.device)
            plane_rows = max(1, x.shape[-2])
        launchers().rowwise_rms_norm(
            self._on(x), x=x.data_ptr(), type=type_, weight=weight.data_ptr(),
            residual=0 if rest is None else rest.data_ptr(), weight_type=weight_type,
            total=0 if total is None else total.data_ptr(), y=y.data_ptr(),
            rows=x.numel() // max(1, x.shape[-1]), cols=x.shape[-1], plane_rows=plane_rows,
            eps=eps, ue8m0=scale_format != "fp32", **where,
        )  # fmt: skip
        result = ScaledTensor(y, scale, (1, GROUP), "e4m3") if quantized else y
        return result if residual is None else (result, total)

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As dskernels.ref.rowwise.rms_norm, for bf16 and fp32."""
        return self._norm(x, weight, eps, residual, quantized=False)

    def rms_norm_quantize(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        residual: torch.Tensor | None = None,
        *,
        block: tuple[int, int] = (1, 128),
        scale_format: str = "fp32",
    ) -> ScaledTensor | tuple[ScaledTensor, torch.Tensor]:
        """As dskernels.ref.rowwise.rms_norm_quantize, in blocks (1, 128)."""
        _need_groups("rms_norm_quantize", block)
        return self._norm(x, weight, eps, residual, quantized=True, scale_format=scale_format)

    def rope(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        interleaved: bool = True,
        inverse: bool = False,
    ) -> torch.Tensor:
        """As dskernels.ref.rowwise.rope, bit for bit, for bf16 and fp32."""
        type_ = _type("x", x)
        if cos.dtype != torch.float32 or sin.dtype != torch.float32:
            raise Unsupported(f"cos, sin: expected fp32, got {cos.dtype} and {sin.dtype}")
        x = x.contiguous()
        half = x.shape[-1] // 2
        angles = [a.expand(*x.shape[:-2], half).contiguous() for a in (cos, sin)]
        y = torch.empty_like(x)
        launchers().rowwise_rope(
            self._on(x), x=x.data_ptr(), type=type_, cos=angles[0].data_ptr(),
            sin=angles[1].data_ptr(), y=y.data_ptr(), rows=math.prod(x.shape[:-1]),
            heads=x.shape[-2], half=half, interleaved=interleaved, inverse=inverse,
        )  # fmt: skip
        return y

    def _gated(
        self, x: torch.Tensor, y: torch.Tensor, where: dict, ue8m0: bool, planes: int
    ) -> None:
        rows = _matrix(x)
        launchers().rowwise_swiglu(
            self._on(x), x=rows.data_ptr(), type=_type("x", x), y=y.data_ptr(), planes=planes,
            rows=rows.shape[0] // max(1, planes), cols=x.shape[-1] // 2, ld_x=rows.stride(0),
            ue8m0=ue8m0, **where,
        )  # fmt: skip

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        """As dskernels.ref.rowwise.swiglu, for bf16 and fp32."""
        _type("x", x)
        y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
        self._gated(x, y, dict(scale=0, ld_scale=0, plane_scale=0), False, 1)
        return y

    def swiglu_quantize(
        self, x: torch.Tensor, *, block: tuple[int, int] = (1, 128), scale_format: str = "fp32"
    ) -> ScaledTensor:
        """As dskernels.ref.rowwise.swiglu_quantize, in blocks (1, 128)."""
        _type("x", x)
        _need_groups("swiglu_quantize", block)
        shape = (*x.shape[:-1], x.shape[-1] // 2)
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale, where = _group_scales(shape, x.device)
        self._gated(x, data, where, scale_format != "fp32", _planes(shape)[0])
        return ScaledTensor(data, scale, (1, GROUP), "e4m3")

    def swiglu_backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As dskernels.ref.rowwise_backward.swiglu_backward, for bf16 and fp32."""
        type_ = _type("x", x)
        rows, dx = _matrix(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad = grad.to(x.dtype).contiguous()
        launchers().rowwise_swiglu_backward(
            self._on(x), grad=grad.data_ptr(), x=rows.data_ptr(), type=type_, dx=dx.data_ptr(),
            rows=rows.shape[0], cols=x.shape[-1] // 2, ld_x=rows.stride(0),
        )  # fmt: skip
        return dx

    def dequantize(self, x: ScaledTensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """As dskernels.ref.rowwise.dequantize, to bf16 or fp32."""
        if dtype not in TYPES:
            raise Unsupported(f"dtype: expected bf16 or fp32, got {dtype}")
        data = x.data.contiguous()
        planes, m, k = _planes(data.shape)
        scale = x.scale if x.scale.dim() <= 3 else x.scale.flatten(0, -3)
        y = torch.empty(data.shape, dtype=dtype, device=data.device)
        launchers().rowwise_dequantize(
            self._on(data), data=data.data_ptr(), type=x.dtype, scale=scale.data_ptr(),
            y=y.data_ptr(), y_type=TYPES[dtype], planes=planes, rows=m, cols=k,
            block_rows=x.block[0], block_cols=x.block[1],
            scale_plane=scale.stride(0) if scale.dim() == 3 else 0,
            scale_row=scale.stride(-2), scale_col=scale.stride(-1),
        )  # fmt: skip
        return y

    def _pack(self, wide: torch.Tensor, packed: torch.Tensor, unpack: bool) -> None:
        launchers().rowwise_pack_e5m6(
            self._on(wide), wide=wide.data_ptr(), packed=packed.data_ptr(),
            rows=math.prod(wide.shape[:-1]), cols=wide.shape[-1], unpack=unpack,
        )  # fmt: skip

    def pack_e5m6(self, data: torch.Tensor) -> torch.Tensor:
        """As dskernels.ref.rowwise.pack_e5m6, bit for bit."""
        data = data.contiguous()
        shape = (*data.shape[:-1], 3 * -(-data.shape[-1] // 2))
        packed = torch.empty(shape, dtype=torch.uint8, device=data.device)
        self._pack(data, packed, unpack=False)
        return packed

    def unpack_e5m6(self, packed: torch.Tensor, k: int) -> torch.Tensor:
        """As dskernels.ref.rowwise.unpack_e5m6, bit for bit."""
        data = torch.empty(*packed.shape[:-1], k, dtype=torch.float16, device=packed.device)
        self._pack(data, packed.contiguous(), unpack=True)
        return data

    def supports(self, op: str, **shapes) -> Support:
        return Support(True, f"{self.machine}: hand-written kernels for bf16 and fp32")


_cuda = Rowwise("cuda")
quantize, dequantize = _cuda.quantize, _cuda.dequantize
rms_norm, rms_norm_quantize, rope = _cuda.rms_norm, _cuda.rms_norm_quantize, _cuda.rope
swiglu, swiglu_quantize = _cuda.swiglu, _cuda.swiglu_quantize
swiglu_backward = _cuda.swiglu_backward
pack_e5m6, unpack_e5m6, supports = _cuda.pack_e5m6, _cuda.unpack_e5m6, _cuda.supports
