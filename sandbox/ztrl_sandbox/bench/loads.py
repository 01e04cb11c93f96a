"""The snippets that the benchmark sends, each with the answer that it must get."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

BOMB_MEMORY_BYTES = 256 << 20
"""The memory limit sent with each bomb. A server that enforces none lets it reach twice that, no more."""

_LOOP_TIMEOUT_SECONDS = 0.25
_HONEST_TIMEOUT_SECONDS = 10.0
_LOOP_SHARE = 0.05
_BOMB_SHARE = 0.02
_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093)
"""Consecutive and ascending."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """A call and what must come of it."""

    code: str
    status: str
    """As in :class:`~ztrl_sandbox.protocol.Status`."""
    stdout: str
    run_timeout_seconds: float = _HONEST_TIMEOUT_SECONDS
    memory_limit_bytes: int | None = None


def _trivial(number: int) -> Snippet:
    return Snippet(f"print({number} + 1)", "ok", f"{number + 1}\n")


def _sympy(number: int) -> Snippet:
    """A factorisation or an equation, built from its solution."""
    if number % 2:
        low, high = sorted((number % 97, number % 89 + 100))
        code = f"x = sympy.Symbol('x')\nprint(sympy.solve(x**2 - {low + high}*x + {low * high}, x))"
        return Snippet(f"import sympy\n{code}", "ok", f"[{low}, {high}]\n")
    low, high = _PRIMES[number % 5], _PRIMES[5 + number // 5 % 5]
    code = f"import sympy\nprint(sorted(sympy.factorint({low * high}).items()))"
    return Snippet(code, "ok", f"{[(low, 1), (high, 1)]}\n")


def _endless_loop(number: int) -> Snippet:
    return Snippet(f"print({number})\nwhile True: pass", "timeout", f"{number}\n", _LOOP_TIMEOUT_SECONDS)


def _memory_bomb(number: int) -> Snippet:
    chunks = 2 * BOMB_MEMORY_BYTES >> 20
    code = f"kept = []\nfor _ in range({chunks}): kept.append(b'x' * (1 << 20))\nprint({number})"
    return Snippet(code, "memory", "", memory_limit_bytes=BOMB_MEMORY_BYTES)


def _mixed(number: int) -> Snippet:
    drawn = random.Random(number).random()
    if drawn < _LOOP_SHARE:
        return _endless_loop(number)
    if drawn < _LOOP_SHARE + _BOMB_SHARE:
        return _memory_bomb(number)
    return _sympy(number) if number % 2 else _trivial(number)


_LEAVING_THINGS = (
    Snippet("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\nprint(1)", "ok", "1\n"),
    Snippet("import os\nfor _ in range(20):\n  if os.fork() == 0: os._exit(0)\nprint(2)", "ok", "2\n"),
    Snippet(
        "import threading, time\nfor _ in range(20):\n"
        "  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint(3)",
        *("ok", "3\n"),
    ),
    Snippet(
        "import os\nfor k in range(50): open(str(k), 'w').write('x' * 9999)\nos.makedirs('a/b/c')\nprint(4)",
        *("ok", "4\n"),
    ),
    Snippet("import socket\nkept = [socket.socketpair() for _ in range(50)]\nprint(5)", "ok", "5\n"),
    Snippet("import mmap\nmmap.mmap(-1, 50 << 20).write(b'x' * (20 << 20))\nprint(6)", "ok", "6\n"),
    Snippet("print('x' * 60_000)", "ok", "x" * 60_000 + "\n"),
    Snippet("import sys; sys.stdout.close()", "ok", ""),
    Snippet("1 / 0", "error", ""),
    Snippet("import os; os.abort()", "killed", ""),
    Snippet("while True: pass", "timeout", "", 0.1),
    _memory_bomb(7),
)


def _soak(number: int) -> Snippet:
    """Every third leaves something behind, or ends badly."""
    hostile = number % 3 == 0
    return _LEAVING_THINGS[number // 3 % len(_LEAVING_THINGS)] if hostile else _trivial(number)


LOADS = {"trivial": _trivial, "sympy": _sympy, "mixed": _mixed, "soak": _soak}


def snippets(load: str) -> Iterator[Snippet]:
    """An endless, reproducible sequence of one of :data:`LOADS`."""
    return map(LOADS[load], itertools.count(1))
