"""Trainer ranks that hold Megatron's slices of a policy, and engine ranks that hold SGLang's own model in FP8."""

import asyncio
import os
import sys
from contextlib import ExitStack

import torch
from link_world import Engine, Process, Trainer, obey, run_sender, weight_receiver_input
from safetensors.torch import load_file
from small_qwen2 import HF_CONFIG

from megatron_ztrl.engines import cpu_compat, weight_receiver
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout, hf_tensor_shapes, megatron_slices

CONFIG = HF_CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 150,
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
}
"""Slices of tensor parallelism 1 and 2, at both ends, end at multiples of 128."""
ARCHITECTURE = Architecture.from_hf_config(CONFIG)
LAYOUT = ParallelLayout(tensor_size=2, pipeline_size=2)


def policy(seed):
    """The tensors of a random policy."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
        for name, shape in hf_tensor_shapes(ARCHITECTURE).items()
    }


def slices_of(rank):
    return megatron_slices(ARCHITECTURE, LAYOUT, rank, backend="te")


def parameters_of(tensors, rank):
    """What Megatron's rank holds of a policy; rows that pad the vocabulary are zero."""
    shapes = {}
    for item in slices_of(rank):
        shape = shapes.setdefault(item.param, list(tensors[item.tensor].shape))
        shape[item.dim] = max(shape[item.dim] if item.start else 0, item.start + item.length)
    parameters = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for item in slices_of(rank):
        part = tensors[item.tensor].narrow(item.dim, item.tensor_start, item.length)
        parameters[item.param].narrow(item.dim, item.start, item.length).copy_(part)
    return parameters


class MegatronRanks(Trainer):
    """A ``SendingWorld`` of tensor parallelism 2 and two pipeline stages."""

    def __init__(self):
        self.ranks = [Process(run_sender, rank) for rank in range(LAYOUT.world_size)]
        self.joins = 0

    async def hold(self, tensors):
        parts = [parameters_of(tensors, rank) for rank in range(len(self.ranks))]
        await asyncio.gather(*(rank.call("hold", part) for rank, part in zip(self.ranks, parts, strict=True)))

    async def parameter_slices(self):
        return [slices_of(rank) for rank in range(len(self.ranks))]


class SGLangEngine(Engine):
    """One engine; each tensor-parallel rank is a process with SGLang's model."""

    def __init__(self, size, scratch):
        self.url = f"engine of {size}"
        self._meeting = f"file://{scratch}/meeting-{size}"
        self.ranks = [Process(run_sglang_rank, rank) for rank in range(size)]

    async def build(self, checkpoint):
        """Start as SGLang does from a checkpoint."""
        size = len(self.ranks)
        await asyncio.gather(
            *(rank.call("build", size, self._meeting, str(checkpoint)) for rank in self.ranks)
        )

    async def on_all(self, *command):
        return await asyncio.gather(*(rank.call(*command) for rank in self.ranks))


def run_sglang_rank(rank, pipe):
    torch.set_num_threads(1)
    with ExitStack() as stack:
        held = _SGLangRank(rank, stack)
        commands = {
            "build": held.build,
            "reload": held.reload,
            "load": lambda payload: weight_receiver.load(held.model, weight_receiver_input(payload)),
            "bytes": held.bytes,
            "rearrange": held.rearrange,
        }
        obey(pipe, commands)


class _SGLangRank:
    def __init__(self, rank, stack):
        self._rank = rank
        self._stack = stack

    def build(self, size, meeting, checkpoint):
        """Make SGLang's Qwen2 with its own FP8 layers, as the server's loader does before the kernels' turn."""
        os.environ |= cpu_compat.environment(size)
        sys.path.insert(0, str(cpu_compat.STANDINS))
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers.quantization.fp8 import Fp8Config
        from sglang.srt.models.qwen2 import Qwen2ForCausalLM
        from sglang.srt.runtime_context import get_context, get_parallel
        from transformers import AutoConfig

        rank, enter = self._rank, self._stack.enter_context
        enter(get_context().override_server_args(tp_size=size, device="cpu", model_path=checkpoint))
        parallel_state.init_distributed_environment(size, rank, meeting, rank, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
        sizes = {"tp_size": size, "attn_tp_size": size, "attn_dp_size": 1, "attn_cp_size": 1}
        ranks = {"tp_rank": rank, "attn_tp_rank": rank, "attn_dp_rank": 0, "attn_cp_rank": 0, "pp_rank": 0}
        enter(get_parallel().override(**sizes, **ranks))
        config = AutoConfig.from_pretrained(checkpoint)
        torch.set_default_dtype(torch.bfloat16)
        self.model = Qwen2ForCausalLM(config, Fp8Config.from_config(config.quantization_config))
        torch.set_default_dtype(torch.float32)
        self.reload(checkpoint)

    def reload(self, checkpoint):
        """Fill the model through SGLang's own weight loaders."""
        self.model.load_weights(load_file(f"{checkpoint}/model.safetensors").items())

    def bytes(self):
        """What every parameter holds."""
        return {
            name: (str(parameter.dtype), parameter.data.reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, parameter in self.model.named_parameters()
        }

    def rearrange(self, name):
        """What some kernels of SGLang do after loading: pack scales into int32."""
        parameter = dict(self.model.named_parameters())[name]
        parameter.data = parameter.data.view(torch.int32)
