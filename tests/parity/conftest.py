# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models, their engines, and the report of the chain of equalities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.parity.engine import Engine
from tests.parity.processes import Process
from tests.parity.report import Report
from tests.parity.subjects import CUDA, FEW_SUBJECTS, SUBJECTS, Subject
from tests.parity.trainer import TwoRanks

# What needs a GPU, and what claims something of the CPU alone.
ON_CUDA = ["test_large_model.py"]
ON_CPU = ["test_random_models.py", "test_speculation.py"]
collect_ignore = ON_CPU if torch.cuda.is_available() else ON_CUDA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-report",
        metavar="DIRECTORY",
        help="compare all models, write report.json there and print the table",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()


REPORT = pytest.StashKey[Report]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """All tests of one subject follow each other, so that it is loaded once."""
    here = Path(__file__).parent
    if not CUDA and config.getoption("--parity-report", None) is None:
        left_out = [
            item
            for item in items
            if here in item.path.parents
            and hasattr(item, "callspec")
            and item.callspec.params.get("subject", FEW_SUBJECTS[0]) not in FEW_SUBJECTS
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def order(item: pytest.Item) -> int:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        subject = params.get("subject")
        return SUBJECTS.index(subject) if subject in SUBJECTS else len(SUBJECTS)

    places = [i for i, item in enumerate(items) if here in item.path.parents]
    for place, item in zip(places, sorted((items[i] for i in places), key=order)):
        items[place] = item


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    directory, report = config.getoption("--parity-report", None), config.stash[REPORT]
    if directory is not None and report.rows:
        report.write(Path(directory))
        terminalreporter.section("chain of equalities")
        terminalreporter.write_line(report.table())
        terminalreporter.write_line(f"report in {directory}/report.json")


@pytest.fixture(scope="session")
def engines() -> Iterator[Engine]:
    """A process of batch-invariant engines."""
    with _engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def pairs() -> Iterator[Engine]:
    """As `engines`, for those of two tensor-parallel ranks, beside the others."""
    with _engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def apart() -> Iterator[Engine]:
    """As `engines`, for those whose front end is in another process than the rest.

    Also for what a process can do once: vLLM starts no second engine on CPU in one
    that has imported numba, as ngram speculation does.
    """
    with _engine(apart=True) as engine:
        yield engine


@contextmanager
def _engine(apart: bool = False) -> Iterator[Engine]:
    environment = {"VLLM_BATCH_INVARIANT": "1"}
    if apart or torch.cuda.is_available():
        # An engine in a process of its own gives all its memory back.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    engine = Engine(Process(environment))
    try:
        yield engine
        engine.stop()
    finally:
        engine.process.end()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    ranks = TwoRanks()
    yield ranks
    ranks.end()


@pytest.fixture(scope="session", params=SUBJECTS, ids=str)
def subject(
    request: pytest.FixtureRequest,
    engines: Engine,
    pairs: Engine,
    tmp_path_factory: pytest.TempPathFactory,
) -> Subject:
    """A model whose weights the tests may change, and change together."""
    subject = request.param.made(tmp_path_factory.mktemp("model"), engines, pairs)
    # What has two ranks starts slowly, so it begins long before it is needed.
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("engine_tp") == 2 and params["subject"] == request.param:
            subject.begin_pair()
            request.getfixturevalue("two_ranks")
    return subject


@pytest.fixture
def record(
    subject: Subject, pytestconfig: pytest.Config
) -> Callable[[str, list[torch.Tensor], list[torch.Tensor]], None]:
    """`record(name, found, expected)` adds a row and requires equality."""

    def add(name: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        row = (f"{name}, {subject.mode}", subject.model_name, subject.dtype)
        pytestconfig.stash[REPORT].add(row, found, expected)

    return add
