"""YAML and overrides become one validated, frozen configuration; what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ztrl.config.load import ConfigError, load_config, save_config

MINIMAL = """
run: {directory: runs/demo}
model: {path: Qwen/Qwen2.5-1.5B}
data:
  train: {name: orz, path: ./orz.jsonl}
  eval: [{name: math500, path: math500.jsonl}]
train: {num_steps: 3}
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "configs" / "config.yaml"
    path.parent.mkdir()
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_saved_config_loads_to_an_equal_config(yaml_file: Path, tmp_path: Path) -> None:
    config = load_config(yaml_file, ["actor.learning_rate=1e-6", "sglang.server_args.log_level=warning"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("name", ["1e-6", "null", "true", "a: b", "été", r"\${not_a_reference}", "- x"])
def test_a_string_that_looks_like_yaml_survives_the_round_trip(
    yaml_file: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(yaml_file, [f"data.train.name='{name}'", f"data.train.path='./{name}.jsonl'"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_overrides_win_over_the_file_and_keep_their_types(yaml_file: Path) -> None:
    config = load_config(
        yaml_file,
        [
            "train.num_steps=7",
            "actor.learning_rate=1e-4",
            "eval.env_iterations=[0,2,4]",
            "data.eval.0.limit=5",
        ]
        + ["actor.sequence_parallel=true", "sandbox.urls=['http://127.0.0.1:1?a=b']", "engine.port=null"],
    )
    assert config.train.num_steps == 7
    assert config.actor.learning_rate == 1e-4
    assert config.eval.env_iterations == [0, 2, 4]
    assert config.data.eval[0].limit == 5
    assert config.actor.sequence_parallel is True
    assert config.sandbox.urls == ["http://127.0.0.1:1?a=b"]
    assert config.engine.port is None


def test_an_override_may_refer_to_another_key(yaml_file: Path) -> None:
    assert load_config(yaml_file, ["eval.samples_per_prompt=${train.num_steps}"]).eval.samples_per_prompt == 3


def test_a_path_that_refers_to_another_key_follows_its_override(
    yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yaml_file.write_text(
        MINIMAL.replace("Qwen/Qwen2.5-1.5B", "./base").replace("math500.jsonl", '"./${run.directory}.jsonl"')
        + 'critic: {path: "${model.path}"}\n'
    )
    config = load_config(yaml_file)
    assert config.critic.path == config.model.path == str(yaml_file.parent / "base")
    config = load_config(
        yaml_file, ["model.path=./other", "run.directory=set", "data.train.path=${model.path}"]
    )
    assert config.critic.path == config.model.path == str(tmp_path / "elsewhere" / "other")
    assert config.data.train.path == config.model.path
    # Still relative to the file that it is written in.
    assert config.data.eval[0].path == str(yaml_file.parent / "set.jsonl")


def test_data_paths_are_relative_to_the_file_and_hub_ids_are_left_alone(yaml_file: Path) -> None:
    config = load_config(yaml_file)
    assert config.model.path == "Qwen/Qwen2.5-1.5B"
    assert config.data.train.path == str(yaml_file.parent / "orz.jsonl")
    assert config.data.eval[0].path == str(yaml_file.parent / "math500.jsonl")


def test_a_token_file_is_relative_to_the_file_that_names_it(yaml_file: Path) -> None:
    (yaml_file.parent / "token").write_text("secret")
    yaml_file.write_text(MINIMAL + "sandbox: {urls: ['http://a:1'], token_file: token}\n")
    assert load_config(yaml_file).sandbox.token_file == str(yaml_file.parent / "token")


def test_a_bare_name_is_local_when_it_exists_beside_the_file(yaml_file: Path) -> None:
    (yaml_file.parent / "Qwen" / "Qwen2.5-1.5B").mkdir(parents=True)
    assert load_config(yaml_file).model.path == str(yaml_file.parent / "Qwen" / "Qwen2.5-1.5B")


def test_paths_in_overrides_and_the_run_directory_are_relative_to_the_current_directory(
    yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_config(yaml_file, ["data.train.path=./mine.jsonl"])
    assert config.data.train.path == str(here / "mine.jsonl")
    assert config.run.directory == str(here / "runs/demo")


def test_an_unknown_key_names_its_file_its_path_and_the_likely_key(yaml_file: Path) -> None:
    yaml_file.write_text(MINIMAL + "rollout: {group_sise: 4}\n")
    assert error_of(yaml_file) == f"{yaml_file}: rollout.group_sise: unknown key; did you mean 'group_size'?"


def test_an_unknown_key_without_a_likely_one_lists_the_known_keys(yaml_file: Path) -> None:
    assert error_of(yaml_file, "train.zzz=1") == "override: train.zzz: unknown key; known keys: num_steps"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.count=1.5", "override: engine.count: must be a valid integer, got 1.5"),
        ("engine.count=true", "override: engine.count: must be a valid integer, got true"),
        ("train.num_steps='3'", 'override: train.num_steps: must be a valid integer, got "3"'),
        (
            "actor.sequence_parallel=tru",
            'override: actor.sequence_parallel: must be a valid boolean, got "tru"',
        ),
        ("model.dtype=fp16", "override: model.dtype: must be 'float32' or 'bfloat16', got \"fp16\""),
        ("data.eval.0.limt=2", "override: data.eval.0.limt: unknown key; did you mean 'limit'?"),
        ("train=null", "override: train: must be a mapping of keys, got null"),
        ("train.num_steps", "override 'train.num_steps': write it as section.key=value"),
        (
            "data.eval.7.name=x",
            "override 'data.eval.7.name=x': there is no data.eval.7.name: the entries of a list are numbers from 0 on",
        ),
        (
            "data.eval.x.name=y",
            "override 'data.eval.x.name=y': there is no data.eval.x.name: the entries of a list are numbers from 0 on",
        ),
        ("eval.env_iterations=2", "override: eval.env_iterations: must be a list, got 2"),
        ("eval.env_iterations=[a]", 'override: eval.env_iterations.0: must be a valid integer, got "a"'),
        (
            "train.num_steps=[1",
            "override 'train.num_steps=[1': the value is not valid YAML; text may need quotes",
        ),
    ],
)
def test_a_wrong_override_is_refused(yaml_file: Path, override: str, message: str) -> None:
    assert error_of(yaml_file, override) == message


@pytest.mark.parametrize("key", ["model.path", "data.train.name", "actor.learning_rate"])
def test_a_reference_to_nothing_names_the_key_that_has_it(yaml_file: Path, key: str) -> None:
    assert (
        error_of(yaml_file, f"{key}='${{nope}}'") == f"{yaml_file}: {key}: Interpolation key 'nope' not found"
    )


def test_a_missing_section_is_named(yaml_file: Path) -> None:
    yaml_file.write_text(MINIMAL.replace("train: {num_steps: 3}", ""))
    assert error_of(yaml_file) == f"{yaml_file}: train: required, but missing"


def test_every_problem_gets_its_own_line(yaml_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(yaml_file, ["engine.count=x", "run.sed=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_broken_yaml_is_reported_with_its_line(yaml_file: Path) -> None:
    yaml_file.write_text("run: {directory: x}\nmodel: [\n")
    assert error_of(yaml_file).startswith(f"{yaml_file}:3: not valid YAML: ")


@pytest.mark.parametrize("text", ["", "- a\n", "just text"])
def test_a_file_that_is_not_a_mapping_is_refused(yaml_file: Path, text: str) -> None:
    yaml_file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(yaml_file)
    assert str(yaml_file) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml: no such configuration file"):
        load_config(tmp_path / "nope.yaml")
