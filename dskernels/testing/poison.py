"""Poison what must not be read, guard what must not be written."""

from __future__ import annotations

from collections.abc import Callable

import torch

UNUSED_PAGE = 2147480000  # a block-table entry that crashes or corrupts whoever follows it
_GUARD_BYTES = 256
_GUARD = 0xA5


def poison_rows(x: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
    """A copy of x [m, ...] with every row outside `keep` (a row count or bool [m]) set to NaN.

    For uint8 data (FP8 caches) and float8 the bytes become 0x7F, which is NaN in e4m3.
    """
    if isinstance(keep, int):
        keep = torch.arange(x.shape[0], device=x.device) < keep
    poisoned = x.clone()
    if x.dtype.itemsize == 1:
        poisoned.view(torch.uint8)[~keep] = 0x7F
    else:
        poisoned[~keep] = torch.nan
    return poisoned


def poisoned_pages(
    kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of a paged cache [pages, page, ...] and its int32 block table [b, max_pages] in which
    every token that no request holds is NaN, and every unused table entry is UNUSED_PAGE."""
    page = kv_cache.shape[1]
    keep = torch.zeros(kv_cache.shape[:2], dtype=torch.bool, device=kv_cache.device)
    table = torch.full_like(block_table, UNUSED_PAGE)
    for request, length in enumerate(seq_lens.tolist()):
        used = -(-length // page)
        table[request, :used] = block_table[request, :used]
        tokens = torch.arange(length, device=kv_cache.device)
        keep[block_table[request].long()[tokens // page], tokens % page] = True
    flat = poison_rows(kv_cache.flatten(0, 1), keep.flatten())
    return flat.view_as(kv_cache), table


def guarded_empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, Callable[[], None]]:
    """A contiguous tensor full of NaN bytes between two guards, and a function that raises
    AssertionError when a guard was written."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    buffer = torch.full((size + 2 * _GUARD_BYTES,), _GUARD, dtype=torch.uint8, device=device)
    body = buffer[_GUARD_BYTES : _GUARD_BYTES + size]
    body.fill_(0xFF)

    def check() -> None:
        for name, guard in (("before", buffer[:_GUARD_BYTES]), ("behind", buffer[-_GUARD_BYTES:])):
            written = (guard != _GUARD).nonzero().flatten()
            if len(written):
                raise AssertionError(
                    f"{len(written)} bytes {name} the tensor were written, "
                    f"first at offset {int(written[0])} of the guard"
                )

    return body.view(dtype).view(shape), check
