"""Both ends of a publish without trainer and server: processes with the real sender, and with the real loader."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_ztrl.engines import weight_receiver
from megatron_ztrl.engines.client import EngineError
from megatron_ztrl.engines.weight_group import Member
from megatron_ztrl.engines.weight_stream import Staging
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.sender import WeightSender

SHAPES = {f"w{index}": (512, 1024) for index in range(8)}
HALVES = 2
"""Trainer ranks, and engine ranks, that hold one copy."""
MODEL_ELEMENTS = 8 * 512 * 1024


def half(rank):
    """What rank ``rank`` of two holds: rows of the even tensors, columns of the odd ones."""
    return [
        TensorSlice(
            param=f"part.{name}",
            tensor=name,
            dim=index % 2,
            start=0,
            tensor_start=rank * shape[index % 2] // 2,
            length=shape[index % 2] // 2,
        )
        for index, (name, shape) in enumerate(SHAPES.items())
    ]


def tensors(seed):
    """The whole weights of one version."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(weights, rank):
    """A rank's parameters."""
    return {
        item.param: weights[item.tensor].narrow(item.dim, item.tensor_start, item.length).contiguous()
        for item in half(rank)
    }


class Model:
    """As much of an engine's model as the loader looks at."""

    def __init__(self, rank):
        self.parameters = cut(tensors(0), rank)

    def named_parameters(self):
        return self.parameters.items()

    def scatter(self):
        """Let every parameter lie in many pieces."""
        for name, parameter in self.parameters.items():
            wider = torch.zeros(len(parameter), parameter.shape[1] + 2)
            self.parameters[name] = wider[:, 1:-1].copy_(parameter)


def die_after(buckets):
    """Let this process be killed once it has written so many buckets."""
    write, left = Staging.write, [buckets]

    def write_and_die(*arguments):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return write(*arguments)

    Staging.write = write_and_die


def die_while_connecting():
    """Let this process be killed when all members have come, and begin to connect to each other."""
    Member._connect = lambda member: os.kill(os.getpid(), signal.SIGKILL)


def fail_to_connect():
    """Let this process find no way to the others."""

    def fail(member, store):
        raise RuntimeError("no route to host")

    Member._connect_gloo = fail


def flip_a_bit(bucket_number):
    """Let one bucket be damaged between the sender's checksum and the network; once."""
    fill = Staging.fill

    def fill_and_flip(self, index, bucket, sums):
        messages = fill(self, index, bucket, sums)
        if bucket.number == bucket_number:
            messages[0] = messages[0].clone()  # it may be the parameter itself
            messages[0].view(torch.uint8).flatten()[100] ^= 1
            Staging.fill = fill
        return messages

    Staging.fill = fill_and_flip


def run_engine_rank(rank, pipe):
    """Obey until the pipe closes."""
    torch.set_num_threads(1)
    model = Model(rank)
    commands = {
        "load": lambda payload: weight_receiver.load(model, weight_receiver_input(payload)),
        "parameters": lambda: model.parameters,
        "forget": lambda name: model.parameters.pop(name),
        "scatter": model.scatter,
        "die after": die_after,
        "die while connecting": die_while_connecting,
        "fail to connect": fail_to_connect,
        "reset peak": reset_peak,
        "peak": peak,
    }
    obey(pipe, commands)


def run_sender(rank, pipe):
    torch.set_num_threads(1)
    parameters = {}
    sender = WeightSender(parameters.__getitem__, rank)
    commands = {
        "hold": parameters.update,
        "join": sender.join,
        "prepare": sender.prepare,
        "send": sender.send,
        "flip a bit": flip_a_bit,
        "reset peak": reset_peak,
        "peak": peak,
    }
    obey(pipe, commands)


def reset_peak():
    """Let the kernel count this process's peak of memory from now."""
    Path("/proc/self/clear_refs").write_text("5")
    reset_peak.before = memory("VmRSS")


def peak():
    """Bytes that this process has had since ``reset_peak``, beyond what it had then."""
    return memory("VmHWM") - reset_peak.before


def memory(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def weight_receiver_input(payload):
    """What SGLang makes of it."""
    import base64
    import pickle

    return pickle.loads(base64.b64decode(payload))


def obey(pipe, commands):
    with contextlib.suppress(EOFError):
        while True:
            name, *arguments = pipe.recv()
            try:
                pipe.send((True, commands[name](*arguments)))
            except RuntimeError as error:
                pipe.send((False, str(error)))


class Process:
    """One of them, and the pipe to it."""

    def __init__(self, target, rank):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [weight_receiver.__name__, WeightSender.__module__]
        )  # torch takes seconds
        self._thread = ThreadPoolExecutor(1)  # asyncio's own are fewer than the processes
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(rank, theirs), daemon=True)
        self.process.start()
        theirs.close()

    async def call(self, *message):
        def exchange():
            self._pipe.send(message)
            return self._pipe.recv()

        try:
            ok, result = await asyncio.get_running_loop().run_in_executor(self._thread, exchange)
        except (EOFError, OSError) as error:
            raise EngineError("the process died") from error
        if not ok:
            raise EngineError(result)
        return result

    def close(self):
        self.process.kill()
        self.process.join()
        self._thread.shutdown()


class Engine:
    """Looks like an ``EngineClient``; its two ranks are processes."""

    def __init__(self, index):
        self.url = f"engine{index}"
        self.ranks = [Process(run_engine_rank, rank) for rank in range(HALVES)]

    async def load_weights(self, payloads, *, loader, version):
        calls = zip(self.ranks, payloads, strict=True)
        await asyncio.gather(*(rank.call("load", payload) for rank, payload in calls))

    async def holds(self, weights):
        """Whether every value of every rank is that of ``weights``."""
        held = [await rank.call("parameters") for rank in self.ranks]
        return all(
            torch.equal(parameter, cut(weights, rank)[name])
            for rank, parameters in enumerate(held)
            for name, parameter in parameters.items()
        )

    def close(self):
        for rank in self.ranks:
            rank.close()


class Trainer:
    """A ``SendingWorld``: ``replicas`` times two ranks."""

    def __init__(self, replicas):
        self.ranks = [Process(run_sender, rank) for rank in range(HALVES * replicas)]
        self.joins = 0

    async def hold(self, weights):
        await asyncio.gather(
            *(rank.call("hold", cut(weights, index % HALVES)) for index, rank in enumerate(self.ranks))
        )

    async def parameter_slices(self):
        return [half(index % HALVES) for index in range(len(self.ranks))]

    async def join_weight_group(self, group, links):
        self.joins += 1
        calls = zip(self.ranks, links, strict=True)
        await asyncio.gather(*(rank.call("join", group, mine) for rank, mine in calls))

    async def send_weights(self, publish):
        return await asyncio.gather(*(rank.call("send", publish) for rank in self.ranks))

    def close(self):
        for rank in self.ranks:
            rank.close()
