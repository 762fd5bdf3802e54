"""Records which rows of the instruction table the tests' kernels execute."""

import pytest

ROWS_RUN: set[int] = set()


@pytest.fixture(autouse=True, scope="session")
def record_rows():
    """The set of table rows in the kernels launched so far in this session."""
    module = pytest.importorskip("dskernels.emu.module")
    launch = module.Launcher.__call__

    def recorded(self, *args, **options):
        ROWS_RUN.update(self._kernel.info["table_rows"])
        return launch(self, *args, **options)

    module.Launcher.__call__ = recorded
    yield ROWS_RUN
    module.Launcher.__call__ = launch


def pytest_collection_modifyitems(items):
    """The coverage count comes after everything that it counts."""
    items.sort(key=lambda item: item.name == "test_every_row_is_executed")
