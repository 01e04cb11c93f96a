"""Weights that are kept quantised are loaded, read and handed to the optimizer as numbers.

The class below stands for Transformer Engine's tensors, which need a GPU: like them it has no views, quantises what is
copied into it, and remembers the weight that it was made from.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()

from megatron.core import fp8_utils  # noqa: E402

from megatron_ztrl.trainer import fp8_weights  # noqa: E402


class Quantised(torch.Tensor):
    """bfloat16 to the outside, float8_e4m3fn inside."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Quantised:
        tensor = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        tensor.data8 = weight.to(torch.float8_e4m3fn)
        return tensor

    def dequantize(self) -> torch.Tensor:
        return self.data8.to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            args[0].data8.copy_(args[1])
            return args[0]
        if function is torch.ops.aten.detach.default:
            detached = cls(args[0].dequantize())
            detached.data8 = args[0].data8
            return detached
        raise NotImplementedError(f"{function} of a quantised weight")


def quantised_parameter(first: torch.Tensor) -> torch.nn.Parameter:
    """As Transformer Engine makes one: with the weight it was initialised to."""

    def clear(self: torch.Tensor) -> None:
        del self._high_precision_init_val

    parameter = torch.nn.Parameter(Quantised(first))
    parameter._high_precision_init_val = first
    parameter.clear_high_precision_init_val = MethodType(clear, parameter)
    return parameter


@pytest.fixture
def parameters(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", Quantised)
    monkeypatch.setattr(fp8_utils, "is_te_min_version", lambda version: True)
    return {
        "linear": quantised_parameter(torch.zeros(4, 3, dtype=torch.bfloat16)),
        "norm": torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)),
    }


LOADED = torch.linspace(-2, 2, 12, dtype=torch.bfloat16).view(4, 3)
ROUNDED = LOADED.to(torch.float8_e4m3fn).to(torch.bfloat16)


def load(parameters: dict[str, torch.Tensor], *, trainable: bool) -> None:
    staged = fp8_weights.staging(parameters)
    with torch.no_grad():
        for row in range(4):  # slice by slice
            staged["linear"].narrow(0, row, 1).copy_(LOADED[row : row + 1])
        staged["norm"].narrow(0, 0, 3).fill_(1.0)
    fp8_weights.take_over(parameters, staged, trainable=trainable)


def test_slices_are_quantised_when_all_of_them_are_there(parameters: dict[str, torch.Tensor]) -> None:
    with pytest.raises(NotImplementedError):
        parameters["linear"].narrow(0, 0, 1)
    load(parameters, trainable=True)
    assert not torch.equal(ROUNDED, LOADED)
    assert torch.equal(fp8_weights.plain(parameters["linear"]), ROUNDED)
    assert parameters["norm"].tolist() == [1.0, 1.0, 1.0]


def test_the_optimizer_begins_with_what_was_loaded_and_not_with_its_rounding(
    parameters: dict[str, torch.Tensor],
) -> None:
    load(parameters, trainable=True)
    assert torch.equal(parameters["linear"]._high_precision_init_val, LOADED)


def test_a_frozen_model_keeps_no_second_copy(parameters: dict[str, torch.Tensor]) -> None:
    load(parameters, trainable=False)
    assert not hasattr(parameters["linear"], "_high_precision_init_val")


def test_an_ordinary_weight_is_read_without_a_copy(parameters: dict[str, torch.Tensor]) -> None:
    assert fp8_weights.plain(parameters["norm"]).data_ptr() == parameters["norm"].data_ptr()
    assert not fp8_weights.plain(parameters["norm"]).requires_grad
