"""Block-wise FP8: scales and roundings worked out by hand, and slices that end where blocks do."""

import numpy as np
import pytest
import torch
from small_qwen2 import HF_CONFIG

from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.engines.weight_group import WeightGroup
from megatron_ztrl.engines.weight_stream import Link, Piece, Staging, checksums, schedule
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.fp8_blocks import (
    QUANTIZATION_CONFIG,
    QuantisingSource,
    block_scales,
    check_fp8_blocks,
    quantised,
    travelling_dtypes,
    with_scale_shapes,
    with_scales,
)
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout, hf_tensor_shapes, megatron_slices

CPU = torch.device("cpu")
GROUP = WeightGroup(
    name="group",
    address="127.0.0.1",
    port=1,
    world_size=2,
    backend="gloo",
    bucket_bytes=30_000,
    checksums=True,
    timeout_seconds=1.0,
)
CONFIG = HF_CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def numbers_of_e4m3():
    """Every number from 0 to 448: 4 bits of exponent with a bias of 7, 3 of mantissa, from the definition."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.array(subnormal + normal, dtype=np.float32)


def quantised_by_hand(weight):
    """(weights as numbers, scales): block after block, in numpy, from the format's definition."""
    numbers = numbers_of_e4m3()
    rows, columns = weight.shape
    values, scales = np.empty_like(weight), np.empty((-(-rows // 128), -(-columns // 128)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            largest = np.abs(weight[place]).max()
            scales[i, j] = largest / np.float32(448) if largest else 1
            scaled = weight[place] / scales[i, j]
            distance = np.abs(np.abs(scaled)[..., None] - numbers)
            nearest = distance.argmin(-1)  # the lower of two that are as near
            upper = np.minimum(nearest + 1, len(numbers) - 1)
            tie = np.take_along_axis(distance, upper[..., None], -1)[..., 0] == distance.min(-1)
            nearest = np.where(tie & (nearest % 2 == 1), upper, nearest)  # to the even mantissa
            values[place] = np.sign(scaled) * numbers[nearest]
    return values, scales


def test_one_block_by_hand():
    weight = torch.zeros(128, 128)
    weight[0, :5] = torch.tensor([896.0, -896.0, 2.0, 2.2, -0.001])
    values, scales = quantised(weight)
    assert scales.tolist() == [[2.0]]  # 896 / 448
    # 2.2 / 2 = 1.1, whose neighbours are 1 and 1.125; half of 0.001 is below half of the least number, 2^-9.
    assert values[0, :5].float().tolist() == [448.0, -448.0, 1.0, 1.125, 0.0]
    assert values.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 256), (200, 300), (5, 130), (129, 7)])
def test_every_value_is_the_nearest_number_of_the_format(shape, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 10.0 ** torch.randint(-4, 3, shape)).to(dtype)
    values, scales = quantised(weight)
    expected, expected_scales = quantised_by_hand(weight.float().numpy())
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(values.float().numpy(), expected)


def test_the_last_blocks_are_as_large_as_what_is_left():
    weight = torch.ones(130, 129)
    weight[129, 128] = 7 * 448.0
    scales = block_scales(weight)
    assert torch.equal(scales, torch.tensor([[1 / 448, 1 / 448], [1 / 448, 7.0]]))


def test_a_block_of_zeros_has_the_scale_one_and_so_has_one_of_nearly_zeros():
    weight = torch.zeros(128, 256)
    weight[:, 128:] = 1e-40
    values, scales = quantised(weight)
    assert scales.tolist() == [[1.0, 1.0]]
    assert not values.float().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_block_visibly_and_no_other(bad):
    weight = torch.ones(128, 256)
    weight[3, 4] = bad
    values, scales = quantised(weight)
    assert scales.isfinite().tolist() == [[False, True]]
    assert torch.isnan(values[3, 4].float() * scales[0, 0])
    assert torch.equal(values[:, 128:].float(), torch.full((128, 128), 448.0))


def item(length, *, dim=0, start=0, tensor_start=0, tensor="model.layers.0.mlp.up_proj.weight"):
    return TensorSlice(
        param="p.weight", tensor=tensor, dim=dim, start=start, tensor_start=tensor_start, length=length
    )


def test_scales_are_slices_of_their_own_a_hundred_and_twenty_eighth_of_the_size():
    shapes = {"model.layers.0.mlp.up_proj.weight": (512, 300), "model.norm.weight": (300,)}
    norm = item(300, tensor="model.norm.weight")
    found = with_scales([item(256, start=128, tensor_start=256), norm], shapes, "trainer rank 0", "x")
    assert found == [
        item(256, start=128, tensor_start=256),
        TensorSlice(
            param="p.weight_scale_inv",
            tensor="model.layers.0.mlp.up_proj.weight_scale_inv",
            dim=0,
            start=1,
            tensor_start=2,
            length=2,
        ),
        norm,
    ]
    everything = with_scale_shapes(shapes)
    assert everything["model.layers.0.mlp.up_proj.weight_scale_inv"] == (4, 3)
    assert list(travelling_dtypes(everything, "bfloat16").values()) == [
        "float8_e4m3fn",
        "float32",
        "bfloat16",
    ]


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (item(64), "rows 0 to 63"),
        (item(128, tensor_start=64), "rows 64 to 191"),
        (item(128, start=64), "rows 0 to 127"),
        (item(100, dim=1), "columns 0 to 99"),
    ],
)
def test_a_slice_that_cuts_a_block_is_refused_by_tensor_and_rank(held, what):
    shapes = {held.tensor: (512, 300)}
    message = (
        rf"actor.tensor_parallel_size: trainer rank 3 holds {what} of the \d+ of model.layers.0.mlp.up_proj.weight in"
        " one piece, .*; choose a smaller actor.tensor_parallel_size, or"
    )
    with pytest.raises(ValueError, match=message):
        with_scales([held], shapes, "trainer rank 3", "actor.tensor_parallel_size")


def test_the_last_block_of_a_tensor_may_be_a_partial_one():
    shapes = {"model.layers.0.mlp.up_proj.weight": (200, 300)}
    (_, scales) = with_scales([item(72, tensor_start=128)], shapes, "trainer rank 0", "x")
    assert (scales.tensor_start, scales.length) == (1, 1)


def test_real_slices_of_both_ends_stay_on_the_grid_with_heads_of_128_and_not_with_64():
    def check(config, size):
        architecture = Architecture.from_hf_config(config)
        shapes = hf_tensor_shapes(architecture)
        for rank in range(size):
            layout = ParallelLayout(tensor_size=size)
            with_scales(megatron_slices(architecture, layout, rank, backend="te"), shapes, "trainer", "size")
            with_scales(engine_slices(config, size, rank), shapes, "engine", "size")

    for size in (1, 2):
        check(CONFIG, size)
    with pytest.raises(
        ValueError, match=r"trainer holds rows 0 to 63 of the 128 of model.layers.0.self_attn.k_proj"
    ):
        check(CONFIG | {"head_dim": 64}, 1)
    with pytest.raises(
        ValueError, match=r"trainer holds rows 0 to 191 of the 384 of model.layers.0.mlp.gate_proj"
    ):
        check(CONFIG | {"intermediate_size": 384}, 2)


def test_what_arrives_in_small_buckets_is_the_whole_weight_quantised():
    """Buckets end in the middle of blocks: 30,000 bytes are 117 rows of 256."""
    torch.manual_seed(1)
    fused = torch.randn(640, 256)  # the parameter: 256 rows of one tensor, 384 of another
    down = torch.randn(256, 640)  # the columns of a third, from its 128th
    ours = {"fused.weight": fused, "down.weight": down}
    source = QuantisingSource(ours.__getitem__)
    theirs = {
        "engine.weight": torch.zeros(384, 256, dtype=torch.float8_e4m3fn),
        "engine.weight_scale_inv": torch.zeros(3, 2),
        "row.weight": torch.zeros(256, 512, dtype=torch.float8_e4m3fn),
        "row.weight_scale_inv": torch.zeros(2, 4),
    }
    pieces = [
        (("up", "fused.weight", 0, 256), ("up", "engine.weight", 0, 0), (384, 256)),
        (("down", "down.weight", 1, 128), ("down", "row.weight", 1, 0), (256, 512)),
    ]

    def link(end):
        found = []
        for ends in pieces:
            (tensor, param, dim, start), shape = ends[end], ends[2]
            found.append(Piece(tensor, param, dim, start, shape, "float8_e4m3fn"))
            few = tuple(size // 128 for size in shape)
            found.append(Piece(f"{tensor}_s", f"{param}_scale_inv", dim, start // 128, few, "float32"))
        return Link(0, 1, None, tuple(found))

    out, into = (schedule([link(end)], GROUP.bucket_bytes) for end in (0, 1))
    assert len(out) > 7
    sender = Staging(GROUP, out, CPU, source.parameter, source.convert)
    receiver = Staging(GROUP, into, CPU, theirs.__getitem__)
    for index, (sent, received) in enumerate(zip(out, into, strict=True)):
        sums = checksums(sent, source.parameter, source.convert) if index % 2 else None
        for message, target in zip(
            sender.fill(index, sent, sums), receiver.receive(index, received), strict=True
        ):
            target.copy_(message)
        assert not receiver.write(index, received).any()
    for name, part in (("engine", fused[256:]), ("row", down[:, 128:])):
        weight, scales = quantised(part)
        assert torch.equal(theirs[f"{name}.weight"].view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(theirs[f"{name}.weight_scale_inv"], scales)
    assert sum(bucket.payload_bytes for bucket in out) == 384 * 256 + 256 * 512 + 4 * (6 + 8)


def test_scales_are_those_of_the_present_weights_after_forget():
    weights = {"w": torch.ones(128, 128)}
    source = QuantisingSource(weights.__getitem__)
    assert source.parameter("w_scale_inv").item() == np.float32(1 / 448)
    weights["w"] = torch.full((128, 128), 896.0)
    source.forget()
    assert source.parameter("w_scale_inv").item() == 2.0


def test_only_block_wise_fp8_of_all_linear_layers_is_taken():
    check_fp8_blocks({"quantization_config": QUANTIZATION_CONFIG}, "engine.path")
    published = {key: value for key, value in QUANTIZATION_CONFIG.items() if key != "fmt"}
    skips = {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}
    check_fp8_blocks({"quantization_config": published | skips}, "engine.path")
    for changes in ({"quant_method": "awq"}, {"weight_block_size": [64, 64]}, {"scale_fmt": "ue8m0"}):
        with pytest.raises(
            ValueError, match=r"engine.path: quantization_config in config.json is .*hf-to-fp8"
        ):
            check_fp8_blocks({"quantization_config": published | changes}, "engine.path")
    with pytest.raises(ValueError, match=r"engine.path: quantization_config in config.json is missing"):
        check_fp8_blocks({}, "engine.path")
    some = {"modules_to_not_convert": ["model.layers.3.mlp.down_proj"]}
    with pytest.raises(ValueError, match=r"leaves out model.layers.3.mlp.down_proj"):
        check_fp8_blocks({"quantization_config": published | some}, "engine.path")
