"""Corpus, windows and the classical baselines."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from model.baseline import Unigram, WittenBell
from model.data import (
    BOS,
    WindowLoader,
    build_corpus,
    decode_bytes,
    find_files,
    held_out_windows,
    is_held_out,
    load_corpus,
)


def _documents(count: int, size: int = 200, seed: int = 0) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(seed)
    return [(f"pkg/f{i}.py", rng.integers(0, 256, size, np.uint8).tobytes()) for i in range(count)]


class TestCorpus:
    def test_split_is_by_file_and_complete(self):
        documents = _documents(60)
        corpus = build_corpus(documents, 0.3)
        assert set(corpus.train_files).isdisjoint(corpus.held_out_files)
        assert {*corpus.train_files, *corpus.held_out_files} == {name for name, _ in documents}
        assert corpus.train_files and corpus.held_out_files
        for files, stream in (
            (corpus.train_files, corpus.train),
            (corpus.held_out_files, corpus.held_out),
        ):
            contents = dict(documents)
            expected = b"".join(contents[name] for name in files)
            assert stream[stream < BOS].astype(np.uint8).tobytes() == expected
            assert int((stream == BOS).sum()) == len(files)

    def test_split_ignores_order_and_neighbours(self):
        documents = _documents(60)
        whole, part = build_corpus(documents, 0.3), build_corpus(documents[::-1][:40], 0.3)
        assert set(part.held_out_files) <= set(whole.held_out_files)

    def test_no_content_on_both_sides(self):
        """Copies under other names would leak the held-out text into training."""
        documents = _documents(40)
        copies = [(f"copy/{name}", content) for name, content in documents]
        corpus = build_corpus(documents + copies, 0.3)
        assert corpus.num_duplicates == 40
        assert len(corpus.train_files) + len(corpus.held_out_files) == 40

    def test_empty_side_is_refused(self):
        with pytest.raises(ValueError, match="held-out side is empty"):
            build_corpus([("only.py", b"x = 1\n")], 1e-9)
        with pytest.raises(ValueError, match="held_out_fraction"):
            build_corpus(_documents(3), 0.0)

    def test_stdlib_is_found_without_site_packages(self):
        corpus = load_corpus(max_bytes=3_000_000)
        assert len(corpus.train) > 1_000_000 and len(corpus.held_out) > 10_000
        names = corpus.train_files + corpus.held_out_files
        assert not any("site-packages" in name for name in names)

    def test_files_are_filtered_and_sorted(self, tmp_path):
        for name in ("b.py", "a.py", "c.txt", "site-packages/d.py", "sub/e.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
        assert found == ["a.py", "b.py", "sub/e.py"]
        with pytest.raises(FileNotFoundError, match="expected a directory"):
            find_files(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="no file ending in"):
            load_corpus(tmp_path, (".rst",))

    def test_held_out_share(self):
        share = np.mean([is_held_out(f"file{i}", 0.1) for i in range(4000)])
        assert 0.08 < share < 0.12


class TestWindows:
    def test_every_window_once_per_epoch(self):
        stream = np.arange(200, dtype=np.uint16) % 256
        loader = WindowLoader(stream, seq_len=10, batch=1, seed=3)
        per_epoch = len(loader._starts)
        starts = [int(loader.next_batch()[0, 0]) for _ in range(per_epoch)]
        assert len(set(starts)) == per_epoch and per_epoch in (18, 19)
        assert np.all(np.diff(sorted(starts)) == 10)
        again = [int(loader.next_batch()[0, 0]) for _ in range(per_epoch)]
        assert again != starts

    def test_targets_follow_inputs(self):
        stream = np.arange(200, dtype=np.uint16)
        batch = WindowLoader(stream, seq_len=10, batch=4).next_batch()
        assert batch.shape == (4, 11) and batch.dtype == torch.int64
        assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)

    @pytest.mark.parametrize("consumed", [0, 3, 17, 18, 19, 40])
    def test_position_restores(self, consumed):
        stream = np.arange(200, dtype=np.uint16)
        first = WindowLoader(stream, seq_len=10, batch=2, seed=5)
        for _ in range(consumed):
            first.next_batch()
        second = WindowLoader(stream, seq_len=10, batch=2, seed=99)
        second.load_state_dict(first.state_dict())
        for _ in range(25):
            assert torch.equal(first.next_batch(), second.next_batch())

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="stream"):
            WindowLoader(np.zeros(5, np.uint16), seq_len=10, batch=1)
        with pytest.raises(ValueError, match="seq_len, batch"):
            WindowLoader(np.zeros(50, np.uint16), seq_len=0, batch=1)

    def test_held_out_windows_do_not_overlap(self):
        stream = np.arange(1000, dtype=np.uint16) % 256
        chosen = held_out_windows(stream, seq_len=16, num_bytes=400)
        assert chosen.windows.shape == (25, 17)
        assert len(np.unique(chosen.positions)) == chosen.positions.size
        assert np.array_equal(stream[chosen.positions], chosen.windows[:, 1:].numpy())
        everything = held_out_windows(stream, seq_len=16, num_bytes=10**9)
        assert everything.positions.size == (len(stream) - 1) // 16 * 16

    def test_decode(self):
        assert decode_bytes([BOS, *"häuser".encode(), 258]) == "häuser"
        assert decode_bytes([0xFF]) == "\ufffd"


def _slow_witten_bell(train, order):
    """The formula, context by context: dictionaries and loops."""
    counts = defaultdict(Counter)
    for i, target in enumerate(train):
        for n in range(order + 1):
            if i >= n and target < BOS:
                counts[tuple(train[i - n : i])][target] += 1

    def probability(history, target):
        p = 1.0 / 256
        for n in range(min(order, len(history)) + 1):
            seen = counts.get(tuple(history[len(history) - n :]))
            if seen:
                total, distinct = sum(seen.values()), len(seen)
                p = (seen[target] + distinct * p) / (total + distinct)
        return p

    return probability


class TestBaselines:
    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_equals_the_formula(self, order):
        rng = np.random.default_rng(order)
        train = rng.integers(60, 72, 900).astype(np.uint16)
        train[[0, 300, 555]] = BOS
        test = rng.integers(60, 76, 200).astype(np.uint16)
        test[[0, 80]] = BOS
        slow = _slow_witten_bell(train.tolist(), order)
        positions = np.flatnonzero(test < BOS)
        expected = [slow(test[max(0, i - order) : i].tolist(), int(test[i])) for i in positions]
        fast = WittenBell(train, order).probabilities(test, positions)
        assert np.allclose(fast, expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("order", [0, 1, 2])
    def test_probabilities_sum_to_one(self, order):
        rng = np.random.default_rng(7)
        model = WittenBell(rng.integers(0, 40, 3000).astype(np.uint16), order)
        for history in ([3, 4], [250, 251], [5, 200], [BOS, 9]):
            streams = np.array([[*history, byte] for byte in range(256)], dtype=np.uint16)
            total = sum(float(model.probabilities(s, np.array([2]))[0]) for s in streams)
            assert math.isclose(total, 1.0, rel_tol=1e-9)

    def test_counting_in_pieces_changes_nothing(self, monkeypatch):
        train = np.random.default_rng(1).integers(0, 257, 5000).astype(np.uint16)
        whole = WittenBell(train, 2).bits_per_byte(train)
        monkeypatch.setattr("model.baseline._CHUNK", 777)
        assert WittenBell(train, 2).bits_per_byte(train) == pytest.approx(whole, rel=1e-12)

    def test_more_context_helps_on_text(self):
        corpus = load_corpus(max_bytes=2_000_000)
        bits = [WittenBell(corpus.train, n).bits_per_byte(corpus.held_out) for n in range(3)]
        unigram = Unigram(corpus.train).bits_per_byte(corpus.held_out)
        assert bits[2] < bits[1] < bits[0] < 6
        assert abs(unigram - bits[0]) < 0.02

    def test_bad_input(self):
        stream = np.full(10, BOS, np.uint16)
        with pytest.raises(ValueError, match="at least one byte"):
            WittenBell(stream, 2)
        with pytest.raises(ValueError, match="order"):
            WittenBell(np.zeros(10, np.uint16), 3)
        model = WittenBell(np.zeros(10, np.uint16), 1)
        with pytest.raises(ValueError, match="BOS"):
            model.probabilities(stream, np.array([3]))
        with pytest.raises(ValueError, match="at least one byte"):
            model.bits_per_byte(stream)
