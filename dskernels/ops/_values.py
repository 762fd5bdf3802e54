"""Checks of the VALUES of index tensors: they cannot be remembered, so they run on every call.

Each rule is stated here in Python, with its message. Where the compiled library is there, it is
asked first (`_C.ops`, a fraction of a microsecond); its yes ends the matter, and for everything
else Python decides. A tensor on an accelerator is not read: that would stall the stream, so there
the caller answers for its indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as _backend
from ._check import bad_value

_native = _backend.compiled("ops")


def _int32(tensor: Tensor) -> Tensor:  # int() costs time even where it has nothing to do
    return tensor if tensor.dtype is torch.int32 else tensor.int()


def _int64(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.int64 else tensor.long()


def index(op: str, name: str, tensor: Tensor, low: int, high: int) -> Tensor:
    """The tensor as int64, its elements in [low, high)."""
    if tensor.is_cpu and not (_native and _native.indices_fit(tensor, low, high)):
        _require_indices(op, name, tensor, low, high)
    return _int64(tensor)


def _require_indices(op: str, name: str, tensor: Tensor, low: int, high: int) -> None:
    values = tensor.numpy()
    if values.size == 0:
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest >= high:
        actual = smallest if smallest < low else largest
        bad_value(op, name, f"indices in [{low}, {high})", actual)


def distinct(op: str, name: str, indices: Tensor) -> None:
    """No row of indices [t, k] names anything twice, -1 apart."""
    if indices.is_cpu and indices.numel():
        ordered = indices.sort(dim=1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
        if len(twice):
            row, column = twice[0].tolist()
            expected = "no index twice in a row, with the masked layout"
            bad_value(op, name, expected, f"{int(ordered[row, column])} twice in row {row}")


def row_groups(op: str, indices: Tensor, groups: int) -> Tensor:
    """m_indices as int32: a group each, or -1."""
    if indices.is_cpu and not (_native and _native.indices_fit(indices, -1, groups)):
        _require_indices(op, "m_indices", indices, -1, groups)
    return _int32(indices)


def sizes_of_parts(op: str, sizes: Tensor, total: int, multiple: int = 1) -> Tensor:
    """group_sizes as int64: multiples of `multiple` whose sum is at most `total`."""
    if sizes.is_cpu and not (_native and _native.sizes_fit(sizes, total, total, multiple)):
        values = sizes.tolist()
        if sum(values) > total or min(values, default=0) < 0:
            expected = f"sizes >= 0 with a sum of at most {total}"
            bad_value(op, "group_sizes", expected, values)
        if any(size % multiple for size in values):
            bad_value(op, "group_sizes", f"multiples of {multiple}", values)
    return _int64(sizes)


def sizes_within(op: str, sizes: Tensor, each: int) -> Tensor:
    """masked_m as int32: each at most `each`."""
    if sizes.is_cpu and not (_native and _native.sizes_fit(sizes, each, _UNBOUNDED, 1)):
        values = sizes.tolist()
        if max(values, default=0) > each or min(values, default=0) < 0:
            bad_value(op, "masked_m", f"sizes >= 0 with each of at most {each}", values)
    return _int32(sizes)


_UNBOUNDED = 2**63 - 1


def ends(op: str, name: str, tensor: Tensor, limit: int) -> Tensor:
    """cu_seqlens as int32: from 0, never falling, at most `limit`."""
    if tensor.is_cpu and not (_native and _native.ends_fit(tensor, limit)):
        values = tensor.tolist()
        if values[0] != 0 or values[-1] > limit or values != sorted(values):
            expected = f"non-decreasing values from 0 to at most {limit}"
            bad_value(op, name, expected, values)
    return _int32(tensor)


def pages(op: str, cache: Tensor, table: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """(block_table, seq_lens) as int32: lengths fit the table, and every page that will be read is
    one of cache's [pages, page, row]; entries behind a request's last page may be anything."""
    if table.is_cpu:
        count, page, _ = cache.shape
        if not (_native and _native.pages_fit(table, lens, page, count)):
            _require_pages(op, count, page, table, lens)
    return _int32(table), _int32(lens)


def _require_pages(op: str, count: int, page: int, table: Tensor, lens: Tensor) -> None:
    lengths = lens.numpy()
    longest = table.shape[1] * page
    if lengths.size and (lengths.min() < 0 or lengths.max() > longest):
        expected = f"0 .. {longest} (max_pages * page)"
        bad_value(op, "seq_lens", expected, lengths.tolist())
    if page == 0:
        return
    used = torch.arange(table.shape[1]) < (-(-lens.long() // page)).unsqueeze(1)
    read = table[used].numpy()
    if read.size and (read.min() < 0 or read.max() >= count):
        bad = read.min() if read.min() < 0 else read.max()
        bad_value(op, "block_table", f"pages in [0, {count})", int(bad))
