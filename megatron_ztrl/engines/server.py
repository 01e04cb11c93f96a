"""One SGLang server as a child process: the stock launcher, its flags, its life and its death."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines import cpu_compat, tether
from megatron_ztrl.engines.ports import port_of, reserve_port
from megatron_ztrl.engines.tether import end_session, session_members

WEIGHT_LOADER = "megatron_ztrl.engines.weight_receiver.load"
"""The custom weight loader (see that module)."""
MODEL_PACKAGE = "megatron_ztrl.engines.sglang_models"
"""Where a server looks for its model first, unless the environment names another package."""

FLAGS = {
    "fp8_gemm_runner_backend": "--fp8-gemm-backend",
    "fp4_gemm_runner_backend": "--fp4-gemm-backend",
    "ep_join_mode": "--elastic-ep-join-mode",
    "ep_join_rank_offset": "--elastic-ep-join-rank-offset",
}
"""Fields of SGLang's ``ServerArgs`` whose flags are not called as they are."""

SCRATCH_PREFIX = "ztrl-engine-"
"""In the system's temporary directory; followed by the id of the process that started the engine."""
LOG_TAIL_LINES = 30
LOG_LINE_CHARACTERS = 400
"""SGLang writes all its arguments in one line of 15,000."""
HEALTH_POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0
"""How long a server on GPUs may take to end by itself before it is killed."""


class EngineDied(RuntimeError):
    """The server process ended, or never became healthy; the message carries the end of its log."""


class EngineServer:
    """Starts, watches and stops one server.

    The process leads its own session and dies with the *thread* that called ``start`` (see ``tether``), so
    start it from a thread that lives as long as the engine should.
    """

    def __init__(
        self,
        config: Config,
        *,
        log_path: Path,
        index: int = 0,
        host: str = "127.0.0.1",
        device: Literal["cpu", "cuda"] | None = None,
    ) -> None:
        """Prepare engine ``index`` of the run.

        Args:
            config: reads ``engine``, ``model`` and ``sglang.server_args``.
            log_path: stdout and stderr of the server, appended.
            index: number of this engine; ``engine.port + index`` is its port.
            host: address to listen on.
            device: None takes CUDA when torch sees it.

        Raises:
            ValueError: ``sglang.server_args`` sets what this project owns, or FP8 engines find no GPU.
        """
        self._config = config
        self._log_path = log_path
        self._host = host
        self._port = None if config.engine.port is None else config.engine.port + index
        self._device = device or _detect_device()
        self._reservations: list[socket.socket] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._identity: psutil.Process | None = None
        """Tells the process from another that has its id when it is gone."""
        self._stopping = threading.Lock()
        self._shared_files: set[Path] = set()
        """As of the start, for when the processes can no longer be asked."""
        self._arguments = _server_args(config, index, self._device)

    @property
    def url(self) -> str:
        """Base address, known once started."""
        assert self._port is not None, "start() first"
        return f"http://{self._host}:{self._port}"

    @property
    def alive(self) -> bool:
        """Whether the process runs; says nothing about its health."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the launcher."""
        assert self._process is not None, "start() first"
        return self._process.pid

    def start(self) -> None:
        """Launch the process and return at once.

        Raises:
            ValueError: the configured port is taken.
        """
        assert not self.alive, "already started"
        self._port = self._reserve(self._port)
        arguments = {**self._arguments, "host": self._host, "port": self._port}
        if (
            arguments.get("nccl_port") is None
        ):  # SGLang would pick a free one, and bind it half a minute later
            arguments["nccl_port"] = self._reserve(None)
        command = [sys.executable, "-m", "sglang.launch_server", *_command_line(arguments)]
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, tether.__file__, str(os.getpid()), *command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._identity = psutil.Process(self._process.pid)

    def wait_healthy(self, timeout_seconds: float | None = None) -> None:
        """Block until the server answers requests.

        Args:
            timeout_seconds: None takes ``engine.startup_timeout_seconds``.

        Raises:
            EngineDied: the process ended or the time is over; the message ends with the last log lines.
        """
        assert self._process is not None, "start() first"
        limit = self._config.engine.startup_timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + limit
        while not self._healthy():
            try:  # the pause between two polls, cut short by a death
                code = self._process.wait(HEALTH_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise EngineDied(
                        f"engine {self.url} was not healthy after {limit:.0f} s"
                        f" (engine.startup_timeout_seconds)\n{self.log_tail()}"
                    ) from None
            else:
                raise EngineDied(f"engine {self.url} ended with code {code}\n{self.log_tail()}")
        self._end_reservations()
        self._shared_files = _shared_files(session_members(self.pid))
        self._shared_files_list().write_text("".join(f"{path}\n" for path in self._shared_files))

    def _reserve(self, port: int | None) -> int:
        self._reservations.append(reserve_engine_port(self._host, port))
        return port_of(self._reservations[-1])

    def _end_reservations(self) -> None:
        while self._reservations:
            self._reservations.pop().close()

    def wait(self) -> str:
        """Block until the process has ended, of itself or by ``stop``. Returns how, with the end of its log."""
        process = self._process
        assert process is not None, "start() first"
        return f"engine {self.url} ended with code {process.wait()}\n{self.log_tail()}"

    def stop(self) -> None:
        """End the server and everything it started; nothing is left when this returns. Safe to call twice.

        Raises:
            RuntimeError: a process does not end.
        """
        with self._stopping:
            if self._process is None:
                return
            shared_files = self._shared_files
            if self._session_is_ours():
                shared_files = shared_files | _shared_files(session_members(self._process.pid))
                if self._device == "cuda" and self.alive:  # so that the schedulers give back GPU memory
                    self._process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(
                        subprocess.TimeoutExpired
                    ):  # then it is killed, with its children
                        self._process.wait(GRACE_SECONDS)
                end_session(self._process.pid)
            self._process.wait()
            for path in shared_files:
                path.unlink(missing_ok=True)
            self._scratch.cleanup()
            self._end_reservations()
            self._process = None

    def _shared_files_list(self) -> Path:
        """For the guard of the session, who removes them when nobody is left to call ``stop``."""
        return Path(self._scratch.name) / "shared_files"

    def _session_is_ours(self) -> bool:
        """Whether the processes of the session, if there are any, are those that the server started.

        It leads a session of its own, which outlives it, so that its orphans are found. The kernel gives its process
        id to another only when all of them are gone.
        """
        assert self._identity is not None
        return self._identity.is_running() or not psutil.pid_exists(self._identity.pid)

    def log_tail(self) -> str:
        """The last lines of the log."""
        return end_of_log(self._log_path)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:  # not listening yet, or too busy starting to answer
            return False
        finally:
            connection.close()

    def _environment(self) -> dict[str, str]:
        tensor_parallel_size = self._config.engine.tensor_parallel_size
        paths = [str(Path(__file__).parents[2])]  # the server imports the weight loader
        variables = {
            # Longer than the client's, so no request meets a closing peer.
            "SGLANG_TIMEOUT_KEEP_ALIVE": "600",
            "SGLANG_EXTERNAL_MODEL_PACKAGE": os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE", MODEL_PACKAGE),
        }
        if self._device == "cpu":
            paths.append(str(cpu_compat.STANDINS))
            variables |= cpu_compat.environment(tensor_parallel_size)
        if Path(_model_path(self._config)).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"
        variables["TMPDIR"] = self._scratch.name  # SGLang leaves its sockets behind
        variables[tether.SHARED_FILES_VARIABLE] = str(self._shared_files_list())
        inherited = os.environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([*paths, *([inherited] if inherited else [])])
        return {**os.environ, **variables}


def _model_path(config: Config) -> str:
    return config.engine.path or config.model.path


def _server_args(config: Config, index: int, device: str) -> dict[str, Any]:
    if device == "cpu" and config.engine.path is not None:  # where SGLang would pack FP8 weights for AMX
        raise ValueError("engine.path: FP8 engines need GPUs; leave it out on a machine without one")
    owned: dict[str, Any] = {
        "model_path": _model_path(config),
        "dtype": config.model.dtype,
        "tp_size": config.engine.tensor_parallel_size,
        # One more than the rollouts take: the canary of a publish must not wait for one of them to end.
        "max_running_requests": config.engine.max_running_requests + 1,
        "random_seed": config.run.seed + index,  # siblings on two engines must not sample alike
        "custom_weight_loader": [WEIGHT_LOADER],
        "weight_version": "0",
    }
    if config.publish.interruption == "in_place":  # nothing flushes it there, and old KV must not be shared
        owned["disable_radix_cache"] = True
    given = config.sglang.server_args
    for key in {*owned, "host", "port"} & given.keys():
        raise ValueError(
            f"sglang.server_args.{key} is set by the run itself: remove it (see engine.* and model.*)"
        )
    defaults = {"sleep_on_idle": True, "log_level_http": "warning"}
    return {**defaults, **(cpu_compat.SERVER_ARGS if device == "cpu" else {}), **owned, **given}


def _command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Spell ``ServerArgs`` fields as the launcher's flags."""
    words: list[str] = []
    for key, value in arguments.items():
        if value is None or value is False:
            continue
        words.append(FLAGS.get(key, "--" + key.replace("_", "-")))
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            words.extend(str(item) for item in value)
        elif value is not True:
            words.append(str(value))
    return words


def reserve_engine_port(host: str, port: int | None) -> socket.socket:
    """``reserve_port`` for an engine.

    Raises:
        ValueError: ``port`` is taken.
    """
    try:
        return reserve_port(host, port)
    except OSError as error:
        raise ValueError(
            f"engine.port: {host}:{port} is taken ({error.strerror}); choose another, or null for any"
        ) from error


def end_of_log(path: Path) -> str:
    """The last lines of a log, for a message."""
    if not path.exists():
        return f"(there is no {path})"
    lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"--- end of {path} ---", *(line[:LOG_LINE_CHARACTERS] for line in lines)])


def _detect_device() -> Literal["cpu", "cuda"]:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _shared_files(processes: Iterable[int]) -> set[Path]:
    """What the processes share through memory; a killed process does not remove its files."""
    paths: set[Path] = set()
    for pid in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # already gone
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = line.split(maxsplit=5)[5:]  # address permissions offset device inode path
                paths.update(Path(name) for name in path if name.startswith("/dev/shm/"))
    return paths
