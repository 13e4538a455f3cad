"""What verl runs share: the policy and the pool of comparisons, and where small jobs start."""

from pathlib import Path

import pytest

from tests.e2e.verl_job import prepare
from tests.verl_jobs import make_policy, make_pool


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), 64)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that small jobs with PivotTrace on start from."""
    path = tmp_path_factory.mktemp("jobs")
    prepare(path)
    return path
