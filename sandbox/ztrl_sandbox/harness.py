"""Runs one snippet as ``__main__`` inside its own, already isolated, single-use process."""

from __future__ import annotations

import ast
import atexit
import builtins
import io
import json
import linecache
import os
import resource
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

from ztrl_sandbox.protocol import MEMORY_EXIT_CODE, Limits

_FILENAME = "snippet.py"
_HEADROOM_BYTES = 32 << 20
"""Left above the soft memory limit, so that a traceback can still be printed when memory has run out."""


class _CountingStdout(io.FileIO):
    """Raw standard output that knows whether anything was written."""

    written_bytes = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.written_bytes += len(data)
        return super().write(data)


def apply_rlimits(limits: Limits, memory_bytes: int, run_timeout_seconds: float | None) -> None:
    """Lower this process's resource limits; ``memory_bytes`` comes on top of what is mapped already.

    ``run_timeout_seconds`` is None for a session, whose process runs many pieces of code.
    """
    with open("/proc/self/statm") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    address_space = mapped_bytes + memory_bytes
    # A backstop: the worker's clock normally comes first.
    cpu_seconds = resource.RLIM_INFINITY if run_timeout_seconds is None else int(run_timeout_seconds) + 2
    for kind, soft, hard in (
        (resource.RLIMIT_AS, address_space, address_space + _HEADROOM_BYTES),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def read_all(fd: int) -> bytes:
    """The whole of a file."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def connect_streams(stdin_fd: int, stdout_fd: int, stderr_fd: int) -> None:
    """Make these the standard streams."""
    for target, fd in enumerate((stdin_fd, stdout_fd, stderr_fd)):
        os.dup2(fd, target)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)), encoding="utf-8")
    # Line buffering: what was printed before a time-out must not be lost.
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_CountingStdout(1, "wb", closefd=False)), encoding="utf-8", line_buffering=True
    )
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "wb", closefd=False)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def run(source: bytes, *, print_last_expression: bool) -> int:
    """Run ``source`` to its end, threads and exit handlers included, and return the exit code."""
    _reseed()
    main = _new_main()
    exit_code = _guarded(lambda: _execute(source, main, print_last_expression))
    shutdown_code = _guarded(_shutdown)
    return exit_code or shutdown_code


def run_session(
    requests: socket.socket, ended_fd: int, options: dict[str, Any], fds: Sequence[int]
) -> int:
    """Run one piece of code after the other in one ``__main__``, until the server ends the session.

    After each, one byte, its exit code, goes to ``ended_fd``. SIGINT stops the code that runs, nothing else.

    Args:
        requests: Where further requests come from.
        ended_fd: A pipe to the worker.
        options: The first request's.
        fds: Its descriptors: code, stdin, stdout, stderr.

    ``sys.exit`` in the code ends the process.
    """
    _reseed()
    main = _new_main()
    interruptible = False

    def interrupt(signal_number: int, frame: types.FrameType | None) -> None:
        if interruptible:
            raise KeyboardInterrupt

    def cell() -> None:
        nonlocal interruptible
        interruptible = True
        try:
            _execute(source, main, options["print_last_expression"])
            _flush()
        finally:
            interruptible = False

    signal.signal(signal.SIGINT, interrupt)
    while True:
        source = read_all(fds[0])
        connect_streams(*fds[1:])
        for fd in fds:
            os.close(fd)
        os.write(ended_fd, bytes([_guarded(cell, may_exit=True)]))
        message, fds, _, _ = socket.recv_fds(requests, 4096, 4, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return 0
        options = json.loads(message)


def _reseed() -> None:
    if "numpy.random" in sys.modules:
        # Python reseeds its own generator after a fork; numpy's would repeat in every snippet.
        sys.modules["numpy.random"].seed()


def _new_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = [_FILENAME]
    return main


def _execute(source: bytes, main: types.ModuleType, print_last_expression: bool) -> None:
    """Run it in ``main``; if asked to, print its last expression's value unless anything was printed."""
    stdout = sys.stdout
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    linecache.cache[_FILENAME] = (len(source), None, lines, _FILENAME)
    tree = ast.parse(source, _FILENAME)
    last = None
    if print_last_expression and tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, _FILENAME, "exec", dont_inherit=True), main.__dict__)
    if last is None:
        return
    value = eval(compile(last, _FILENAME, "eval", dont_inherit=True), main.__dict__)
    stdout.flush()
    if value is not None and stdout.buffer.raw.written_bytes == 0:
        print(repr(value))


def _shutdown() -> None:
    """What the interpreter does at exit, short of freeing every module (tens of ms with sympy loaded)."""
    threading._shutdown()
    atexit._run_exitfuncs()
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()


def _guarded(function: Callable[[], None], *, may_exit: bool = False) -> int:
    """The exit code that the interpreter would give for what ``function`` raises, its traceback printed."""
    try:
        function()
    except SystemExit as exit_request:
        code = _exit_code(exit_request.code)
        if may_exit:
            _guarded(_shutdown)
            os._exit(code)
        return code
    except MemoryError as error:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        _print_traceback(error)
        return MEMORY_EXIT_CODE
    except BaseException as error:  # noqa: BLE001  # whatever escapes the snippet is its own result
        _print_traceback(error)
        return 1
    return 0


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """Print ``error`` as the interpreter would, without this module's frames."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename in (__file__, ast.__file__):
        tb = tb.tb_next
    stream = sys.stderr if sys.stderr is not None and not sys.stderr.closed else None
    if stream is not None:
        traceback.print_exception(type(error), error, tb, file=stream)
