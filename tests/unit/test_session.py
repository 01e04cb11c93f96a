"""The training loop and its session, told to stop or killed at every moment, and gone on with.

Real: loop, session, scheduler, fleet, rollouts, journals, evaluation, checkpoints, logs, packing. Scripted: engine and
trainer. The policy counts upwards from its prompt; the engine checks that it is never asked for a token twice.
"""

import asyncio
import collections
import contextlib
import io
import itertools
import json
import shutil
from types import SimpleNamespace

from rich.console import Console

from megatron_ztrl.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.batches import Scores
from megatron_ztrl.data.prompts import PromptSource
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.evaluate import Evaluator
from megatron_ztrl.loop import train
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.runtime.checkpoints import CheckpointStore
from megatron_ztrl.session import TrainingSession
from megatron_ztrl.trainer.integrity import seal
from megatron_ztrl.types import Completion, FinishReason, Prompt, VersionSpan

EOS = 0
STEPS, GROUPS, GROUP_SIZE, STALENESS = 4, 2, 2, 1
EVALUATED = [0, 2, 4]
EVAL_PROMPTS = ["9000", "9100"]


def config_of(directory, max_staleness=STALENESS):
    return Config(
        run=RunConfig(directory=str(directory)),
        model=ModelConfig(path="model", dtype="float32"),
        data=DataConfig(train=DatasetConfig(name="d", path="d"), prompt_template="plain"),
        train=TrainConfig(num_steps=STEPS),
        rollout=RolloutConfig(
            groups_per_step=GROUPS,
            group_size=GROUP_SIZE,
            env_iterations=0,
            max_staleness=max_staleness,
            max_call_tokens=3,
        ),
        algorithm=AlgorithmConfig(old_logprobs="engine"),
        actor=ActorConfig(max_tokens_per_microbatch=64),
        engine=EngineConfig(max_running_requests=6),
        eval=EvalConfig(interval_steps=2, env_iterations=[0], beside_steps=1),
        checkpoint=CheckpointConfig(interval_steps=2),
        logging=LoggingConfig(tensorboard=False, sample_rollouts=100),
    )


class Numbers:
    """A tokenizer of numbers in a row."""

    def encode(self, text, *, add_special_tokens=False, split_special_tokens=False):
        return [int(word) for word in text.split()]

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


class Engine:
    """One token for each turn of the event loop, until the rollout's length; remembers what it was asked for."""

    def __init__(self, tick):
        self.tick = tick
        self.version = 0
        self.interrupted = False
        self.sampled = collections.Counter()

    async def generate(self, input_ids, *, max_new_tokens, request_id, **_):
        prompt, *written = input_ids
        assert written == list(range(prompt + 1, prompt + 1 + len(written))), "gone on with where it stood"
        group, index = map(int, request_id.partition("-")[0].split("."))
        length = 3 + (7 * group + 5 * index) % 9
        new, versions = [], []
        while len(new) < max_new_tokens and EOS not in new and not self.interrupted:
            await asyncio.sleep(0)
            position = len(written) + len(new)
            self.sampled[prompt, group, index, position] += 1
            new.append(EOS if position == length else prompt + 1 + position)
            versions.append(VersionSpan(version=self.version, start=len(new) - 1, end=len(new)))
            self.tick()
        ended = EOS in new
        return Completion(
            token_ids=new,
            logprobs=[-0.5] * len(new),
            finish_reason=FinishReason.STOP
            if ended
            else FinishReason.ABORT
            if self.interrupted
            else FinishReason.LENGTH,
            matched_stop=EOS if ended else None,
            version_spans=versions,
            cached_tokens=0,
        )


class System:
    """What `runtime.system.System` is to the loop."""

    def __init__(self, config, tick):
        self.engine = Engine(tick)
        self.fleet = EngineFleet([self.engine], max_concurrent_per_engine=6)
        self.rollouts = SimpleNamespace(
            config=config, fleet=self.fleet, engines=self, group_runner=self._group_runner
        )
        self.actor, self.critic = self, None
        self._tick = tick
        self._files = {}

    def _group_runner(self, sampling):
        async def score(text, ground_truth):
            return float(len(text.split()) % 2)

        return GroupRunner(
            fleet=self.fleet,
            tokenizer=Numbers(),
            execute=None,
            score=score,
            template=get_template("plain"),
            tool=self.rollouts.config.tool,
            sampling=sampling,
        )

    async def publish(self, version):
        self._tick()
        await asyncio.sleep(0)
        self.engine.version = version

    async def while_engines_serve(self, work):
        await work

    async def interrupt(self):
        drained = asyncio.create_task(self.fleet.drain(self.engine))
        await asyncio.sleep(0)
        self.engine.interrupted = True
        await drained

    async def scores(self, minibatch):
        return Scores()

    async def train_step(self, minibatch, step):
        for _ in range(5):
            await asyncio.sleep(0)
            self._tick()
        return {"loss/loss": 0.0}

    async def save_checkpoint(self, directory):
        self._tick()
        (directory / "actor").mkdir()
        (directory / "actor" / "weights").write_text("w")
        self._files = {"actor/weights": directory / "actor" / "weights"}

    async def checkpoint_written(self):
        return True

    async def finish_checkpoint(self):
        self._tick()
        return {name: seal(path) for name, path in self._files.items()}

    async def load_checkpoint(self, directory):
        assert (directory / "actor" / "weights").read_text() == "w"

    async def export_hf(self, directory):
        directory.mkdir(exist_ok=True)


def prompt_of(text):
    return Prompt(prompt_id=text, problem="", text=text, ground_truth="", data_source="d")


async def live(directory, *, resume, max_staleness=STALENESS, at_tick=lambda number, stop: None):
    """One life of a run. Returns whether it reached its end, and its engine."""
    config, stop, ticks = config_of(directory, max_staleness), asyncio.Event(), itertools.count()
    system = System(config, lambda: at_tick(next(ticks), stop))
    evaluator = Evaluator(system.rollouts, {"held out": [prompt_of(text) for text in EVAL_PROMPTS]})
    source = PromptSource(
        [prompt_of(str(100 * number)) for number in range(1, 6)],
        seed=0,
        max_prompt_tokens=8,
        tokenize=Numbers().encode,
    )
    session = TrainingSession(
        system,
        source,
        evaluator,
        decode=str,
        resume=resume,
        checkpoint=CheckpointStore(directory / "checkpoints", keep_last=1).latest() if resume else None,
        progress=Progress(STEPS, console=Console(file=io.StringIO())),
        stop=stop,
    )
    async with session:
        return await train(session), system.engine


def stop_at(moment):
    def at_tick(number, stop):
        if number == moment:
            stop.set()

    return at_tick


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_every_group_was_trained_once_and_every_policy_evaluated_once(directory):
    metrics = rows(directory / "metrics.jsonl")
    trained = [row for row in metrics if row["split"] == "train"]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert max(row["train/staleness_max"] for row in trained) <= STALENESS
    evaluations = {row["step"]: row for row in metrics if row["split"] == "eval"}
    assert (
        sorted(evaluations) == sorted(row["step"] for row in metrics if row["split"] == "eval") == EVALUATED
    )
    groups = collections.defaultdict(set)
    for row in rows(directory / "rollouts.jsonl"):
        if row["split"] == "train":
            groups[row["step"]].add(int(row["rollout_id"].partition(".")[0]))
    assert [sorted(groups[step]) for step in sorted(groups)] == [
        list(range(step * GROUPS, (step + 1) * GROUPS)) for step in range(STEPS)
    ]


def test_told_to_stop_at_any_moment_it_loses_no_token_and_goes_on_where_it_was(tmp_path):
    moments = []
    finished, _ = asyncio.run(
        live(tmp_path / "whole", resume=False, at_tick=lambda n, stop: moments.append(n))
    )
    assert finished
    assert_every_group_was_trained_once_and_every_policy_evaluated_once(tmp_path / "whole")
    assert len(moments) > 200
    for moment in moments[::25]:
        directory = tmp_path / str(moment)
        finished, first = asyncio.run(live(directory, resume=False, at_tick=stop_at(moment)))
        if not finished:
            finished, second = asyncio.run(live(directory, resume=True))
            assert finished
            asked = first.sampled + second.sampled
            for (prompt, *_), times in asked.items():
                assert times == (len(EVALUATED) if str(prompt) in EVAL_PROMPTS else 1), moment
        assert_every_group_was_trained_once_and_every_policy_evaluated_once(directory)
        shutil.rmtree(directory)


def test_told_to_stop_during_an_evaluation_it_does_not_wait_for_its_end(tmp_path):
    finished, _ = asyncio.run(live(tmp_path, resume=False, at_tick=stop_at(5)))
    assert not finished
    assert rows(tmp_path / "metrics.jsonl") == []


def test_killed_at_any_moment_it_trains_every_group_once_all_the_same(tmp_path):
    """What is on the disk at a moment is what a driver that is killed then leaves."""
    left = []

    def copy_if_there(source, target):
        with contextlib.suppress(FileNotFoundError):  # the journal's thread removes what is covered
            shutil.copy(source, target)

    def copy(number, stop):
        if number % 31 == 0:
            left.append(tmp_path / f"killed{number}")
            shutil.copytree(tmp_path / "run", left[-1], copy_function=copy_if_there)

    asyncio.run(live(tmp_path / "run", resume=False, at_tick=copy))
    assert len(left) > 5
    for directory in left:
        finished, _ = asyncio.run(live(directory, resume=True))
        assert finished
        assert_every_group_was_trained_once_and_every_policy_evaluated_once(directory)
        shutil.rmtree(directory)


def test_resumed_with_a_smaller_staleness_it_trains_on_no_token_that_is_older(tmp_path):
    asyncio.run(live(tmp_path, resume=False, at_tick=stop_at(130)))
    steps_before = len(rows(tmp_path / "metrics.jsonl"))
    finished, _ = asyncio.run(live(tmp_path, resume=True, max_staleness=0))
    assert finished
    later = [row for row in rows(tmp_path / "metrics.jsonl")[steps_before:] if row["split"] == "train"]
    assert later and {row["train/staleness_max"] for row in later} == {0}
    assert_every_group_was_trained_once_and_every_policy_evaluated_once(tmp_path)
