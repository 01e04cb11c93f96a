"""The conversion program, called from tests, and ways to spoil its input."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def convert(*arguments: Any) -> int:
    """The program's exit code."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def layout_options(tp: int, pp: int, vp: int) -> list[Any]:
    return ["--tp", tp, "--pp", pp, "--vp", vp]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    loaded = load_file(directory / "model.safetensors")
    edit(loaded)
    save_file(loaded, directory / "model.safetensors")


def refuse(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: Any) -> str:
    """The one line that the program ends with; it made nothing."""
    before = sorted(directory.rglob("*"))
    capsys.readouterr()
    assert convert(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: ")
    assert sorted(directory.rglob("*")) == before
    return lines[-1]


def without_record(directory: Path) -> None:
    (directory / "config.json").unlink()
