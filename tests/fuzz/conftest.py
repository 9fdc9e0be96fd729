"""Says at the end how many inputs were tried."""

from __future__ import annotations

import pytest

from tests.fuzz.cases import COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("inputs that were tried")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.line(f"{count:7,}  {name}")
        terminalreporter.line(f"{sum(COUNTS.values()):7,}  in all")
