"""tools/convert_checkpoint: round trips, what Megatron loads, what runs saved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import assert_bitwise_equal, convert, edit_config, layout_options, refuse, tensors
from launcher import launch
from random_policies import config

from megatron_ztrl.weights import hf_checkpoint

LAYOUTS = [(1, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 1)]
"""Tensor, pipeline and virtual sizes."""
FAMILIES = ["qwen2", "qwen2-tied", "llama-tied", "qwen3-tied"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}-pp{}-vp{}".format(*sizes))
@pytest.mark.parametrize("model", FAMILIES)
def test_round_trip_is_bitwise_the_source(
    root: Path, tmp_path: Path, model: str, layout: tuple[int, int, int]
) -> None:
    assert convert("hf-to-megatron", root / model, tmp_path / "megatron", *layout_options(*layout)) == 0
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == layout[0] * layout[1]
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "hf") == 0
    assert_bitwise_equal(tensors(tmp_path / "hf"), tensors(root / model))
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {p.name for p in (root / model).iterdir()}
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


def test_a_saved_checkpoint_says_by_itself_what_it_is_of(
    root: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(work / "run" / "checkpoints" / "step_000002" / "actor", tmp_path / "alone")
    assert convert("megatron-to-hf", tmp_path / "alone", tmp_path / "hf") == 0
    assert_bitwise_equal(tensors(tmp_path / "hf"), tensors(work / "export-actor"))
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    shutil.copytree(root / "qwen2-tied", tmp_path / "like")
    edit_config(tmp_path / "like", rms_norm_eps=1e-5)
    arguments = ("megatron-to-hf", tmp_path / "alone", tmp_path / "out", "--like", tmp_path / "like")
    assert "norm epsilon: 1e-06 in recorded, 1e-05 in --like" in refuse(capsys, tmp_path, *arguments)


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


def test_a_step_of_a_run_names_the_checkpoints_in_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refuse(capsys, tmp_path, "megatron-to-hf", work / "run/checkpoints/step_000002", tmp_path / "out")
    assert line.endswith("step_000002/critic") and "step_000002/actor or " in line
