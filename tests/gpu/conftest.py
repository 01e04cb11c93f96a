"""Tests that only an NVIDIA GPU can pass. docs/gpu_checks.md says what each would show, and how to run it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves the path alone.
sys.path.insert(0, str(Path(__file__).parent))

from small_policy import save_policy


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch sees none (run tests/gpu by itself)")
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine: make gpu-setup")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy of shapes that every kernel takes."""
    directory = tmp_path_factory.mktemp("policy")
    save_policy(directory)
    return directory
