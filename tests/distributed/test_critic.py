"""A critic is a transformers token classifier with one label; ``test_parity`` compares the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import Case
from random_policies import CHECKPOINTS, samples
from reference import reference_path
from safetensors.torch import load_file


def test_critic_made_from_a_policy_says_zero(parity: dict[str, Any], root: Path) -> None:
    reference = torch.load(reference_path(root, "new-critic"), weights_only=False)
    assert all((values == 0.0).all() for values in reference["outputs"])
    assert all(rank["gaps"]["float32"]["outputs"] == 0.0 for rank in parity["critic-new-tp2"])


def test_value_clip_is_at_work(root: Path, critic: Case) -> None:
    reference = torch.load(reference_path(root, critic.checkpoint), weights_only=False)
    assert 0.05 < reference["clip_fractions"][0] < 0.95


def test_transformers_loads_an_export_and_gives_the_same_values(
    parity: dict[str, Any], root: Path, critic: Case
) -> None:
    from transformers import AutoModelForTokenClassification

    reference = torch.load(reference_path(root, critic.checkpoint), weights_only=False)
    model = AutoModelForTokenClassification.from_pretrained(root / f"export-{critic.name}").eval()
    assert model.config.num_labels == 1
    for sample, expected in zip(samples(), reference["outputs"], strict=True):
        with torch.no_grad():
            found = model(torch.tensor([sample.token_ids])).logits[0, :-1, 0]
        # The same numbers, but a kernel may take another way where a file's weights lie otherwise in memory.
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_export_is_bitwise_the_source_and_a_new_head(
    parity: dict[str, Any], root: Path, critic: Case
) -> None:
    source = load_file(root / critic.checkpoint / "model.safetensors")
    export = load_file(root / f"export-{critic.name}" / "model.safetensors")
    head = {"score.weight", "score.bias"} if CHECKPOINTS[critic.checkpoint].new_head else set()
    assert export.keys() == source.keys() | head
    assert all(torch.equal(source[name], export[name]) for name in source)


def test_a_critic_in_bfloat16_says_numbers_that_are_finer(parity: dict[str, Any]) -> None:
    assert max(rank["finer outputs"] for rank in parity["bfloat16-critic-pp2"]) > 0.3
