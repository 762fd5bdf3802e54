"""FP8 weights in the order the CPU kernels stream them, in memory or mapped from a file."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _C
from ..types import ScaledTensor

MAGIC = b"dskernels packed fp8 v1\n"
_ALIGN = 4096  # of the arrays in a file: a mapping starts on a page
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """e4m3 weights [n, k] or [g, n, k] with scales in blocks (128, 128), packed by `pack`.

    data   uint8 [g, bytes of a matrix]: panels of 64 n, each a stream along k (csrc/cpu/packed.hpp)
    marks  uint8 [g, marks of a matrix]: which 64 x 128 blocks hold a NaN
    scale  fp32 [(g,) ceil(n/128), ceil(k/128)]

    The layout is the same for every target. `unpack` gives the ScaledTensor back, bit for bit.
    """

    data: torch.Tensor
    marks: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size
    block: tuple[int, int] = (128, 128)

    def unpack(self) -> ScaledTensor:
        data = torch.empty(self.shape, dtype=torch.float8_e4m3fn)
        threads = torch.get_num_threads()
        _C.cpu.unpack(self.data, data.view(-1, *self.shape[-2:]), threads)
        return ScaledTensor(data, self.scale, self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.unpack().dequantize(dtype)

    def group(self, index: int) -> PackedWeight:
        """Matrix `index` of a stack, without copying."""
        one = slice(index, index + 1)
        return PackedWeight(self.data[one], self.marks[one], self.scale[index], self.shape[1:])

    def save(self, path: str | os.PathLike) -> None:
        """Write a file that `load` maps without copying."""
        header = {"shape": list(self.shape), "arrays": {}}
        arrays = {"data": self.data, "marks": self.marks, "scale": self.scale.contiguous()}
        offset = _ALIGN
        for name, array in arrays.items():
            header["arrays"][name] = [offset, list(array.shape)]
            offset += -(-array.nbytes // _ALIGN) * _ALIGN
        text = MAGIC + json.dumps(header).encode() + b"\n"
        if len(text) > _ALIGN:
            raise ValueError(f"header: expected at most {_ALIGN} bytes, got {len(text)}")
        with open(path, "wb") as file:
            file.write(text)
            for name, array in arrays.items():
                file.seek(header["arrays"][name][0])
                file.write(memoryview(array.contiguous().view(torch.uint8).numpy()))
            file.truncate(offset)

    @staticmethod
    def load(path: str | os.PathLike) -> PackedWeight:
        """Map a file written by `save`: nothing is read until a kernel streams it.

        Raises ValueError for a file of another kind or one that was cut short.
        """
        size = Path(path).stat().st_size
        if size < _ALIGN:
            raise ValueError(f"{path}: expected at least {_ALIGN} bytes, got {size}")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        lines = mapped[:_ALIGN].split(b"\n", 2)
        if lines[0] + b"\n" != MAGIC:
            raise ValueError(f"{path}: expected a file that starts with {MAGIC!r}")
        header = json.loads(lines[1])
        tensors = {}
        for name, (offset, shape) in header["arrays"].items():
            dtype = torch.float32 if name == "scale" else torch.uint8
            count = torch.Size(shape).numel()
            end = offset + count * dtype.itemsize
            if end > size:
                raise ValueError(f"{path}: expected {end} bytes for {name}, got {size}")
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
            tensors[name] = flat.view(shape)
        return PackedWeight(**tensors, shape=torch.Size(header["shape"]))


def pack(weight: ScaledTensor) -> PackedWeight:
    """weight: e4m3 [n, k] or [g, n, k] in blocks (128, 128). Any n and k, ragged ends included."""
    if tuple(weight.block) != (128, 128) or weight.dtype != "e4m3":
        raise ValueError(
            f"weight: expected e4m3 in blocks (128, 128), got {weight.dtype} in {weight.block}"
        )
    return _pack(weight)


def pack_columns(weight: ScaledTensor) -> PackedWeight:
    """A second operand whose rows have their own scales, e4m3 [n, k] in blocks (1, 128); not kept:
    it holds activations or gradients of one step."""
    return _pack(weight)


def _pack(weight: ScaledTensor) -> PackedWeight:
    data = weight.data if weight.data.dim() == 3 else weight.data[None]
    if data.dim() != 3:
        raise ValueError(f"weight: expected [n, k] or [g, n, k], got {tuple(weight.shape)}")
    if data.stride(-1) != 1 and data.shape[-1] > 1:
        data = data.contiguous()
    g, n, k = data.shape
    packed = torch.empty(g, _C.cpu.packed_bytes(n, k), dtype=torch.uint8)
    marks = torch.empty(g, _C.cpu.packed_marks(n, k), dtype=torch.uint8)
    _C.cpu.pack(data, packed, marks, torch.get_num_threads())
    return PackedWeight(packed, marks, weight.scale, weight.data.shape, tuple(weight.block))


def fits_cache(*weights: ScaledTensor | PackedWeight) -> bool:
    """Whether the packed forms of these weights can stay in the cache together."""
    loose = [w.data.nbytes for w in weights if isinstance(w, ScaledTensor)]
    return sum(loose) <= _CACHE_BYTES


def groups(weight: ScaledTensor | PackedWeight) -> Callable[[int], PackedWeight]:
    """index -> that matrix of a stack [g, n, k], packed.

    A stack that does not fit the cache is packed matrix by matrix, when one is asked for: packing
    all of it on every call would double a model's memory and read experts that no token chose.
    """
    if fits_cache(weight):
        return packed(weight).group
    return lambda i: pack(ScaledTensor(weight.data[i], weight.scale[i], weight.block))


# Packed forms of weights that were passed unpacked, so that a model that knows nothing of packing
# pays for it once. Keyed by the data tensor itself: dropped with it, and when it was written to.
_cache: OrderedDict[int, tuple[weakref.ref, int, PackedWeight]] = OrderedDict()


def packed(weight: ScaledTensor | PackedWeight) -> PackedWeight:
    """The packed form of a weight, from a cache of at most 1 GiB where possible."""
    if isinstance(weight, PackedWeight):
        return weight
    key = id(weight.data)
    found = _cache.get(key)
    if found is not None and found[0]() is weight.data and found[1] == weight.data._version:
        _cache.move_to_end(key)
        hit = found[2]
        return PackedWeight(hit.data, hit.marks, weight.scale, weight.data.shape)
    result = pack(weight)
    if result.data.nbytes <= _CACHE_BYTES:
        watcher = weakref.ref(weight.data, lambda _: _cache.pop(key, None))
        _cache[key] = (watcher, weight.data._version, result)
        while sum(entry[2].data.nbytes for entry in _cache.values()) > _CACHE_BYTES:
            _cache.popitem(last=False)
    return result
