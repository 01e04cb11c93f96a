"""The engine's end of a publish: SGLang's custom weight loader, run inside every tensor-parallel rank.

``--custom-weight-loader megatron_ztrl.engines.weight_receiver.load`` makes the stock server call
``load(model, ...)`` with whatever ``/update_weights_from_tensor`` carried. That is only a message
(``payload``): which group to join and, the first time, which slices come from which trainer rank. The
weights themselves arrive over the group, straight from the ranks that hold them.

An error here ends the engine, on purpose: its parameters may be half old, half new.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class _Membership:
    group: WeightGroup
    channel: Channel
    pieces: dict[int, list[Piece]]
    """Source rank to what it sends, in the order of sending."""


_membership: _Membership | None = None
"""Joined at the first publish and kept: SGLang calls a function, so the state has to live in the module."""


def payload(group_name: str, membership: tuple[WeightGroup, int, Sequence[Piece]] | None = None) -> str:
    """Make the message for one engine rank.

    Args:
        group_name: the group that the weights come over.
        membership: the group, this rank's number in it and all it receives; only the first time.

    Returns:
        What ``serialized_named_tensors`` wants: a base64 pickle of ``(name, tensor)`` pairs. The message is
        the name.
    """
    message: dict[str, Any] = {"group": group_name}
    if membership is not None:
        group, rank, pieces = membership
        pieces_json = [[p.peer, p.param, p.dim, p.start, p.length] for p in pieces]
        message["join"] = {"group": asdict(group), "rank": rank, "pieces": pieces_json}
    return base64.b64encode(pickle.dumps([(json.dumps(message), torch.empty(0))])).decode()


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Receive this rank's slices of the new weights into ``model``.

    Raises:
        RuntimeError: the group did not come together, or a sender fell silent, within the group's time-out.
    """
    global _membership
    message = json.loads(named_tensors[0][0])
    if "join" in message:
        _membership = _join(message["join"])
    if _membership is None or _membership.group.name != message["group"]:
        raise RuntimeError(
            f"this engine rank is not in weight group {message['group']}: it was started after it"
        )
    _receive(model, _membership)


def _join(spec: dict[str, Any]) -> _Membership:
    group = WeightGroup(**spec["group"])
    pieces: dict[int, list[Piece]] = {}
    for fields in spec["pieces"]:
        piece = Piece(*fields)
        pieces.setdefault(piece.peer, []).append(piece)
    order = peer_order(spec["rank"], list(pieces))
    return _Membership(group, join(group, spec["rank"]), {peer: pieces[peer] for peer in order})


def _receive(model: torch.nn.Module, membership: _Membership) -> None:
    parameters = dict(model.named_parameters())
    dtype = getattr(torch, membership.group.dtype)

    def parameter(name: str) -> torch.Tensor:
        tensor = parameters[name].data
        if tensor.dtype != dtype:
            raise RuntimeError(f"engine parameter {name} is {tensor.dtype}, the weights come as {dtype}")
        return tensor

    rounds = {
        source: buckets(pieces, parameter, dtype, BUCKET_BYTES)
        for source, pieces in membership.pieces.items()
    }
    while rounds:
        pending: list[tuple[int, dist.Work, torch.Tensor, list[torch.Tensor]]] = []
        for source in list(rounds):
            views = next(rounds[source], None)
            if views is None:
                del rounds[source]
                continue
            staging = torch.empty(sum(view.numel() for view in views), dtype=dtype, device=views[0].device)
            pending.append((source, membership.channel.recv([staging], source, 0), staging, views))
        for source, work, staging, views in pending:
            _wait(work, membership.group, source)
            for view, part in zip(views, staging.split([view.numel() for view in views]), strict=True):
                view.copy_(part.view(view.shape))
    if membership.group.backend == "nccl":
        torch.cuda.synchronize()  # the next forward pass may run on another stream


def _wait(work: dist.Work, group: WeightGroup, source: int) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"weight group {group.name}: nothing from trainer rank {source}"
            f" within {group.timeout_seconds:.0f} s: {error}"
        ) from error
