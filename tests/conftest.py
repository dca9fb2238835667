"""How tests are dealt out where two files run at a time: whole files, and those with processes one by one."""

from __future__ import annotations

import pytest

# They meet at free ports, which two at a time may find to be the same.
WITH_PROCESSES = {"edited_parameters", "failing_ranks", "launchers", "preemption", "scripts", "two_processes", "zero"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.path.stem
        group = "processes" if name.removeprefix("test_") in WITH_PROCESSES else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
