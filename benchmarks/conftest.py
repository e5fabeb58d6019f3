"""Options, the session's recorder, and what is written when the session ends. `pytest benchmarks/ --help` lists the options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import report
import torch
import torch._dynamo.config
import torch._functorch.config

HERE = Path(__file__).parent
_recorder = harness.Recorder()
_session = {"deselected": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("newllm benchmarks")
    group.addoption(
        "--results",
        metavar="PATH",
        type=Path,
        help="write the rows to this JSON file, whatever ran. Without it benchmarks/results/<device>.json is written, and "
        "only if every benchmark ran and none failed: a partial run never replaces the committed file",
    )
    group.addoption(
        "--candidates",
        action="store_true",
        help="time every pure-PyTorch formulation of the scans, not only the fastest ones (some compile for a minute)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's own table is some 300 columns wide; ours says the same, and -v brings it back.
    if config.option.verbose < 1 and hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True
    harness.keep_heap()
    torch._functorch.config.donated_buffer = False  # compiled backwards are run many times on one retained graph
    # One graph a size and provider, and a new one rather than a slower dynamic one.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024


def pytest_deselected(items: list[pytest.Item]) -> None:
    _session["deselected"] += len(items)


@pytest.fixture(scope="session")
def recorder() -> harness.Recorder:
    return _recorder


@pytest.fixture(scope="module", autouse=True)
def copy_around_the_group(recorder: harness.Recorder, request: pytest.FixtureRequest) -> Iterator[None]:
    """The ceiling is measured before and after every operation's benchmarks. What --results has so far is written after each,
    because time on a lent GPU can end before the session does."""
    recorder.measure_copy()
    yield
    recorder.measure_copy()
    path = request.config.getoption("results")
    if path is not None and recorder.rows:
        report.write(path, recorder.finished(), recorder.copies, recorder.refused)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not _recorder.rows:
        return
    path = session.config.getoption("results")
    if path is None and exitstatus == 0 and _whole(session):
        path = HERE / "results" / f"{report.device_slug()}.json"
    _session["path"] = path
    if path is not None:
        report.write(path, _recorder.finished(), _recorder.copies, _recorder.refused)


def _whole(session: pytest.Session) -> bool:
    """Whether every benchmark file was collected in full: nothing deselected, no single tests named."""
    collected = {item.path for item in session.items}
    return (
        not _session["deselected"]
        and not any("::" in arg for arg in session.config.args)
        and collected >= set(HERE.glob("bench_*.py"))
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _recorder.rows:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(report.table(_recorder.finished(), _recorder.copy_gbps))
    for what in _recorder.refused:
        terminalreporter.write_line(f"REFUSED  {what}")
    path = _session.get("path")
    terminalreporter.write_line(
        f"written to {path}" if path else "not written (a partial or failed run; --results PATH)"
    )
