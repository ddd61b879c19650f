"""pytest and pytest-benchmark: `pytest benchmarks --benchmark-enable [--scale quick]`.

What a benchmark measured in its processes is handed to pytest-benchmark as it is, by a clock that
moves only when told to; limits, ratios and targets go along as `extra_info`. Without
--benchmark-enable every benchmark runs once, tiny, so that nothing is measured but that it works.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.harness import Bench, Row


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    names = sorted(harness.SCALES)
    parser.addoption("--scale", choices=names, default=None, help="how much is measured")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Bench]:
    enabled = request.config.getoption("--benchmark-enable", default=False)
    name = request.config.getoption("--scale") or ("quick" if enabled else "tiny")
    bench = Bench(harness.SCALES[name])
    yield bench
    bench.close()


@pytest.fixture
def bench(session: Bench, benchmark: Any, request: pytest.FixtureRequest) -> Bench:
    """The session's, which hands what is measured to pytest-benchmark."""
    session.question = (request.module.__doc__ or "").split("\n")[0]

    def added(row: Row) -> None:
        if benchmark.extra_info:  # one that has several rows: the plugin takes one
            benchmark.extra_info.setdefault("more", []).append(row.as_dict())
            return
        benchmark.extra_info.update(row.as_dict())
        benchmark.name = row.work
        benchmark.group = row.question
        rounds = iter(row.ours)
        if row.unit not in harness.SECONDS:
            benchmark.name = f"{row.work}: {row.shown(row.ours)}"
            rounds = iter(())

        def pass_time() -> None:
            CLOCK.now += next(rounds, 0.0)

        benchmark.pedantic(pass_time, rounds=len(row.ours))

    session.added = added  # type: ignore[method-assign]
    return session
