"""Megatron's slices in bfloat16 become what SGLang's own loaders make of an FP8 checkpoint, bit for bit."""

import json
from types import SimpleNamespace

import pytest
import torch
from fp8_world import ARCHITECTURE, CONFIG, MegatronRanks, SGLangEngine, policy
from safetensors.torch import load_file, save_file

from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.weights.fp8_checkpoint import hf_to_fp8
from megatron_ztrl.weights.hf_mapping import hf_tensor_shapes
from megatron_ztrl.weights.transports import Network
from megatron_ztrl.weights.transports.shards import ShardTransport

pytestmark = pytest.mark.timeout(300)
QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SCALES = "_scale_inv"


def quantised_checkpoint(directory, tensors):
    """Written without this project: every block of a linear layer over its largest magnitude, times 448."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": QUANTIZATION}))
    made = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            made[name] = tensor
            continue
        rows, columns = tensor.shape
        assert rows % 128 == columns % 128 == 0
        made[name] = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        made[name + SCALES] = torch.empty(rows // 128, columns // 128)
        for i in range(rows // 128):
            for j in range(columns // 128):
                place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale = tensor[place].float().abs().max() / 448
                made[name + SCALES][i, j] = scale
                made[name][place] = (tensor[place].float() / scale).to(torch.float8_e4m3fn)
    save_file(made, directory / "model.safetensors")
    return directory


@pytest.fixture(params=[1, 2], ids=["TP 1", "TP 2"])
async def world(request, tmp_path):
    """Both ends, and what is between them; the engine started from another policy."""
    size = request.param
    trainer, engine = MegatronRanks(), SGLangEngine(size, tmp_path)
    publish = SimpleNamespace(bucket_bytes=100_000, checksums=True)  # buckets end in the middle of blocks
    transport = ShardTransport(
        SimpleNamespace(model=SimpleNamespace(dtype="bfloat16"), publish=publish),
        trainer,
        [engine_slices(CONFIG, size, rank) for rank in range(size)],
        hf_tensor_shapes(ARCHITECTURE),
        Network(timeout_seconds=120),
        fp8_blocks=True,
    )
    await engine.build(quantised_checkpoint(tmp_path / "start", policy(0)))
    yield trainer, engine, transport
    trainer.close()
    engine.close()


async def test_the_engine_holds_what_sglang_loads_from_a_quantised_checkpoint(world, tmp_path):
    trainer, engine, transport = world
    size = len(engine.ranks)
    for version in (1, 2):  # the second with scales of its own, through the same group
        tensors = policy(version)
        await trainer.hold(tensors)
        delivery = await transport.deliver([engine], version)
        assert delivery.complete == [engine], delivery
        published = await engine.on_all("bytes")
        checkpoint = quantised_checkpoint(tmp_path / f"fp8-{version}", tensors)
        await engine.on_all("reload", checkpoint)
        loaded = await engine.on_all("bytes")
        for ours, theirs in zip(published, loaded, strict=True):
            assert [name for name in theirs if ours[name] != theirs[name]] == []
        kinds = {kind for kind, _ in loaded[0].values()}
        assert kinds == {"torch.float8_e4m3fn", "torch.float32", "torch.bfloat16"}
    linear = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("_proj.weight"))
    cut = sum(
        t.numel() for name, t in tensors.items() if "embed" in name or "lm_head" in name or "bias" in name
    )
    whole = sum(tensor.numel() for name, tensor in tensors.items() if "norm" in name)
    # A byte for each quantised weight and four for each block; everything else in two; norms to every rank.
    assert sum(delivery.received_bytes[engine.url]) == linear + linear // 4096 + 2 * (cut + size * whole)
    assert sum(delivery.sent_bytes) == sum(delivery.received_bytes[engine.url])
    assert trainer.joins == 1


@pytest.mark.parametrize("world", [1], indirect=True)
async def test_scales_that_sglang_has_rearranged_are_refused_before_anything_is_written(world):
    trainer, engine, transport = world
    await trainer.hold(policy(1))
    await engine.ranks[0].call("rearrange", "model.layers.1.mlp.down_proj.weight_scale_inv")
    before = await engine.on_all("bytes")
    delivery = await transport.deliver([engine], 1)
    assert (
        "engine parameter model.layers.1.mlp.down_proj.weight_scale_inv is torch.int32"
        in delivery.untouched[engine]
    )
    assert "leave out engine.path" in delivery.untouched[engine]
    assert await engine.on_all("bytes") == before


def test_the_converter_writes_the_same_checkpoint(tmp_path):
    tensors = policy(3)
    expected = load_file(quantised_checkpoint(tmp_path / "by-hand", tensors) / "model.safetensors")
    source = tmp_path / "policy"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, source / "model.safetensors")
    hf_to_fp8(source, tmp_path / "fp8")
    made = load_file(tmp_path / "fp8" / "model.safetensors")
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
