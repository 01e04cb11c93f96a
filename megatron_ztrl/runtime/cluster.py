"""The Ray cluster of a run: embedded on one machine, or joined when ``RAY_ADDRESS`` names one."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ztrl.engines.server import SCRATCH_PREFIX

OBJECT_STORE_BYTES = 512 << 20
"""Of the embedded cluster: packed batches and log-probs, a few hundred KB each."""
_DIRECTORY_PREFIX = "ztrl-ray-"
"""In the system's temporary directory; followed by the driver's process id."""
_ADDRESS_VARIABLE = "ZTRL_NODE_ADDRESS"
"""Set, and inherited by every process of an embedded cluster: its servers listen on loopback only."""
_ANSWER_SECONDS = 10.0


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """Starts (or joins) Ray; an embedded cluster leaves no process and no file behind.

    Raises:
        ValueError: Nobody answers at ``RAY_ADDRESS``.
    """
    _check_answers(os.environ.get("RAY_ADDRESS", ""))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A local cluster would write a token under the home directory and turn authentication on for later ones.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray would run its workers, and so the ranks and the engines, at niceness 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray would print a paragraph of guesses; the run itself says what died, and what becomes of it.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed ")
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            os.environ[_ADDRESS_VARIABLE] = "127.0.0.1"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            _remove_directories_of_killed_runs()
            # Sockets live in it, and their paths may not exceed 107 bytes.
            directory = tempfile.TemporaryDirectory(
                prefix=f"{_DIRECTORY_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True
            )
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=stack.enter_context(directory),
            )
        stack.callback(ray.shutdown)
        # Ray has put two handlers in its place: one prints a stack and aborts after three seconds, one exits at once.
        signal.signal(signal.SIGTERM, on_sigterm)
        yield


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes, and end in a traceback."""
    host, colon, port = address.rpartition(":")
    if "/" in address or not (colon and port.isdecimal()):
        return  # nothing, or what only Ray understands: "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start one with"
            " `ray start --head`, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def _remove_directories_of_killed_runs() -> None:
    """A driver that was killed could not remove its own, nor those of its engines."""
    for prefix in (_DIRECTORY_PREFIX, SCRATCH_PREFIX):
        for directory in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
            pid = directory.name.removeprefix(prefix).partition("-")[0]
            if pid.isdigit() and not Path("/proc", pid).exists():
                shutil.rmtree(directory, ignore_errors=True)  # another user's is his to remove


def cluster_gpus() -> int:
    """GPUs of the whole cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cluster_nodes() -> list[str]:
    """Ray's ids of the nodes that are up."""
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def node_address() -> str:
    """Where the other nodes reach this one; loopback when there are none."""
    import ray

    return os.environ.get(_ADDRESS_VARIABLE) or ray.util.get_node_ip_address()


async def user_facing(reference: Any) -> Any:
    """The result of a remote call whose ValueErrors and OSErrors are for the user: they are raised as themselves."""
    from ray.exceptions import RayTaskError

    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise error.cause from error
        raise
