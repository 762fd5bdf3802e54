"""SIGKILL at any moment: the state on disk is whole, and the resumed run ends bit for bit the same.

These tests kill real processes: a write in progress cannot clean up after itself.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.snapshot import load_snapshot, save_snapshot
from model.train import main
from model.trainer import SNAPSHOT_NAME

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12


def write_texts(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    words = ["for ", "x ", "in ", "range(9):\n", "    print(x)\n", "def f():\n", "    return 1\n"]
    for i in range(40):
        (folder / f"t{i}.py").write_text("".join(rng.choices(words, k=150)))


def train_options(out: Path, texts: Path, *options: str) -> list[str]:
    return [
        *("--model", "tiny", "--threads", "1", "--data", str(texts), "--out", str(out)),
        *("--seq-len", "32", "--batch", "2", "--held-out", "0.2", "--max-steps", str(STEPS)),
        *("--checkpoint-every", "1", "--eval-every", "5", "--eval-bytes", "500", *options),
    ]


def kill_after_saves(options: list[str], state: Path, saves: int, delay: float) -> None:
    """Start a training process, wait for `saves` new states on disk and `delay` more, kill -9."""
    process = subprocess.Popen(
        [sys.executable, "-m", "model.train", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = {_version(state)}
    deadline = time.monotonic() + 120
    while len(seen) <= saves and process.poll() is None:
        assert time.monotonic() < deadline, "the training process made no progress"
        seen.add(_version(state))
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {errors}"


def _version(state: Path) -> int:
    return state.stat().st_mtime_ns if state.exists() else 0


@pytest.fixture
def threads():
    """main() sets the thread count of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_killed_runs_end_bitwise_equal(tmp_path, threads, capsys):
    texts = tmp_path / "texts"
    write_texts(texts)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main(train_options(straight, texts)) == 0
    state = killed / SNAPSHOT_NAME
    kill_after_saves(train_options(killed, texts), state, 2, 0.0)
    first = load_snapshot(state)[1]["step"]
    again = train_options(killed, texts, "--resume")
    kill_after_saves(again, state, 2, random.Random(1).random() * 0.05)
    second = load_snapshot(state)[1]["step"]
    assert 0 < first < second < STEPS
    assert main(again) == 0
    assert f"resumed at step {second}" in capsys.readouterr().out
    tensors, values = load_snapshot(state)
    expected, expected_values = load_snapshot(straight / SNAPSHOT_NAME)
    assert values["step"] == expected_values["step"] == STEPS
    assert values["loader"] == expected_values["loader"]
    assert values["evals"] == expected_values["evals"]
    assert tensors.keys() == expected.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], expected[name])]


# One process imports torch once and forks the writers that it kills.
_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from model.snapshot import load_snapshot, save_snapshot

torch.set_num_threads(1)
path, rng = Path(sys.argv[1]), random.Random(3)
for kill in range(15):
    child = os.fork()
    if child == 0:
        number = 1000 * kill
        while True:
            number += 1
            tensors = {name: torch.full((100_000,), float(number)) for name in "ab"}
            save_snapshot(path, tensors, {"number": number})
    while not path.exists() or load_snapshot(path)[1]["number"] <= 1000 * kill:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, values = load_snapshot(path)
    assert all((tensors[name] == values["number"]).all() for name in "ab"), values
    unfinished = path.with_name(path.name + ".tmp").exists()
    print("killed inside a write" if unfinished else "killed between writes", flush=True)
"""


def test_snapshot_is_whole_after_every_kill(tmp_path):
    """Kill a process that does nothing but write snapshots, at moments spread over a write."""
    state = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, str(state)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 15 and "killed inside a write" in done.stdout
    assert len(list(tmp_path.iterdir())) <= 2  # the state, and at most one unfinished write


def test_failed_write_keeps_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state"
    save_snapshot(path, {"a": torch.ones(3)}, {"n": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_snapshot(path, {"a": torch.zeros(3)}, {"n": 2})
    tensors, values = load_snapshot(path)
    assert values == {"n": 1} and torch.equal(tensors["a"], torch.ones(3))


def test_bad_snapshots_are_refused(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_snapshot(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_snapshot(path)
    save_snapshot(path, {"a": torch.ones(300)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_snapshot(path)
    header = json.dumps({"__metadata__": {"format": "other"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="expected format"):
        load_snapshot(path)


def test_command_refuses_to_lose_a_run(tmp_path, threads, capsys):
    texts, out = tmp_path / "texts", tmp_path / "out"
    write_texts(texts)
    out.mkdir()
    save_snapshot(out / SNAPSHOT_NAME, {"a": torch.ones(1)}, {"step": 1})
    before = (out / SNAPSHOT_NAME).read_bytes()
    assert main(train_options(out, texts)) == 1
    errors = capsys.readouterr().err
    assert "--resume" in errors and "--overwrite" in errors
    assert (out / SNAPSHOT_NAME).read_bytes() == before
