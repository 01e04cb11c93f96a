"""Trainer ranks for the tests: processes that each hold half of a Hugging Face model,
as tensor parallelism cuts it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import tempfile
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_ztrl.engines.weight_stream import Staging
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.broadcaster import WeightBroadcaster
from megatron_ztrl.weights.sender import WeightSender
from megatron_ztrl.weights.verify import find_invalid

if TYPE_CHECKING:  # the ranks would wait for it
    from transformers import Qwen2ForCausalLM

SIZE = 2
COLUMNS = ("o_proj.weight", "down_proj.weight")


def half_of(name, tensor, rank):
    """(description, local tensor) of what ``rank`` holds of one tensor."""
    if name.endswith("norm.weight"):
        return TensorSlice(
            param=name, tensor=name, dim=0, start=0, tensor_start=0, length=len(tensor)
        ), tensor
    dim = 1 if name.endswith(COLUMNS) else 0
    length = tensor.shape[dim] // SIZE
    description = TensorSlice(
        param=name, tensor=name, dim=dim, start=0, tensor_start=rank * length, length=length
    )
    return description, tensor.narrow(dim, rank * length, length).contiguous()


def stop_before(bucket):
    """Let this process stand still before it fills its ``bucket``-th bucket, until somebody continues it."""
    fill, left = Staging.fill, [bucket]

    def stop_and_fill(*arguments):
        if left[0] == 0:
            Staging.fill = fill
            os.kill(os.getpid(), signal.SIGSTOP)
        left[0] -= 1
        return fill(*arguments)

    Staging.fill = stop_and_fill


def run_rank(rank, pipe):
    """Obey (command, *arguments) until None; answers are (ok, result)."""
    torch.set_num_threads(1)
    parameters, slices = {}, []
    sender = WeightSender(parameters.__getitem__, rank)
    broadcaster = WeightBroadcaster(parameters.__getitem__, rank)
    while (message := pipe.recv()) is not None:
        command, *arguments = message
        try:
            if command == "hold":
                parameters.update(arguments[0])
                slices = arguments[1]
                result = None
            elif command == "join":
                result = sender.join(*arguments)
            elif command == "send":
                result = sender.send(*arguments)
            elif command == "join broadcast":
                if not dist.is_initialized():  # what Megatron's ranks have
                    dist.init_process_group("gloo", init_method=arguments[1], rank=rank, world_size=SIZE)
                result = broadcaster.join(arguments[0])
            elif command == "broadcast":
                result = broadcaster.send(*arguments)
            elif command == "invalid":
                sender.prepare()
                result = find_invalid(slices, parameters.__getitem__, rank)
            elif command == "stop before":
                result = stop_before(*arguments)
            pipe.send((True, result))
        except RuntimeError as error:
            pipe.send((False, str(error)))


class TensorParallelWorld:
    """An ``ActorWorld`` of two sending processes; the log-probs are Hugging Face's."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.model = None
        self.joins = 0
        self._slices = []
        self._pipes = []
        self._processes = []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(rank, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    async def hold(self, model: Qwen2ForCausalLM):
        """Take new weights, as an optimizer step would leave them."""
        self.model = model
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        halves = [
            {name: half_of(name, tensor, rank) for name, tensor in weights.items()} for rank in range(SIZE)
        ]
        self._slices = [[description for description, _ in half.values()] for half in halves]
        await self._call(
            [
                ("hold", {name: tensor for name, (_, tensor) in half.items()}, slices)
                for half, slices in zip(halves, self._slices, strict=True)
            ]
        )

    async def parameter_slices(self):
        return self._slices

    async def join_weight_group(self, group, links):
        self.joins += 1
        await self._call([("join", group, mine) for mine in links])

    async def send_weights(self, publish):
        return await self._call([("send", publish)] * SIZE)

    async def invalid_weights(self):
        return await self._call([("invalid",)] * SIZE)

    async def join_broadcast_group(self, group):
        with tempfile.TemporaryDirectory() as directory:
            await self._call([("join broadcast", group, f"file://{directory}/meet")] * SIZE)

    async def broadcast_weights(self, buckets):
        return await self._call([("broadcast", buckets)] * SIZE)

    async def export_hf(self, directory):
        self.model.save_pretrained(directory)

    async def stop_before(self, bucket):
        """Let all ranks stand still in the middle of the next publish."""
        await self._call([("stop before", bucket)] * SIZE)

    async def until_stopped(self):
        for process in self._processes:
            await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self):
        for process in self._processes:
            os.kill(process.pid, signal.SIGCONT)

    async def canary_logprobs(self, token_ids):
        with torch.no_grad():
            logprobs = self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        return [logprobs[i, token].item() for i, token in enumerate(token_ids[1:])]

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()

    async def _call(self, messages):
        def exchange(pipe, message):
            pipe.send(message)
            return pipe.recv()

        answers = await asyncio.gather(
            *(
                asyncio.to_thread(exchange, pipe, message)
                for pipe, message in zip(self._pipes, messages, strict=True)
            )
        )
        for ok, result in answers:
            if not ok:
                raise RuntimeError(result)
        return [result for _, result in answers]
