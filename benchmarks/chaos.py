"""What a training run makes of kill -9: of its engines, its executors and its driver, again and again.

The quickstart, small and asynchronous (staleness 1, two engines), trains `--steps` steps while `--kills` processes of
it are killed, at moments spread over them by `--seed`; a driver that was killed is started again with `--resume`. A
kill hits a server that serves or waits for its first weights; the driver also while it starts. Then it is read off what
the run left behind that it is whole: every step is there once, trained on as many groups as any other; no group was
trained in two of them; trainer and engines agreed on the log-probs of every step, so that no engine ever served other
weights than it said; and nothing that a killed process had started outlived it. The same run without kills is timed
first (`--undisturbed no` leaves that out). Processes are found in `<run>/processes.json`, never by name.

    python benchmarks/chaos.py [--kills 30] [--steps 240] [--kinds engine,executor,driver] [--json FILE] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import read_rows
from megatron_ztrl.runtime.processes import PROCESSES_FILE, read_processes

CONFIG = Path(__file__).parents[1] / "examples" / "quickstart" / "config.yaml"
GROUPS_PER_STEP = 8
GROUP_SIZE = 4
MAX_LOGPROB_GAP = 1e-4
"""Nats, in float32, between trainer and engine on the tokens of the trainer's own version."""
OVERRIDES = (
    f"rollout.groups_per_step={GROUPS_PER_STEP}",
    f"rollout.group_size={GROUP_SIZE}",
    "rollout.max_staleness=1",
    "engine.count=2",
    "engine.max_restarts=1000",
    "sandbox.max_restarts=1000",
    "eval.interval_steps=0",
    "checkpoint.interval_steps=1",
    "checkpoint.export_hf=false",
    "logging.tensorboard=false",
    f"logging.sample_rollouts={GROUPS_PER_STEP * GROUP_SIZE}",  # all: their ids say which groups were trained
)
POLL_SECONDS = 0.05
PATIENT_SHARE = 0.3
PATIENCE_ENDS = 0.8
"""Share of the steps after which no kill waits any more: all must be done when the run ends."""
PATIENCE_STEPS = 8
"""Nor does any wait for longer: on a busy machine all steps could be done before an engine is back."""
KINDS = ("engine", "executor", "driver")
LONGEST_START_SECONDS = 30.0
"""So long after its start at most a driver is killed that has no server yet; ..."""
EARLY_STEPS = 4
"""... then the moment was meant to be at most so many steps later."""
LONGEST_FAREWELL_SECONDS = 30.0
"""What a killed process had started must be gone by then."""


@dataclass(kw_only=True)
class Kill:
    """One process that was killed."""

    kind: str
    name: str
    at_step: int
    recovery_seconds: float | None = None
    """Until its successor served; of the driver, until an engine of the new one did. None: the run ended first, or its
    driver was killed meanwhile."""
    farewell_seconds: float | None = None
    """Until all was gone that it had started. None: not all of it ended."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of what is killed, drawn evenly")
    parser.add_argument("--undisturbed", choices=("yes", "no"), default="yes")
    parser.add_argument("--keep", type=Path, help="directory for the runs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        figures: dict[str, Any] = {}
        if options.undisturbed == "yes":
            run = Run(directory / "undisturbed", options.steps, options.overrides)
            figures["undisturbed_seconds"] = run.to_its_end([])
        chaos = Run(directory / "chaos", options.steps, options.overrides)
        plan = draw(options.kills, options.steps, options.kinds.split(","), options.seed)
        figures["chaos_seconds"] = chaos.to_its_end(plan)
        figures["kills"] = [asdict(kill) for kill in chaos.kills]
        figures["findings"] = findings = examine(chaos.directory, options.steps)
        findings["problems"] += chaos.left_behind()
    print_tables(chaos.kills, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if findings["problems"] or len(chaos.kills) < options.kills else 0


@dataclass(frozen=True, kw_only=True)
class PlannedKill:
    """When and what."""

    step: int
    share_of_step: float
    kind: str
    pick: float
    """Picks one of the kind."""
    patient: bool
    """Waits until everything killed before serves again; else it may hit a run that has not recovered."""


def draw(count: int, steps: int, kinds: Sequence[str], seed: int) -> list[PlannedKill]:
    """Moments spread evenly at random over the steps, in order."""
    generator = random.Random(seed)
    moments = sorted(generator.uniform(0, steps) for _ in range(count))
    return [
        PlannedKill(
            step=int(moment),
            share_of_step=moment % 1,
            kind=generator.choice(kinds),
            pick=generator.random(),
            patient=generator.random() < PATIENT_SHARE,
        )
        for moment in moments
    ]


class Run:
    """A training run, as a user starts it, and starts it again."""

    def __init__(self, directory: Path, steps: int, overrides: Sequence[str]) -> None:
        self.directory = directory
        self.kills: list[Kill] = []
        self._steps = steps
        self._command = [
            *(sys.executable, "-m", "megatron_ztrl.cli", "train", str(CONFIG), "--resume"),
            *(f"run.directory={directory}", f"train.num_steps={steps}", *OVERRIDES, *overrides),
        ]
        self._open: list[tuple[Kill, float, int]] = []
        """Kills whose successor does not serve yet: when they were, and the process id that they had."""
        self._orphans: list[tuple[Kill, float, list[psutil.Process]]] = []
        """Kills, when they were, and what they had started, where that has not ended yet."""

    def to_its_end(self, plan: Sequence[PlannedKill]) -> float:
        """Trains, kills what is planned, starts drivers again. Returns the seconds that it took."""
        self.directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with (self.directory / "output.log").open("ab") as output:
            waiting = list(plan)
            while True:
                driver = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)
                try:
                    self._watch(driver, waiting)
                finally:
                    if driver.poll() is None:
                        driver.terminate()
                if driver.wait() != -signal.SIGKILL:
                    break
        if driver.returncode != 0:
            log = (self.directory / "output.log").read_text(errors="replace").splitlines()
            raise SystemExit("\n".join([f"the run ended with code {driver.returncode}", *log[-40:]]))
        return time.monotonic() - began

    def _watch(self, driver: subprocess.Popen[bytes], waiting: list[PlannedKill]) -> None:
        """Returns when the driver has ended, of itself or because it was its turn."""
        driver_began = time.monotonic()
        step_seen, step_began, step_seconds = -1, driver_began, 1.0
        while driver.poll() is None:
            time.sleep(POLL_SECONDS)
            servers = self._servers(driver.pid)
            self._note_recoveries(servers)
            self._note_farewells()
            step = self._steps_done()
            if step != step_seen:
                if step_seen >= 0:
                    step_seconds = time.monotonic() - step_began
                step_seen, step_began = step, time.monotonic()
            if not waiting:
                continue
            if not servers:
                # It starts; of the processes that it begins with, some do not know yet whom to follow into death.
                seconds = time.monotonic() - driver_began
                next_one = waiting[0]
                hit = (
                    next_one.kind == "driver" and not next_one.patient and next_one.step <= step + EARLY_STEPS
                )
                if hit and seconds > next_one.pick * LONGEST_START_SECONDS:
                    self._kill(waiting.pop(0), driver, servers, step)
                continue
            patience_ends = min(waiting[0].step + PATIENCE_STEPS, PATIENCE_ENDS * self._steps)
            patient = waiting[0].patient and step < patience_ends
            share_of_step = min((time.monotonic() - step_began) / step_seconds, 1.0)
            due = step + share_of_step >= waiting[0].step + waiting[0].share_of_step
            if due and not (patient and self._open) and self._kill(waiting[0], driver, servers, step):
                del waiting[0]

    def _kill(
        self, planned: PlannedKill, driver: subprocess.Popen[bytes], servers: dict[str, Any], step: int
    ) -> bool:
        """Whether there was something of the kind to kill."""
        if planned.kind == "driver":
            name, pid = "driver", driver.pid
            self._open.clear()  # what was on its way to serve again is gone
        else:
            serving = sorted(name for name, row in servers.items() if row["state"] == "serves")
            candidates = sorted(
                name
                for name, row in servers.items()
                if name.startswith(planned.kind) and row["state"] != "starts"
            )
            if not candidates or not any(name.startswith("engine") for name in serving):  # it still starts
                return False
            name = candidates[int(planned.pick * len(candidates))]
            pid = servers[name]["pid"]
        started: list[psutil.Process] = []
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            started = psutil.Process(pid).children(recursive=True)
            os.kill(pid, signal.SIGKILL)
        self.kills.append(Kill(kind=planned.kind, name=name, at_step=step))
        self._open.append((self.kills[-1], time.monotonic(), pid))
        self._orphans.append((self.kills[-1], time.monotonic(), started))
        if name == "driver":
            driver.wait()
        return True

    def _note_recoveries(self, servers: dict[str, Any]) -> None:
        for entry in list(self._open):
            kill, since, pid = entry
            serving = [row for name, row in servers.items() if name.startswith(kill.name)]
            if kill.kind == "driver":  # the table is the new driver's
                serving = [row for name, row in servers.items() if name.startswith("engine")]
            if any(row["state"] == "serves" and row["pid"] != pid for row in serving):
                kill.recovery_seconds = time.monotonic() - since
                self._open.remove(entry)

    def _note_farewells(self) -> None:
        for entry in list(self._orphans):
            kill, since, started = entry
            if not any(map(_runs, started)):
                kill.farewell_seconds = time.monotonic() - since
                self._orphans.remove(entry)

    def left_behind(self) -> list[str]:
        """Which processes outlived what had started them; they are ended."""
        deadline = time.monotonic() + LONGEST_FAREWELL_SECONDS
        while self._orphans and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._note_farewells()
        problems = []
        for kill, _, started in self._orphans:
            left = [process for process in started if _runs(process)]
            problems.append(f"of {kill.name}, killed at step {kill.at_step}, this is left: {left}")
            for process in left:
                process.kill()
        return problems

    def _servers(self, driver_pid: int) -> dict[str, Any]:
        """The servers of this driver; none while it starts."""
        if not (self.directory / PROCESSES_FILE).exists():
            return {}
        with contextlib.suppress(ValueError):  # it has just ended
            table = read_processes(self.directory)
            if table["driver"]["pid"] == driver_pid:
                return table["servers"]
        return {}

    def _steps_done(self) -> int:
        return max((row[names.STEP] for row in train_rows(self.directory)), default=0)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def train_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """The rows of training steps."""
    return (row for row in read_rows(directory / names.METRICS_FILE) if row[names.SPLIT] == names.TRAIN)


def examine(directory: Path, steps: int) -> dict[str, Any]:
    """What a run left behind, and what is wrong with it."""
    problems = []
    rows = list(train_rows(directory))
    if [row[names.STEP] for row in rows] != list(range(1, steps + 1)):
        problems.append(f"the steps are {[row[names.STEP] for row in rows]}, not 1 to {steps}")
    trained = int(sum(row[names.TRAIN_GROUPS_KEPT] for row in rows))
    if trained != steps * GROUPS_PER_STEP:
        problems.append(f"{trained} groups were trained, not {steps * GROUPS_PER_STEP}")
    ids_of_step: dict[int, list[str]] = defaultdict(list)
    for row in read_rows(directory / names.ROLLOUTS_FILE):
        ids_of_step[row[names.STEP]].append(row["rollout_id"])
    steps_of_group = Counter(
        group for ids in ids_of_step.values() for group in {rollout_id.split(".")[0] for rollout_id in ids}
    )
    twice = [group for group, count in steps_of_group.items() if count > 1]
    if twice:
        problems.append(f"groups {', '.join(twice)} were trained in more than one step")
    for step, ids in ids_of_step.items():
        groups = {rollout_id.split(".")[0] for rollout_id in ids}
        if (
            len(ids) != len(set(ids))
            or len(ids) != GROUPS_PER_STEP * GROUP_SIZE
            or len(groups) != GROUPS_PER_STEP
        ):
            problems.append(f"step {step} was trained on the rollouts {sorted(ids)}")
    gap = max((row[key] for row in rows for key in row if key == names.MISMATCH_MEAN), default=0.0)
    if gap > MAX_LOGPROB_GAP:
        problems.append(f"trainer and engines differ by {gap:.1e} nats")
    staleness = max((row[names.TRAIN_STALENESS_MAX] for row in rows), default=0)
    if staleness > 1:
        problems.append(f"a token was {staleness} steps old")
    return {
        "steps": len(rows),
        "groups_trained": trained,
        "groups_trained_twice": len(twice),
        "largest_mean_logprob_gap": gap,
        "staleness_max": staleness,
        "problems": problems,
    }


def print_tables(kills: Sequence[Kill], figures: dict[str, Any]) -> None:
    columns = ("killed", "times", "recovered", "median recovery", "mean", "longest", "all gone after at most")
    table = Table(*columns, title="kill -9")
    for kind in KINDS:
        mine = [kill for kill in kills if kill.kind == kind]
        seconds = [kill.recovery_seconds for kill in mine if kill.recovery_seconds is not None]
        if mine:
            shown = [f"{f(seconds):.1f} s" for f in (median, fmean, max)] if seconds else ["-"] * 3
            farewells = [kill.farewell_seconds or 0.0 for kill in mine]
            table.add_row(kind, str(len(mine)), str(len(seconds)), *shown, f"{max(farewells):.1f} s")
    console = Console()
    console.print(table)
    times = Table("figure", "value")
    for name, value in figures["findings"].items():
        if name != "problems":
            times.add_row(name, f"{value:.2e}" if isinstance(value, float) else str(value))
    if "undisturbed_seconds" in figures:
        times.add_row("seconds undisturbed", f"{figures['undisturbed_seconds']:.0f}")
    times.add_row("seconds with kills", f"{figures['chaos_seconds']:.0f}")
    console.print(times)
    for problem in figures["findings"]["problems"]:
        console.print(f"WRONG: {problem}", style="bold red")


if __name__ == "__main__":
    sys.exit(main())
