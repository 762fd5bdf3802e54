"""Pipeline parallelism: schedules as data, priced, drawn and executed from the same list.

    from dskernels import pipeline
    schedule = pipeline.make("dualpipe", ranks=8, microbatches=20)
    result = pipeline.simulate(schedule, pipeline.Costs(f=1, bi=1, w=1, fb=3))
    result.makespan, result.bubble, result.peak_activations
    svg = pipeline.draw.svg(result)

Schedules, simulator and pictures need the standard library and NumPy only; `runtime` needs torch.
"""

from . import draw
from .actions import Action, Op, Schedule, ScheduleError
from .costs import Costs
from .lower import add_comms
from .overlap import Work
from .schedules import NAMES, make
from .simulate import Result, simulate
from .validate import problems, validate

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Op",
    "Result",
    "Schedule",
    "ScheduleError",
    "Work",
    "add_comms",
    "draw",
    "make",
    "problems",
    "simulate",
    "validate",
]
