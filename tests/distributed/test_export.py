"""A policy loaded into Megatron and exported again is the same file content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import Case
from reference import CANARY, reference_path
from safetensors.torch import load_file


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
