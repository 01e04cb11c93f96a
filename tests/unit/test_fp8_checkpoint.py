"""The checkpoint that engines in FP8 start from, read with the safetensors library."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_qwen2 import HF_CONFIG

from megatron_ztrl.weights.fp8_blocks import check_fp8_blocks
from megatron_ztrl.weights.fp8_checkpoint import hf_to_fp8
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader
from megatron_ztrl.weights.hf_mapping import Architecture, hf_tensor_shapes

CONFIG = HF_CONFIG | {"hidden_size": 136, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def policy(tmp_path):
    """(its directory, its tensors): values that e4m3 holds exactly, under one scale for each block."""
    directory = tmp_path / "policy"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    torch.manual_seed(0)
    tensors = {}
    for name, shape in hf_tensor_shapes(Architecture.from_hf_config(CONFIG)).items():
        tensors[name] = torch.randint(-14, 15, shape).to(torch.bfloat16)
        tensors[name].view(-1)[::7] = 14
    save_file(tensors, directory / "model.safetensors")
    return directory, tensors


def test_linear_layers_are_quantised_with_a_scale_for_each_block_and_nothing_else_is(policy, tmp_path):
    directory, tensors = policy
    hf_to_fp8(directory, tmp_path / "fp8")
    found = load_file(tmp_path / "fp8" / "model.safetensors")
    linear = [name for name in tensors if name.endswith("_proj.weight")]
    assert len(linear) == 7
    assert found.keys() == tensors.keys() | {f"{name}_scale_inv" for name in linear}
    assert found[DOWN].dtype == torch.float8_e4m3fn
    assert found[f"{DOWN}_scale_inv"].shape == (2, 2)  # of [136, 256]
    assert torch.equal(found[f"{DOWN}_scale_inv"], torch.full((2, 2), 14 / 448))
    # Whole numbers up to 14 are multiples of 1/32 of the scale with at most 4 bits, which e4m3 has.
    for name, tensor in tensors.items():
        if name in linear:
            assert torch.equal(found[name].float() / 32, tensor.float()), name
        else:
            assert torch.equal(found[name], tensor), name


def test_its_config_says_so_to_the_engine_and_to_the_publisher(policy, tmp_path):
    directory, _ = policy
    hf_to_fp8(directory, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    check_fp8_blocks(config, "engine.path")
    assert config["torch_dtype"] == "bfloat16"
    assert Architecture.from_hf_config(config) == Architecture.from_hf_config(CONFIG)
    assert (tmp_path / "fp8" / "tokenizer.json").exists()


def test_it_cannot_be_mistaken_for_weights_to_train(policy, tmp_path):
    directory, _ = policy
    hf_to_fp8(directory, tmp_path / "fp8")
    with pytest.raises(ValueError, match=r"is F8_E4M3; weights must be one of"):
        HFCheckpointReader(tmp_path / "fp8").dtype(DOWN)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(policy, tmp_path):
    directory, tensors = policy
    tensors[DOWN][130, 200] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=f"HF_DIR: {DOWN} has values that are not finite"):
        hf_to_fp8(directory, tmp_path / "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
