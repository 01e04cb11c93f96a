"""The executors of a run: one on each node of the Ray cluster, or those that the configuration names."""

import asyncio
import contextlib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engine_configs import engine_config
from sandbox_server import executor_with

from megatron_ztrl.config.schema import Config, SandboxConfig, ToolConfig
from megatron_ztrl.runtime.cluster import cluster_nodes, ray_cluster
from megatron_ztrl.runtime.executors import run_snippets, start_executors
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


def test_each_node_gets_an_executor_that_works_and_ends_with_the_run(tmp_path):
    async def scenario() -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            pool = await start_executors(configured(tmp_path), cluster_nodes() * 2, tmp_path, stack)
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

    with ray_cluster():  # of one node, which is taken for two
        urls = asyncio.run(scenario())
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["executor0.log", "executor1.log"]
    for url in urls:
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(url + "/ready")


def test_executors_that_the_configuration_names_are_used_with_their_token(tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("a-token-of-the-test\n")

    async def scenario(urls: list[str]) -> str:
        async with contextlib.AsyncExitStack() as stack:
            config = configured(tmp_path, urls=urls, token_file=str(token_file))
            pool = await start_executors(config, [], tmp_path, stack)
            return (await run_snippets(pool, run_timeout_seconds=10.0)("print(6 * 7)")).stdout

    with executor_with(
        "auto", "--workers", "1", "--preload", "math", token="a-token-of-the-test"
    ) as executor:
        assert asyncio.run(scenario([executor.url])) == "42\n"
    assert not list(Path(tmp_path).glob("*.log"))
