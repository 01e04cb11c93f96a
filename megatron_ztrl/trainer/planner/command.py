"""``ztrl plan``: reads the shape of the model, plans the configuration as it is, and searches if it may."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ztrl.config.schema import Config
from megatron_ztrl.observability.console import open_console
from megatron_ztrl.trainer.planner.hardware import Hardware
from megatron_ztrl.trainer.planner.models import PRESETS
from megatron_ztrl.trainer.topology import check_world, read_architecture
from megatron_ztrl.weights.hf_mapping import Architecture

SUGGESTIONS = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line adds to a configuration."""

    model: str | None = None
    """One of ``PRESETS`` in place of ``model.path``."""
    gpus: int | None = None
    """Search for the best layout of so many."""
    memory_gb: float = 80.0
    prompt_tokens: float | None = None
    response_tokens: float | None = None
    png: Path | None = None
    json: Path | None = None


def run_plan(config: Config, options: Options) -> None:
    """Prints the plan, and writes the files that were asked for.

    Raises:
        ValueError: the model's shape is not known here, or the layout does not fit it.
    """
    if options.model is None:
        name, policy = find_architecture(config.model.path)
    else:
        name, policy = find_architecture(options.model, "--model")
    critic = policy
    if config.critic.path is not None and config.algorithm.advantage == "gae":
        critic = find_architecture(config.critic.path, "critic.path")[1]
    check_world("actor", config.actor, policy)
    if config.algorithm.advantage == "gae":
        check_world("critic", config.critic, critic)
    # Megatron's: about optional packages, and about defaults of its own that are deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _plan(config, options, name, policy, critic)


def _plan(config: Config, options: Options, name: str, policy: Architecture, critic: Architecture) -> None:
    from megatron_ztrl.trainer.planner.layouts import least_gpus, suggest
    from megatron_ztrl.trainer.planner.plan import Subject, make_plan
    from megatron_ztrl.trainer.planner.step_time import Workload
    from megatron_ztrl.trainer.planner.table import print_plan, print_suggestions

    subject = Subject(
        model=name,
        policy=policy,
        critic=critic,
        hardware=replace(Hardware(), memory_bytes=options.memory_gb * 1e9),
        workload=Workload.of(
            config, prompt_tokens=options.prompt_tokens, response_tokens=options.response_tokens
        ),
        backend="te" if config.model.backend != "local" and config.model.dtype == "bfloat16" else "local",
    )
    console = open_console()
    plan = make_plan(config, subject)
    print_plan(plan, console)
    suggestions = []
    if options.gpus is not None:
        suggestions = suggest(config, subject, options.gpus, SUGGESTIONS)
        least = None if suggestions else least_gpus(config, subject)
        print_suggestions(options.gpus, suggestions, least, config, console)
    if options.json:
        options.json.write_text(json.dumps(_to_json(plan, suggestions), indent=2) + "\n")
    if options.png:
        _draw(plan, suggestions, options.png)


def find_architecture(path: str, setting: str = "model.path") -> tuple[str, Architecture]:
    """Name and shape of a preset, of a hub id that ends like one, or of a local checkpoint.

    Args:
        path: What was given.
        setting: Where, for the error.

    Raises:
        ValueError: it is none of these.
    """
    name = path.rpartition("/")[2].lower()
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory.resolve().name, read_architecture(directory, setting)
    if name in PRESETS:
        return name, Architecture.from_hf_config(PRESETS[name])
    raise ValueError(
        f"{setting}: planning needs the config.json of {path}: give a local directory, or one of"
        f" {', '.join(PRESETS)}"
    )


def _to_json(plan: Any, suggestions: list[Any]) -> dict[str, Any]:
    from megatron_ztrl.trainer.planner.working import to_json

    return {"plan": to_json(plan), "suggestions": [to_json(each) for each in suggestions]}


def _draw(plan: Any, suggestions: list[Any], path: Path) -> None:
    from megatron_ztrl.observability.plan_figure import draw_plan
    from megatron_ztrl.trainer.planner.table import shown_stages
    from megatron_ztrl.trainer.planner.working import components, engine_lines

    def gigabytes(parts: dict[str, float]) -> dict[str, float]:
        return {name: amount / 1e9 for name, amount in parts.items()}

    bars = [
        (f"{world.name} {world.layout}, stage {stage.stage}", gigabytes(components(stage)))
        for world in plan.worlds
        for stage in shown_stages(world)
    ]
    engine = plan.config.engine
    held = {line.name: line.amount for line in engine_lines(plan) if line.unit == "bytes"}
    bars.append((f"engine TP {engine.tensor_parallel_size}", gigabytes(held)))
    layouts: list[tuple[str, dict[str, float]]] = []
    configured = "configured, does not fit" if plan.problems else "configured"
    for each in [plan, *suggestions]:
        engine = each.config.engine
        label = f"{each.worlds[0].layout}, {engine.count} engines TP {engine.tensor_parallel_size}"
        times = {line.name: line.amount for line in each.times}
        layouts.append((label if layouts else f"{configured}:\n{label}", times))
    draw_plan(
        path,
        title=f"{plan.subject.model} on {plan.gpus} GPUs",
        memory_gb=bars,
        limit_gb=plan.subject.hardware.memory_bytes / 1e9,
        seconds=layouts,
    )
