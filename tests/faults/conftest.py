"""At the end, each row of the fault matrix says how many cases it took, with which seed, in what time."""

from collections.abc import Iterator
from typing import Any

import pytest
from faults.matrix import Figure


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    figure = getattr(item, "callspec", None) and item.callspec.params.get("figure")  # type: ignore[attr-defined]
    if call.when == "call" and isinstance(figure, Figure):
        if call.excinfo is None:
            assert figure.whole, f"{figure}: cases were left out"
        item.user_properties.append(("figure", str(figure)))
    return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
    ]
    told = [
        f"{dict(report.user_properties)['figure']}, {report.duration:.0f} s, {report.outcome}: "
        f"{report.nodeid.rpartition('::')[2]}"
        for report in reports
        if "figure" in dict(report.user_properties)
    ]
    if told:
        terminalreporter.section("fault matrix")
        for line in sorted(told):
            terminalreporter.write_line(line)
