"""The configuration of an engine that a test starts. Not in a conftest: there are several, and one name."""

from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)


def engine_config(directory, **engine):
    return Config(
        run=RunConfig(directory=str(directory)),
        model=ModelConfig(path=str(directory / "model"), dtype="float32"),
        data=DataConfig(train=DatasetConfig(name="none", path="none")),
        train=TrainConfig(num_steps=1),
        engine=EngineConfig(max_running_requests=32, startup_timeout_seconds=300, **engine),
    )
