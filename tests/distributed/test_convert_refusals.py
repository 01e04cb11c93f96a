"""What tools/convert_checkpoint refuses: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import convert, edit_config, edit_tensors, refuse, tensors, without_record
from random_policies import VOCAB_SIZE

from megatron_ztrl.weights.convert import hf_to_megatron
from megatron_ztrl.weights.hf_mapping import ParallelLayout

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
    "tp": (lambda d: None, ["--tp", 4], "--tp: 4 does not divide the model's 2 key-value groups"),
    "pp": (
        lambda d: None,
        ["--pp", 3],
        "--pp: 3 pipeline stages (virtual ones included) do not divide the model's 4 layers",
    ),
    "vp": (lambda d: None, ["--vp", 2], "--vp: needs --pp > 1"),
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


def test_a_checkpoint_from_elsewhere_needs_like(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("hf-to-megatron", root / "qwen2", tmp_path / "ckpt") == 0
    without_record(tmp_path / "ckpt")
    assert "give --like HF_DIR" in refuse(
        capsys, tmp_path, "megatron-to-hf", tmp_path / "ckpt", tmp_path / "out"
    )
    assert convert("megatron-to-hf", tmp_path / "ckpt", tmp_path / "out", "--like", root / "qwen2") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--like is believed in: family Qwen2, attention heads 4, key-value groups 2, head size 16" in told
    assert "norm epsilon 1e-06, rope theta 10000.0, rope scaling none, max positions 256" in told


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


def test_a_result_that_was_damaged_on_its_way_is_discarded(root: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("size", ["0", "-1", "two", "1.5"])
def test_a_size_that_is_none_is_one_line(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert("hf-to-megatron", "HF", "OUT", f"--tp={size}")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument --tp: must be a whole number above 0, got '{size}' (see ")
