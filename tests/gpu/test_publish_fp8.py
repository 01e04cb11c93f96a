"""Engines in block-wise FP8 serve what is published to them, as if they had loaded it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import QUICKSTART, VOCAB_SIZE, save_policy

from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.engines.weight_group import WeightGroup
from megatron_ztrl.engines.weight_stream import Link
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.fp8_checkpoint import hf_to_fp8
from megatron_ztrl.weights.publish import WeightPublisher
from megatron_ztrl.weights.sender import SendReport, WeightSender
from megatron_ztrl.weights.verify import canary_tokens, find_invalid

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
DEVICE = "cuda"
SHAPES = {"num_attention_heads": 4, "intermediate_size": 1536}
"""Heads of 128; tensor parallelism 1 and 2 cut no block of 128 x 128."""


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random policies."""
    directory = tmp_path_factory.mktemp("policies")
    for seed in range(2):
        save_policy(directory / f"{seed}", seed=seed, **SHAPES)
    return [directory / "0", directory / "1"]


class HFRank:
    """An ``ActorWorld`` of one rank in this process, which holds Hugging Face's tensors as they are."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._sender = WeightSender(self._tensors.__getitem__, 0)
        self.model: Any = None

    def hold(self, policy: Path) -> None:
        from transformers import Qwen2ForCausalLM

        self.model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).to(DEVICE)
        self._tensors.update(self.model.state_dict())

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        return [self._slices()]

    def _slices(self) -> list[TensorSlice]:
        return [
            TensorSlice(
                param=name,
                tensor=name,
                dim=int(name.endswith(("o_proj.weight", "down_proj.weight"))),  # as the engine cuts it
                start=0,
                tensor_start=0,
                length=tensor.shape[int(name.endswith(("o_proj.weight", "down_proj.weight")))],
            )
            for name, tensor in self._tensors.items()
        ]

    async def join_weight_group(self, group: WeightGroup, links: Sequence[Sequence[Link]]) -> None:
        await asyncio.to_thread(self._sender.join, group, links[0])

    async def send_weights(self, publish: int) -> list[SendReport]:
        return [await asyncio.to_thread(self._sender.send, publish)]

    async def invalid_weights(self) -> list[str | None]:
        self._sender.prepare()
        return [find_invalid(self._slices(), self._tensors.__getitem__, 0)]

    async def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        ids = torch.tensor(token_ids, device=DEVICE)
        with torch.no_grad():
            logp = self.model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        return logp.gather(-1, ids[1:, None])[:, 0].tolist()


@pytest.fixture
async def engine(policies: list[Path], tmp_path: Path) -> AsyncIterator[tuple[Config, EngineClient]]:
    """A server on the first GPU, which starts with the first policy in FP8."""
    hf_to_fp8(policies[0], tmp_path / "fp8")
    config = Config(
        run=RunConfig(directory=str(tmp_path / "run")),
        model=ModelConfig(path=str(policies[0])),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        engine=EngineConfig(path=str(tmp_path / "fp8"), max_running_requests=8),
    )
    server = EngineServer(config, log_path=tmp_path / "engine.log")
    server.start()
    try:
        await asyncio.to_thread(server.wait_healthy)
        async with EngineClient(server.url, request_timeout_seconds=300) as client:
            yield config, client
    finally:
        server.stop()


async def test_published_weights_give_the_logprobs_of_loaded_ones(
    policies: list[Path], engine: tuple[Config, EngineClient]
) -> None:
    """On one GPU: the weights travel over gloo. If SGLang laid out what it loads in another way, it would show."""
    config, client = engine
    canary = canary_tokens(VOCAB_SIZE)
    loaded = await client.prompt_logprobs(canary)
    actor = HFRank()
    publisher = WeightPublisher(config, actor, [client], backend="gloo")  # type: ignore[arg-type]
    gaps = []
    for version, policy in ((1, policies[1]), (2, policies[0])):
        actor.hold(policy)
        report = await publisher.publish(version)
        trainer, served = await actor.canary_logprobs(canary), await client.prompt_logprobs(canary)
        assert report.max_logprob_gap is not None
        gaps.append(sum(abs(a - b) for a, b in zip(trainer, served, strict=True)) / len(served))
        print(f"version {version}: mean gap {gaps[-1]:.3f} nats, largest {report.max_logprob_gap:.3f}")
        if version == 1:
            assert max(abs(a - b) for a, b in zip(served, loaded, strict=True)) > 1  # it is another policy
    await publisher.close()
    assert served == pytest.approx(loaded, abs=0.01)
    assert max(gaps) < 0.3  # the emulation on CPUs has 0.1 (docs/gpu_checks.md)
    (received,) = report.received_bytes[client.url]
    linear = sum(p.numel() for name, p in actor.model.named_parameters() if name.endswith("_proj.weight"))
    rest = sum(p.numel() for p in actor.model.parameters()) - linear
    assert received == linear + 4 * linear // 128**2 + 2 * rest


@pytest.mark.parametrize("size", [1, 2], ids=["TP 1", "TP 2"])
def test_a_run_trains_with_engines_in_fp8(policies: list[Path], tmp_path: Path, size: int) -> None:
    """Two steps and three publishes over NCCL, each of which compares a canary's log-probs."""
    if torch.cuda.device_count() < 2 * size:
        pytest.skip(f"needs {2 * size} GPUs: NCCL wants actor and engine on different ones")
    hf_to_fp8(policies[0], tmp_path / "fp8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_ztrl.cli", "train", str(QUICKSTART / "config.yaml")),
            f"run.directory={tmp_path / 'run'}",
            f"model.path={policies[0]}",
            "model.dtype=bfloat16",
            f"engine.path={tmp_path / 'fp8'}",
            f"engine.tensor_parallel_size={size}",
            f"actor.tensor_parallel_size={size}",
            f"actor.sequence_parallel={'true' if size > 1 else 'false'}",
            "train.num_steps=2",
            "rollout.groups_per_step=4",
            "eval.interval_steps=0",
            "logging.tensorboard=false",
        ],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    assert len(steps) == 2
    print({key: value for key, value in steps[-1].items() if key.startswith("mismatch/")})
    assert all(row["mismatch/gap_mean"] < 0.3 for row in steps)
