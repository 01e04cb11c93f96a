"""A user's own reward, environment and prompt template, named in the configuration."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ztrl.config.errors import ConfigError
from megatron_ztrl.config.extensions import load_object
from megatron_ztrl.config.load import check_config, load_config
from megatron_ztrl.envs.base import RolloutContext
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.runtime.system import RolloutSystem
from megatron_ztrl.types import Prompt

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "config.yaml"
MINE = """
from megatron_ztrl.envs.prompt_templates import PromptTemplate

async def length(response_text, ground_truth):
    return len(response_text) / 8

def synchronous(response_text, ground_truth):
    return 0.0

class Silence:
    def __init__(self, context):
        self.context = context

brief = PromptTemplate(name="brief", text="{problem} =", stop=("\\n",))
loads = []
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_a_file_is_run_once_and_gives_the_same_object_each_time(mine: Path):
    loads = load_object(f"{mine}:loads", key="reward.function")
    loads.append(1)
    assert load_object(f"{mine}:loads", key="tool.environment") is loads


def test_a_module_is_imported():
    assert load_object("json:loads", key="reward.function")("[1]") == [1]


def test_an_own_prompt_template_is_used(mine: Path):
    template = get_template(f"{mine}:brief")
    assert (template.render("1 + 1"), template.stop) == ("1 + 1 =", ("\n",))
    with pytest.raises(
        ValueError, match=r"data.prompt_template: .*mine.py:length is no PromptTemplate but function"
    ):
        get_template(f"{mine}:length")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("length", "expected FILE.py:NAME or package.module:NAME, got 'length'"),
        ("gone.py:length", "there is no file .*/gone.py"),
        ("no_such_package.rewards:length", "No module named 'no_such_package'.*install it"),
        ("{mine}:lenght", "mine.py has no 'lenght'; did you mean 'length'"),
        ("{broken}:length", r"broken.py failed: ZeroDivisionError: .* \(.*broken.py, line 2\)"),
        ("{mine}:brief", "is no function or class but PromptTemplate"),
        ("{mine}:synchronous", "must be defined with async def"),
    ],
)
def test_what_cannot_be_used_is_refused_when_the_configuration_is_read(
    mine: Path, reference: str, message: str
):
    broken = mine.with_name("broken.py")
    broken.write_text("x = 1\n1 / 0\n")
    reference = reference.format(mine=mine, broken=broken)
    with pytest.raises(ConfigError, match=rf"reward.function: .*{message}"):
        check_config(load_config(QUICKSTART, [f"reward.function={reference}"]))


def test_a_file_named_in_a_configuration_is_looked_for_beside_it(mine: Path, monkeypatch: pytest.MonkeyPatch):
    own = mine.with_name("own.yaml")
    own.write_text(QUICKSTART.read_text().replace("reward:\n", "reward:\n  function: mine.py:length\n"))
    config = load_config(own)
    assert config.reward.function == f"{mine}:length"
    monkeypatch.chdir(mine.parent)
    config = load_config(QUICKSTART, ["tool.environment=mine.py:length"])
    assert config.tool.environment == f"{mine}:length"


def test_an_unknown_template_is_refused_with_a_suggestion():
    with pytest.raises(
        ConfigError, match="data.prompt_template: no template 'orz_tri'; did you mean 'orz_tir'"
    ):
        check_config(load_config(QUICKSTART, ["data.prompt_template=orz_tri"]))


def test_a_run_scores_with_the_own_reward_and_puts_rollouts_into_the_own_environment(mine: Path):
    own = [f"reward.function={mine}:length", f"tool.environment={mine}:Silence"]
    rollouts = RolloutSystem(
        config=load_config(QUICKSTART, own),
        tokenizer=None,
        engines=SimpleNamespace(fleet=None),
        executors=None,
        execute=None,
        verifier=None,
        processes=None,
    )
    runner = rollouts.group_runner(Sampling(temperature=1.0, top_p=1.0, max_response_tokens=8))
    assert asyncio.run(runner.score("four", "")) == 0.5
    with pytest.raises(
        ValueError, match=r"reward.function: .*mine.py:length must return a number from 0 to 1, .* 1.125"
    ):
        asyncio.run(runner.score("nine char", ""))
    environment = runner.make_environment(
        RolloutContext(
            prompt=Prompt(prompt_id="p", problem="", text="", ground_truth="", data_source=""),
            env_iterations=3,
            template_stop=(),
            execute=None,
            count_tokens=len,
            config=rollouts.config.tool,
        )
    )
    assert type(environment).__name__ == "Silence" and environment.context.env_iterations == 3
