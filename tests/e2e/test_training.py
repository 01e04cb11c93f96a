"""The whole loop on real components: megatron-core on gloo (TP 2), the SGLang server, the sandbox, Ray."""

import json
import math
import os
import re
import resource
import shutil
import signal
import socket

import pytest
from running import (
    GREEDY,
    LIMIT_SECONDS,
    MANY,
    QUICKSTART,
    SMALL,
    assert_nothing_left,
    processes_of,
    rows,
    ztrl,
)

from megatron_ztrl.config.load import load_config
from megatron_ztrl.runtime.checkpoints import CheckpointStore, verify

pytestmark = pytest.mark.timeout(1200)  # some runs of at most ``LIMIT_SECONDS`` each


def test_a_synchronous_run_trains_on_policy_publishes_and_exports(tmp_path, marker):
    run = tmp_path / "run"
    options = ("train.num_steps=3", *SMALL, *MANY, *GREEDY)
    process = ztrl("train", str(QUICKSTART), f"run.directory={run}", *options)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    train = rows(run, "train")
    assert [row["step"] for row in train] == [1, 2, 3]
    assert all(row["train/staleness_max"] == 0 for row in train)
    # The engine's log-probs are the trainer's: every publish arrived, bit for bit in fp32.
    assert all(row["mismatch/gap_max"] < 1e-4 for row in train)
    # Siblings with equal rewards have no gradient; the 48 groups are not all like that.
    assert any(row["loss/grad_norm"] > 0 for row in train)
    assert [row["step"] for row in rows(run, "eval")] == [0, 3]
    assert {path.name for path in (run / "policy").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert_nothing_left(marker)


@pytest.mark.slow
def test_what_a_run_exports_answers_as_its_engines_did_after_the_last_publish(tmp_path, marker):
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    for command, directory, *options in (
        ("train", run, "train.num_steps=1"),
        ("eval", evaluation, f"model.path={run / 'policy'}"),
    ):
        process = ztrl(command, str(QUICKSTART), f"run.directory={directory}", *options, *SMALL, *GREEDY)
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, output
    measured = json.loads((evaluation / "eval.json").read_text())["2"]
    of_the_run = rows(run, "eval")[-1]
    assert measured["arithmetic_held_out/response_tokens"] > 0
    assert {f"eval/{key}": value for key, value in measured.items()}.items() <= of_the_run.items()
    assert load_config(evaluation / "eval_config.yaml").model.path == str(run / "policy")
    assert json.loads((evaluation / "eval_environment.json").read_text())["versions"]["torch"]
    assert_nothing_left(marker)


def test_ctrl_c_saves_and_a_resumed_asynchronous_run_keeps_its_staleness_bound(tmp_path, marker):
    run = tmp_path / "run"
    arguments = ("train", str(QUICKSTART), f"run.directory={run}", "rollout.max_staleness=1", *SMALL)
    process = ztrl(*arguments, "train.num_steps=1000")
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    output = process.stdout.read()
    assert process.wait(timeout=LIMIT_SECONDS) == 130, output
    assert_nothing_left(marker)
    saved = json.loads(next((run / "checkpoints").glob("step_*/state.json")).read_text())
    assert saved["version"] >= 2
    assert len(saved["pending"]) >= 4  # what was in flight is rolled out first after the restart

    last = saved["version"] + 3
    process = ztrl(*arguments, f"train.num_steps={last}", "--resume")
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    assert re.search(r"resumed [1-9]\d* rollouts with [1-9][\d,]* tokens from the journal", output), output
    train = rows(run, "train")
    assert [row["step"] for row in train] == list(range(1, last + 1))
    assert max(row["train/staleness_max"] for row in train) == 1
    assert all(math.isfinite(row["loss/policy"]) for row in train)
    assert_nothing_left(marker)


def test_a_taken_port_is_one_clear_line_and_leaves_nothing(tmp_path, marker):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = ztrl(
            "train", str(QUICKSTART), f"run.directory={tmp_path / 'run'}", f"engine.port={port}", *SMALL
        )
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2, output
    assert f"error: engine.port: 127.0.0.1:{port} is taken" in output
    assert "Traceback" not in output
    assert_nothing_left(marker)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda model: os.truncate(model / "model.safetensors", 1000), "model.safetensors is damaged"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    ],
)
def test_a_spoilt_checkpoint_is_one_clear_line_before_anything_starts(tmp_path, spoil, message):
    model = shutil.copytree(QUICKSTART.parent / "base", tmp_path / "model")
    spoil(model)
    process = ztrl(
        "train", str(QUICKSTART), f"run.directory={tmp_path / 'run'}", f"model.path={model}", *SMALL
    )
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2, output
    assert message in output
    assert output.startswith("error: model.path")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("override", ["engine.tensor_parallel_size=3", "sglang.server_args.quantization=fp8"])
def test_engines_that_cannot_take_weights_are_one_clear_line_before_anything_starts(tmp_path, override):
    process = ztrl("train", str(QUICKSTART), f"run.directory={tmp_path / 'run'}", *SMALL, override)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2, output
    assert output.startswith(f"error: {override.partition('=')[0]}: ")
    assert len(output.splitlines()) == 1


def test_a_row_without_an_answer_is_named_with_its_file(tmp_path):
    rows = tmp_path / "problems.jsonl"
    rows.write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": "1 + 2"}\n')
    process = ztrl(
        "train", str(QUICKSTART), f"run.directory={tmp_path / 'run'}", f"data.train.path={rows}", *SMALL
    )
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 2, output
    assert f"{rows}:2: no key 'answer'" in output
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_with_its_last_checkpoint_unharmed(tmp_path, marker):
    run = tmp_path / "run"
    options = ("train.num_steps=1000", "checkpoint.interval_steps=1", *SMALL)
    process = ztrl("train", str(QUICKSTART), f"run.directory={run}", *options)
    for line in process.stdout:
        if line.startswith("step 3/"):  # two checkpoints are complete
            break
    for rank in ranks_of(marker):
        _, most = resource.prlimit(rank.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (500_000, most))  # a disk with no more room
    output = process.stdout.read()
    assert process.wait(timeout=LIMIT_SECONDS) == 2, output
    last = output.splitlines()[-1]
    assert re.fullmatch(r"error: .*/actor/__\d_0.distcp could not be written: .*File too large", last), output
    assert "Traceback" not in output
    verify(CheckpointStore(run / "checkpoints", keep_last=1).latest())
    assert_nothing_left(marker)


@pytest.mark.slow
def test_a_trainer_rank_that_is_killed_ends_a_run_in_one_line_that_says_how_to_go_on(tmp_path, marker):
    run = tmp_path / "run"
    command = ("train", str(QUICKSTART), f"run.directory={run}", "checkpoint.interval_steps=1", *SMALL)
    process = ztrl(*command, "train.num_steps=1000")
    for line in process.stdout:
        if line.startswith("step 3/"):  # the checkpoint of step 1 is complete
            break
    ranks_of(marker)[-1].kill()
    output = process.stdout.read()
    assert process.wait(timeout=LIMIT_SECONDS) == 1, output
    assert "Traceback" not in output
    (error,) = (line for line in output.splitlines() if not line.startswith("step "))  # nor a word of Ray's
    way_on = f"ztrl train CONFIG run.directory={run} --resume goes on from step "
    said = re.fullmatch(rf"error: rank [01] of the 2 of the actor died: .+; {way_on}(\d+)", error)
    assert said, output
    version = int(said[1])
    assert version >= 1
    assert_nothing_left(marker)

    process = ztrl(*command, f"train.num_steps={version + 1}", "--resume")
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    assert [row["step"] for row in rows(run, "train")] == list(range(1, version + 2))
    assert_nothing_left(marker)


def ranks_of(marker):
    """The trainer's processes of the run."""
    return [
        process
        for process in processes_of(marker)
        if "RankProcess" in " ".join(process.info["cmdline"] or [])
    ]
