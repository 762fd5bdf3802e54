"""What changes while training runs: learning rate, MTP weight, and the gates' bias speed.

The V3 report (arXiv 2412.19437, section 4.2) counts in tokens out of 14.8T. Here every phase is a
fraction of the run, so that one schedule serves 14.8T tokens and four minutes on a laptop; the
warm-up alone is a number of steps, because it protects the optimizer's first estimates and not a
share of the data.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up, hold, cosine, and two constant tails; the defaults are the report's proportions.

    All `*_end` values are fractions of the run in [0, 1].
    """

    peak_lr: float = 2.2e-4
    warmup_steps: int = 2000
    hold_end: float = 10.0 / 14.8
    """The peak is held up to here (10T of 14.8T tokens); the MTP weight changes here too."""
    decay_end: float = 14.3 / 14.8
    """The cosine reaches its floor here; from here on the gates' biases stay as they are."""
    tail_end: float = (14.8 - 0.167) / 14.8
    """The floor is held up to here (333B tokens); the rest (167B) runs at the last rate."""
    floor: float = 0.1
    """2.2e-5 over 2.2e-4."""
    last: float = 7.3e-6 / 2.2e-4
    mtp_weight_early: float = 0.3
    mtp_weight_late: float = 0.1
    bias_speed: float = 1e-3
    """gamma, the step of the auxiliary-loss-free bias update."""

    def __post_init__(self):
        if not 0.0 <= self.hold_end <= self.decay_end <= self.tail_end <= 1.0:
            raise ValueError(
                "hold_end, decay_end, tail_end: expected 0 <= hold_end <= decay_end <= tail_end "
                f"<= 1, got {self.hold_end}, {self.decay_end}, {self.tail_end}"
            )
        if self.peak_lr <= 0 or self.warmup_steps < 0:
            raise ValueError(
                f"peak_lr, warmup_steps: expected > 0 and >= 0, got {self.peak_lr}, "
                f"{self.warmup_steps}"
            )

    def learning_rate(self, step: int, progress: float) -> float:
        """Rate of update number `step` (from 0) when `progress` of the run lies behind it."""
        _check_progress(progress)
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.peak_lr * min(warmup, self._decay(progress))

    def _decay(self, progress: float) -> float:
        if progress < self.hold_end:
            return 1.0
        if progress < self.decay_end:
            phase = (progress - self.hold_end) / (self.decay_end - self.hold_end)
            return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * phase))
        return self.floor if progress < self.tail_end else self.last

    def mtp_weight(self, progress: float) -> float:
        """lambda of the multi-token-prediction loss."""
        _check_progress(progress)
        return self.mtp_weight_early if progress < self.hold_end else self.mtp_weight_late

    def gate_bias_speed(self, progress: float) -> float:
        """gamma of the gates' bias update; zero over the last stretch."""
        _check_progress(progress)
        return self.bias_speed if progress < self.decay_end else 0.0


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress: expected a fraction in [0, 1], got {progress}")
