"""Writes down what a run was made of: the resolved configuration, versions, source revision and machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import megatron_ztrl
from megatron_ztrl.config.load import save_config
from megatron_ztrl.config.schema import Config
from megatron_ztrl.observability import names

_DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "sglang",
    "transformers",
    "ray",
    "numpy",
)


def write_run_info(config: Config, *, prefix: str = "") -> None:
    """Writes ``config.yaml`` and ``environment.json``, with a prefix to their names, into the run directory."""
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(environment(), indent=2, ensure_ascii=False)
    temporary = directory / f"{prefix}run_info.tmp"
    save_config(config, temporary)
    os.replace(temporary, directory / f"{prefix}{names.CONFIG_FILE}")
    write_whole(directory / f"{prefix}{names.ENVIRONMENT_FILE}", text + "\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is never there by half, whenever the process is killed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Versions, source revision, machine and command line, ready for JSON."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": versions(),
        "source": source_revision(Path(megatron_ztrl.__file__).parent),
        "machine": machine(),
    }


def versions() -> dict[str, str | None]:
    """Installed releases, None for what is missing; looked up without importing anything."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "megatron_ztrl": megatron_ztrl.__version__,
    }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def source_revision(directory: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that holds a directory; None outside a checkout."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # an installed copy may lie inside another project's tree
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except subprocess.CalledProcessError:
        return None


def machine() -> dict[str, Any]:
    """What the run had to work with on this node."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "gpus": gpu_models(),
    }


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or the container's when that is less."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [installed]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else "max"
        if text != "max":
            limits.append(int(text))
    return min(limits)


def gpu_models() -> list[str]:
    """NVIDIA GPUs as the driver lists them; asking CUDA would take memory on each of them."""
    models = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text().splitlines()
        models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return models


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
