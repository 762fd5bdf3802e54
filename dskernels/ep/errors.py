"""What a rank is told when another one does not answer."""

from __future__ import annotations

from typing import Any


class PeerSilent(RuntimeError):
    """A collective call could not finish: a rank died, stopped, or did not answer in time.

    report: a dict with
      rank, reason, phase, epoch, waited_seconds  who waited, why it gave up, for what, how long
      silent    one dict per rank whose signal is missing: rank, state ("alive", "stopped", "dead",
                "unknown"), have and want (its counter), and, where it can be read, waits_for,
                waits_on, waits_seconds: what that rank waits for itself
      counters  per phase, the counter of every source rank as this rank has it
    The group is unusable until `Group.recover()` has run on every survivor.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(_text(report))
        self.report = report

    @property
    def ranks(self) -> list[int]:
        """The silent ranks."""
        return [peer["rank"] for peer in self.report["silent"]]

    @property
    def dead(self) -> list[int]:
        """Those of them that are known to be dead or stopped."""
        return [p["rank"] for p in self.report["silent"] if p["state"] in ("dead", "stopped")]


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"rank {report['rank']} gave up ({report['reason']}) after "
        f"{report['waited_seconds']:.2f} s, waiting for {report['phase']!r} of epoch "
        f"{report['epoch']}"
    ]
    for peer in report["silent"]:
        line = f"  rank {peer['rank']} is silent: {peer['state']}, at {peer['have']}"
        if "waits_on" in peer:
            line += (
                f"; for {peer['waits_seconds']:.2f} s it has waited for {peer['waits_for']!r} of "
                f"ranks {peer['waits_on']}"
            )
        lines.append(line)
    lines.append("  counters of every source rank, as seen here:")
    for phase, row in report["counters"].items():
        if any(row):
            lines.append(f"    {phase:20} " + " ".join(f"{value:6d}" for value in row))
    return "\n".join(lines)
