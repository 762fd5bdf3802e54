"""What the emulator executes in a call, counted: for tests of work that must not be done twice."""

from collections import Counter, defaultdict

from dskernels import emu


def launches_of(call):
    with emu.profiling(sample_ctas=None) as profile:
        call()
    return profile.launches


def work_of(call):
    """Warp-instructions by kernel and kind."""
    work = defaultdict(Counter)
    for launch in launches_of(call):
        work[launch.kernel].update(launch.mix)
    return work


def instructions_of(call):
    """How often warps ran each instruction, of one launch a kernel: {name: [(text, times)]}."""
    return {
        launch.kernel: [(line["text"], line["executed"]) for line in launch.instructions]
        for launch in launches_of(call)
    }


def times(instructions, *starts):
    """How often those ran that begin with one of `starts`."""
    return sum(executed for text, executed in instructions if text.startswith(starts))


def executed(call, text):
    """How often warps ran an instruction that begins with `text`, over all launches of a call."""
    lines = (line for launch in launches_of(call) for line in launch.instructions)
    return sum(line["executed"] for line in lines if line["text"].startswith(text))
