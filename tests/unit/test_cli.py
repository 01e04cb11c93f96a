"""``ztrl`` answers a user's mistake with one line on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ztrl import __version__, cli
from megatron_ztrl.config.load import ConfigError
from megatron_ztrl.runtime.services import ServerDied

CONFIG = """
run: {directory: RUN}
model: {path: ./model}
data: {train: {name: t, path: ./problems.jsonl}}
train: {num_steps: 3}
eval: {interval_steps: 0}
"""
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "problems.jsonl").write_text("")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("RUN", str(tmp_path / "run")))
    return path


def ztrl(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ztrl.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def refusal(*arguments: object) -> str:
    """The one line of a refused command, without its ``error: ``."""
    done = ztrl(*arguments)
    assert done.returncode == cli.USER_ERROR, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert refusal("train", tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: no such configuration file"


def test_an_unknown_key_is_one_line(config: Path) -> None:
    message = refusal("train", config, "rollout.group_sise=4")
    assert message == "override: rollout.group_sise: unknown key; did you mean 'group_size'?"


def test_a_value_out_of_range_names_the_file_and_the_key(config: Path) -> None:
    assert refusal("eval", config, "rollout.group_size=1") == (
        f"{config}: rollout.group_size: must be at least 2, got 1"
    )


def test_a_native_option_of_the_project_is_one_line(config: Path) -> None:
    assert refusal("train", config, "megatron.optimizer.lr=1") == (
        f"{config}: megatron.optimizer.lr: not set here: set actor.learning_rate"
    )


def test_a_layout_the_model_does_not_fit_is_one_line(config: Path) -> None:
    message = refusal("train", config, "actor.tensor_parallel_size=3")
    assert message.startswith(f"{config}: actor.tensor_parallel_size: ")


def test_a_directory_that_holds_a_run_is_not_mixed_with_another(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "already holds a run; add --resume" in refusal("train", config)


def test_a_report_on_something_else_is_one_line(tmp_path: Path) -> None:
    assert (
        refusal("report", tmp_path)
        == f"{tmp_path}: not a run directory (it has no metrics.jsonl, which ztrl train writes)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see ztrl --help)"),
        (["train"], "the following arguments are required: CONFIG (see ztrl train --help)"),
        (["train", "c.yaml", "--resum", "--x"], "unrecognized argument: --x (see ztrl train --help)"),
        (["doctor", "now"], "unrecognized argument: now (see ztrl doctor --help)"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.USER_ERROR
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    done = ztrl("train", tmp_path / "no.yaml", ZTRL_TRACEBACK="1")
    assert "Traceback" in done.stderr
    assert "FileNotFoundError" in done.stderr


def test_options_may_stand_between_overrides() -> None:
    options = cli._parse(["train", "c.yaml", "a.b=1", "--resume", "c.d=2", "e.f=-1"])
    assert (options.config, options.words, options.resume) == (
        Path("c.yaml"),
        ["a.b=1", "c.d=2", "e.f=-1"],
        True,
    )


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    def interrupted(path: Path, overrides: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert cli.main(["train", str(config)]) == cli.INTERRUPTED


def test_a_disk_that_is_full_is_one_line_wherever_it_was_noticed(
    monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, overrides: list[str]) -> None:
        Path("/dev/full").write_text("x")

    monkeypatch.setattr(cli, "_load", write)
    assert cli.main(["train", str(config)]) == cli.USER_ERROR
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_server_that_does_not_start_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, overrides: list[str]) -> None:
        raise ServerDied("engine 0 ended with code 1\nits last words")

    monkeypatch.setattr(cli, "_load", fail)
    assert cli.main(["train", str(config)]) == cli.FAILED
    assert capsys.readouterr().err == "error: engine 0 ended with code 1\nerror: its last words\n"


def test_what_cannot_be_read_or_written_is_one_line(config: Path, tmp_path: Path) -> None:
    assert refusal("train", tmp_path) == f"{tmp_path}: no such configuration file"
    message = refusal("plan", config, "--png", tmp_path / "none" / "plan.png")
    assert message == f"--png: there is no directory {tmp_path}/none"
    (tmp_path / "file").write_text("")
    message = refusal("eval", config, f"run.directory={tmp_path}/file/run")
    assert message == f"run.directory: Not a directory: {tmp_path}/file/run; choose another"
    assert "not a run directory" in refusal("report", tmp_path / "file")
    (tmp_path / "metrics.jsonl").mkdir()
    assert "Is a directory" in refusal("report", tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--gpus=0", "argument --gpus: must be a whole number above 0, got '0'"),
        ("--gpus=8.5", "argument --gpus: must be a whole number above 0, got '8.5'"),
        ("--memory-gb=-80", "argument --memory-gb: must be a number above 0, got '-80'"),
        ("--memory-gb=nan", "argument --memory-gb: must be a number above 0, got 'nan'"),
        ("--prompt-tokens=many", "argument --prompt-tokens: must be a number above 0, got 'many'"),
        ("--rollout.x=1", "unrecognized argument: --rollout.x=1; overrides have no dashes: rollout.x=1"),
    ],
)
def test_an_option_with_a_wrong_value_is_one_line(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "c.yaml", option])
    assert caught.value.code == cli.USER_ERROR
    assert capsys.readouterr().err == f"error: {message} (see ztrl plan --help)\n"


@pytest.mark.parametrize("option", ["--png", "--json"])
def test_a_plan_that_could_not_be_written_is_not_made(
    option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(config), option, str(tmp_path)]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert captured.err == f"error: {option}: {tmp_path} is a directory; name a file\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["--model", "qwen9"], "--model"),
        (["model.path=qwen9"], "model.path"),
        (["algorithm.advantage=gae", "critic.path=qwen9"], "critic.path"),
    ],
)
def test_a_shape_that_is_not_known_is_named_with_the_key_that_names_it(
    arguments: list[str], setting: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(config), *arguments]) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"error: {setting}: planning needs the config.json of qwen9: ")
    assert len(error.splitlines()) == 1


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ztrl {__version__}\n"


def test_an_evaluation_may_leave_out_an_n_that_training_evaluates_in_between(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ztrl import evaluate

    evaluated = []
    monkeypatch.setattr(
        evaluate, "run_evaluation", lambda config: evaluated.append(config.eval.env_iterations)
    )
    in_between = "eval: {interval_env_iterations: [2], "
    config.write_text(config.read_text().replace("eval: {", in_between))
    assert cli.main(["eval", str(config), "eval.env_iterations=[0,4]"]) == 0
    assert evaluated == [[0, 4]]


def test_an_evaluation_of_no_n_is_one_line(config: Path) -> None:
    (config.parent / "problems.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    problems = f"data.eval=[{{name: e, path: {config.parent / 'problems.jsonl'}}}]"
    message = refusal("eval", config, problems, "eval.env_iterations=[]")
    assert message == "eval.env_iterations: no N to evaluate at; name one, e.g. [2]"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_ztrl.cli", "doctor", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (-signal.SIGPIPE, "")


def test_a_bug_keeps_its_traceback_and_a_users_mistake_does_not() -> None:
    def our_own() -> None:
        from megatron_ztrl.config.load import load_config

        load_config("c.yaml", ["x"])

    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads("{")
    assert not cli._is_for_the_user(theirs.value)
    with pytest.raises((ConfigError, FileNotFoundError)) as ours:
        our_own()
    assert cli._is_for_the_user(ours.value)
