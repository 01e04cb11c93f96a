"""Starts an executor as a child process and stops it again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TOKEN_VARIABLE = "ZTRL_SANDBOX_TOKEN"
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


class ExecutorServer:
    """An executor on this machine, which ends with this process whatever happens to it.

    Args:
        host: Address to listen on; anything but loopback needs a token.
        port: Of it; 0 takes a free one.
        token: Bearer token that callers must send; None asks for none.
        workers: Snippets that run at once; None: one for each core.
        preload: Modules that snippets find imported already.
        memory_limit_bytes: Per snippet.
        isolation: ``auto`` (the strongest available), ``full``, ``user`` or ``basic``.
        min_isolation: The weakest of these tiers to accept.
        log_path: Where its standard error goes; None keeps this process's.
        start_timeout_seconds: Longest wait for the preload.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        workers: int | None = None,
        preload: Sequence[str] = ("math", "sympy"),
        memory_limit_bytes: int = 1 << 30,
        isolation: str = "auto",
        min_isolation: str = "basic",
        log_path: Path | None = None,
        start_timeout_seconds: float = 60.0,
    ) -> None:
        self._arguments = [
            *("serve", "--host", host, "--exit-with-parent"),
            *(() if workers is None else ("--workers", str(workers))),
            *("--preload", ",".join(preload)),
            *("--memory-limit-bytes", str(memory_limit_bytes)),
            *("--isolation", isolation, "--min-isolation", min_isolation),
        ]
        self._port = port
        self._token = token
        self._log_path = log_path
        self._start_timeout_seconds = start_timeout_seconds
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        """Set by :meth:`start`."""

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> str:
        """Start it and return its URL once it can serve: a free port, and again the same one after an end.

        Raises:
            RuntimeError: it exited, or was not ready in time.
        """
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        if self._token is not None:
            environment[TOKEN_VARIABLE] = self._token
        with contextlib.ExitStack() as stack:
            log = None if self._log_path is None else stack.enter_context(self._log_path.open("ab"))
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ztrl_sandbox", *self._arguments, "--port", str(self._port)),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C must not end it before the rollouts that use it
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(self._start_timeout_seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            await self.stop()
            raise RuntimeError(f"the executor was not ready after {self._start_timeout_seconds} s") from None
        if not line:
            code = await self._process.wait()
            where = f"see {self._log_path}" if self._log_path else "its standard error says why"
            raise RuntimeError(f"the executor exited with code {code} before it was ready; {where}")
        ready = json.loads(line)
        self.url, self._port = ready["url"], ready["port"]
        return self.url

    async def wait(self) -> int:
        """Wait until it has ended, of itself or by :meth:`stop`. Returns its exit code."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """End it and everything it runs; returns when it is gone."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()
        self._process = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()
