"""A trainer that only sends: versions of a policy that anybody can make again from their number."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from megatron_ztrl.engines.weight_group import WeightGroup
from megatron_ztrl.engines.weight_stream import Link
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.sender import SendReport, WeightSender
from megatron_ztrl.weights.verify import find_invalid

RANKS = 2
SPLIT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


class Policies:
    """Version ``v``: every weight of the base times ``1 + noise * z``, with z from N(0, 1) and the seed ``v``.

    Args:
        base: Hugging Face's implementation, float32; it is used to compute with, too.
        noise: Relative.
    """

    def __init__(self, base: PreTrainedModel, noise: float) -> None:
        self._model = base
        self._noise = noise
        tied = {"lm_head.weight"} if base.config.tie_word_embeddings else set()
        self._base = {name: t.clone() for name, t in base.state_dict().items() if name not in tied}
        self._loaded: int | None = None

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """By Hugging Face name."""
        generator = torch.Generator().manual_seed(version)
        return {
            name: tensor * (1 + self._noise * torch.randn(tensor.shape, generator=generator))
            for name, tensor in self._base.items()
        }

    @torch.no_grad()
    def model(self, version: int) -> PreTrainedModel:
        """The model with these weights, until the next call."""
        if self._loaded != version:
            for name, tensor in self.weights(version).items():
                self._model.get_parameter(name).copy_(tensor)
            self._loaded = version
        return self._model


class SendingTrainer:
    """An ``ActorWorld`` whose ranks hold half of each matrix, as tensor parallelism cuts it, and really send it.

    The ranks are threads: sending is all they do.
    """

    def __init__(self, policies: Policies) -> None:
        self._policies = policies
        self._version: int | None = None
        self._held: list[dict[str, torch.Tensor]] = [{} for _ in range(RANKS)]
        self._slices: list[list[TensorSlice]] = []
        self._senders = [WeightSender(held.__getitem__, rank) for rank, held in enumerate(self._held)]

    async def hold(self, version: int) -> None:
        """Take this version's weights, as an optimizer step would leave them."""
        weights = await asyncio.to_thread(self._policies.weights, version)
        self._slices = [[_slice(name, t, rank) for name, t in weights.items()] for rank in range(RANKS)]
        for held, slices in zip(self._held, self._slices, strict=True):
            for s in slices:
                held[s.param] = weights[s.tensor].narrow(s.dim, s.tensor_start, s.length).contiguous()
        self._version = version

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        return self._slices

    async def join_weight_group(self, group: WeightGroup, links: Sequence[Sequence[Link]]) -> None:
        calls = zip(self._senders, links, strict=True)
        await asyncio.gather(*(asyncio.to_thread(sender.join, group, mine) for sender, mine in calls))

    async def send_weights(self, publish: int) -> list[SendReport]:
        return await asyncio.gather(*(asyncio.to_thread(s.send, publish) for s in self._senders))

    async def invalid_weights(self) -> list[str | None]:
        for sender in self._senders:
            sender.prepare()
        ranks = enumerate(zip(self._slices, self._held, strict=True))
        return [find_invalid(slices, held.__getitem__, rank) for rank, (slices, held) in ranks]

    async def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        assert self._version is not None
        with torch.no_grad():
            logits = self._policies.model(self._version)(torch.tensor([list(token_ids)])).logits[0]
        return logits[:-1].log_softmax(-1).gather(1, torch.tensor(token_ids)[1:, None])[:, 0].tolist()


def _slice(name: str, tensor: torch.Tensor, rank: int) -> TensorSlice:
    if name.endswith("norm.weight"):
        return TensorSlice(param=name, tensor=name, dim=0, start=0, tensor_start=0, length=len(tensor))
    dim = 1 if name.endswith(SPLIT_BY_COLUMNS) else 0
    length = tensor.shape[dim] // RANKS
    return TensorSlice(param=name, tensor=name, dim=dim, start=0, tensor_start=rank * length, length=length)
