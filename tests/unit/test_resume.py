"""``--resume`` with the configuration of another run is refused before anything starts or is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ztrl import cli
from megatron_ztrl.config.load import load_config
from megatron_ztrl.data.prompts import PromptSource, load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.runtime.checkpoints import MANIFEST, STATE
from megatron_ztrl.runtime.driver_state import DriverState

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "config.yaml"
RECORD = "the configuration that the run was started with\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the quickstart that was interrupted after two steps; its weights are never read here."""
    config = load_config(QUICKSTART)
    source = PromptSource(
        load_prompts(config.data.train, get_template(config.data.prompt_template).render),
        seed=config.run.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
        tokenize=PolicyTokenizer(Path(config.model.path)).encode,
    )
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    (checkpoint / "actor").mkdir(parents=True)
    (checkpoint / "actor" / "config.json").write_bytes(
        (QUICKSTART.parent / "base" / "config.json").read_bytes()
    )
    state = {"version": 2, **DriverState(version=2, source=source.state()).as_json()}
    (checkpoint / STATE).write_text(json.dumps(state))
    (checkpoint / MANIFEST).write_text(json.dumps({"files": {}}))
    (tmp_path / "config.yaml").write_text(RECORD)
    return tmp_path


def another_model(directory: Path) -> str:
    """The override that names a copy of the policy whose rotary base is another."""
    copy = directory / "model"
    copy.mkdir()
    for path in (QUICKSTART.parent / "base").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    theta = config.get("rope_parameters", config)["rope_theta"]
    config.get("rope_parameters", config)["rope_theta"] = 10 * theta
    (copy / "config.json").write_text(json.dumps(config))
    return f"model.path={copy}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=1", "the checkpoint was made with other training prompts: run.seed, "),
        ("data.train.limit=100", "the checkpoint was made with other training prompts: run.seed, "),
        ("MODEL", "is not of this model: rope theta: "),
        ("algorithm.advantage=gae", "has no critic: it is of a run with another algorithm.advantage"),
    ],
)
def test_another_runs_checkpoint_is_refused_and_its_record_stays(
    run: Path, tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    override = another_model(tmp_path) if override == "MODEL" else override
    code = cli.main(["train", str(QUICKSTART), f"run.directory={run}", override, "--resume"])
    captured = capsys.readouterr()
    assert code == cli.USER_ERROR
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1  # no phase of a start
    assert (run / "config.yaml").read_text() == RECORD
    assert not (run / "environment.json").exists()
