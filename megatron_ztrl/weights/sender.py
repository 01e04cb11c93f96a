"""The trainer ranks' end of a publish: each sends its slices straight to the engine ranks that need them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ztrl.engines.weight_group import Channel, Member, Refused, WeightGroup
from megatron_ztrl.engines.weight_stream import Bucket, Link, Staging, schedule, wait


@dataclass(frozen=True, kw_only=True, slots=True)
class SendReport:
    """What one rank sent."""

    sent_bytes: int
    broken: str | None = None
    """Why it did not send everything: a peer failed, or somebody refused to begin."""
    invalid: str | None = None
    """Why this rank refused to begin."""


class WeightSender:
    """One trainer rank's end."""

    def __init__(self, parameter: Callable[[str], torch.Tensor], rank: int) -> None:
        """Wrap a rank's parameters.

        Args:
            parameter: returns the local parameter of a ``TensorSlice.param``.
            rank: global rank of this process in the trainer.
        """
        self._parameter = parameter
        self._rank = rank
        self._member: Member | None = None
        self._buckets: list[Bucket] = []

    def join(self, group: WeightGroup, links: Sequence[Link]) -> None:
        """Enter the group and remember what this rank sends; an earlier group is left.

        Raises:
            ValueError: a bucket is too small.
            RuntimeError: not everybody came within the time-out.
        """
        self._member = None
        self._buckets = schedule(links, getattr(torch, group.dtype), group.bucket_bytes)
        with contextlib.suppress(Refused):  # ``send`` will say that there is no group
            self._member = Member(group, self._rank)

    @torch.no_grad()
    def send(self, publish: int) -> SendReport:
        """Send everything, in buckets: one is filled while the one before it travels.

        Args:
            publish: number of this publish within the group.
        """
        member = self._member
        if member is None:
            return SendReport(sent_bytes=0, broken=f"trainer rank {self._rank} is in no weight group")
        try:
            self._check()
        except ValueError as error:
            member.refuse(publish, str(error))
            return SendReport(sent_bytes=0, invalid=str(error))
        try:
            member.gate(member.group.gate(publish))
            with member.transfer(publish) as channel:
                return SendReport(sent_bytes=self._send(channel, member.group))
        except RuntimeError as error:  # Refused among them
            self._member = None
            return SendReport(sent_bytes=0, broken=f"trainer rank {self._rank}: {error}")

    def _send(self, channel: Channel, group: WeightGroup) -> int:
        if not self._buckets:
            return 0
        staging = Staging(group, self._buckets, self._device())
        in_flight: list[tuple[dist.Work, Bucket]] = []
        for index, bucket in enumerate(self._buckets):
            if len(in_flight) == 2:
                work, sent = in_flight.pop(0)
                wait(work, group, sent.link.peer, sent)
            buffer = staging.buffer(index, bucket)
            staging.fill(buffer, bucket, self._parameter)
            in_flight.append((channel.send([buffer], bucket.link.peer, bucket.number), bucket))
        for work, bucket in in_flight:
            wait(work, group, bucket.link.peer, bucket)
        if self._device().type == "cuda":
            torch.cuda.synchronize()  # the buffers may go only when they have been read
        return sum(bucket.payload_bytes for bucket in self._buckets)

    def _device(self) -> torch.device:
        return self._parameter(self._buckets[0].blocks[0].piece.param).device

    def _check(self) -> None:
        """Refuse weights that must not reach an engine.

        Raises:
            ValueError: names the tensor and this rank.
        """
        pieces = {piece: None for bucket in self._buckets for piece in (b.piece for b in bucket.blocks)}
        if not pieces:
            return
        views = [piece.of(self._parameter(piece.param)) for piece in pieces]
        # One pass and no memory: a sum is finite only if all its terms are.
        sums = torch.stack([view.sum(dtype=torch.float32) for view in views])
        for piece, view, suspicious in zip(pieces, views, (~sums.isfinite()).tolist(), strict=True):
            if suspicious and not view.isfinite().all():  # finite terms may add up to more than float32 holds
                count = int((~view.isfinite()).sum())
                raise ValueError(
                    f"{piece.tensor}: {count} of {view.numel()} values on trainer rank {self._rank} are not finite"
                )
