"""Classical byte models, the bar that a trained network has to clear.

`WittenBell` interpolates every order with the one below it:

    P_n(c | h) = (N(h, c) + T(h) * P_{n-1}(c | h')) / (N(h) + T(h))

where N counts occurrences of the last n bytes h, T(h) is the number of distinct bytes seen after
h, h' drops the oldest byte of h, and P_{-1} is uniform over the 256 bytes. (Witten and Bell, "The
zero-frequency problem", IEEE Trans. Information Theory 37(4), 1991, method C, in the interpolated
form of Chen and Goodman, 1998.) A context that was never seen falls through to the order below.
"""

import numpy as np

from model.data import BOS

_ALPHABET = BOS + 1  # BOS occurs in contexts, never as a target
_CHUNK = 1 << 22


class WittenBell:
    """Interpolated Witten-Bell byte model of order 0, 1 or 2.

    Args:
        stream: training tokens, [n] integers in 0..256 (256 = BOS, opening a document).
        order: number of context bytes. Order 2 holds dense tables: 17M counters of 4 bytes.
    """

    def __init__(self, stream: np.ndarray, order: int):
        if order not in (0, 1, 2):
            raise ValueError(f"order: expected 0, 1 or 2, got {order}")
        if len(stream) <= order or not (stream[order:] < BOS).any():
            raise ValueError(f"stream: expected at least one byte after {order} context tokens")
        if int(stream.max()) > BOS or int(stream.min()) < 0:
            raise ValueError(f"stream: expected tokens in 0..{BOS}, got {int(stream.max())}")
        self.order = order
        self._counts = [_ngram_counts(stream, n) for n in range(order + 1)]
        self._totals = [counts.sum(axis=1) for counts in self._counts]
        self._distinct = [np.count_nonzero(counts, axis=1) for counts in self._counts]

    def probabilities(self, stream: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """P(stream[i] | the bytes before it), float64, for every i in `positions` (any shape).

        Near the start of the stream, where i < order, the longest context that exists is used.
        Positions of BOS are an error: BOS is not text.
        """
        stream = stream.astype(np.int64)
        positions = np.asarray(positions)
        target = stream[positions]
        if target.size and int(target.max()) >= BOS:
            raise ValueError("positions: expected bytes only, got the position of a BOS")
        probability = np.full(positions.shape, 1.0 / BOS)
        for n in range(self.order + 1):
            has_context = positions >= n
            context = _context_index(stream, np.where(has_context, positions, n), n)
            total = self._totals[n][context].astype(np.float64)
            distinct = self._distinct[n][context]
            mass = total + distinct
            seen = (mass > 0) & has_context
            mixed = self._counts[n][context, target] + distinct * probability
            probability = np.where(seen, mixed / np.where(seen, mass, 1.0), probability)
        return probability

    def bits_per_byte(self, stream: np.ndarray, positions: np.ndarray | None = None) -> float:
        """Mean of -log2 P over the bytes at `positions` (default: all); BOS is left out."""
        positions = np.arange(len(stream)) if positions is None else np.asarray(positions).ravel()
        positions = positions[stream[positions] < BOS]
        if positions.size == 0:
            raise ValueError("positions: expected at least one byte to score")
        total = sum(
            -np.log2(self.probabilities(stream, positions[i : i + _CHUNK])).sum()
            for i in range(0, positions.size, _CHUNK)
        )
        return float(total / positions.size)


class Unigram:
    """Relative byte frequencies with add-one smoothing: what knowing no context gives."""

    def __init__(self, stream: np.ndarray):
        counts = np.bincount(stream[stream < BOS], minlength=BOS).astype(np.float64) + 1.0
        self._bits = -np.log2(counts / counts.sum())

    def bits_per_byte(self, stream: np.ndarray, positions: np.ndarray | None = None) -> float:
        target = stream if positions is None else stream[np.asarray(positions).ravel()]
        target = target[target < BOS]
        if target.size == 0:
            raise ValueError("positions: expected at least one byte to score")
        return float(self._bits[target].mean())


def _context_index(stream: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
    """Row of the order-n table: the n tokens before each position as one base-257 number."""
    index = np.zeros(positions.shape, dtype=np.int64)
    for distance in range(n, 0, -1):
        index = index * _ALPHABET + stream[positions - distance]
    return index


def _ngram_counts(stream: np.ndarray, n: int) -> np.ndarray:
    """[257**n, 256] int32: how often each byte followed each context of n tokens."""
    counts = np.zeros(_ALPHABET**n * BOS, dtype=np.int32)
    for begin in range(n, len(stream), _CHUNK):
        # Each piece carries the n tokens of context before it.
        piece = stream[begin - n : begin + _CHUNK].astype(np.int64)
        positions = np.flatnonzero(piece[n:] < BOS) + n
        key = _context_index(piece, positions, n) * BOS + piece[positions]
        found, times = np.unique(key, return_counts=True)
        counts[found] += times.astype(np.int32)
    return counts.reshape(-1, BOS)
