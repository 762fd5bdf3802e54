"""The bugs planted by mutation/mutate_model.py: all apply (always), all are caught (nightly)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "mutation" / "mutate_model.py"


def test_every_mutant_still_applies():
    spec = importlib.util.spec_from_file_location("mutate_model", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    names = [mutant.name for mutant in script.MUTANTS]
    assert len(set(names)) == len(names) >= 46
    for mutant in script.MUTANTS:
        source = (script.ROOT / mutant.file).read_text()
        assert mutant.old in source and mutant.old != mutant.new, mutant.name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_planted_bug_is_caught():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
