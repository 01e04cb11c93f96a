"""Weights kept in FP8 are loaded, trained, published, exported and saved as the numbers they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_policy import actor, batch, reference, trained, with_targets
from test_fp8 import LARGEST_GAP, MEAN_GAP, NEEDS

pytestmark = pytest.mark.gpu

E4M3_STEP = 2**-3
"""Largest distance of a number from its nearest neighbour in e4m3, relative to it, and then some: scales differ."""


@pytest.fixture(params=NEEDS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    if torch.cuda.get_device_capability() < NEEDS[request.param]:
        pytest.skip(f"{request.param} needs compute capability {NEEDS[request.param]}")
    return {"fp8": "hybrid", "fp8_recipe": request.param, "fp8_param": True}


def main_weights(rank: Any) -> dict[str, torch.Tensor]:
    return {name: weight.main_param.detach().view(weight.shape) for name, weight in rank._parameters.items()}


def test_linear_weights_are_quantised_and_main_weights_are_the_checkpoint(
    options: dict[str, Any], checkpoint: Path
) -> None:
    from megatron.core.fp8_utils import is_float8tensor

    tensors = load_file(checkpoint / "model.safetensors")
    with actor(checkpoint, **options) as rank:
        quantised = {name for name, weight in rank._parameters.items() if is_float8tensor(weight)}
        assert {name.split(".", 3)[-1] for name in quantised} == {
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
            "mlp.linear_fc1.weight",
            "mlp.linear_fc2.weight",
        }
        mains = main_weights(rank)
        for piece in rank.parameter_slices():
            expected = tensors[piece.tensor].narrow(piece.dim, piece.tensor_start, piece.length).cuda()
            exact = mains[piece.param].narrow(piece.dim, piece.start, piece.length)
            assert torch.equal(exact, expected.bfloat16().float()), piece
            read = rank.parameter(piece.param).narrow(piece.dim, piece.start, piece.length).float()
            largest = expected.abs().max()
            assert (read - expected).abs().max() <= E4M3_STEP * largest, piece


def test_logprobs_stay_near_float32(options: dict[str, Any], checkpoint: Path) -> None:
    packed = batch()
    exact = reference(checkpoint, torch.float32)
    with actor(checkpoint, **options) as rank:
        gap = np.abs(trained(packed, rank.logprobs(packed)) - exact)
    print(f"{options['fp8_recipe']}: mean {gap.mean():.4f}, largest {gap.max():.3f} nats")
    assert gap.mean() < 2 * MEAN_GAP and gap.max() < 2 * LARGEST_GAP


def test_it_trains_and_a_resumed_rank_goes_on_where_it_stopped(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    packed = batch()
    with actor(checkpoint, **options) as rank:
        targets = with_targets(packed, rank.logprobs(packed))
        rank.train_step(targets, 0)
        rank.save_checkpoint(tmp_path)
        rank.finish_checkpoint()
        saved = {name: weight.clone() for name, weight in main_weights(rank).items()}
        expected = rank.train_step(targets, 1)
    assert np.isfinite(expected["loss"]) and expected["grad_norm"] > 0
    with actor(checkpoint, **options) as rank:
        rank.load_checkpoint(tmp_path)
        assert all(torch.equal(weight, saved[name]) for name, weight in main_weights(rank).items())
        found = rank.train_step(targets, 1)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)


def test_the_export_is_of_ordinary_numbers(options: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    with actor(checkpoint, **options) as rank:
        rank.export_hf(tmp_path)
    before = load_file(checkpoint / "model.safetensors")
    after = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype is torch.bfloat16
        assert (after[name].float() - tensor).abs().max() <= E4M3_STEP * tensor.abs().max(), name
