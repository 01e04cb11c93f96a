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
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

from ztrl_sandbox.protocol import MEMORY_EXIT_CODE, Limits

_FILENAME = "snippet.py"
_DEEP_TRACEBACK_FRAMES = 10_000
_HEADROOM_BYTES = 32 << 20
"""Left above the soft memory limit, so that a traceback can still be printed when memory has run out."""


class _CountingStdout(io.FileIO):
    """Raw standard output that knows whether anything was written."""

    written_bytes = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.written_bytes += len(data)
        return super().write(data)


def apply_common_rlimits(limits: Limits) -> None:
    """Lower the limits that worker and snippets share."""
    for kind, value in (
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def mapped_bytes() -> int:
    """Address space of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def apply_rlimits(address_space_bytes: int, run_timeout_seconds: float | None) -> None:
    """Lower the limits of one snippet.

    ``run_timeout_seconds`` is None for a session, whose process runs many pieces of code.
    """
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes + _HEADROOM_BYTES))
    if run_timeout_seconds is not None:  # a backstop: the worker's clock normally comes first
        cpu_seconds = int(run_timeout_seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))


def read_all(fd: int) -> bytes:
    """The whole of a file."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


class Streams:
    """Standard streams for code to come, made before it comes: they refer to descriptors 0, 1 and 2.

    The descriptors must be pipes or files of the kind that they will be when the code runs.
    """

    def __init__(self) -> None:
        stdin = io.BufferedReader(io.FileIO(0, "rb", closefd=False))
        self._stdin = io.TextIOWrapper(stdin, encoding="utf-8")
        # Line buffering: what was printed before a time-out must not be lost.
        stdout = io.BufferedWriter(_CountingStdout(1, "wb", closefd=False))
        self._stdout = io.TextIOWrapper(stdout, encoding="utf-8", line_buffering=True)
        stderr = io.BufferedWriter(io.FileIO(2, "wb", closefd=False))
        self._stderr = io.TextIOWrapper(
            stderr, encoding="utf-8", errors="backslashreplace", line_buffering=True
        )

    @classmethod
    def ahead_of_time(cls) -> Streams:
        """Made in the worker, whose own descriptors 0 to 2 are other kinds of files."""
        own = [os.dup(fd) for fd in range(3)]
        reader, writer = os.pipe()
        for target, fd in enumerate((reader, writer, writer)):
            os.dup2(fd, target)
        streams = cls()
        for target, fd in enumerate(own):
            os.dup2(fd, target)
        for fd in (*own, reader, writer):
            os.close(fd)
        return streams

    def connect(self, stdin_fd: int, stdout_fd: int, stderr_fd: int) -> None:
        """Make these descriptors the standard streams."""
        for target, fd in enumerate((stdin_fd, stdout_fd, stderr_fd)):
            os.dup2(fd, target)
        sys.stdin, sys.stdout, sys.stderr = self._stdin, self._stdout, self._stderr
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def run(source: bytes, *, print_last_expression: bool) -> int:
    """Run ``source`` to its end, threads and exit handlers included, and return the exit code."""
    _reseed()
    main = _new_main()
    exit_code = _guarded(lambda: _execute(source, main, print_last_expression))
    shutdown_code = _guarded(_shutdown)
    return exit_code or shutdown_code


class Interrupts:
    """SIGINT in a session: raised in its code and nowhere else; one that comes before its code begins waits for it."""

    def __init__(self) -> None:
        self._code_runs = False
        self._waits = False

    def on_signal(self, signal_number: int, frame: types.FrameType | None) -> None:
        """The handler."""
        if self._code_runs:
            raise KeyboardInterrupt
        self._waits = True

    def forget(self) -> None:
        """Whatever came was meant for code that had ended by then."""
        self._waits = False

    def begin(self) -> None:
        """Raise ``KeyboardInterrupt`` from now on, or at once if one waits."""
        self._code_runs = True
        if self._waits:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Raise it no more."""
        self._code_runs = self._waits = False


def run_session(
    requests: socket.socket,
    ended_fd: int,
    interrupts: Interrupts,
    options: dict[str, Any],
    fds: Sequence[int],
) -> int:
    """Run one piece of code after the other in one ``__main__``, until the server ends the session.

    After each, one byte, its exit code, goes to ``ended_fd``. SIGINT stops the code that runs, nothing else.

    Args:
        requests: Where further requests come from.
        ended_fd: A pipe to the worker.
        interrupts: Has handled SIGINT since the process began.
        options: The first request's.
        fds: Its descriptors: code, stdin, stdout, stderr.

    ``sys.exit`` in the code ends the process.
    """
    _reseed()
    main = _new_main()

    def cell() -> None:
        try:
            interrupts.begin()
            _execute(source, main, options["print_last_expression"])
            _flush()
        finally:
            interrupts.end()

    while True:
        source = read_all(fds[0])
        Streams().connect(*fds[1:])
        for fd in fds:
            os.close(fd)
        os.write(ended_fd, bytes([_guarded(cell, may_exit=True)]))
        message, fds, _, _ = socket.recv_fds(requests, 4096, 4, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return 0
        interrupts.forget()
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
    sys.path.insert(0, os.getcwd())  # as for a script that lies there
    return main


def _execute(source: bytes, main: types.ModuleType, print_last_expression: bool) -> None:
    """Run it in ``main``; if asked to, print its last expression's value unless anything was printed."""
    stdout = sys.stdout
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    linecache.cache[_FILENAME] = (len(source), None, lines, _FILENAME)
    if not print_last_expression:
        exec(_parsed(source, 0), main.__dict__)
        return
    tree = _parsed(source, ast.PyCF_ONLY_AST)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, _FILENAME, "exec", dont_inherit=True), main.__dict__)
    if last is None:
        return
    value = eval(compile(last, _FILENAME, "eval", dont_inherit=True), main.__dict__)
    stdout.flush()
    if value is not None and stdout.buffer.raw.written_bytes == 0:
        print(repr(value))


def _parsed(source: bytes, flags: int) -> Any:
    try:
        return compile(source, _FILENAME, "exec", flags=flags, dont_inherit=True)
    except MemoryError:  # so the parser calls the end of its own stack; memory there is enough for any source
        raise RecursionError("too deeply nested for the parser") from None


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
    except BaseException as error:  # noqa: BLE001  # whatever escapes the snippet is its own result
        deep = _is_deep(error.__traceback__)
        if deep:  # printing it takes seconds, and it may be what fills the memory
            error.__traceback__ = None
        # Where no memory is left for a traceback entry, the interpreter loses the MemoryError.
        out_of_memory = isinstance(error, MemoryError) or (deep and isinstance(error, SystemError))
        if out_of_memory:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        _print_traceback(error)
        return MEMORY_EXIT_CODE if out_of_memory else 1
    return 0


def _is_deep(tb: types.TracebackType | None) -> bool:
    for _ in range(_DEEP_TRACEBACK_FRAMES):
        if tb is None:
            return False
        tb = tb.tb_next
    return True


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
