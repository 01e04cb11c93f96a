"""Prints a plan: what each GPU holds, how each figure comes about, and the layouts that would be quicker."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ztrl.config.schema import Config
from megatron_ztrl.observability.console import print_whole
from megatron_ztrl.trainer.planner.hardware import Line
from megatron_ztrl.trainer.planner.plan import Plan, StagePlan, WorldPlan
from megatron_ztrl.trainer.planner.working import components, engine_lines, shown, world_lines

_STAGES_SHOWN = 6
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "working", "reserved")
_WORLD = (
    *("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_size", "context_parallel_size"),
    *("data_parallel_size", "sequence_parallel"),
)
_SEARCHED = {"actor": _WORLD, "critic": _WORLD, "engine": ("count", "tensor_parallel_size")}
"""Keys in which a suggestion may differ, megatron.transformer aside."""


def print_plan(plan: Plan, console: Console) -> None:
    """Everything about one configuration."""
    hardware = plan.subject.hardware
    each = f"{hardware.memory_bytes / 1e9:.0f} GB = {hardware.memory_bytes / 2**30:.1f} GiB each"
    heading = Text.assemble((plan.subject.model, "bold"), f" on {plan.gpus} × {hardware.name} ({each})\n")
    console.print(heading, soft_wrap=True)
    _print_memory(plan, console)
    for world in plan.worlds:
        _print_lines(f"{world.name}, a GPU of stage {world.largest.stage}", world_lines(plan, world), console)
    engines = plan.config.engine
    title = f"engines: {engines.count} × TP {engines.tensor_parallel_size}, one GPU"
    _print_lines(title, engine_lines(plan), console)
    publish = Line(
        name="publish",
        amount=plan.publish.total_bytes,
        unit="bytes",
        working=(
            f"every slice to every engine once; an actor rank sends at most"
            f" {plan.publish.largest_sent_bytes / 1e9:.2f} GB, an engine GPU receives"
            f" {plan.publish.largest_received_bytes / 1e9:.2f} GB"
        ),
    )
    how = "generation beside training" if plan.config.rollout.max_staleness else "one after the other"
    total = Line(name="step", amount=plan.step_seconds, unit="seconds", working=f"{how}; an estimate")
    _print_lines("one training step", [publish, *plan.times, total], console)
    if plan.problems:
        console.print("[bold red]Does not fit:[/]")
        for problem in plan.problems:
            console.print(Text(f"  {problem}"), soft_wrap=True)
    else:
        console.print("[bold green]Fits.[/]")


def print_suggestions(
    gpus: int, plans: Sequence[Plan], least: int | None, configured: Config, console: Console
) -> None:
    """The quickest layouts, or the number of GPUs that would be needed.

    Args:
        gpus: What was searched for.
        plans: The layouts, the quickest first.
        least: GPUs that would be enough, where there is no layout.
        configured: What they are an alternative to.
        console: Where to print.
    """
    if not plans:
        fewest = "no number tried fits" if least is None else f"the first whole nodes that fit: {least} GPUs"
        console.print(f"\n[bold red]No layout of {gpus} GPUs fits[/]; {fewest}.")
        return
    console.print()
    table = Table(title=f"Quickest layouts of {gpus} GPUs", title_justify="left")
    for name in ("training ranks", "engines", "recompute"):
        table.add_column(name)
    for name in ("GB", "generation", "log-probs", "training", "publish", "step (s)"):
        table.add_column(name, justify="right")
    for plan in plans:
        engine = plan.config.engine
        table.add_row(
            " + ".join(f"{world.name} {world.layout}" for world in plan.worlds),
            f"{engine.count} × TP {engine.tensor_parallel_size}",
            plan.config.megatron.transformer.get("recompute_granularity") or "none",
            f"{max(world.largest.total_bytes for world in plan.worlds) / 1e9:.1f}",
            *(f"{line.amount:.1f}" for line in plan.times),
            f"{plan.step_seconds:.1f}",
        )
    print_whole(console, table)
    words = " ".join(_overrides(plans[0], configured)) or "it is the configuration as it is"
    console.print(Text(f"The first, as overrides: {words}"), soft_wrap=True)


def _overrides(plan: Plan, configured: Config) -> list[str]:
    """What makes the configuration the planned one."""
    words = []
    for section, names in _SEARCHED.items():
        new, old = getattr(plan.config, section), getattr(configured, section)
        for name in names if section != "critic" or configured.algorithm.advantage == "gae" else ():
            if (value := getattr(new, name)) != getattr(old, name):
                words.append(f"{section}.{name}={str(value).lower()}")
    new, old = plan.config.megatron.transformer, configured.megatron.transformer
    for name in sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key)):
        words.append(f"megatron.transformer.{name}={new.get(name, 'null')}")
    return words


def _print_memory(plan: Plan, console: Console) -> None:
    table = Table(title="Memory of one GPU (GB)", title_justify="left")
    for name in ("world", "layout", "stage"):
        table.add_column(name)
    for name in (*_COLUMNS, "total"):
        table.add_column(name, justify="right")
    for world in plan.worlds:
        for stage in shown_stages(world):
            parts = components(stage)
            too_much = stage.total_bytes > plan.subject.hardware.memory_bytes
            total = f"{stage.total_bytes / 1e9:.2f}"
            table.add_row(
                world.name,
                world.layout,
                str(stage.stage),
                *(f"{parts[name] / 1e9:.2f}" if name in parts else "" for name in _COLUMNS),
                f"[red]{total}[/]" if too_much else total,
            )
    print_whole(console, table)


def shown_stages(world: WorldPlan) -> list[StagePlan]:
    """All of a few stages; of many the first ones and the last."""
    if len(world.stages) <= _STAGES_SHOWN:
        return world.stages
    return [*world.stages[: _STAGES_SHOWN - 1], world.stages[-1]]


def _print_lines(title: str, lines: Sequence[Line], console: Console) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for line in lines:
        table.add_row(line.name, shown(line), line.working)
    console.print(table)
    console.print()
