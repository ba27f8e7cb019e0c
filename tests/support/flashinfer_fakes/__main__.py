"""`python -m flashinfer_fakes`: the tests that run FlashInfer's Python over these fakes. None may be skipped."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


class Tally:
    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.outcomes[report.outcome] += 1


def main() -> int:
    tally = Tally()
    code = pytest.main([*map(str, sorted(TESTS.rglob("test_flashinfer*.py"))), *sys.argv[1:]], plugins=[tally])
    print(f"flashinfer: {tally.outcomes['passed']} passed, {tally.outcomes['skipped']} skipped")
    return int(code) or int(tally.outcomes["skipped"] > 0)


if __name__ == "__main__":
    sys.exit(main())
