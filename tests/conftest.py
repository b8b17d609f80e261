"""Options and fixtures of all tests: the device they run on, and real processes to run on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from tests.distributed import BACKENDS, RankPool, missing_device

# No deadline: the first example of a test pays for what torch sets up lazily.
hypothesis.settings.register_profile("nnscaler_ring", deadline=None)
hypothesis.settings.load_profile("nnscaler_ring")

# Small tensors: more threads only wait for each other, most of all where processes share the cores.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
    # The interpreter of triton 3.6 and before, with numpy before 2.4; newer ones refuse it, see tests/interpreter.py.
    known = r"ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning:triton\.runtime\.interpreter"
    config.addinivalue_line("filterwarnings", known)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=list(BACKENDS), default="cpu", help="device type of the tests (default: cpu)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("transformers") is None:
        for item in items:
            if item.path.match("nnscaler_ring/integrations/*"):  # examples in docstrings
                item.add_marker(pytest.mark.skip(reason="needs transformers"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and (missing := missing_device("cuda")):
        pytest.skip(f"needs {missing}")
    if item.get_closest_marker("nnscaler") and importlib.util.find_spec("nnscaler") is None:
        pytest.skip("needs nnscaler")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen by ``--device``."""
    name = request.config.getoption("--device")
    if missing := missing_device(name):
        pytest.skip(f"needs {missing}")
    return torch.device(name)


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Callable[[int], RankPool]]:
    """``ranks(world_size)``: a pool of processes on the chosen device, kept for the session."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, request.config.getoption("--device"))
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()
