"""What the planner's test ranks run: a real small world, and what it really holds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from activation_memory import Case, measure_peak

from megatron_ztrl.trainer.topology import parallel_layout


def layout(name: str, case: Case, dp: int = 1, cp: int = 1, **ddp: Any) -> tuple[Case, Any]:
    """A case and its configuration, spread over ``dp`` replicas of ``cp`` ranks that share sequences."""
    config = case.config()
    return replace(case, name=name), replace(
        config,
        actor=replace(config.actor, data_parallel_size=dp, context_parallel_size=cp),
        megatron=replace(config.megatron, ddp=ddp),
    )


SMALL = Case(name="", layers=6, hidden=64, vocab=331)
BUCKETS = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20_000}
STATES = [
    layout("one rank", SMALL),
    layout("float32", replace(SMALL, dtype="float32"), dp=2),
    layout("data parallel 3", SMALL, dp=3),
    layout("data parallel 3, in buckets", SMALL, dp=3, **BUCKETS),
    layout("context parallel 3", SMALL, cp=3),
    layout("data parallel 3, no distributed optimizer", SMALL, dp=3, use_distributed_optimizer=False),
    layout("tensor parallel", replace(SMALL, tp=2)),
    layout("pipeline of 3, tied", replace(SMALL, pp=3, tied=True)),
    layout("interleaved pipeline", replace(SMALL, pp=2, vp=3)),
]
PEAKS = [
    Case(name="bfloat16"),
    Case(name="large tied vocabulary", vocab=16384, tied=True, layers=2),
    Case(
        name="full recomputation",
        layers=8,
        transformer={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    Case(name="sequence parallel", tp=2),
    Case(name="pipeline", pp=2, microbatches=4),
    Case(name="interleaved", pp=2, vp=2, microbatches=4),
]


def measure(rank: int, scratch: Path) -> dict[str, Any]:
    """By case, the states and the peak of activations of this rank."""
    states = {
        case.name: _states(case, config, rank, f"file://{scratch}/states{index}")
        for index, (case, config) in enumerate(STATES)
        if rank < parallel_layout(config.actor).world_size
    }
    peaks = {
        case.name: measure_peak(case, rank, f"file://{scratch}/peak{index}")
        for index, case in enumerate(PEAKS)
        if rank < case.tp * case.pp
    }
    return {"states": states, "peaks": peaks}


def _states(case: Case, config: Any, rank: int, init_method: str) -> dict[str, int]:
    """Bytes after one optimizer step."""
    from megatron_ztrl.trainer.cpu_compat import cuda_calls

    cuda_calls.install()
    from megatron_ztrl.trainer import setup
    from megatron_ztrl.trainer.model import build_chunks, wrap_chunks

    architecture = case.architecture()
    places = parallel_layout(config.actor)
    setup.init_distributed(places, rank, init_method, 0)
    transformer = setup.transformer_config(config, config.actor, architecture, "local")
    chunks = build_chunks(transformer, architecture, "local", case.tokens)
    ddp = setup.ddp_config(config)
    models = wrap_chunks(chunks, transformer, ddp)
    optimizer = setup.build_optimizer(config, config.actor, models, ddp)
    optimizer.step()
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = _storages(parameters)
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    updated = [p for each in inner for group in each.param_groups for p in group["params"]]
    moments = [
        state[key] for each in inner for state in each.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    place = places.place(rank)
    main = {key: size for key, size in _storages(updated).items() if key not in weights}
    result = {
        "place": (place.pipeline_rank, place.data_rank * places.context_size + place.context_rank),
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": sum(weights.values()),
        "gradient_bytes": sum(_storages([b.grad_data for model in models for b in model.buffers]).values()),
        "optimizer_bytes": sum(main.values()) + sum(_storages(moments).values()),
    }
    setup.destroy_distributed()
    return result


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage: views of one buffer count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
