"""Tools for tests of kernels: error budgets, poisoned inputs, guarded buffers.

calc_diff, assert_close_to_exact     how far from the truth may a result be
poison_rows, poisoned_pages, UNUSED_PAGE, guarded_empty     was anything touched that must not
"""

from .errors import assert_bitwise_equal, assert_close_to_exact, calc_diff, relative_error
from .poison import UNUSED_PAGE, guarded_empty, poison_rows, poisoned_pages

__all__ = [
    "UNUSED_PAGE",
    "assert_bitwise_equal",
    "assert_close_to_exact",
    "calc_diff",
    "guarded_empty",
    "poison_rows",
    "poisoned_pages",
    "relative_error",
]
