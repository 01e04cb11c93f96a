"""The fixture that every run needs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the path alone


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Inherited by every process of the run, so that a left-over one can be told."""
    monkeypatch.setenv("ZTRL_TEST_MARKER", str(tmp_path))
    return str(tmp_path)
