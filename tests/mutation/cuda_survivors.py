"""Mutants of the CUDA kernels that no test can catch, each with the reason why that is right.

Keyed by (file, source line, mutated line); an entry that no longer applies is reported as stale.
"""

EXPLAINED: dict[tuple[str, str, str], str] = {}
