"""The world of a case: made once through the real verbs, copied for each case."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bad_world
from bad_forks import Forks


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished world; never written to."""
    folder = tmp_path_factory.mktemp("world")
    bad_world.make(folder)
    return folder


@pytest.fixture
def world(made_once: Path, tmp_path: Path) -> Path:
    """A copy of its own for one case."""
    return bad_world.copy(made_once, tmp_path / "w")


@pytest.fixture
def new_world(made_once: Path, tmp_path: Path) -> Callable[[str], Path]:
    """As many copies as a case wants, by name."""
    return lambda name: bad_world.copy(made_once, tmp_path / name)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """One process that has imported everything; every command runs in a fork of it."""
    with Forks() as running:
        yield running
