"""Native options are checked by name against the installed releases, without importing them."""

from __future__ import annotations

import ast
import importlib.util
import sys

import pytest

from megatron_ztrl.config import native
from megatron_ztrl.config.errors import ConfigError
from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    MegatronConfig,
    ModelConfig,
    RunConfig,
    SGLangConfig,
    TrainConfig,
)
from megatron_ztrl.engines.server import FLAGS

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core missing"
)
needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang missing")


def config(megatron: MegatronConfig | None = None, server_args: dict[str, object] | None = None) -> Config:
    return Config(
        run=RunConfig(directory="run"),
        model=ModelConfig(path="org/model"),
        data=DataConfig(train=DatasetConfig(name="t", path="org/data")),
        train=TrainConfig(num_steps=1),
        megatron=megatron or MegatronConfig(),
        sglang=SGLangConfig(server_args=server_args or {}),
    )


def error_of(checked: Config) -> str:
    with pytest.raises(ConfigError) as error:
        native.check_native(checked)
    return str(error.value)


@needs_megatron
def test_options_that_megatron_has_are_accepted_inherited_ones_included() -> None:
    transformer = {"recompute_granularity": "full", "overlap_p2p_comm": True}
    optimizer, ddp = {"optimizer_cpu_offload": True}, {"overlap_grad_reduce": True}
    native.check_native(config(MegatronConfig(transformer=transformer, optimizer=optimizer, ddp=ddp)))


@needs_sglang
def test_options_that_sglang_has_are_accepted() -> None:
    native.check_native(config(server_args={"mem_fraction_static": 0.5, "chunked_prefill_size": 512}))


@needs_megatron
@needs_sglang
def test_a_typo_gets_a_suggestion_in_each_section() -> None:
    megatron = MegatronConfig(
        transformer={"recompute_granularty": "full"},
        optimizer={"use_distributed_optimiser": True},
        ddp={"bucket_sise": 1},
    )
    assert error_of(config(megatron, {"mem_fraction_statik": 0.5})).splitlines() == [
        "megatron.transformer.recompute_granularty: unknown option; did you mean 'recompute_granularity'?",
        "megatron.optimizer.use_distributed_optimiser: unknown option; did you mean 'use_distributed_optimizer'?",
        "megatron.ddp.bucket_sise: unknown option; did you mean 'bucket_size'?",
        "sglang.server_args.mem_fraction_statik: unknown option; did you mean 'mem_fraction_static'?",
    ]


@needs_megatron
@needs_sglang
def test_keys_that_have_a_home_in_the_schema_are_sent_there() -> None:
    megatron = MegatronConfig(transformer={"tensor_model_parallel_size": 2}, optimizer={"lr": 1.0})
    assert error_of(config(megatron, {"tp_size": 2, "model_path": "x"})).splitlines() == [
        "megatron.transformer.tensor_model_parallel_size: not set here: set actor.tensor_parallel_size",
        "megatron.optimizer.lr: not set here: set actor.learning_rate",
        "sglang.server_args.tp_size: not set here: set engine.tensor_parallel_size",
        "sglang.server_args.model_path: not set here: set model.path",
    ]


@needs_megatron
@pytest.mark.parametrize(
    ("section", "options", "reason"),
    [
        ("transformer", {"layernorm_zero_centered_gamma": True}, "comes from the config.json at model.path"),
        ("transformer", {"window_size": [128, 0]}, "comes from the config.json at model.path"),
        ("transformer", {"num_layers_in_first_pipeline_stage": 3}, "every pipeline stage has the same"),
        ("transformer", {"cross_entropy_loss_fusion": True}, "would change nothing"),
        ("transformer", {"cuda_graph_impl": "local"}, "needs microbatches of one size"),
        ("optimizer", {"use_distributed_optimizer": False}, "set it in megatron.ddp"),
        ("optimizer", {"optimizer": "muon"}, "the optimizer is AdamW"),
        ("ddp", {"average_in_collective": True}, "gradients are summed"),
        ("ddp", {"use_megatron_fsdp": True}, "FSDP is not used"),
    ],
)
def test_an_option_that_would_be_ignored_or_change_the_model_is_refused(
    section: str, options: dict[str, object], reason: str
) -> None:
    name = next(iter(options))
    message = error_of(config(MegatronConfig(**{section: options})))
    assert message.startswith(f"megatron.{section}.{name}: not set here: ") and reason in message


@needs_megatron
def test_every_owned_key_is_really_an_upstream_field() -> None:
    assert set(native._OWNED_TRANSFORMER) <= native.transformer_fields()
    assert set(native._OWNED_OPTIMIZER) <= native.optimizer_fields()
    assert set(native._OWNED_DDP) <= native.ddp_fields()


@needs_sglang
def test_owned_server_keys_are_upstream_fields_or_their_aliases() -> None:
    assert set(native._OWNED_SERVER) - native.server_fields() == {"model", "tp", "tensor_parallel_size"}


@needs_sglang
def test_every_server_option_becomes_the_flag_that_sglang_has_for_it() -> None:
    """SGLang names the flag where it is not that of the field: ``field: A[type, Arg(cli_name="--flag")]``."""
    given: dict[str, str] = {}
    for path in (native._package_directory("sglang", "sglang") / "srt/arg_groups/fields").glob("*.py"):
        for field in (
            node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.AnnAssign)
        ):
            for word in (node for node in ast.walk(field.annotation) if isinstance(node, ast.keyword)):
                if word.arg == "cli_name":
                    given[field.target.id] = word.value.value
    other = {name: flag for name, flag in given.items() if flag != "--" + name.replace("_", "-")}
    assert other == FLAGS


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = error_of(config(MegatronConfig(ddp={"bucket_size": 1}), {"log_level": "info"}))
    assert message.splitlines() == [
        "megatron.ddp: cannot be checked: megatron-core is not installed",
        "sglang.server_args: cannot be checked: sglang is not installed",
    ]


def test_without_native_options_nothing_needs_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    native.check_native(config())


@needs_megatron
@needs_sglang
def test_the_check_imports_neither_package() -> None:
    before = set(sys.modules)
    native.transformer_fields(), native.server_fields()
    assert not {
        name for name in set(sys.modules) - before if name.startswith(("megatron.", "sglang", "torch"))
    }
