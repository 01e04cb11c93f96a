"""tools/convert_checkpoint: what Megatron loads, what runs saved, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import launch
from random_policies import VOCAB_SIZE, config
from safetensors.torch import load_file, save_file

from megatron_ztrl.weights import hf_checkpoint
from megatron_ztrl.weights.convert import hf_to_megatron
from megatron_ztrl.weights.hf_mapping import ParallelLayout

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
LAYOUTS = [(1, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 1)]
"""Tensor, pipeline and virtual sizes."""
FAMILIES = ["qwen2", "qwen2-tied", "llama-tied", "qwen3-tied"]


def convert(*arguments: Any) -> int:
    """The program's exit code."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def layout_options(tp: int, pp: int, vp: int) -> list[Any]:
    return ["--tp", tp, "--pp", pp, "--vp", vp]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}-pp{}-vp{}".format(*sizes))
@pytest.mark.parametrize("model", FAMILIES)
def test_round_trip_is_bitwise_the_source(
    root: Path, tmp_path: Path, model: str, layout: tuple[int, int, int]
) -> None:
    assert convert("hf-to-megatron", root / model, tmp_path / "megatron", *layout_options(*layout)) == 0
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == layout[0] * layout[1]
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "hf") == 0
    assert_bitwise_equal(tensors(tmp_path / "hf"), tensors(root / model))
    before, after = (json.loads((d / "config.json").read_text()) for d in (root / model, tmp_path / "hf"))
    assert before == after
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == (root / model / "tokenizer.json").read_text()


def test_another_dtype_is_a_cast_of_every_tensor(root: Path, tmp_path: Path) -> None:
    assert convert("hf-to-megatron", root / "qwen2", tmp_path / "megatron", "--dtype", "bfloat16") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "hf") == 0
    cast = {name: tensor.bfloat16() for name, tensor in tensors(root / "qwen2").items()}
    assert_bitwise_equal(tensors(tmp_path / "hf"), cast)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_of_many_files_is_written_and_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_checkpoint, "MAX_FILE_BYTES", 100_000)
    assert convert("hf-to-megatron", root / "llama-tied", tmp_path / "megatron", "--tp", 2) == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "hf") == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert_bitwise_equal(tensors(tmp_path / "hf"), tensors(root / "llama-tied"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.model.norm.weight, tensors(root / "llama-tied")["model.norm.weight"])
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "again", "--pp", 2) == 0


# What ranks do with converted checkpoints, and the tool with checkpoints of ranks -------------------------------


def load_and_save(rank: int, scratch: Path, root: Path, work: Path) -> list[str]:
    """Loads every converted checkpoint with Megatron's own loader, and saves an actor and a critic.

    Returns:
        Names of the parameters that came out different from the HF checkpoint.
    """
    from megatron.core import dist_checkpointing

    from megatron_ztrl.trainer.actor import ActorRank, PolicyRank
    from megatron_ztrl.trainer.critic import CriticRank

    wrong = []
    for policy in FAMILIES:
        ranks = PolicyRank(config(root / policy, tp=2, pp=2), rank, 4, f"file://{scratch}/{policy}")
        expected = {piece: ranks.parameter(piece.param).clone() for piece in ranks.parameter_slices()}
        for path in sorted(work.glob(f"{policy}_*")):
            for chunk in ranks._chunks:
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
                loaded = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(path))
                chunk.load_state_dict(loaded["model"], strict=False)
            for piece, whole in expected.items():
                if not torch.equal(ranks.parameter(piece.param), whole):
                    wrong.append(f"{path.name}: {piece.param}")
        ranks.close()
    for name, kind, chosen in (
        ("actor", ActorRank, config(root / "qwen2-tied", tp=2, pp=2)),
        ("critic", CriticRank, _critic_config(root)),
    ):
        trained = kind(chosen, rank, 4, f"file://{scratch}/{name}")
        torch.manual_seed(rank)
        with torch.no_grad():
            for piece in trained.parameter_slices():  # not the padding
                parameter = trained.parameter(piece.param).narrow(piece.dim, piece.start, piece.length)
                parameter.copy_(_noise(piece.tensor, piece.tensor_start, parameter.shape))
        trained.save_checkpoint(work / "run" / "checkpoints" / "step_000002" / name)
        trained.finish_checkpoint()
        trained.export_hf(work / f"export-{name}")
        trained.close()
    return wrong


def _critic_config(root: Path) -> Any:
    from megatron_ztrl.config.schema import CriticConfig

    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    return replace(config(root / "qwen2"), critic=CriticConfig(**sizes))


def _noise(tensor: str, start: int, shape: torch.Size) -> torch.Tensor:
    """Alike on all ranks that hold the same block."""
    generator = torch.Generator().manual_seed(hash((len(tensor), sum(map(ord, tensor)), start)) % 2**31)
    return torch.randn(shape, generator=generator)


@pytest.fixture(scope="module")
def work(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted checkpoints, and what four ranks made of them."""
    directory = tmp_path_factory.mktemp("convert")
    for policy in FAMILIES:
        for sizes in LAYOUTS:
            name = "_".join(map(str, (policy, *sizes)))
            assert convert("hf-to-megatron", root / policy, directory / name, *layout_options(*sizes)) == 0
    by_rank = launch(load_and_save, 4, root, directory)
    (directory / "wrong.json").write_text(json.dumps([name for names in by_rank for name in names]))
    (directory / "run" / "config.yaml").write_text(
        f"model: {{path: {root / 'qwen2-tied'}}}\ncritic: {{path: {root / 'qwen2'}}}\n"
    )
    return directory


def test_megatron_loads_every_layout_into_ranks_of_tp2_pp2(work: Path) -> None:
    assert json.loads((work / "wrong.json").read_text()) == []


def test_a_runs_actor_converts_to_what_its_ranks_export(work: Path, tmp_path: Path) -> None:
    step = work / "run" / "checkpoints" / "step_000002"
    assert (
        convert("megatron-to-hf", step / "actor", tmp_path / "hf") == 0
    )  # the run's config.yaml says of what
    assert_bitwise_equal(tensors(tmp_path / "hf"), tensors(work / "export-actor"))


def test_a_critic_becomes_a_token_classifier(root: Path, work: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    critic = work / "run" / "checkpoints" / "step_000002" / "critic"
    assert convert("megatron-to-hf", critic, tmp_path / "hf") == 0
    assert_bitwise_equal(tensors(tmp_path / "hf"), tensors(work / "export-critic"))
    model, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.score.weight, tensors(work / "export-critic")["score.weight"])
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", "--pp", 2) == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "again") == 0
    assert_bitwise_equal(tensors(tmp_path / "again"), tensors(tmp_path / "hf"))


# What is refused -------------------------------------------------------------------------------------------------


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    loaded = load_file(directory / "model.safetensors")
    edit(loaded)
    save_file(loaded, directory / "model.safetensors")


def refuse(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: Any) -> str:
    """The one line that the program ends with; it made nothing."""
    before = sorted(directory.rglob("*"))
    capsys.readouterr()
    assert convert(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: ")
    assert sorted(directory.rglob("*")) == before
    return lines[-1]


BAD_HF: dict[str, tuple[Callable[[Path], Any], list[Any], str]] = {
    "truncated": (
        lambda d: os.truncate(d / "model.safetensors", 100_000),
        [],
        "100,000 bytes, where its header",
    ),
    "truncated-header": (
        lambda d: os.truncate(d / "model.safetensors", 5),
        [],
        "model.safetensors is damaged",
    ),
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), [], "has neither model.safetensors nor"),
    "no-config": (lambda d: (d / "config.json").unlink(), [], "cannot read"),
    "vocabulary": (
        lambda d: edit_config(d, vocab_size=160),
        [],
        "vocabulary: 151 in tensors, 160 in config.json",
    ),
    "other-architecture": (
        lambda d: edit_config(d, architectures=["Qwen3ForCausalLM"]),
        [],
        "QKV bias: yes in tensors, no in config.json; QK norm: no in tensors, yes in config.json",
    ),
    "unknown-architecture": (
        lambda d: edit_config(d, architectures=["MambaForCausalLM"]),
        [],
        "architecture MambaForCausalLM is not supported",
    ),
    "tying": (
        lambda d: edit_config(d, tie_word_embeddings=False),
        [],
        "tied embeddings: yes in tensors, no in config.json",
    ),
    "layers": (lambda d: edit_config(d, num_hidden_layers=3), [], "layers: 4 in tensors, 3 in config.json"),
    "extra-tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.0.adapter": torch.zeros(3)})),
        [],
        "model.layers.0.adapter is not a tensor of this architecture",
    ),
    "tied-copy": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB_SIZE, 64)})),
        [],
        "lm_head.weight differs from the embeddings",
    ),
    "missing-tensor": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        [],
        "no tensor model.layers.2.mlp.up_proj.weight",
    ),
    "dtypes": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()})),
        [],
        "mixes float16, float32; choose one with --dtype",
    ),
    "tp": (lambda d: None, ["--tp", 4], "--tp 4 does not divide the model's 2 key-value groups"),
    "pp": (lambda d: None, ["--pp", 3], "--pp 3 x --vp 1 stages do not divide the model's 4 layers"),
    "vp": (lambda d: None, ["--vp", 2], "--vp needs --pp > 1"),
}


@pytest.mark.parametrize("name", BAD_HF)
def test_a_bad_hf_checkpoint_is_refused_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, options, message = BAD_HF[name]
    shutil.copytree(root / "qwen2-tied", tmp_path / "hf")
    damage(tmp_path / "hf")
    line = refuse(capsys, tmp_path, "hf-to-megatron", tmp_path / "hf", tmp_path / "out", *options)
    assert message in line


def without_record(directory: Path) -> None:
    (directory / "config.json").unlink()


def truncate_last_file(directory: Path) -> None:
    last = sorted(directory.glob("*.distcp"))[-1]
    os.truncate(last, last.stat().st_size - 1)


BAD_MEGATRON: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "other-family": (
        lambda d: None,
        {"architectures": ["LlamaForCausalLM"]},
        "family: Qwen2 in recorded, Llama",
    ),
    "other-theta": (
        lambda d: None,
        {"rope_parameters": {"rope_theta": 5e5}},
        "rope theta: 10000.0 in recorded",
    ),
    "other-norm": (
        lambda d: None,
        {"rms_norm_eps": 1e-5},
        "norm epsilon: 1e-06 in recorded, 1e-05 in --like",
    ),
    "vocabulary": (without_record, {"vocab_size": 140}, "padded vocabulary: 152 in tensors, 140 in --like"),
    "padded-vocabulary": (lambda d: None, {"vocab_size": 152}, "vocabulary: 151 in recorded, 152 in --like"),
    "no-bias": (
        without_record,
        {"architectures": ["LlamaForCausalLM"]},
        "QKV bias: yes in tensors, no in --like",
    ),
    "truncated": (truncate_last_file, {}, "is damaged"),
    "missing-file": (lambda d: (d / "__0_0.distcp").unlink(), {}, "__0_0.distcp is damaged: 0 bytes"),
    "no-metadata": (
        lambda d: (d / ".metadata").unlink(),
        {},
        "not a complete Megatron distributed checkpoint",
    ),
    "bad-metadata": (lambda d: (d / ".metadata").write_bytes(b"\x80"), {}, ".metadata is damaged"),
}


@pytest.mark.parametrize("name", BAD_MEGATRON)
def test_a_bad_megatron_checkpoint_is_refused_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, changes, message = BAD_MEGATRON[name]
    shutil.copytree(root / "qwen2-tied", tmp_path / "like")
    assert convert("hf-to-megatron", tmp_path / "like", tmp_path / "ckpt", "--tp", 2) == 0
    damage(tmp_path / "ckpt")
    edit_config(tmp_path / "like", **changes)
    arguments = ("megatron-to-hf", tmp_path / "ckpt", tmp_path / "out", "--like", tmp_path / "like")
    assert message in refuse(capsys, tmp_path, *arguments)


def test_a_vocabulary_that_is_one_short_is_noticed_in_the_weights(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 151 and 152 entries are both 152 rows under tensor parallelism of 2; nothing recorded says which it was.
    shutil.copytree(root / "qwen2-tied", tmp_path / "hf")
    rows = torch.ones(1, 64)
    edit_tensors(
        tmp_path / "hf",
        lambda t: t.update({"model.embed_tokens.weight": torch.cat([t["model.embed_tokens.weight"], rows])}),
    )
    edit_config(tmp_path / "hf", vocab_size=152)
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "ckpt", "--tp", 2) == 0
    without_record(tmp_path / "ckpt")
    arguments = ("megatron-to-hf", tmp_path / "ckpt", tmp_path / "out", "--like", root / "qwen2-tied")
    assert "rows 151 to 152 are beyond the vocabulary" in refuse(capsys, tmp_path, *arguments)


def test_a_step_of_a_run_names_the_checkpoints_in_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refuse(capsys, tmp_path, "megatron-to-hf", work / "run/checkpoints/step_000002", tmp_path / "out")
    assert line.endswith("step_000002/critic") and "step_000002/actor or " in line


def test_an_existing_output_is_left_alone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refuse(capsys, tmp_path, "hf-to-megatron", root / "qwen2", tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing(root: Path, tmp_path: Path) -> None:
    done = []

    def interrupt(phase: str, count: int) -> None:
        done.append(count)
        if len(done) == 5:
            raise KeyboardInterrupt

    conversion = hf_to_megatron(root / "qwen2", ParallelLayout(), None, lambda fields: None)
    with pytest.raises(KeyboardInterrupt):
        conversion.run(tmp_path / "out", advance=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_was_damaged_on_its_way_is_discarded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = hf_to_megatron(root / "qwen2", ParallelLayout(), None, lambda fields: None)

    def write_then_damage(directory: Path, advance: Any) -> None:
        conversion.write(directory, advance)
        with (directory / "__0_0.distcp").open("r+b") as file:
            data = bytearray(file.read())
            at = data.find(tensors(root / "qwen2")["lm_head.weight"].numpy().tobytes())
            file.seek(at + 1000)
            file.write(b"\xff")

    with pytest.raises(RuntimeError, match=r"lm_head.weight was not written as it was read"):
        replace(conversion, write=write_then_damage).run(tmp_path / "out", advance=lambda phase, count: None)
    assert list(tmp_path.iterdir()) == []
