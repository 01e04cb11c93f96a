"""The GPUs that a world's ranks ask Ray for. They are names here: nothing computes on them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray
from ray.util import placement_group_table

from megatron_ztrl.config.schema import (
    ActorConfig,
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.runtime.megatron_world import MegatronWorld

GPUS = 2


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name, value)  # as a run does: no token in the home directory
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray has no more GPUs than are visible
    directory = tempfile.mkdtemp(prefix="ztrl-")  # sockets in it want a short path
    ray.init(
        address="local",
        num_gpus=GPUS,
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        _node_ip_address="127.0.0.1",
        _temp_dir=directory,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def world() -> MegatronWorld:
    config = Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path="unused"),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        actor=ActorConfig(tensor_parallel_size=GPUS),
    )
    return MegatronWorld(config, "actor")


def gpus_of(process: object) -> list[int]:
    return ray.get_gpu_ids()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tensor_parallel_group_is_one_bundle_which_ray_never_splits_over_nodes(two_gpus: None) -> None:
    made = world()
    gpus = ray.get([rank.__ray_call__.remote(gpus_of) for rank in made._ranks], timeout=150)
    assert sorted(gpu for (gpu,) in gpus) == [0, 1]  # one each
    table = placement_group_table(made._gpus)
    assert table["strategy"] == "PACK"
    assert list(table["bundles"].values()) == [{"GPU": 2.0}]
    made.kill()
    assert ray.get(ray.remote(num_cpus=0, num_gpus=GPUS)(lambda: "free").remote(), timeout=60) == "free"
