"""The bugs planted by mutation/mutate_ref.py: all apply (always), all are caught (nightly)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "mutation" / "mutate_ref.py"


def test_every_mutant_still_applies():
    spec = importlib.util.spec_from_file_location("mutate_ref", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    names = [mutant.name for mutant in script.MUTANTS]
    assert len(set(names)) == len(names) >= 100
    for mutant in script.MUTANTS:
        source = (script.ROOT / "dskernels" / "ref" / f"{mutant.stem}.py").read_text()
        assert mutant.old in source and mutant.old != mutant.new, mutant.name
        compile(source.replace(mutant.old, mutant.new), mutant.name, "exec")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_mutant_is_caught():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
