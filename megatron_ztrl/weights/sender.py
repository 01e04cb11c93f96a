"""The trainer ranks' end of a publish: each sends its slices straight to the engine ranks that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_ztrl.engines.weight_group import (
    BUCKET_BYTES,
    Channel,
    Piece,
    WeightGroup,
    buckets,
    join,
    peer_order,
)
from megatron_ztrl.weights.reshard import Transfer


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
        self._group: WeightGroup | None = None
        self._channel: Channel | None = None
        self._pieces: dict[int, list[Piece]] = {}

    def join(self, group: WeightGroup, transfers: Sequence[Transfer], num_senders: int) -> None:
        """Enter the group and remember what this rank sends; an earlier group is left.

        Raises:
            RuntimeError: not everybody came within the time-out.
        """
        self._pieces = {}
        for item in transfers:
            if item.source == self._rank:
                peer = num_senders + item.target
                piece = Piece(peer, item.source_param, item.dim, item.source_start, item.length)
                self._pieces.setdefault(peer, []).append(piece)
        self._channel = join(group, self._rank)
        self._group = group

    def send(self) -> int:
        """Send everything, to all peers at once, bucket by bucket; returns the bytes sent.

        Raises:
            RuntimeError: an engine rank did not take its slices within the time-out.
        """
        assert self._channel is not None and self._group is not None, "join() first"
        dtype = getattr(torch, self._group.dtype)
        rounds = {
            peer: buckets(self._pieces[peer], self._parameter, dtype, BUCKET_BYTES)
            for peer in peer_order(self._rank, list(self._pieces))
        }
        sent_bytes = 0
        while rounds:
            pending: list[tuple[int, dist.Work, torch.Tensor]] = []  # the tensor must outlive the transfer
            for peer in list(rounds):
                views = next(rounds[peer], None)
                if views is None:
                    del rounds[peer]
                    continue
                staging = torch.cat([view.detach().reshape(-1).to(dtype) for view in views])
                pending.append((peer, self._channel.send([staging], peer, 0), staging))
                sent_bytes += staging.numel() * staging.element_size()
            for peer, work, _ in pending:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"weight group {self._group.name}: engine rank {peer} did not take its weights within"
                        f" {self._group.timeout_seconds:.0f} s: {error}"
                    ) from error
        return sent_bytes
