"""Settings shared by all tests: one torch thread a process, a cache of their own, and the ``gpu`` marker."""

import logging

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    logging.raiseExceptions = False  # handlers of earlier tests write to streams that are closed


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps the checks of the tests' datasets out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AQDET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def loggers():
    """Starts every test with loggers whose messages it sees, whatever programs ran in this process before."""
    logging.disable(logging.NOTSET)
    for name in ("aqdet", "detectron2", "fvcore"):
        logging.getLogger(name).propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
