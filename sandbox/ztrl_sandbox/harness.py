"""Runs one snippet as ``__main__`` inside its own, already isolated, single-use process."""

from __future__ import annotations

import ast
import atexit
import builtins
import io
import linecache
import os
import resource
import sys
import threading
import traceback
import types
from collections.abc import Callable

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


def apply_rlimits(limits: Limits, memory_bytes: int, run_timeout_seconds: float) -> None:
    """Lower this process's resource limits; ``memory_bytes`` comes on top of what is mapped already."""
    with open("/proc/self/statm") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    address_space = mapped_bytes + memory_bytes
    cpu_seconds = int(run_timeout_seconds) + 2  # a backstop: the worker's clock normally comes first
    for kind, soft, hard in (
        (resource.RLIMIT_AS, address_space, address_space + _HEADROOM_BYTES),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def connect_streams(stdin_fd: int, stdout_fd: int, stderr_fd: int) -> None:
    """Make these the standard streams, and close every other descriptor."""
    for target, fd in enumerate((stdin_fd, stdout_fd, stderr_fd)):
        os.dup2(fd, target)
    os.closerange(3, 1 << 20)
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
    stdout = sys.stdout
    if "numpy.random" in sys.modules:
        # Python reseeds its own generator after a fork; numpy's would repeat in every snippet.
        sys.modules["numpy.random"].seed()
    linecache.cache[_FILENAME] = (
        len(source),
        None,
        source.decode("utf-8", "replace").splitlines(keepends=True),
        _FILENAME,
    )
    exit_code = _guarded(lambda: _execute(source, stdout if print_last_expression else None))
    shutdown_code = _guarded(_shutdown)
    return exit_code or shutdown_code


def _execute(source: bytes, silent_stdout: io.TextIOWrapper | None) -> None:
    """Run the module; with ``silent_stdout``, print its last expression's value if that stayed silent."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = [_FILENAME]
    tree = ast.parse(source, _FILENAME)
    last = None
    if silent_stdout is not None and tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, _FILENAME, "exec", dont_inherit=True), main.__dict__)
    if last is None:
        return
    value = eval(compile(last, _FILENAME, "eval", dont_inherit=True), main.__dict__)
    silent_stdout.flush()
    if value is not None and silent_stdout.buffer.raw.written_bytes == 0:
        print(repr(value))


def _shutdown() -> None:
    """What the interpreter does at exit, short of freeing every module (tens of ms with sympy loaded)."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()


def _guarded(function: Callable[[], None]) -> int:
    """The exit code that the interpreter would give for what ``function`` raises, its traceback printed."""
    try:
        function()
    except SystemExit as exit_request:
        return _exit_code(exit_request.code)
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
