"""The emulated FP8 of ``benchmarks/fp8_error.py`` rounds as e4m3 with a scale per block does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from fp8_error import emulated_fp8, quantise


def test_what_e4m3_can_represent_stays_as_it_is() -> None:
    # The largest is 448 x 2^-5, so the scale is a power of two and every small integer is exact.
    x = torch.tensor([[14.0, -1.0, 3.0, 0.0, 0.5]])
    assert torch.equal(quantise(x, (1, 128)), x)


def test_a_value_is_off_by_at_most_a_sixteenth() -> None:
    # Three bits of mantissa: half a step is 2^-4 of the value, down to the smallest normal number.
    x = torch.linspace(0.05, 1.0, 1000)[None]
    relative = ((quantise(x, (1, 1000)) - x) / x).abs()
    assert 0.04 < relative.max() <= 1 / 16 + 1e-6


def test_an_outlier_spoils_its_own_block_only() -> None:
    x = torch.full((1, 256), 1e-4)
    x[0, 0] = 1000.0
    restored = quantise(x, (1, 128))
    assert restored[0, 1] == 0.0  # below the least that a scale of 1000 / 448 leaves
    assert torch.allclose(restored[0, 128:], x[0, 128:])


def test_blocks_at_the_end_may_be_smaller() -> None:
    x = torch.arange(1.0, 301.0)[:, None].expand(300, 130).contiguous()
    restored = quantise(x, (128, 128))
    assert restored.shape == x.shape
    assert ((restored - x) / x).abs().max() < 0.07


def test_zeros_stay_zeros() -> None:
    assert torch.equal(quantise(torch.zeros(3, 5), (128, 128)), torch.zeros(3, 5))


def test_only_the_named_layers_are_quantised_and_only_inside_the_block() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"o_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)})
    x = torch.randn(2, 8)
    before = {name: layer(x) for name, layer in model.items()}
    with emulated_fp8(model, ("proj",)):
        assert not torch.equal(model["o_proj"](x), before["o_proj"])
        assert model["o_proj"](x).detach() == pytest.approx(before["o_proj"].detach(), abs=0.2)
        assert torch.equal(model["down_proj"](x), before["down_proj"])
    assert torch.equal(model["o_proj"](x), before["o_proj"])
