"""The working behind a plan's memory: each figure with its formula in words."""

from __future__ import annotations

from typing import Any

from megatron_ztrl.trainer.planner.activations import StageActivations
from megatron_ztrl.trainer.planner.engine import DTYPE_BYTES
from megatron_ztrl.trainer.planner.hardware import Line
from megatron_ztrl.trainer.planner.plan import Plan, StagePlan, WorldPlan

UNITS = {"bytes": (1e9, "GB"), "seconds": (1.0, "s"), "tokens": (1.0, "tokens")}


def shown(line: Line) -> str:
    """The amount in a unit for reading."""
    divisor, unit = UNITS[line.unit]
    return f"{line.amount / divisor:,.{0 if line.unit == 'tokens' else 2}f} {unit}"


def components(stage: StagePlan) -> dict[str, float]:
    """Bytes of one GPU by what they are for; they sum to ``stage.total_bytes``."""
    parts: dict[str, float] = {
        "weights": stage.states.weight_bytes,
        "gradients": stage.states.gradient_bytes,
        "optimizer": stage.states.optimizer_bytes,
    }
    if stage.activations is not None:
        kept = stage.activations.per_microbatch_bytes * stage.activations.in_flight
        parts |= {"activations": kept, "working": stage.activations.peak_bytes - kept}
    return parts | {"reserved": stage.reserved_bytes}


def world_lines(plan: Plan, world: WorldPlan) -> list[Line]:
    """Of the largest GPU of a world."""
    stage, states = world.largest, world.largest.states
    size = DTYPE_BYTES[plan.config.model.dtype]
    data_size = len(states.optimizer_bytes_by_data_rank)
    moments = "4 B main weight + 2 × 4 B Adam moments" if size == 2 else "2 × 4 B Adam moments"
    lines = [
        Line(
            name="weights",
            amount=states.weight_bytes,
            unit="bytes",
            working=f"{states.parameters:,} parameters × {size} B, and Megatron's padding",
        )
    ]
    if stage.activations is not None:
        lines += [
            Line(
                name="gradients",
                amount=states.gradient_bytes,
                unit="bytes",
                working=f"{states.parameters:,} × {states.gradient_bytes / states.parameters:.0f} B, padded alike",
            ),
            Line(
                name="optimizer",
                amount=states.optimizer_bytes,
                unit="bytes",
                working=f"{states.parameters:,} × ({moments}) / {data_size} data-parallel ranks, largest share",
            ),
            *_activation_lines(stage.activations),
        ]
    reserved = Line(
        name="reserved",
        amount=stage.reserved_bytes,
        unit="bytes",
        working="allowance for CUDA context, NCCL, workspaces, fragmentation",
    )
    return [*lines, reserved]


def engine_lines(plan: Plan) -> list[Line]:
    """Of one engine GPU."""
    engine, size = plan.engine, plan.config.engine.tensor_parallel_size
    a, width = plan.subject.policy, DTYPE_BYTES[plan.config.model.dtype]
    memory = plan.subject.hardware.memory_bytes
    return [
        Line(
            name="weights",
            amount=engine.weight_bytes,
            unit="bytes",
            working=f"{engine.weight_bytes // width:,} parameters of this GPU × {width} B",
        ),
        Line(
            name="KV cache",
            amount=engine.kv_bytes,
            unit="bytes",
            working=f"{engine.mem_fraction:.0%} of {memory / 1e9:.0f} GB (mem_fraction_static), less the weights",
        ),
        Line(
            name="tokens that fit",
            amount=max(0, engine.kv_tokens),
            unit="tokens",
            working=(
                f"KV cache / {engine.kv_bytes_per_token:,} B a token (2 × {a.num_layers} layers × {a.num_kv_groups}"
                f" KV heads × {a.head_size} × {width} B / {size} GPUs); max_running_requests of the greatest length"
                f" would fill {engine.demanded_tokens:,}"
            ),
        ),
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """The figures of a plan, for programs."""

    def rows(lines: list[Line]) -> list[dict[str, Any]]:
        return [{"name": x.name, "amount": x.amount, "unit": x.unit, "working": x.working} for x in lines]

    return {
        "model": plan.subject.model,
        "gpus": plan.gpus,
        "fits": not plan.problems,
        "problems": plan.problems,
        "recompute": plan.config.megatron.transformer.get("recompute_granularity"),
        "worlds": [
            {
                "name": world.name,
                "layout": world.layout,
                "gpus": world.gpus,
                "stages": [components(stage) | {"total": stage.total_bytes} for stage in world.stages],
                "working": rows(world_lines(plan, world)),
            }
            for world in plan.worlds
        ],
        "engine": {
            "count": plan.config.engine.count,
            "tensor_parallel_size": plan.config.engine.tensor_parallel_size,
            "working": rows(engine_lines(plan)),
        },
        "publish_bytes": plan.publish.total_bytes,
        "step_seconds": plan.step_seconds,
        "times": rows(plan.times),
    }


def _activation_lines(activations: StageActivations) -> list[Line]:
    head_is_larger = activations.head_bytes > activations.working_bytes
    return [
        Line(
            name="activations",
            amount=activations.per_microbatch_bytes * activations.in_flight,
            unit="bytes",
            working=f"{activations.working} × {activations.in_flight} microbatches in flight",
        ),
        Line(
            name="working",
            amount=max(activations.head_bytes, activations.working_bytes),
            unit="bytes",
            working=(
                "final norm, trained rows, a chunk of logits, the gradient of the head's weights"
                if head_is_larger
                else "gradients of a layer's activations and of one weight, a recomputed layer, gathered inputs"
            ),
        ),
    ]
