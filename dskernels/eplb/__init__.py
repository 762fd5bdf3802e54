"""Which experts to replicate, on which GPU each replica lives, and how much traffic it takes.

`greedy` is the published algorithm. `rebalance` starts from it and never ends worse: replicas of an
expert lie on different GPUs whenever there are experts enough to fill one, GPUs may be dead or have
unequal slots, a move of weights costs something, and replicas may share an expert's traffic
unequally. `LoadWindow` gathers the loads while the model runs; `Placement.replicas` turns the
router's expert numbers into slot numbers at dispatch.
"""

from .greedy import greedy
from .placement import Placement
from .rebalance import rebalance
from .window import LoadWindow

__all__ = ["LoadWindow", "Placement", "greedy", "rebalance"]
