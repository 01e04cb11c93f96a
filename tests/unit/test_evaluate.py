"""Evaluation: what it measures, its share of the engines, and going on where it was interrupted."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TrainConfig,
)
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.evaluate import Evaluator, UrgentShare, load_eval_prompts
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.journal import Journal
from megatron_ztrl.types import (
    Completion,
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Prompt,
    VersionSpan,
)

QUICKSTART_BASE = Path(__file__).parents[2] / "examples" / "quickstart" / "base"
EOS = 0
DATASETS = {"easy": 2, "hard": 3}
SAMPLES = 4


class ByteTokenizer:
    def encode(self, text, *, add_special_tokens=True, split_special_tokens=False):
        return list(text.encode())

    def decode(self, token_ids):
        return bytes(token_ids).decode(errors="replace")


class Echo:
    """Answers with the prompt, one token per call; counts how many rollouts it has at once."""

    def __init__(self, calls=None):
        self.calls_left = calls
        self.calls = 0
        self.running = 0
        self.most = 0
        self.out_of_calls = asyncio.Event()

    async def generate(self, input_ids, *, max_new_tokens, stop_patterns, temperature, top_p, request_id):
        self.running += 1
        self.most = max(self.most, self.running)
        if self.calls == self.calls_left:
            self.out_of_calls.set()
            await asyncio.Event().wait()
        self.calls += 1
        await asyncio.sleep(0)
        self.running -= 1
        asked, _, answered = bytes(input_ids).partition(b"=")
        token = [*asked, EOS][len(answered)]
        return Completion(
            token_ids=[token],
            logprobs=[-0.5],
            finish_reason=FinishReason.STOP if token == EOS else FinishReason.ABORT,
            matched_stop=EOS if token == EOS else None,
            version_spans=[VersionSpan(version=2, start=0, end=1)],
            cached_tokens=0,
        )


async def score(text, ground_truth):
    return float(ground_truth in text)


TEXTS = {name: [f"{name}{row}" for row in range(count)] for name, count in DATASETS.items()}


def evaluator_on(engine, *, share=0.25, texts=TEXTS, fleet=None, execute=None):
    config = Config(
        run=RunConfig(directory="run"),
        model=ModelConfig(path="model"),
        data=DataConfig(train=DatasetConfig(name="d", path="d.jsonl"), prompt_template="plain"),
        train=TrainConfig(num_steps=1),
        engine=EngineConfig(max_running_requests=12),
        eval=EvalConfig(samples_per_prompt=SAMPLES, beside_share=share),
    )
    fleet = fleet or EngineFleet([engine], max_concurrent_per_engine=12)

    def group_runner(sampling):
        return GroupRunner(
            fleet=fleet,
            tokenizer=ByteTokenizer(),
            execute=execute,
            score=score,
            template=get_template("plain"),
            tool=config.tool,
            sampling=sampling,
        )

    prompts = {
        name: [
            Prompt(
                prompt_id=f"{name}:{row}",
                problem="",
                text=f"{text}=",
                ground_truth="easy",
                data_source=name,
            )
            for row, text in enumerate(of_set)
        ]
        for name, of_set in texts.items()
    }
    system = SimpleNamespace(config=config, group_runner=group_runner, fleet=fleet)
    return Evaluator(system, prompts)


def test_a_prompt_that_the_engine_has_no_room_for_is_refused_by_file_and_row(tmp_path):
    rows = [{"problem": problem, "answer": "1"} for problem in ("1", "é" * 50, "2")]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = PolicyTokenizer(QUICKSTART_BASE)
    longest = len(tokenizer.encode("Question: " + "é" * 50 + "\nAnswer:"))

    def load(max_response_tokens):
        return load_eval_prompts(
            Config(
                run=RunConfig(directory="run"),
                model=ModelConfig(path=str(QUICKSTART_BASE)),
                data=DataConfig(
                    train=DatasetConfig(name="d", path="d.jsonl"),
                    eval=[DatasetConfig(name="held", path=str(tmp_path / "set.jsonl"))],
                    prompt_template="plain",
                ),
                rollout=RolloutConfig(max_response_tokens=max_response_tokens),
                train=TrainConfig(num_steps=1),
                sglang=SGLangConfig(server_args={"context_length": 1000}),
            ),
            tokenizer.encode,
        )

    room = 1000 - 6 - longest  # SGLang keeps six
    assert len(load(room)["held"]) == 3
    with pytest.raises(
        ValueError, match=rf"set\.jsonl: row 2: .* has {longest} tokens.*context_length"
    ) as error:
        load(room + 1)
    assert "\n" not in str(error.value)


async def test_every_data_set_is_measured_by_itself():
    metrics, rollouts = await evaluator_on(Echo()).evaluate(0)
    assert metrics["easy/accuracy"] == metrics["easy/pass_at_k"] == 1.0
    assert metrics["hard/accuracy"] == metrics["hard/pass_at_k"] == 0.0
    assert len(rollouts) == SAMPLES * sum(DATASETS.values())


async def test_whoever_waits_is_told_after_every_problem_how_many_are_done():
    told = []
    await evaluator_on(Echo()).evaluate(0, count=lambda done, total: told.append((done, total)))
    assert told == [(done, sum(DATASETS.values())) for done in range(1, sum(DATASETS.values()) + 1)]


async def test_a_problem_that_the_infrastructure_failed_counts_neither_as_solved_nor_as_unsolved():
    async def no_executor(code):
        return ExecutionResult(
            status=ExecutionStatus.SANDBOX_ERROR, stdout="", stderr="", run_seconds=0.0, queue_seconds=0.0
        )

    texts = {"d": ["```python\n1\n```", "easy", "hard"], "down": ["```python\n2\n```"]}
    metrics, _ = await evaluator_on(Echo(), texts=texts, execute=no_executor).evaluate(1)
    assert (metrics["d/accuracy"], metrics["d/pass_at_k"]) == (0.5, 0.5)
    assert metrics["d/infrastructure_failures"] == pytest.approx(1 / 3)
    assert not {"down/accuracy", "down/pass_at_k"} & set(metrics)


@pytest.mark.parametrize("beside", [True, False])
async def test_it_does_not_stand_in_line_behind_rollouts_of_later_training_steps(beside):
    engine = Echo()
    fleet = EngineFleet([engine], max_concurrent_per_engine=2)
    seated = []

    async def train(name):
        async with fleet.engine():
            seated.append(name)
            for _ in range(10):  # turns of the loop, not a time: the engine takes one for each token
                await asyncio.sleep(0)

    waiting = [asyncio.create_task(train(name)) for name in range(20)]
    await asyncio.sleep(0)
    await evaluator_on(engine, texts={"d": ["easy"]}, fleet=fleet).evaluate(0, beside=beside)
    assert len(seated) < len(waiting)  # all of them, had it waited for its turn
    await asyncio.gather(*waiting)


@pytest.mark.parametrize(("share", "most"), [(0.25, 3), (0.01, 1), (1.0, 12)])
async def test_beside_training_it_has_its_share_of_the_engines_and_no_more(share, most):
    engine = Echo()
    await evaluator_on(engine, share=share).evaluate(0, beside=True)
    assert engine.most == most


async def test_its_share_is_of_the_engines_that_there_are_just_then():
    first, second = Echo(), Echo()
    fleet = EngineFleet([first], max_concurrent_per_engine=12)
    share = UrgentShare(fleet, 0.25)
    began, ended, leaving = 0, 0, asyncio.Semaphore(0)

    async def roll_out():
        nonlocal began, ended
        async with share.engine():
            began += 1
            await leaving.acquire()
            ended += 1

    async def leave(count):
        for _ in range(count):
            leaving.release()
        before = ended
        while ended < before + count:  # noqa: ASYNC110 (nothing is waited for but the loop itself)
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        return began - ended

    rollouts = [asyncio.create_task(roll_out()) for _ in range(30)]
    assert await leave(0) == 3
    fleet.add(second)
    assert await leave(1) == 6
    rollouts[-1].cancel()  # which waits
    rollouts[3].cancel()  # which is inside
    began -= 1
    assert await leave(0) == 6
    fleet.remove(first)
    assert [await leave(count) for count in (2, 2, 2)] == [4, 3, 3]
    fleet.remove(second)
    assert [await leave(count) for count in (1, 1, 1)] == [2, 1, 0]  # one is let in, and waits for an engine
    fleet.add(first)
    assert [await leave(count) for count in (0, 1)] == [1, 3]
    for rollout in rollouts:
        rollout.cancel()
    await asyncio.gather(*rollouts, return_exceptions=True)


async def test_with_training_waiting_it_has_all_engines():
    engine = Echo()
    await evaluator_on(engine, share=0.01).evaluate(0)
    assert engine.most == 12


@pytest.mark.parametrize("calls", [0, 1, 17, 60, 100])
async def test_an_interrupted_evaluation_asks_only_for_the_tokens_that_are_missing(tmp_path, calls):
    whole = Echo()
    expected = await evaluator_on(whole).evaluate(0)
    first = Echo(calls)
    journal = Journal(tmp_path, identity="evaluation")
    interrupted = asyncio.create_task(evaluator_on(first).evaluate(0, journal=journal))
    await first.out_of_calls.wait()
    interrupted.cancel()
    await asyncio.gather(interrupted, return_exceptions=True)
    journal.close()
    journal = Journal(tmp_path, identity="evaluation")
    journal.restore(2)
    second = Echo()
    metrics, rollouts = await evaluator_on(second).evaluate(0, journal=journal)
    journal.close()
    assert metrics == expected[0]
    assert [rollout.token_ids for rollout in rollouts] == [rollout.token_ids for rollout in expected[1]]
    assert first.calls == calls
    assert first.calls + second.calls == whole.calls
