"""Which layers are chosen, what is refused, and the ``TransformerConfig`` that results: the upstream dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_qwen2 import HF_CONFIG

from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()

from megatron.core.enums import Fp8Recipe  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from planner_ranks import Case  # noqa: E402

from megatron_ztrl.data.packing import token_multiple  # noqa: E402
from megatron_ztrl.trainer.backend import (  # noqa: E402
    check_support,
    choose_backend,
    fp8_alignment,
    platform_options,
)
from megatron_ztrl.trainer.native_values import native_values  # noqa: E402
from megatron_ztrl.trainer.setup import ddp_config, optimizer_config, transformer_config  # noqa: E402
from megatron_ztrl.weights.hf_mapping import Architecture, Backend  # noqa: E402

ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)
QWEN = Case(name="", hidden=256, layers=4)
"""8 heads of 32, 2 key-value groups, 704 feed-forward columns."""


@pytest.fixture(autouse=True)
def transformer_engine_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's dataclass looks for this kernel of Transformer Engine's before it accepts a rotary fusion."""
    name = "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb_thd"
    monkeypatch.setattr(name, object())


def built(case: Case, backend: Backend) -> TransformerConfig:
    config = case.config()
    return transformer_config(config, config.actor, case.architecture(), backend)


def fp8(recipe: str = "delayed", case: Case = QWEN, **options: Any) -> TransformerConfig:
    wanted = {"fp8": "hybrid", "fp8_recipe": recipe, **options}
    return built(dataclasses.replace(case, transformer=wanted), "te")


def test_auto_takes_local_layers_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend("auto", "bfloat16") == choose_backend("local", "bfloat16") == "local"


def test_auto_takes_transformer_engine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_backend("auto", "bfloat16") == choose_backend("te", "bfloat16") == "te"
    assert choose_backend("local", "bfloat16") == "local"


def test_float32_takes_local_layers_on_a_gpu_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Transformer Engine's attentions only the unfused one takes float32, and that takes no packed sequences."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("auto", "float32") == "local"
    with pytest.raises(ValueError, match=r"model.backend: .* in bfloat16 only; set model.dtype"):
        choose_backend("te", "float32")


def test_transformer_engine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model.backend: te needs a CUDA device; use local"):
        choose_backend("te", "bfloat16")


def test_a_gpu_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model.backend: transformer_engine is not installed"):
        choose_backend("auto", "bfloat16")


def test_every_field_is_upstreams_default_or_named_here() -> None:
    """The whole dataclass: a field that somebody sets, or upstream changes, shows up here."""
    config = built(dataclasses.replace(QWEN, tp=2, pp=2), "local")
    upstream = TransformerConfig(num_layers=4, hidden_size=256, num_attention_heads=8)
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if getattr(config, field.name) != getattr(upstream, field.name)
        and not callable(getattr(config, field.name))
    }
    # The initial weights are overwritten, so how Megatron would draw them does not matter.
    assert changed == {
        "ffn_hidden_size": 704,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "autocast_dtype": torch.bfloat16,
        "bf16": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "expert_tensor_parallel_size": 2,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": True,
        "batch_p2p_comm": False,
        "microbatch_group_size_per_vp_stage": 2,
    }
    assert config.activation_func is F.silu
    assert config.finalize_model_grads_func is not None


def test_transformer_engine_differs_from_local_layers_on_a_gpu_in_two_fusions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    local, te = (dataclasses.asdict(built(QWEN, backend)) for backend in ("local", "te"))
    plain = [name for name in te if not callable(te[name])]
    different = {name: te[name] for name in plain if te[name] != local[name]}
    assert different == {"apply_rope_fusion": True, "bias_activation_fusion": True}


@pytest.mark.parametrize(
    ("backend", "cuda", "expected"),
    [
        (
            "local",
            False,
            {"apply_rope_fusion": False, "bias_activation_fusion": False, "batch_p2p_comm": False},
        ),
        (
            "local",
            True,
            {"apply_rope_fusion": False, "bias_activation_fusion": False, "batch_p2p_comm": True},
        ),
        ("te", True, {"apply_rope_fusion": True, "bias_activation_fusion": True, "batch_p2p_comm": True}),
    ],
)
def test_fusions_follow_the_layers_and_point_to_point_calls_the_device(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, cuda: bool, expected: dict[str, bool]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    options = platform_options(backend)
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    assert {name: options.get(name, defaults[name]) for name in expected} == expected
    assert options.get("use_cpu_initialization", False) is not cuda
    assert set(options) <= set(defaults)


def test_native_options_have_the_last_word() -> None:
    config = built(dataclasses.replace(QWEN, transformer={"bias_activation_fusion": True}), "local")
    assert config.bias_activation_fusion


@pytest.mark.parametrize("cuda", [False, True])
def test_interleaved_stages_overlap_single_calls_on_every_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool
) -> None:
    """Megatron refuses to overlap batched calls, and without overlap two stages mix their messages up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    interleaved = built(dataclasses.replace(QWEN, pp=2, vp=2), "local")
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    plain = built(dataclasses.replace(QWEN, pp=2), "local")
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, cuda)


@pytest.mark.parametrize(
    ("options", "capability", "message"),
    [
        ({"deallocate_pipeline_outputs": True}, None, r"deallocate_pipeline_outputs: gloo may still read"),
        (
            {"overlap_p2p_comm": False, "batch_p2p_comm": True},
            HOPPER,
            r"batch_p2p_comm: two interleaved stages",
        ),
    ],
)
def test_calls_that_give_wrong_gradients_are_refused(options: dict, capability: Any, message: str) -> None:
    config = built(dataclasses.replace(QWEN, pp=2, vp=2, transformer=options), "local")
    with pytest.raises(ValueError, match=message):
        check_support(config, "local", capability)


def test_names_become_the_members_and_dtypes_that_megatron_compares_with() -> None:
    config = built(dataclasses.replace(QWEN, transformer={"attention_backend": "fused"}), "te")
    assert config.attention_backend is AttnBackend.fused
    values = native_values(
        "megatron.optimizer", OptimizerConfig, {"exp_avg_dtype": "bfloat16", "clip_grad": 1.0}
    )
    assert values == {"exp_avg_dtype": torch.bfloat16, "clip_grad": 1.0}


def test_a_name_of_nothing_is_refused() -> None:
    message = r"megatron.transformer.attention_backend: must be one of flash, fused, .*, got 'flsh'"
    with pytest.raises(ValueError, match=message):
        built(dataclasses.replace(QWEN, transformer={"attention_backend": "flsh"}), "te")


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("delayed", ADA), ("tensorwise", ADA), ("blockwise", HOPPER), ("mxfp8", BLACKWELL)],
)
def test_an_fp8_recipe_passes_through_to_where_it_runs(recipe: str, capability: tuple[int, int]) -> None:
    config = fp8(recipe)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", Fp8Recipe(recipe), False)
    check_support(config, "te", capability)


@pytest.mark.parametrize(
    ("recipe", "options", "backend", "capability", "message"),
    [
        ("delayed", {}, "local", None, r"fp8: needs an NVIDIA GPU; this rank computes on the CPU"),
        (
            "delayed",
            {},
            "local",
            HOPPER,
            r"fp8: the local layers do not compute in FP8; set model.backend to te",
        ),
        ("delayed", {}, "te", (8, 0), r"fp8_recipe: delayed needs Ada .*8.9.* this GPU has 8.0"),
        ("blockwise", {}, "te", ADA, r"fp8_recipe: blockwise needs Hopper .*9.0.* this GPU has 8.9"),
        ("mxfp8", {}, "te", HOPPER, r"fp8_recipe: mxfp8 needs Blackwell .*10.0.* this GPU has 9.0"),
    ],
)
def test_fp8_is_refused_where_it_cannot_run(
    recipe: str, options: dict, backend: Backend, capability: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=r"megatron.transformer." + message):
        check_support(fp8(recipe, **options), backend, capability)


@pytest.mark.parametrize(("recipe", "reuses"), [("delayed", False), ("blockwise", False), ("mxfp8", True)])
def test_weights_in_fp8_are_gathered_and_updated_in_fp8(recipe: str, reuses: bool) -> None:
    """``reuse_grad_buf_for_mxfp8_param_ag``: mxfp8 weights have no buffer that could be gathered."""
    wanted = {"fp8": "e4m3", "fp8_recipe": recipe, "fp8_param": True}
    config = dataclasses.replace(QWEN, transformer=wanted).config()
    check_support(fp8(recipe, fp8_param=True), "te", BLACKWELL)
    ddp = ddp_config(config)
    assert (ddp.fp8_param_gather, ddp.reuse_grad_buf_for_mxfp8_param_ag) == (True, reuses)
    optimizer = optimizer_config(config, config.actor, ddp)
    assert (optimizer.fp8_recipe, optimizer.reuse_grad_buf_for_mxfp8_param_ag) == (recipe, reuses)


def test_weights_in_bfloat16_leave_optimizer_and_gather_as_they_are() -> None:
    config = dataclasses.replace(QWEN, transformer={"fp8": "e4m3", "fp8_recipe": "mxfp8"}).config()
    ddp = ddp_config(config)
    assert not ddp.fp8_param_gather and not ddp.reuse_grad_buf_for_mxfp8_param_ag
    assert optimizer_config(config, config.actor, ddp).fp8_recipe is None


@pytest.mark.parametrize(
    ("recipe", "ddp", "message"),
    [
        (
            "blockwise",
            {"use_distributed_optimizer": False},
            r"ddp.use_distributed_optimizer: .*fp8_param needs",
        ),
        (
            "mxfp8",
            {"overlap_param_gather": True},
            r"ddp.overlap_param_gather: not with fp8_param .*leave it out",
        ),
    ],
)
def test_a_gather_that_has_no_fp8_is_refused(recipe: str, ddp: dict, message: str) -> None:
    wanted = {"fp8": "e4m3", "fp8_recipe": recipe, "fp8_param": True}
    config = dataclasses.replace(QWEN, transformer=wanted).config()
    overlapped = {"overlap_grad_reduce": True} if ddp.get("overlap_param_gather") else {}
    megatron = dataclasses.replace(config.megatron, ddp=overlapped | ddp)
    with pytest.raises(ValueError, match=message):
        ddp_config(dataclasses.replace(config, megatron=megatron))


def test_fp8_wants_bfloat16_weights() -> None:
    with pytest.raises(ValueError, match=r"set model.dtype to bfloat16"):
        check_support(fp8(case=dataclasses.replace(QWEN, dtype="float32")), "te", HOPPER)


def test_fp8_wants_shapes_that_its_kernels_take() -> None:
    # 2.75 x 96 = 264 feed-forward columns are 132 a rank.
    with pytest.raises(ValueError, match=r"132 feed-forward columns are no multiple of 16"):
        check_support(fp8(case=dataclasses.replace(QWEN, hidden=96, tp=2)), "te", HOPPER)


@pytest.mark.parametrize(
    ("recipe", "tp", "align", "tokens"),
    [("blockwise", 1, 16, 16), ("blockwise", 2, 16, 32), ("mxfp8", 1, 32, 32), ("mxfp8", 2, 32, 64)],
)
def test_microbatches_are_padded_to_what_fp8_needs(recipe: str, tp: int, align: int, tokens: int) -> None:
    case = dataclasses.replace(QWEN, tp=tp, transformer={"fp8": "hybrid", "fp8_recipe": recipe})
    config = case.config()
    assert fp8_alignment(built(case, "te")) == align
    assert token_multiple(config.actor, config.megatron.transformer) == tokens


def test_without_fp8_only_sequence_parallelism_pads() -> None:
    assert token_multiple(QWEN.config().actor, {}) == 1
    assert token_multiple(dataclasses.replace(QWEN, tp=2).config().actor, {}) == 2


def test_expert_parallelism_is_refused() -> None:
    options = {"expert_model_parallel_size": 2, "num_moe_experts": 4}
    with pytest.raises(ValueError, match=r"no supported architecture has experts"):
        check_support(built(dataclasses.replace(QWEN, transformer=options), "local"), "local", None)


def test_fp4_is_refused() -> None:
    with pytest.raises(ValueError, match=r"megatron.transformer.fp4: not supported"):
        check_support(built(dataclasses.replace(QWEN, transformer={"fp4": "e2m1"}), "te"), "te", BLACKWELL)


def test_the_refusal_comes_before_a_model_is_built() -> None:
    from megatron_ztrl.trainer.backend import block_spec

    architecture = Architecture.from_hf_config(HF_CONFIG)
    case = dataclasses.replace(QWEN, transformer={"fp8": "hybrid", "fp8_recipe": "blockwise"})
    config = case.config()
    chosen = transformer_config(config, config.actor, architecture, "local")
    with pytest.raises(ValueError, match=r"megatron.transformer.fp8: needs an NVIDIA GPU"):
        block_spec(chosen, "local", None)
