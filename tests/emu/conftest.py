"""Records which tests execute which rows of the instruction table, and prints the count."""

import os
from collections import defaultdict

import pytest

ROW_TESTS: dict[int, set[str]] = defaultdict(set)  # row -> the tests whose kernels hold it


@pytest.fixture(autouse=True, scope="session")
def record_rows():
    """The tests by table row, of the kernels launched so far in this session."""
    module = pytest.importorskip("dskernels.emu.module")
    launch = module.Launcher.__call__

    def recorded(self, *args, **options):
        for row in self._kernel.info["table_rows"]:
            ROW_TESTS[row].add(os.environ.get("PYTEST_CURRENT_TEST", "?"))
        return launch(self, *args, **options)

    module.Launcher.__call__ = recorded
    yield ROW_TESTS
    module.Launcher.__call__ = launch


def pytest_collection_modifyitems(items):
    """The coverage count comes after everything that it counts."""
    items.sort(key=lambda item: item.name == "test_every_row_is_executed")


def pytest_terminal_summary(terminalreporter):
    if not ROW_TESTS:
        return
    from dskernels import emu

    counts = sorted(len(tests) for tests in ROW_TESTS.values())
    tests = len(set().union(*ROW_TESTS.values()))
    terminalreporter.write_line(
        f"instruction table: {len(counts)} of {len(emu.instruction_table())} rows executed by "
        f"{tests} tests; tests of one row: {counts[0]} to {counts[-1]}, median "
        f"{counts[len(counts) // 2]}"
    )
