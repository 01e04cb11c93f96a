"""Where numbers go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_ztrl.config.schema import LoggingConfig
from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import JsonLines, read_rows


class Sink(Protocol):
    """Takes the rows of a run, in the order of their steps."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLogger:
    """Writes every row to ``metrics.jsonl`` and to the configured sinks."""

    def __init__(
        self, run_directory: str | Path, config: LoggingConfig, *, restored_step: int | None = None
    ) -> None:
        """Opens the sinks.

        Args:
            run_directory: Where ``metrics.jsonl`` lies; made when it is missing.
            config: Which sinks there are.
            restored_step: The optimizer steps of the checkpoint that a resumed run restarts from; rows past
                it are removed, since the run will write them again.

        Raises:
            ValueError: A sink was asked for whose package is not installed.
        """
        directory = Path(run_directory)
        self._rows = JsonLines(directory / names.METRICS_FILE)
        self._elapsed_before_seconds = 0.0
        if restored_step is not None:
            self._rows.truncate_after(restored_step)
            for row in read_rows(directory / names.METRICS_FILE):
                self._elapsed_before_seconds = row[names.WALL_SECONDS]
        self._sinks: list[Sink] = []
        if config.tensorboard:
            self._sinks.append(_TensorBoard(directory / "tensorboard", restored_step))
        if config.wandb_project is not None:
            self._sinks.append(_WeightsAndBiases(directory, config.wandb_project))
        self._start_seconds = time.monotonic()

    @property
    def wall_seconds(self) -> float:
        """Time the run has worked, all of its sessions together."""
        return self._elapsed_before_seconds + time.monotonic() - self._start_seconds

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        split: str = names.TRAIN,
        env_iterations: int | None = None,
    ) -> None:
        """Writes one row.

        Args:
            metrics: Numbers by the keys of `observability.names`.
            step: Optimizer steps behind the policy the numbers speak of.
            split: ``train`` or ``eval``.
            env_iterations: N of an evaluation.

        Raises:
            FloatingPointError: A metric is not a finite number: training has diverged.
        """
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step}: {key} is {value}")
        row: dict[str, Any] = {names.STEP: step, names.SPLIT: split}
        if env_iterations is not None:
            row[names.ENV_ITERATIONS] = env_iterations
        row |= {names.WALL_SECONDS: round(self.wall_seconds, 3), **metrics}
        self._rows.append(row)
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Flushes and closes every sink."""
        self._rows.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row; an evaluation's N becomes part of the name, so that each N is a curve."""
    suffix = f"/N={row[names.ENV_ITERATIONS]}" if names.ENV_ITERATIONS in row else ""
    return {f"{key}{suffix}": value for key, value in row.items() if "/" in key}


class _TensorBoard:
    def __init__(self, directory: Path, restored_step: int | None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "logging.tensorboard: tensorboard is not installed; install it, or set this to false"
            )
        from torch.utils.tensorboard import SummaryWriter

        # Steps from purge_step on are hidden: the resumed run writes them again.
        purge_step = None if restored_step is None else restored_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in _scalars(row).items():
            self._writer.add_scalar(key, value, row[names.STEP])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run_directory: Path, project: str) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("logging.wandb_project: wandb is not installed; install it, or set this to null")
        wandb: Any = importlib.import_module("wandb")  # optional, and absent from the pinned environments
        # The id ties a resumed run to its earlier rows.
        identity_file = run_directory / "wandb_id.txt"
        if not identity_file.exists():
            identity_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project,
            name=run_directory.name,
            id=identity_file.read_text(),
            dir=str(run_directory),
            resume="allow",
        )
        # Training and evaluation write the same step, so the step is a metric of its own.
        self._run.define_metric("*", step_metric=names.STEP)

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({**_scalars(row), names.STEP: row[names.STEP]})

    def close(self) -> None:
        self._run.finish()
