"""Snippets that abuse their standard streams, and callers that leave."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from hostile import (
    HONEST,
    HONEST_OUTPUT,
    WORKERS,
    Case,
    on_every_claiming_tier,
    on_tiers,
    undisturbed,
    withstand,
)
from sandbox_server import until

FLOOD = "import os\nfor _ in range(1024): os.write({fd}, bytes(1 << 20))"  # 1 GiB, and not one line

STREAMS = [
    Case(
        name="standard output closed",
        claim="streams",
        code="import sys; sys.stdout.close(); sys.stderr.close()",
        exit_code=0,
        stdout="",
    ),
    Case(
        name="print to a closed output",
        claim="streams",
        code="import sys; sys.stdout.close(); print(1)",
        status="error",
        exit_code=1,
        stderr_end="ValueError: I/O operation on closed file.",
    ),
    Case(
        name="descriptor 1 closed",
        claim="streams",
        code="import os; os.close(1); print(1)",
        status="error",
        exit_code=1,
        stderr_end="OSError: [Errno 9] Bad file descriptor",
    ),
    Case(
        name="all descriptors closed",
        claim="streams",
        code="import os; os.closerange(0, 1000)",
        exit_code=0,
        stdout="",
    ),
    Case(
        name="output replaced",
        claim="streams",
        code="import sys, io; print('seen'); sys.stdout = io.StringIO(); print('unseen')",
        stdout="seen\n",
    ),
    Case(
        name="invalid UTF-8 and NUL",
        claim="streams",
        code=r"import os; os.write(1, b'a\xff\x00\xc3(\xf0\x9f\x98b\xed\xa0\x80')",
        stdout="a\ufffd\x00\ufffd(\ufffdb\ufffd\ufffd\ufffd",
    ),
    Case(
        name="lone surrogate printed",
        claim="streams",
        code="print(chr(0xd800))",
        status="error",
        exit_code=1,
        stderr_end="can't encode character '\\ud800' in position 0: surrogates not allowed",
    ),
    Case(
        name="lone surrogate in the code",
        claim="streams",
        code="print('\ud800')",
        status="error",
        exit_code=1,
    ),
    Case(name="NUL in the code", claim="streams", code="print('\0')", status="error", exit_code=1),
    Case(
        name="control characters", claim="streams", code=r"print('\x1b[2J\r\x08')", stdout="\x1b[2J\r\x08\n"
    ),
    Case(
        name="no standard input",
        claim="streams",
        code="input()",
        status="error",
        exit_code=1,
        stderr_end="EOFError: EOF when reading a line",
    ),
    Case(
        name="ten megabytes of standard input",
        claim="streams",
        code="import sys; print(len(sys.stdin.read()))",
        options={"stdin": "é" * 5_000_000},
        stdout="5000000\n",
    ),
    Case(
        name="standard input changed",
        claim="streams",
        code="import os\ntry:\n  os.write(0, b'x')\nexcept OSError: pass\nprint(input())",
        options={"stdin": "given"},
    ),
    Case(
        name="half a kilobyte of input unread",
        claim="streams",
        code="print('done')",
        options={"stdin": "x" * 512},
        stdout="done\n",
    ),
]


@on_every_claiming_tier(STREAMS)
def test_streams_carry_what_was_written_and_nothing_else(executor, case):
    withstand(executor, case)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@on_every_claiming_tier(
    Case(
        name=f"a gibibyte on descriptor {fd}",
        claim="streams",
        code=f"print('begin', flush=True)\n{FLOOD.format(fd=fd)}",
        status="output_truncated",
        exit_code=-9,
    )
    for fd in (1, 2)
)
def test_a_flood_without_a_newline_is_stopped_and_not_kept(executor, case):
    before = resident_bytes(executor.process.pid)
    result = withstand(executor, case)
    assert resident_bytes(executor.process.pid) - before < 48 << 20  # a hundredth of what was sent, and slack
    assert result["stdout"].startswith("begin\n")
    assert len(result["stdout"]) < 70_000 and len(result["stderr"]) < 70_000
    assert "bytes of output cut]" in result["stdout"] + result["stderr"]


@on_every_claiming_tier(
    [
        Case(
            name="half a megabyte",
            claim="streams",
            code="print('a' * 250_000 + 'b' * 250_000)",
            status="output_truncated",
            exit_code=0,
        )
    ]
)
def test_long_output_keeps_both_ends_and_says_how_much_is_missing(executor, case):
    stdout = withstand(executor, case)["stdout"]
    kept = 64 << 10
    head, cut, tail = stdout[: kept // 2], stdout[kept // 2 : -kept // 2], stdout[-kept // 2 :]
    assert (head, tail) == ("a" * (kept // 2), "b" * (kept // 2 - 1) + "\n")
    assert cut == f"\n... [{500_001 - kept} bytes of output cut] ...\n"


def hang_up_on(executor, code: str, path: str = "/v1/execute") -> None:
    """Send a request and close the connection when the snippet runs."""
    body = json.dumps({"code": code, "run_timeout_seconds": 60}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", executor.ready["port"])) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.1)  # the server gives no sign that the snippet has started


@on_tiers("streams")
def test_a_caller_that_hangs_up_takes_its_snippets_processes_along(executor):
    daemon = (
        "import os, time\nfor _ in range(5):\n  if os.fork() == 0: os.setsid()\nwhile True: time.sleep(1)"
    )
    with undisturbed(executor):
        hang_up_on(executor, daemon)
    hang_up_on(executor, daemon)
    hang_up_on(executor, daemon)
    started_at = time.monotonic()
    assert executor.execute(HONEST)["stdout"] == HONEST_OUTPUT
    assert time.monotonic() - started_at < 20
    assert until(executor.settled)


@on_tiers("streams")
def test_callers_that_hang_up_while_they_queue_cost_nothing(executor):
    busy = [hang_up_after(executor, "import time; time.sleep(60)") for _ in range(WORKERS)]
    queued = [hang_up_after(executor, "raise SystemExit('must not run')") for _ in range(20)]
    assert until(lambda: executor.get("/health")["queued"] == 20)
    for connection in (*queued, *busy):
        connection.close()
    started_at = time.monotonic()
    assert executor.execute(HONEST)["stdout"] == HONEST_OUTPUT
    assert time.monotonic() - started_at < 20
    assert executor.get("/health")["queued"] == 0
    assert until(executor.settled)


def hang_up_after(executor, code: str) -> socket.socket:
    """A connection that has asked, for the caller to close."""
    body = json.dumps({"code": code, "run_timeout_seconds": 60}).encode()
    head = "POST /v1/execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", executor.ready["port"]))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@on_tiers("streams")
def test_a_request_that_never_ends_holds_no_worker(executor):
    head = b"POST /v1/execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", executor.ready["port"])))
            connection.sendall(head)
        assert executor.execute(HONEST)["stdout"] == HONEST_OUTPUT
