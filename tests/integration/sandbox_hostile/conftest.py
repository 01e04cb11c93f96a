"""One executor for each tier and session, for all hostile snippets."""

import sys
from pathlib import Path

import pytest

# pytest's importlib mode leaves the path alone.
sys.path.insert(0, str(Path(__file__).parent))

from hostile import Executors


@pytest.fixture(scope="session")
def executors():
    running = Executors()
    yield running
    running.stop()


@pytest.fixture
def executor(executors, request):
    """The executor of the tier that the test is parametrised with."""
    return executors[request.param]
