"""``ztrl doctor``: what this machine can run, what a missing piece costs, and how to get it."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ztrl.observability.console import open_console
from megatron_ztrl.observability.run_info import gpu_models, memory_bytes

_GIB = 1 << 30
_MIN_MEMORY_BYTES = 4 * _GIB
_MIN_DISK_BYTES = 10 * _GIB
_MIN_SHARED_MEMORY_BYTES = 2 * _GIB
_MIN_OPEN_FILES = 4096


class State(enum.StrEnum):
    """How a check went."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    name: str
    state: State
    found: str
    cost: str = ""
    """What does not work, or works less well, in this state."""
    fix: str = ""
    blocks: bool = False
    """Nothing trains without it."""


def examine() -> list[Finding]:
    """Runs every check. Starts no process that outlives it and writes nothing."""
    # The sandbox probe forks, so it comes before torch starts threads.
    sandbox = _sandbox()
    cuda = _cuda()
    return [*_hardware(), *cuda, *_packages(with_gpu=cuda[-1].state is State.OK), sandbox, *_system()]


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)


def print_table(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Prints the findings and a verdict."""
    console = console or open_console()
    colours = {State.OK: "green", State.LIMITED: "yellow", State.MISSING: "red"}
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        optional = finding.state is State.MISSING and not finding.blocks
        state = Text("absent", "dim") if optional else Text(finding.state, colours[finding.state])
        found = Text(finding.found)
        if finding.cost:
            found.append(f"\n{finding.cost}", "dim")
        if finding.fix:
            found.append(f"\n→ {finding.fix}", "cyan")
        table.add_row(state, Text(finding.name, "bold"), found)
    console.print(table)
    missing = [finding.name for finding in findings if finding.blocks]
    verdict = f"cannot train: {', '.join(missing)} missing" if missing else "ready to train"
    console.print(Text(f"\n{verdict}", "bold red" if missing else "bold green"))


def _hardware() -> Iterator[Finding]:
    yield Finding(name="CPU cores", state=State.OK, found=str(len(os.sched_getaffinity(0))))
    memory = memory_bytes()
    yield _at_least(
        "memory",
        memory,
        _MIN_MEMORY_BYTES,
        cost="an engine and two Megatron ranks of the quickstart may not fit",
        fix="use a machine or container with at least 4 GiB",
    )


def _cuda() -> list[Finding]:
    """The GPUs, then torch, then CUDA as torch sees it."""
    models = gpu_models()
    gpu = Finding(name="GPU", state=State.OK if models else State.MISSING, found=", ".join(models) or "none")
    if importlib.util.find_spec("torch") is None:
        torch = _package("torch", cost="nothing runs", fix="pip install torch==2.13.0", blocks=True)
        return [gpu, torch, Finding(name="CUDA", state=State.MISSING, found="no torch")]
    try:
        import torch as torch_module
    except (ImportError, OSError) as error:  # the latter where a library of CUDA is missing
        broken = Finding(
            name="torch",
            state=State.MISSING,
            found=f"does not import: {' '.join(str(error).split())}",
            cost="nothing runs",
            fix="pip install --force-reinstall torch==2.13.0",
            blocks=True,
        )
        return [gpu, broken, Finding(name="CUDA", state=State.MISSING, found="no torch")]

    torch = Finding(name="torch", state=State.OK, found=torch_module.__version__)
    if torch_module.cuda.is_available():
        found = f"{torch_module.version.cuda}, {torch_module.cuda.device_count()} visible"
        return [gpu, torch, Finding(name="CUDA", state=State.OK, found=found)]
    fix = (
        "install a CUDA build of torch"
        if models
        else "use a machine with NVIDIA GPUs for models beyond the quickstart"
    )
    cuda = Finding(
        name="CUDA",
        state=State.MISSING,
        found=f"torch built for {torch_module.version.cuda or 'CPU'}",
        cost="all runs on CPU (gloo, Megatron's local layers, SGLang's torch path): for tiny models only",
        fix=fix,
    )
    return [gpu, torch, cuda]


def _packages(*, with_gpu: bool) -> Iterator[Finding]:
    sglang_fix = "pip install sglang==0.5.21" if with_gpu else "pip install --no-deps sglang==0.5.21"
    megatron_fix = "pip install megatron-core==0.16.1"
    yield _package("megatron-core", cost="nothing trains", fix=megatron_fix, blocks=True)
    yield _package("sglang", cost="nothing generates", fix=sglang_fix, blocks=True)
    yield _package("ray", cost="no process is placed", fix="pip install ray==2.60.0", blocks=True)
    yield _package("transformers", cost="no tokenizer", fix="pip install transformers==5.12.1", blocks=True)
    yield _package("math-verify", cost="no reward", fix="pip install math-verify==0.9.0", blocks=True)
    yield _package("psutil", cost="a Megatron checkpoint save hangs", fix="pip install psutil", blocks=True)
    if with_gpu:
        yield _package(
            "transformer-engine",
            cost="bfloat16 needs model.backend: local, which is slower and has no FP8",
            fix='pip install "transformer-engine[core_cu13,pytorch]"',
        )
        yield _package("apex", cost="the optimizer is Transformer Engine's or torch's: no loss worth noting")
        yield _package(
            "sglang-kernel", cost="SGLang does not start", fix="pip install sglang==0.5.21", blocks=True
        )
    else:
        yield from _cpu_arrangement()
    yield _package(
        "tensorboard",
        cost="no TensorBoard curves: set logging.tensorboard=false",
        fix="pip install tensorboard",
    )
    yield _package("matplotlib", cost="no ztrl report", fix="pip install matplotlib")
    yield _package("wandb", cost="only needed when logging.wandb_project is set", fix="pip install wandb")


def _cpu_arrangement() -> Iterator[Finding]:
    """What lets SGLang start without CUDA."""
    if importlib.util.find_spec("torchvision") is not None:
        yield Finding(
            name="SGLang on CPU",
            state=State.LIMITED,
            found=f"torchvision {importlib.metadata.version('torchvision')}",
            cost="its CUDA build breaks every import of transformers beside a CPU torch",
            fix="pip uninstall torchvision",
        )
    elif importlib.util.find_spec("sglang") is not None:
        yield Finding(
            name="SGLang on CPU", state=State.OK, found="torch-native path with stand-ins for its GPU kernels"
        )


def _sandbox() -> Finding:
    if importlib.util.find_spec("ztrl_sandbox") is None:
        return Finding(
            name="sandbox",
            state=State.MISSING,
            found="ztrl_sandbox is not importable",
            cost="no code is executed, unless sandbox.urls names running executors",
            fix="pip install -e .",
        )
    from ztrl_sandbox import tiers

    tier, reason = tiers.choose("auto")
    found = f"isolation tier {tier.name} ({reason})"
    if tier.name != "basic":
        return Finding(name="sandbox", state=State.OK, found=found)
    return Finding(
        name="sandbox",
        state=State.LIMITED,
        found=found,
        cost="snippets see the host's files and network",
        fix="allow user namespaces, or run as root with CAP_SYS_ADMIN (docker: --cap-add SYS_ADMIN"
        " --security-opt seccomp=unconfined --security-opt apparmor=unconfined)",
    )


def _system() -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield Finding(name="loopback port", state=State.OK, found=f"bound 127.0.0.1:{probe.getsockname()[1]}")
    yield _at_least(
        "disk",
        shutil.disk_usage(Path.cwd()).free,
        _MIN_DISK_BYTES,
        cost="checkpoints of the quickstart fit, those of a real model do not",
        fix="put run.directory on a larger disk",
    )
    shared = Path("/dev/shm")
    yield _at_least(
        "/dev/shm",
        shutil.disk_usage(shared).total if shared.is_dir() else 0,
        _MIN_SHARED_MEMORY_BYTES,
        cost="Ray keeps its objects on disk, and NCCL between GPUs may fail",
        fix="docker: --shm-size=16g",
    )
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = limit == resource.RLIM_INFINITY or limit >= _MIN_OPEN_FILES
    yield Finding(
        name="open files",
        state=State.OK if enough else State.LIMITED,
        found=f"limit {'none' if limit == resource.RLIM_INFINITY else limit}",
        cost="" if enough else "many concurrent rollouts run out of connections",
        fix="" if enough else f"ulimit -n {_MIN_OPEN_FILES}",
    )


def _package(name: str, *, cost: str, fix: str = "", blocks: bool = False) -> Finding:
    try:
        return Finding(name=name, state=State.OK, found=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name=name, state=State.MISSING, found="not installed", cost=cost, fix=fix, blocks=blocks
        )


def _at_least(name: str, found_bytes: int, least_bytes: int, *, cost: str, fix: str) -> Finding:
    found = f"{found_bytes / _GIB:.1f} GiB"
    if found_bytes >= least_bytes:
        return Finding(name=name, state=State.OK, found=found)
    return Finding(name=name, state=State.LIMITED, found=found, cost=cost, fix=fix)
