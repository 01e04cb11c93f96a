"""Engines that are killed, hang, are added and removed while rollouts run: no token is lost, or of the wrong policy."""

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import tiny_model
from engine_configs import engine_config
from tensor_parallel_world import TensorParallelWorld
from tiny_model import VOCAB_SIZE, byte_tokenizer, logprobs_under, random_qwen2

from megatron_ztrl.config.schema import SandboxConfig, ToolConfig
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.python_tool import PythonTool
from megatron_ztrl.rollout.trajectory import Sampling, run_rollout
from megatron_ztrl.runtime.cluster import cluster_nodes
from megatron_ztrl.runtime.engines import RunEngines
from megatron_ztrl.runtime.executors import RunExecutors, run_snippets
from megatron_ztrl.runtime.processes import ProcessTable, read_processes
from megatron_ztrl.runtime.supervision import Supervisor
from megatron_ztrl.types import NOT_SAMPLED, Prompt, StopReason
from megatron_ztrl.weights.publish import WeightPublisher

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _calling_policy import call_the_tool

pytestmark = pytest.mark.asyncio(loop_scope="module")
IN_FLIGHT = 24
RESPONSE_TOKENS = 160
ENV_ITERATIONS = 8


class Run:
    """Engines and an executor under supervision, and two trainer processes that publish to them."""

    def __init__(self, config, directory, world, engines, execute, notes):
        self.config = config
        self.directory = directory
        self.world = world
        self.engines = engines
        self.notes = notes
        self.policies = {}
        self.executed = 0
        self._execute = execute
        self._tokenizer = PolicyTokenizer(directory / "model")

    async def train(self, version, seed):
        """The actor changes, and is published."""
        policy = random_policy(seed)
        await self.engines.before_actor_changes()
        await self.world.hold(policy)
        self.policies[version] = policy
        await self.engines.publish(version)

    async def roll_out(self, name):
        async with self.engines.fleet.engine() as engine:
            return await run_rollout(
                name,
                Prompt(
                    prompt_id="p", problem="", text=f"Question {name}:", ground_truth="", data_source="test"
                ),
                engine=engine,
                tokenizer=self._tokenizer,
                environment=PythonTool(
                    self.execute,
                    lambda text: len(text),
                    env_iterations=ENV_ITERATIONS,
                    template_stop=(),
                    config=ToolConfig(max_output_tokens=40),
                ),
                sampling=Sampling(temperature=1.0, top_p=1.0, max_response_tokens=RESPONSE_TOKENS),
            )

    async def execute(self, code):
        self.executed += 1
        return await self._execute(code)

    def start_rollouts(self, count=IN_FLIGHT):
        return [asyncio.create_task(self.roll_out(str(i))) for i in range(count)]

    def processes(self):
        return read_processes(self.directory)["servers"]

    async def until(self, condition, seconds=400):
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 (a file and other processes are looked at)
                await asyncio.sleep(0.05)

    def serves(self, name, other_than_pid=None):
        row = self.processes().get(name, {})
        return row.get("state") == "serves" and row["pid"] != other_than_pid


def random_policy(seed):
    """One that calls the tool, with log-probs that no other seed has."""
    policy = random_qwen2(0)
    policy.config.eos_token_id = VOCAB_SIZE - 1  # an unused token: rollouts are to go on until they are full
    call_the_tool(policy, byte_tokenizer().convert_tokens_to_ids(["```", "python", "Ċ", "7", "```Ċ"]))
    noise = dict(random_qwen2(seed).named_parameters())
    for name, parameter in policy.named_parameters():
        parameter.data.add_(noise[name].data * 0.02)
    return policy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp("replacement")
    tiny_model.save_checkpoint(directory / "model", seed=0)
    config = replace(
        engine_config(directory, count=2, health_timeout_seconds=20.0),
        sandbox=SandboxConfig(workers=1, preload=["math"]),
    )
    notes = []
    processes = ProcessTable(directory)
    world = TensorParallelWorld()
    with contextlib.closing(world):
        async with contextlib.AsyncExitStack() as stack:
            engines = RunEngines(config, directory, processes, notes.append)
            stack.push_async_callback(engines.stop)
            executors = RunExecutors(config, cluster_nodes(), directory, processes)
            stack.push_async_callback(executors.stop)
            _, pool = await asyncio.gather(engines.start(), executors.start())
            await world.hold(random_policy(1))
            publisher = WeightPublisher(config, world, engines.clients, timeout_seconds=60)
            stack.push_async_callback(publisher.close)
            supervisor = await stack.enter_async_context(Supervisor(notes.append))
            engines.supervise(supervisor, publisher)
            executors.supervise(supervisor)
            run = Run(config, directory, world, engines, run_snippets(pool, run_timeout_seconds=10.0), notes)
            await run.train(1, seed=1)
            yield run


def check(run, rollouts, versions):
    """Every rollout is whole: masks by turn, and each sampled token's log-prob is that of its version's policy."""
    for rollout in rollouts:
        tool = [False] * len(rollout.token_ids)
        for turn in rollout.turns:
            tool[turn.tool_start : turn.end] = [True] * (turn.end - turn.tool_start)
        assert rollout.loss_mask == [not is_tool for is_tool in tool]
        assert [version == NOT_SAMPLED for version in rollout.weight_versions] == tool
        assert rollout.stop_reason in (StopReason.LENGTH, StopReason.STOP)
        assert len(rollout.token_ids) <= RESPONSE_TOKENS
        by_version = {
            version: logprobs_under(run.policies[version], rollout.prompt_ids, rollout.token_ids)
            for version in versions
        }
        for position, version in enumerate(rollout.weight_versions):
            if version != NOT_SAMPLED:
                assert rollout.logprobs[position] == pytest.approx(by_version[version][position], abs=1e-4)
    seen = {version for rollout in rollouts for version in rollout.weight_versions} - {NOT_SAMPLED}
    assert seen <= set(versions)
    assert sum(rollout.executed_calls for rollout in rollouts) > len(rollouts)
    return seen


async def test_rollouts_survive_the_death_of_their_engine_and_a_new_one_serves_the_current_weights(run):
    before = run.processes()["engine 0"]
    tasks = run.start_rollouts()
    await run.until(lambda: run.executed >= IN_FLIGHT)
    os.kill(before["pid"], signal.SIGKILL)
    await run.until(lambda: len(run.engines.fleet.engines) == 1, seconds=60)
    rollouts = await asyncio.gather(*tasks)
    assert check(run, rollouts, [1]) == {1}

    await run.until(lambda: run.serves("engine 0", other_than_pid=before["pid"]))
    assert run.processes()["engine 0"]["restarts"] == 1
    assert len(run.engines.fleet.engines) == 2
    # Nobody trained meanwhile, so it was brought to version 1 by a publish of its own.
    (client,) = [client for client in run.engines.clients if client.url == run.processes()["engine 0"]["url"]]
    assert await client.weight_version() == 1
    completion = await client.generate([7, 8, 9], max_new_tokens=30, temperature=1.0, request_id="new")
    expected = logprobs_under(run.policies[1], [7, 8, 9], completion.token_ids)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    both = await asyncio.gather(*run.start_rollouts())
    check(run, both, [1])


async def test_an_executor_that_is_killed_costs_no_rollout(run):
    tasks = run.start_rollouts()
    started = run.executed
    await run.until(lambda: run.executed >= started + IN_FLIGHT)
    before = run.processes()["executor 0"]
    os.kill(before["pid"], signal.SIGKILL)
    rollouts = await asyncio.gather(*tasks)
    check(run, rollouts, [1])
    await run.until(lambda: run.serves("executor 0", other_than_pid=before["pid"]))


@pytest.mark.slow
async def test_an_engine_that_dies_while_the_actor_trains_comes_back_with_the_next_publish(run):
    before = run.processes()["engine 1"]
    await run.engines.before_actor_changes()
    tasks = run.start_rollouts()
    os.kill(before["pid"], signal.SIGKILL)
    await run.until(lambda: run.processes()["engine 1"]["state"] == "waits for weights")
    await asyncio.sleep(0.5)
    assert run.processes()["engine 1"]["state"] == "waits for weights"
    tasks += run.start_rollouts()
    await run.train(2, seed=2)
    assert run.serves("engine 1", other_than_pid=before["pid"])
    check(run, await asyncio.gather(*tasks), [1, 2])
    assert [await client.weight_version() for client in run.engines.clients] == [2, 2]


async def test_an_engine_that_leaves_gives_back_its_tokens(run):
    tasks = run.start_rollouts()
    started = run.executed
    await run.until(lambda: run.executed >= started + IN_FLIGHT // 2)
    await run.engines.scale(1)
    assert list(run.processes()) == ["engine 0", "executor 0"]
    assert len(run.engines.fleet.engines) == 1
    version = max(run.policies)
    check(run, await asyncio.gather(*tasks), [version])
    with pytest.raises(ValueError, match="at least one engine"):
        await run.engines.scale(0)


@pytest.mark.slow
async def test_an_engine_that_joins_has_the_weights_and_gets_its_share_of_the_rollouts(run):
    version = max(run.policies)
    tasks = run.start_rollouts(2 * run.config.engine.max_running_requests)
    await run.engines.scale(2)
    await run.until(lambda: run.serves("engine 1"))
    tasks += run.start_rollouts()
    newcomer = run.engines.clients[-1]
    await run.until(lambda: run.engines.fleet.load(newcomer) > 0)
    assert await newcomer.weight_version() == version
    check(run, await asyncio.gather(*tasks), [version])
    assert run.engines.fleet.capacity == 2 * run.config.engine.max_running_requests


def hang(pid):
    """Stops a server and all that it started, without an end."""
    process = psutil.Process(pid)
    for each in [process, *process.children(recursive=True)]:
        each.suspend()


@pytest.mark.slow
async def test_an_engine_that_hangs_is_replaced_and_its_rollouts_move(run):
    before = run.processes()["engine 0"]
    tasks = run.start_rollouts()
    started = run.executed
    await run.until(lambda: run.executed >= started + IN_FLIGHT // 2)
    hang(before["pid"])
    check(run, await asyncio.gather(*tasks), [max(run.policies)])
    assert any("answered no health check for 20 s" in note for note in run.notes)
    await run.until(lambda: run.serves("engine 0", other_than_pid=before["pid"]))


@pytest.mark.slow
async def test_a_publish_waits_for_an_engine_when_all_have_died(run):
    version = max(run.policies) + 1
    await run.engines.before_actor_changes()
    pids = {name: row["pid"] for name, row in run.processes().items() if name.startswith("engine")}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    tasks = run.start_rollouts()
    await run.train(version, seed=version)
    await run.until(lambda: all(run.serves(name, other_than_pid=pid) for name, pid in pids.items()))
    assert check(run, await asyncio.gather(*tasks), [version]) == {version}


@pytest.mark.slow
async def test_an_engine_that_hangs_during_a_publish_is_replaced_and_the_publish_ends_without_it(run):
    version = max(run.policies) + 1
    before = run.processes()["engine 1"]
    tasks = run.start_rollouts()
    started = run.executed
    await run.until(lambda: run.executed >= started + IN_FLIGHT // 2)
    hang(before["pid"])
    async with asyncio.timeout(120):  # its clients would wait for an hour
        await run.train(version, seed=version)
    assert run.serves("engine 0")
    check(run, await asyncio.gather(*tasks), [version - 1, version])
    await run.until(lambda: run.serves("engine 1", other_than_pid=before["pid"]))


@pytest.mark.slow
async def test_a_replacement_that_dies_before_it_has_its_weights_is_replaced_too(run):
    version = max(run.policies)
    before = run.processes()["engine 0"]
    await run.engines.before_actor_changes()  # so that nobody brings it any
    os.kill(before["pid"], signal.SIGKILL)
    await run.until(lambda: run.processes()["engine 0"]["state"] == "waits for weights")
    replacement = run.processes()["engine 0"]
    os.kill(replacement["pid"], signal.SIGKILL)
    await run.until(lambda: run.processes()["engine 0"]["state"] == "starts")
    await run.train(version + 1, seed=version + 1)
    await run.until(lambda: run.serves("engine 0", other_than_pid=replacement["pid"]))
    assert run.processes()["engine 0"]["restarts"] >= 2
    check(run, await asyncio.gather(*run.start_rollouts()), [version + 1])
