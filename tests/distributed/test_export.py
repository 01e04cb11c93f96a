"""A policy loaded into Megatron and exported again is the same file content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case
from reference import CANARY, reference_path
from safetensors.torch import load_file
from small_qwen2 import HF_CONFIG

from megatron_ztrl.trainer.export import export_hf
from megatron_ztrl.weights.hf_checkpoint import load_slices
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)


def test_export_of_the_loaded_policy_is_bitwise_the_source(parity: Any, root: Path, policy: Case) -> None:
    source = load_file(root / policy.checkpoint / "model.safetensors")
    export = load_file(root / f"export-{policy.name}" / "model.safetensors")
    assert source.keys() == export.keys()
    assert all(torch.equal(source[name], export[name]) for name in source)


def test_export_carries_config_and_tokenizer(parity: Any, root: Path) -> None:
    export = root / "export-tp2"
    assert (export / "tokenizer.json").read_text() == (root / "qwen2" / "tokenizer.json").read_text()
    assert json.loads((export / "config.json").read_text())["dtype"] == "float32"


def test_transformers_loads_an_export(parity: Any, root: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = torch.load(reference_path(root, "qwen2-tied"), weights_only=False)
    model = AutoModelForCausalLM.from_pretrained(root / "export-tp2-sp-pp2-tied")
    canary = torch.tensor(CANARY)
    with torch.no_grad():
        logp = model(canary[None]).logits[0, :-1].log_softmax(-1).gather(-1, canary[1:, None])[:, 0]
    assert torch.allclose(logp, reference["canary"], atol=1e-6)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """This process is the only rank of a world."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_an_export_takes_the_place_of_the_former_one_when_it_is_whole(alone: None, tmp_path: Path) -> None:
    """Whenever it is killed, there is the former policy, or the new one: never weights of both."""
    source, target = tmp_path / "source", tmp_path / "policy"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(HF_CONFIG))
    architecture, layout = Architecture.from_hf_config(HF_CONFIG), ParallelLayout()
    shapes = hf_tensor_shapes(architecture)
    sizes: dict[str, list[int]] = {}
    for piece in megatron_slices(architecture, layout, 0, backend="local"):
        shape = sizes.setdefault(piece.param, [*shapes[piece.tensor]])
        shape[piece.dim] = max(shape[piece.dim], piece.start + piece.length)
    calls = 0

    def export(number: float, fail_at: int) -> None:
        nonlocal calls
        calls = 0

        def parameter(name: str) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if target.exists():
                assert {float(t.unique()) for t in load_file(target / "model.safetensors").values()} == {1.0}
            if calls == fail_at:
                raise OSError("no space left on device")
            return torch.full(sizes[name], number)

        export_hf(target, source, parameter, architecture, layout, "local")

    export(1.0, fail_at=-1)
    with pytest.raises(OSError, match="no space left"):
        export(2.0, fail_at=calls - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meeting", "policy", "source"]
    export(2.0, fail_at=-1)
    assert {float(t.unique()) for t in load_file(target / "model.safetensors").values()} == {2.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meeting", "policy", "source"]


def test_a_parameter_that_no_slice_fills_is_not_taken_for_padding() -> None:
    with pytest.raises(AssertionError, match="decoder.layers.3.mlp.linear_fc1.weight is in no slice"):
        load_slices([], {"decoder.layers.3.mlp.linear_fc1.weight": torch.ones(2, 2)}, None)  # type: ignore[arg-type]
