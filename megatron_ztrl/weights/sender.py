"""The trainer ranks' end of a publish: each sends its slices straight to the engine ranks that need them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_ztrl.engines.weight_group import Channel, Member, Refused, WeightGroup
from megatron_ztrl.engines.weight_stream import Bucket, InFlight, Link, Staging, checksums, schedule
from megatron_ztrl.weights.fp8_blocks import QuantisingSource


@dataclass(frozen=True, kw_only=True, slots=True)
class SendReport:
    """What one rank sent."""

    sent_bytes: int
    broken: str | None = None
    """Why it did not send everything: a peer failed, or somebody refused to begin."""


class TrainerEnd:
    """One trainer rank's end of a transport."""

    def __init__(self, parameter: Callable[[str], torch.Tensor], rank: int) -> None:
        """Wrap a rank's parameters.

        Args:
            parameter: returns the local parameter of a ``TensorSlice.param``.
            rank: global rank of this process in the trainer.
        """
        self._parameter = parameter
        self._rank = rank


class WeightSender(TrainerEnd):
    """One trainer rank's end of ``ShardTransport``."""

    def __init__(self, parameter: Callable[[str], torch.Tensor], rank: int) -> None:
        """See ``TrainerEnd``."""
        super().__init__(parameter, rank)
        self._member: Member | None = None
        self._buckets: Sequence[Bucket] = ()
        self._sums: Sequence[torch.Tensor | None] = ()
        """Checksums by bucket, where they have been taken."""
        self._source = QuantisingSource(parameter)

    def join(self, group: WeightGroup, links: Sequence[Link]) -> None:
        """Enter the group and remember what this rank sends; an earlier group is left.

        Raises:
            ValueError: a bucket is too small, or a parameter is not what was planned.
            RuntimeError: not everybody came within the time-out.
        """
        self._member = None
        self._buckets = schedule(links, group.bucket_bytes)
        self._sums = [None] * len(self._buckets)
        for piece in (piece for link in links for piece in link.pieces):
            piece.of(self._source.parameter(piece.param))
        self._source.forget()
        with contextlib.suppress(Refused):  # ``send`` will say that there is no group
            self._member = Member(group, self._rank)

    @torch.no_grad()
    def prepare(self) -> None:
        """Take the checksums, and the scales, of what ``send`` sends next, while the engines stop.

        It may be left out, and the weights must not change in between. Does nothing outside a group.
        """
        self._source.forget()
        if self._member is not None and self._member.group.checksums:
            source = self._source
            self._sums = [checksums(bucket, source.parameter, source.convert) for bucket in self._buckets]

    @torch.no_grad()
    def send(self, publish: int) -> SendReport:
        """Send everything, in buckets: one is filled while the one before it travels.

        Args:
            publish: number of this publish within the group.
        """
        member = self._member
        sums, self._sums = self._sums, [None] * len(self._buckets)
        if member is None:
            return SendReport(sent_bytes=0, broken=f"trainer rank {self._rank} is in no weight group")
        try:
            member.gate(member.group.gate(publish))
            with member.transfer(publish) as channel:
                return SendReport(sent_bytes=self._send(channel, member.group, sums))
        except RuntimeError as error:  # Refused among them
            self._member = None
            return SendReport(sent_bytes=0, broken=f"trainer rank {self._rank}: {error}")
        finally:
            self._source.forget()

    def _send(self, channel: Channel, group: WeightGroup, sums: Sequence[torch.Tensor | None]) -> int:
        if not self._buckets:
            return 0
        staging = Staging(group, self._buckets, self._device(), self._source.parameter, self._source.convert)
        in_flight: list[InFlight] = []
        for index, (bucket, taken) in enumerate(zip(self._buckets, sums, strict=True)):
            if len(in_flight) == 2:
                in_flight.pop(0).wait()
            messages = staging.fill(index, bucket, taken)
            in_flight.append(InFlight(channel.send, group, bucket.link.peer, bucket, messages))
        for transfer in in_flight:
            transfer.wait()
        if self._device().type == "cuda":
            torch.cuda.synchronize()  # the buffers may go only when they have been read
        return sum(bucket.payload_bytes for bucket in self._buckets)

    def _device(self) -> torch.device:
        return self._source.parameter(self._buckets[0].blocks[0].piece.param).device
