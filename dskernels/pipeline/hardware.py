"""Accelerators and the networks between them, as data sheets state them.

Rates are per GPU and per direction. Efficiencies, how much of a data sheet figure real kernels
reach, are not here but in `rates`, each with its source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from .actions import ScheduleError


@dataclass(frozen=True)
class Hardware:
    """One GPU and its share of the network.

    bf16, fp8           dense tensor-core FLOP/s.
    hbm, memory         bytes/s and bytes of device memory.
    nvlink, rdma        bytes/s to GPUs of the same node, and of other nodes.
    sms                 multiprocessors.
    gpus_per_node       GPUs joined by NVLink.
    dollars             rent of one GPU for an hour.
    """

    name: str
    bf16: float
    fp8: float
    hbm: float
    memory: float
    nvlink: float
    rdma: float
    sms: int = 132
    gpus_per_node: int = 8
    dollars: float = 2.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "name" and not getattr(self, f.name) > 0:
                raise ScheduleError(
                    f"hardware {self.name}: {f.name} must be > 0; got {getattr(self, f.name)!r}"
                )


# H100, H200, B200: NVIDIA data sheets (dense rates). H800: H100 SXM with 400 GB/s NVLink (200 each
# way; DeepSeek states 160 GB/s reachable) and a 400 Gb/s NIC a GPU (DeepSeek-V3 report, 3.1).
# Rents: $2 an H800 hour is the report's own assumption; the others are list prices' order only.
PRESETS = {
    h.name: h
    for h in (
        Hardware("h800", 989e12, 1979e12, 3.35e12, 80e9, 200e9, 50e9),
        Hardware("h100", 989e12, 1979e12, 3.35e12, 80e9, 450e9, 50e9, dollars=2.5),
        Hardware("h200", 989e12, 1979e12, 4.8e12, 141e9, 450e9, 50e9, dollars=3.0),
        Hardware("b200", 2250e12, 4500e12, 8e12, 180e9, 900e9, 50e9, sms=148, dollars=5.0),
    )
}


def hardware(name: str) -> Hardware:
    """A preset by name, or a description from a .toml, .yaml or .json file.

    A file holds the fields of `Hardware`; `base = "h800"` starts from a preset.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).suffix:
        raise ScheduleError(
            f"cluster must be one of {', '.join(PRESETS)} or a .toml/.yaml/.json file; got {name!r}"
        )
    given = read_table(name)
    base = given.pop("base", None)
    if base is not None and base not in PRESETS:
        raise ScheduleError(f"{name}: base must be one of {', '.join(PRESETS)}; got {base!r}")
    start = vars(PRESETS[base]).copy() if base else {}
    unknown = set(given) - {f.name for f in fields(Hardware)}
    if unknown:
        raise ScheduleError(f"{name}: unknown hardware fields {sorted(unknown)}")
    try:
        return Hardware(**{**start, "name": Path(name).stem, **given})
    except TypeError as error:
        raise ScheduleError(f"{name}: {error}") from error


def read_table(path: str) -> dict:
    """A flat table from .toml, .yaml/.yml or .json."""
    text = Path(path).read_text()
    suffix = Path(path).suffix
    if suffix == ".json":
        table = json.loads(text)
    elif suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError as error:
            raise ScheduleError(f"{path}: reading YAML needs the PyYAML package") from error
        table = yaml.safe_load(text)
    else:
        try:
            import tomllib
        except ImportError as error:  # Python 3.10
            raise ScheduleError(f"{path}: reading TOML needs Python >= 3.11") from error
        table = tomllib.loads(text)
    if not isinstance(table, dict):
        raise ScheduleError(f"{path}: expected a table of fields, got {type(table).__name__}")
    return table
