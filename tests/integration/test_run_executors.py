"""The executors of a run: one on each node of the Ray cluster, or those that the configuration names."""

import asyncio
import contextlib
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from engine_configs import engine_config
from sandbox_server import executor_with

from megatron_ztrl.config.schema import Config, SandboxConfig, ToolConfig
from megatron_ztrl.runtime import executors as executors_module
from megatron_ztrl.runtime.cluster import cluster_nodes
from megatron_ztrl.runtime.executors import RunExecutors, run_snippets
from megatron_ztrl.runtime.processes import ProcessTable, read_processes
from megatron_ztrl.runtime.supervision import Supervisor
from megatron_ztrl.types import ExecutionStatus


def configured(directory, **sandbox) -> Config:
    base = engine_config(directory)
    return Config(
        run=base.run,
        model=base.model,
        data=base.data,
        train=base.train,
        tool=ToolConfig(max_concurrent=4),
        sandbox=SandboxConfig(workers=1, preload=["math"], **sandbox),
    )


@contextlib.asynccontextmanager
async def executors_of(config, nodes, directory):
    """(executors, their pool)"""
    executors = RunExecutors(config, nodes, directory, ProcessTable(directory))
    try:
        yield executors, await executors.start()
    finally:
        await executors.stop()


def test_each_node_gets_an_executor_that_works_and_ends_with_the_run(cluster, tmp_path):
    async def scenario() -> list[str]:
        nodes = cluster_nodes() * 2  # there is one, which is taken for two
        async with executors_of(configured(tmp_path), nodes, tmp_path) as (_, pool):
            execute = run_snippets(pool, run_timeout_seconds=10.0)
            results = await asyncio.gather(*(execute(f"print({n})") for n in range(20)))
            assert {result.status for result in results} == {ExecutionStatus.OK}
            assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]
            served = [executor.served for executor in pool.executors]
            assert len(served) == 2 and sum(served) == 20 and min(served) > 0
            urls = [executor.url for executor in pool.executors]
            for url in urls:  # nobody else may run code there
                request = urllib.request.Request(url + "/v1/execute", b"{}", method="POST")
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    await asyncio.to_thread(urllib.request.urlopen, request)
            return urls

    urls = asyncio.run(scenario())
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["executor0.log", "executor1.log"]
    for url in urls:
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(url + "/ready")


def test_an_executor_that_is_killed_is_started_again_where_it_was_and_every_snippet_is_answered(
    cluster, tmp_path
):
    async def scenario() -> None:
        async with (
            executors_of(configured(tmp_path), cluster_nodes(), tmp_path) as (executors, pool),
            Supervisor(notes.append) as supervisor,
        ):
            executors.supervise(supervisor)
            execute = run_snippets(pool, run_timeout_seconds=10.0)
            for kill in range(2):
                before = read_processes(tmp_path)["servers"]["executor 0"]
                calls = [
                    asyncio.create_task(execute(f"import time; time.sleep(0.2); print({n})"))
                    for n in range(12)
                ]
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                os.kill(before["pid"], signal.SIGKILL)
                results = await asyncio.gather(*calls)
                assert [(result.status, result.stdout) for result in results] == [
                    (ExecutionStatus.OK, f"{n}\n") for n in range(12)
                ]
                after = read_processes(tmp_path)["servers"]["executor 0"]
                assert (after["url"], after["state"], after["restarts"]) == (
                    before["url"],
                    "serves",
                    kill + 1,
                )
                assert after["pid"] != before["pid"]
            assert [executor.ejections for executor in pool.executors] == [2]

    notes: list[str] = []
    asyncio.run(scenario())
    assert sum("ended with code -9: executor 0 starts again" in note for note in notes) == 2


def test_an_executor_that_hangs_is_replaced_and_so_is_one_whose_host_died_where_it_was(
    cluster, tmp_path, monkeypatch
):
    def hang(executor: psutil.Process) -> None:
        executor.suspend()

    def lose_its_host(executor: psutil.Process) -> None:
        executor.parent().kill()

    async def scenario() -> None:
        async with (
            executors_of(configured(tmp_path), cluster_nodes(), tmp_path) as (executors, pool),
            Supervisor(notes.append) as supervisor,
        ):
            executors.supervise(supervisor)
            for fail in (hang, lose_its_host):
                before = read_processes(tmp_path)["servers"]["executor 0"]
                fail(psutil.Process(before["pid"]))
                async with asyncio.timeout(120):
                    while read_processes(tmp_path)["servers"]["executor 0"]["pid"] == before["pid"]:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                after = read_processes(tmp_path)["servers"]["executor 0"]
                assert (after["url"], after["state"]) == (before["url"], "serves")
                result = await run_snippets(pool, run_timeout_seconds=10.0)("print(7)")
                assert (result.status, result.stdout) == (ExecutionStatus.OK, "7\n")

    monkeypatch.setattr(executors_module, "PROBE_INTERVAL_SECONDS", 0.2)
    monkeypatch.setattr(executors_module, "HANGS_SECONDS", 6.0)
    notes: list[str] = []
    asyncio.run(scenario())
    reasons = [note.partition(": executor 0 starts again")[0] for note in notes if "starts again" in note]
    assert reasons[0] == "executor 0 was not ready for 6 s"
    assert reasons[1].startswith("its host on the cluster died")


def test_executors_that_the_configuration_names_are_used_with_their_token(tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("a-token-of-the-test\n")

    async def scenario(urls: list[str]) -> str:
        config = configured(tmp_path, urls=urls, token_file=str(token_file))
        async with executors_of(config, [], tmp_path) as (_, pool):
            return (await run_snippets(pool, run_timeout_seconds=10.0)("print(6 * 7)")).stdout

    with executor_with(
        "auto", "--workers", "1", "--preload", "math", token="a-token-of-the-test"
    ) as executor:
        assert asyncio.run(scenario([executor.url])) == "42\n"
    assert not list(Path(tmp_path).glob("*.log"))
