"""The paged latent cache, and the description of a batch of tokens that attends to it.

One row per token and layer holds what MLA needs of it: the normalised latent and the rotated shared
key, 576 values for V3 whatever the number of heads. Rows live in pages; a sequence owns a list of
pages, the same for every layer, so position p of a sequence is row `pages[p // size] * size +
p % size` of each layer's pool. MTP modules have pools of their own after those of the main layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

import dskernels as dsk
from model.config import DeepseekConfig

FP8_ROW_BYTES = 656  # 512 E4M3 latents, 4 fp32 scales, 64 BF16 rotated keys
UNUSED_PAGE = -1  # fills the block table's tail; must never be read


@dataclass(eq=False)
class Sequence:
    """The pages that one sequence owns, in order of position."""

    pages: list[int] = field(default_factory=list)


class PagedLatentCache:
    """Pools of pages for all layers, and their allocator.

    `dtype`: a floating-point torch dtype, or "fp8" for 656-byte quantised rows (V3's latent 512 and
    rotated 64 only). Memory: num_pages * page_size * layers * row size.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        num_pages: int,
        *,
        page_size: int = 64,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages, page_size: expected positive: {num_pages}, {page_size}")
        row, row_dtype = config.latent_dim, dtype
        if dtype == "fp8":
            if (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
                raise ValueError(
                    "dtype 'fp8': expected kv_lora_rank 512 and qk_rope_head_dim 64, got "
                    f"{config.kv_lora_rank} and {config.qk_rope_head_dim}"
                )
            row, row_dtype = FP8_ROW_BYTES, torch.uint8
        shape = (num_pages, page_size, row)
        layers = config.num_layers_with_mtp
        self.pools = [torch.zeros(shape, dtype=row_dtype, device=device) for _ in range(layers)]
        self.page_size = page_size
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Give `sequence` pages for `length` tokens. MemoryError, nothing taken, if too few."""
        missing = -(-length // self.page_size) - len(sequence.pages)
        if missing > len(self._free):
            raise MemoryError(
                f"latent cache: {missing} more pages needed, {len(self._free)} of "
                f"{self.num_pages} free (page_size {self.page_size})"
            )
        for _ in range(missing):
            sequence.pages.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        """Return all pages of `sequence`."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages.clear()


@dataclass
class TokenBatch:
    """Tokens of several sequences, flattened without padding: sequence i brings `counts[i]` new
    tokens at positions `starts[i]`, `starts[i] + 1`, ...

    Without a cache every sequence starts at 0 and attends to this batch alone."""

    counts: list[int]
    starts: list[int]
    device: torch.device | str = "cpu"
    cache: PagedLatentCache | None = None
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.cache is None:
            return
        for sequence, start, count in zip(self.sequences, self.starts, self.counts, strict=True):
            self.cache.reserve(sequence, start + count)

    @property
    def lengths(self) -> list[int]:
        """Keys each sequence attends to, the new ones included."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]

    @cached_property
    def positions(self) -> torch.Tensor:
        """[t] int64."""
        return _ranges(self.starts, self.counts).to(self.device)

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        return _cumulative(self.counts).to(self.device)

    @cached_property
    def cu_seqlens_k(self) -> torch.Tensor:
        return _cumulative(self.lengths).to(self.device)

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def block_table(self) -> torch.Tensor:
        """[b, most pages] int32."""
        return self._host_table.to(self.device)

    @cached_property
    def _host_table(self) -> torch.Tensor:
        used = [-(-length // self.cache.page_size) for length in self.lengths]
        table = torch.full((len(used), max(used)), UNUSED_PAGE, dtype=torch.int32)
        for row, sequence, pages in zip(table, self.sequences, used, strict=True):
            row[:pages] = torch.tensor(sequence.pages[:pages], dtype=torch.int32)
        return table

    @cached_property
    def slots(self) -> torch.Tensor:
        """[t] int64: the cache row of every new token."""
        return self._slots(self.starts, self.counts)

    @cached_property
    def key_slots(self) -> torch.Tensor:
        """[sum lengths] int64: the cache rows of every key, in order."""
        return self._slots([0] * len(self.counts), self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Sequences by equal count: (count, sequence indices [g], token indices [g, count])."""
        first = _cumulative(self.counts).to(torch.int64)
        out = []
        for count in sorted(set(self.counts)):
            rows = torch.tensor([i for i, c in enumerate(self.counts) if c == count])
            tokens = first[rows][:, None] + torch.arange(count)
            out.append((count, rows.to(self.device), tokens.to(self.device)))
        return out

    def _slots(self, starts: list[int], counts: list[int]) -> torch.Tensor:
        positions = _ranges(starts, counts)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        page = self._host_table[owner, positions // self.cache.page_size].to(torch.int64)
        slots = page * self.cache.page_size + positions % self.cache.page_size
        return slots.to(self.device)


def append(
    pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, batch: TokenBatch
) -> None:
    """Write the new tokens' rows: latent [t, dl], k_rope [t, r]."""
    dsk.mla_cache_append(pool, latent, k_rope, batch.slots)


def _ranges(starts: list[int], counts: list[int]) -> torch.Tensor:
    """[sum counts] int64: start, start + 1, ... for every sequence, one after the other."""
    return torch.cat([torch.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])


def _cumulative(counts: list[int]) -> torch.Tensor:
    out = torch.zeros(len(counts) + 1, dtype=torch.int32)
    out[1:] = torch.tensor(counts, dtype=torch.int32).cumsum(0)
    return out
