"""The engine's end of a publish: SGLang's custom weight loader, run inside every tensor-parallel rank.

``--custom-weight-loader megatron_ztrl.engines.weight_receiver.load`` makes the stock server call
``load(model, ...)`` with whatever ``/update_weights_from_tensor`` carried. That is only a message
(``receive_message``, ``commit_message``). The weights themselves arrive over the weight group.

Two calls make a publish. The first receives, and always returns: an engine that did not get everything says
so in its report, and may be told to receive again. The second commits; SGLang takes the new version and forgets
its cache with it. A commit of incomplete weights raises, which ends the engine: it must not sample.
"""

from __future__ import annotations

import base64
import json
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from typing import Any

import torch

from megatron_ztrl.engines.weight_group import Channel, Member, WeightGroup
from megatron_ztrl.engines.weight_stream import Bucket, InFlight, Link, Piece, Staging, dtype_named, schedule

_member: Member | None = None
"""Joined at the first publish and kept: SGLang calls a function, so the state has to live in the module."""
_buckets: list[Bucket] = []
_complete_version: int | None = None
"""The version whose weights this rank holds entirely; None while they are a mixture."""


def receive_message(
    group_name: str,
    publish: int,
    version: int,
    membership: tuple[WeightGroup, int, Sequence[Link]] | None = None,
) -> str:
    """Make the message that lets one engine rank receive.

    Args:
        group_name: the group that the weights come over.
        publish: number of this publish within the group.
        version: of the weights.
        membership: the group, this rank's number in it and all it receives; only the first time.

    Returns:
        What ``serialized_named_tensors`` wants: a base64 pickle of ``(name, tensor)`` pairs. The message is
        the name.
    """
    message: dict[str, Any] = {"group": group_name, "publish": publish, "version": version}
    if membership is not None:
        group, rank, links = membership
        message["join"] = {"group": asdict(group), "rank": rank, "links": [astuple(link) for link in links]}
    return _payload(message)


def commit_message(version: int) -> str:
    """Make the message after which the engine serves what it received."""
    return _payload({"commit": version})


def _payload(message: dict[str, Any]) -> str:
    return base64.b64encode(pickle.dumps([(json.dumps(message), torch.empty(0))])).decode()


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Receive this rank's slices of the new weights into ``model``, or commit them.

    Raises:
        RuntimeError: a commit of weights that are not complete.
    """
    message = json.loads(named_tensors[0][0])
    if "commit" in message:
        if _complete_version != message["commit"]:
            raise RuntimeError(f"weights of version {message['commit']} are not complete on this engine rank")
    else:
        _receive(dict(model.named_parameters()), message)


def _receive(parameters: dict[str, torch.nn.Parameter], message: dict[str, Any]) -> None:
    """Take part in one publish, and leave word of it."""
    global _member, _complete_version
    publish = message["publish"]
    if "join" in message:
        _join(message["join"])
    member = _member
    if member is None or member.group.name != message["group"]:
        return  # without a report, the driver knows
    report: dict[str, Any] = {"begun": False, "complete": False, "received_bytes": 0}

    def parameter(name: str) -> torch.Tensor:
        return parameters[name].data

    try:
        _check(member, publish, parameters)
        member.gate(member.group.gate(publish))
        report["begun"], _complete_version = True, None
        started = time.perf_counter()
        with member.transfer(publish) as channel:
            wrong = _stream(channel, member.group, parameter)
        report["stream_seconds"] = time.perf_counter() - started
        report["received_bytes"] = sum(bucket.payload_bytes for bucket in _buckets)
        if wrong:
            raise ValueError("; ".join(wrong))
        report["complete"], _complete_version = True, message["version"]
    except (RuntimeError, ValueError) as error:
        report["error"] = f"engine rank {member.rank}: {error}"
        _member = None
    member.report(publish, report)


def _join(spec: dict[str, Any]) -> None:
    global _member, _buckets
    _member = None  # an earlier group is left
    group = WeightGroup(**spec["group"])
    links = [
        Link(
            order,
            peer,
            forward_to,
            tuple(
                Piece(tensor, param, dim, start, tuple(shape), dtype)
                for tensor, param, dim, start, shape, dtype in pieces
            ),
        )
        for order, peer, forward_to, pieces in spec["links"]
    ]
    _buckets = schedule(links, group.bucket_bytes)
    try:
        _member = Member(group, spec["rank"])
    except RuntimeError as error:  # without a group, and a report, this rank keeps what it has
        logging.getLogger(__name__).warning("%s", error)


def _check(member: Member, publish: int, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Refuse what does not fit, before anything is written.

    Raises:
        ValueError: a parameter is missing, or has another shape or dtype than planned.
    """
    try:
        for piece in {block.piece: None for bucket in _buckets for block in bucket.blocks}:
            parameter = parameters.get(piece.param)
            if parameter is None:
                raise ValueError(f"{piece.tensor}: the engine has no parameter {piece.param}")
            if parameter.dtype != dtype_named(piece.dtype):
                raise ValueError(
                    f"engine parameter {piece.param} is {parameter.dtype}, the weights come as torch.{piece.dtype}"
                    + _rearranged(piece)
                )
            piece.of(parameter)
    except ValueError as error:
        member.refuse(publish, f"engine rank {member.rank}: {error}")
        raise


def _rearranged(piece: Piece) -> str:
    if piece.dtype != "float8_e4m3fn" and not piece.param.endswith("_scale_inv"):
        return ""
    return "; SGLang rearranges FP8 weights for the kernels of GPUs other than Hopper's: leave out engine.path there"


@torch.no_grad()
def _stream(channel: Channel, group: WeightGroup, parameter: Callable[[str], torch.Tensor]) -> list[str]:
    """Receive, send on and write all buckets. Returns what has a wrong checksum."""
    if not _buckets:
        return []
    device = parameter(_buckets[0].blocks[0].piece.param).device
    staging = Staging(group, _buckets, device, parameter)
    differs: list[tuple[Bucket, torch.Tensor | None]] = []

    def finish(index: int, bucket: Bucket, arrival: InFlight) -> None:
        arrival.wait()
        onward = bucket.link.forward_to
        forward = None
        if onward is not None:
            forward = InFlight(channel.send, group, onward, bucket, staging.receive(index, bucket))
        differs.append((bucket, staging.write(index, bucket)))
        if forward is not None:
            forward.wait()

    in_flight: list[tuple[int, Bucket, InFlight]] = []
    for index, bucket in enumerate(_buckets):
        if len(in_flight) == 2:
            finish(*in_flight.pop(0))
        messages = staging.receive(index, bucket)
        in_flight.append((index, bucket, InFlight(channel.recv, group, bucket.link.peer, bucket, messages)))
    for received in in_flight:
        finish(*received)
    if device.type == "cuda":
        torch.cuda.synchronize()  # the next forward pass may run on another stream
    return [
        f"{block.piece.tensor} rows {block.row}..{block.row + block.rows - 1} of the part in {block.piece.param},"
        f" from rank {bucket.link.peer}, have another checksum than was sent"
        for bucket, flags in differs
        if flags is not None and bool(flags.any())
        for block, flag in zip(bucket.blocks, flags.tolist(), strict=True)
        if flag
    ]
