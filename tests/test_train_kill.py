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
from model.trainer import SNAPSHOT_NAME

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24


def write_texts(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    words = ["for ", "x ", "in ", "range(9):\n", "    print(x)\n", "def f():\n", "    return 1\n"]
    for i in range(40):
        (folder / f"t{i}.py").write_text("".join(rng.choices(words, k=150)))


def train_command(out: Path, texts: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "model.train", "--model", "tiny", "--threads", "1"),
        *("--data", str(texts), "--out", str(out), "--seq-len", "32", "--batch", "2"),
        *("--held-out", "0.2", "--max-steps", str(STEPS), "--checkpoint-every", "1"),
        *("--eval-every", "7", "--eval-bytes", "500", *options),
    ]


def run_to_end(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after_steps(command: list[str], state: Path, steps: int, delay: float) -> int:
    """Start, wait until the state on disk is `steps` further, wait `delay` more, kill -9."""
    before = saved_step(state)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while saved_step(state) < before + steps and process.poll() is None:
        assert time.monotonic() < deadline, "the training process made no progress"
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return saved_step(state)


def saved_step(state: Path) -> int:
    return load_snapshot(state)[1]["step"] if state.exists() else 0


def test_killed_runs_end_bitwise_equal(tmp_path):
    texts = tmp_path / "texts"
    write_texts(texts)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_to_end(train_command(straight, texts))
    state = killed / SNAPSHOT_NAME
    reached = kill_after_steps(train_command(killed, texts), state, 2, 0.0)
    assert 0 < reached < STEPS
    again = train_command(killed, texts, "--resume")
    reached = kill_after_steps(again, state, 3, random.Random(1).random() * 0.05)
    assert reached < STEPS
    assert "resumed at step" in run_to_end(again)
    tensors, values = load_snapshot(state)
    expected, expected_values = load_snapshot(straight / SNAPSHOT_NAME)
    assert values["step"] == expected_values["step"] == STEPS
    assert values["loader"] == expected_values["loader"]
    assert values["evals"] == expected_values["evals"]
    assert tensors.keys() == expected.keys()
    assert not [name for name in tensors if not torch.equal(tensors[name], expected[name])]


_WRITER = """
import sys, torch
from pathlib import Path
from model.snapshot import save_snapshot
number = 0
while True:
    number += 1
    tensors = {name: torch.full((200_000,), float(number)) for name in "ab"}
    save_snapshot(Path(sys.argv[1]), tensors, {"number": number})
    print(number, flush=True)
"""


def test_snapshot_is_whole_after_every_kill(tmp_path):
    """Kill a process that does nothing but write snapshots, at moments spread over a write."""
    state, rng = tmp_path / "state", random.Random(3)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(state)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().strip() == "1"
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.communicate()
        tensors, values = load_snapshot(state)
        for name in "ab":
            assert (tensors[name] == values["number"]).all()
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


def test_command_refuses_to_lose_a_run(tmp_path):
    texts, out = tmp_path / "texts", tmp_path / "out"
    write_texts(texts)
    out.mkdir()
    save_snapshot(out / SNAPSHOT_NAME, {"a": torch.ones(1)}, {"step": 1})
    before = (out / SNAPSHOT_NAME).read_bytes()
    done = subprocess.run(
        train_command(out, texts), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "--resume" in done.stderr and "--overwrite" in done.stderr
    assert (out / SNAPSHOT_NAME).read_bytes() == before
