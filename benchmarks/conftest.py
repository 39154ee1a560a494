"""Device, ceilings and clock of the benchmarks; a wrong result is never timed."""

import dataclasses
import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.reports import TestReport

from . import timing

START = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=default, choices=("cuda", "cpu"))
    parser.addoption("--seconds", type=int, help="skip the rows that would start later")
    parser.addoption("--results", type=Path, help="JSON lines: ceiling, rows, what is absent, why")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(cuda, cpu): what a benchmark is run on")
    config.stash[START] = time.monotonic()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.backends.cuda.matmul.allow_tf32 = False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.cases(cuda=..., cpu=...)``: the cases of the device this run is on."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.definition.get_closest_marker("cases").kwargs
        chosen = cases[metafunc.config.getoption("--device")]
        metafunc.parametrize("case", chosen, ids=lambda case: case.name)


def ours(item: pytest.Item) -> bool:
    """Whether a row is of this package, in any of its variants."""
    return item.callspec.params["peer"].name.startswith("croc")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The device's clock for every row, and an order in which a budget cuts least: ours first, with
    attention, which takes longest, last of them; then attention's peers and the other peers; at the
    end those that compile longest.
    """

    def late(item: pytest.Item) -> tuple[bool, bool, bool]:
        name, attention = item.callspec.params["peer"].name, "attention" in item.path.name
        return not ours(item), name in ("flex-flash", "fa4-mask-mod"), attention == ours(item)

    items.sort(key=late)
    device = torch.device(config.getoption("--device"))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timing.clock(device)))


def note(config: pytest.Config, kind: str, value: dict[str, Any]) -> None:
    """One line of the results, at once: what was measured survives a run that is stopped."""
    path = config.getoption("--results")
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({kind: value}) + "\n")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--device"))
    timing.capturable_stream(chosen)
    return chosen


@pytest.fixture(scope="session")
def ceiling(request: pytest.FixtureRequest, device: torch.device) -> timing.Ceiling:
    measured = timing.measure_ceiling(device)
    note(request.config, "ceiling", dataclasses.asdict(measured))
    return measured


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[START] > seconds:
        pytest.skip(f"the time budget of {seconds} s is used up")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, TestReport, TestReport]:
    """Note why a row has no time. A peer that breaks is absent; only our own rows fail a run."""
    report = yield
    peer = item.callspec.params["peer"].name
    row = {"row": item.nodeid.split("::")[-1]}
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        note(item.config, "absent", row | {"reason": reason})
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else str(report.longrepr)).strip().splitlines()
        row["reason"] = f"{peer}: {message[0] if message else 'no message'}"
        note(item.config, "failed" if ours(item) else "absent", row)
        if not ours(item):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {row['reason']}")
    elif report.when == "call" and item.funcargs["benchmark"].extra_info:
        note(item.config, "row", item.funcargs["benchmark"].extra_info)
    return report
