"""One real SGLang server for the session, and random models that it and Hugging Face's implementation agree
on.
"""

import sys
from pathlib import Path

import pytest

# pytest's importlib mode leaves the path alone; the spawned ranks inherit it.
sys.path.insert(0, str(Path(__file__).parent))

import tiny_model
from engine_configs import engine_config

from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.runtime.cluster import ray_cluster


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def config(run_directory):
    return engine_config(run_directory)


@pytest.fixture(scope="session")
def model(run_directory):
    """What the server loads at its start."""
    return tiny_model.save_checkpoint(run_directory / "model", seed=0)


@pytest.fixture(scope="session")
def server(config, model, run_directory):
    server = EngineServer(config, log_path=run_directory / "engine.log")
    server.start()
    try:
        server.wait_healthy()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")  # a process can have one, and a test may want another
def cluster():
    """Ray on this machine."""
    with ray_cluster():
        yield


@pytest.fixture
async def client(server):
    async with EngineClient(server.url, request_timeout_seconds=120) as client:
        yield client
