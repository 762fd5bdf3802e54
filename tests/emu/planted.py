"""Planting hazards: a kernel that is right on every schedule, and without some lines is caught."""

import re

import numpy as np
import pytest
from ptx_kernel import text

from dskernels import emu

SEEDS = [None, 0, 1, 2]


def launch(body, args, seed=None, **options):
    """Runs `body` as a kernel and returns its statistics."""
    shared = options.pop("shared", 8192)
    threads, grid = options.pop("threads", 64), options.pop("grid", 1)
    module = emu.Module(text(body, len(args), shared))
    return module.kernel("k")[grid, threads](*args, seed=seed, **options)


def check_hazard(hazard, kind, source):
    """`hazard` is of the kind and, like the other access it names, on a line the source marks."""
    marked = {
        k
        for k, line in enumerate(source.splitlines(), 1)
        if re.search(r"// .*\b(BUG|VICTIM)\b", line)
    }
    assert hazard.kind == kind, hazard
    assert hazard.ptx_line in marked, (hazard, marked)
    named = re.search(r"PTX line (\d+)", hazard.message)
    assert named is None or int(named[1]) in marked, (hazard, marked)
    return named is not None


def caught(body, args, kind, seed=None, alone=False, **options):
    """The hazard of kind `kind` is raised, on a line that the body marks, and names the other
    access's line too (unless it stands alone)."""
    with pytest.raises(emu.HazardError) as e:
        launch(body, args, seed, **options)
    source = text(body, len(args), options.get("shared", 8192))
    assert check_hazard(e.value.hazards[0], kind, source) or alone


def drop(body, marker):
    """The body without the lines that end in the comment `// marker`."""
    return "\n".join(line for line in body.splitlines() if not line.endswith(f"// {marker}"))


def planted(body, args, kind, without="FIX", broken=None, **options):
    """`body` is right on every schedule; without the lines marked `without` (or as `broken`) it is
    caught on every schedule."""

    def fresh():
        return [a.copy() if isinstance(a, np.ndarray) else a for a in args]

    for seed in SEEDS:
        good = {k: v for k, v in options.items() if k != "alone"}
        stats = launch(body, fresh(), seed, **good)
        assert not [h for h in stats.hazards if h.severity == "error"]
        caught(broken or drop(body, without), fresh(), kind, seed, **options)
