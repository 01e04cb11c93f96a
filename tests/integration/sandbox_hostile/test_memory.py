"""Snippets that want more memory than they may have."""

from hostile import Case, on_every_claiming_tier, withstand

ACROSS_FORKS = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        kept = b"x" * (150 << 20)
        time.sleep(60)
time.sleep(60)
"""

SHARED_ACROSS_FORKS = """
import mmap, os, time
for _ in range(3):
    if os.fork() == 0:
        kept = mmap.mmap(-1, 150 << 20)
        for start in range(0, len(kept), 4096):
            kept[start] = 1
        time.sleep(60)
time.sleep(60)
"""

LIMIT_RAISED = """
import resource
try:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
except ValueError:
    pass  # who may not raise it meets it
kept = []
for _ in range(128):  # 1 GiB, should nothing stop it
    kept.append(b"x" * (8 << 20))
"""

UNMAPPED = """
import os
for number in range(10):
    fd = os.memfd_create(str(number))
    for _ in range(16):
        os.write(fd, bytes(1 << 20))
print("kept")
"""

IN_SOCKETS = """
import os, socket, time
def fill():
    kept = []
    for _ in range(100):
        kept.append(socket.socketpair())
        for end in kept[-1]:
            end.setblocking(False)
            try:
                while True:
                    end.send(bytes(1 << 16))
            except BlockingIOError:
                pass
    time.sleep(60)
for _ in range(24):  # 1 GiB, should nothing stop it
    if os.fork() == 0:
        fill()
        os._exit(0)
time.sleep(60)
"""

OVER_THE_LIMIT = {"claim": "memory", "status": "memory"}

BOMBS = [
    Case(name="8 GiB at once", code="x = bytearray(8 << 30)", exit_code=1, **OVER_THE_LIMIT),
    Case(
        name="many small", code="x = []\nwhile True: x.append(bytes(1 << 16))", exit_code=1, **OVER_THE_LIMIT
    ),
    Case(name="many tiny", code="x = list(range(10**9))", exit_code=1, **OVER_THE_LIMIT),
    Case(name="numpy array", code="import numpy; x = numpy.ones(10**9)", exit_code=1, **OVER_THE_LIMIT),
    Case(name="across forks", code=ACROSS_FORKS, **OVER_THE_LIMIT),
    Case(name="shared mappings across forks", code=SHARED_ACROSS_FORKS, **OVER_THE_LIMIT),
    Case(name="limit raised", code=LIMIT_RAISED, **OVER_THE_LIMIT),
    Case(
        name="endless recursion without a limit",
        code="import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        options={"memory_limit_bytes": 64 << 20},
        **OVER_THE_LIMIT,
    ),
    Case(
        name="a mapping too large",
        claim="memory",
        code="import mmap; mmap.mmap(-1, 1 << 30)",
        status="error",
        stderr_end="Cannot allocate memory",
    ),
    Case(
        name="memory error caught",
        claim="memory",
        code="try:\n  bytearray(8 << 30)\nexcept MemoryError: print('caught')",
        stdout="caught\n",
    ),
    Case(
        name="in a new interpreter",
        claim="memory",
        code=(
            "import subprocess, sys\n"
            "print(subprocess.run([sys.executable, '-c', 'bytearray(8 << 30)'], capture_output=True).returncode)"
        ),
        stdout="1\n",
    ),
    Case(
        name="memfd",
        claim="memory that no process has mapped",
        code=UNMAPPED,
        status="error",
        stderr_end="Operation not permitted",
    ),
    Case(
        name="buffers of sockets",
        claim="memory of the kernel",
        code=IN_SOCKETS,
        status="memory",
    ),
    Case(
        name="file in memory",
        claim="memory that no process has mapped",
        code="for k in range(8): open(f'/dev/shm/{k}', 'wb').write(bytes(16 << 20))",
        status="error",
        stderr_end="No space left on device",
    ),
]


@on_every_claiming_tier(BOMBS)
def test_memory_is_limited(executor, case):
    withstand(executor, case)


NESTED = [
    Case(
        name="recursion",
        claim="results",
        code="def f(): f()\nf()",
        status="error",
        exit_code=1,
        stderr_end="RecursionError: maximum recursion depth exceeded",
    ),
    Case(
        name="recursion in C",
        claim="results",
        code="x = ()\nfor _ in range(10**6): x = (x,)\nhash(x)",
        status="killed",
        exit_code=-11,
    ),
    Case(
        name="parentheses",
        claim="results",
        code="(" * 10_000 + ")" * 10_000,
        status="error",
        exit_code=1,
        stderr_end="SyntaxError: too many nested parentheses",
    ),
    Case(name="minus signs", claim="results", code="-" * 100_000 + "1", status="error", exit_code=1),
    Case(name="additions", claim="results", code="+".join(["1"] * 100_000), status="error", exit_code=1),
    Case(name="attributes", claim="results", code="a" + ".a" * 100_000, status="error", exit_code=1),
    Case(
        name="tree given to compile",
        claim="results",
        code="import ast\nx = ast.Constant(1)\nfor _ in range(10**5): x = ast.UnaryOp(ast.USub(), x)\n"
        "compile(ast.fix_missing_locations(ast.Expression(x)), '', 'eval')",
        status="error",
        exit_code=1,
    ),
]


@on_every_claiming_tier(NESTED)
def test_deep_nesting_is_an_error_of_the_snippet(executor, case):
    withstand(executor, case)
