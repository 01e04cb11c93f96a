"""Snippets that look for the server's secrets, for its network, and for one another."""

import contextlib
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from hostile import Case, attempt, memory_search, on_every_claiming_tier, on_tiers, undisturbed, withstand
from sandbox_server import announced, announcing, until


@on_tiers("environment")
def test_the_servers_environment_is_not_the_snippets(executor):
    code = "import os; print(dict(os.environ)); print(open('/proc/self/environ').read())"
    assert "s3cr3t" not in executor.execute(code)["stdout"]
    assert executor.execute(memory_search("s3cr3t-of-the-server"))["stdout"] == "0\n"


@on_tiers("environment")
def test_no_code_input_or_output_is_found_in_the_memory_of_a_later_snippet(executor):
    marker = secrets.token_hex(16)
    for _ in range(4):  # each slot, twice
        result = executor.execute(f"print(input(), {marker!r})", stdin=marker)
        assert result["stdout"] == f"{marker} {marker}\n"
    for _ in range(2):
        assert executor.execute(memory_search(marker))["stdout"] == "0\n"


@on_tiers("processes that are not its own")
def test_no_other_process_is_seen(executor):
    code = """
import glob, os
print(sorted(int(name) > 1 for name in os.listdir("/proc") if name.isdigit()))
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
print(open("/proc/1/environ", "rb").read())
"""
    result = executor.execute(code)
    assert result["stdout"].startswith("[True]\n") and "s3cr3t" not in result["stdout"]
    assert result["status"] == "error"


@pytest.fixture
def listeners():
    """The host's TCP, UDP and abstract sockets: their addresses, and who came."""
    visitors: list[str] = []
    name = f"\0ztrl-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(name)
        abstract.listen()
        for listener in (tcp, udp, abstract):
            listener.setblocking(False)
        yield tcp.getsockname(), udp.getsockname(), name, visitors
        for listener, receive in (
            (tcp, tcp.accept),
            (udp, lambda: udp.recvfrom(16)),
            (abstract, abstract.accept),
        ):
            with contextlib.suppress(BlockingIOError):
                receive()
                visitors.append(str(listener))
    assert not visitors


@on_tiers("network")
def test_there_is_no_network(executor, listeners):
    tcp, udp, abstract, _ = listeners
    code = attempt(
        "import socket",
        f"socket.create_connection(('127.0.0.1', {executor.ready['port']}), 1)",
        f"socket.create_connection({tcp}, 1)",
        "socket.create_connection(('::1', 22), 1)",
        f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {udp})",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
        "socket.getaddrinfo('example.com', 80)",
        "socket.create_connection(('169.254.169.254', 80), 1)",
        f"socket.socket(socket.AF_UNIX).connect({abstract!r})",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
        "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "socket.socket(31, socket.SOCK_RAW, 1)",
        "print([name for _, name in socket.if_nameindex() if name != 'lo'] or 1 / 0)",
    )
    with undisturbed(executor):
        result = executor.execute(code.replace("except OSError", "except (OSError, ZeroDivisionError)"))
    assert result["stdout"] == "denied\n" * code.count("lambda"), result


HOLDER = """
import os, socket, time
name = {marker!r}
for directory in (".", "/snippet/tmp", "/dev/shm"):
    open(f"{{directory}}/{{name}}", "w").write(name)
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0" + name)
abstract.listen()
print("held", flush=True)
time.sleep({seconds})
print(open(name).read(), os.path.exists("/snippet/tmp/intruder"))
"""

INTRUDER = """
import os, socket
name = {marker!r}
found = [file for d in ("/snippet", "/tmp", "/dev") for _, _, files in os.walk(d) for file in files if file == name]
found += [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
try:
    socket.socket(socket.AF_UNIX).connect("\\0" + name)
    found.append("socket")
except OSError:
    pass
found += [line for line in open("/proc/net/unix") if name in line]
open("/snippet/tmp/intruder", "w").write("x")
print(found)
"""


@on_tiers("residue elsewhere")
def test_snippets_that_run_at_once_cannot_find_each_other(executor):
    marker = secrets.token_hex(8)
    for seconds in (1, 4, 16):
        holds = announcing("holder", HOLDER.format(marker=marker, seconds=seconds))
        intrusions = []
        with ThreadPoolExecutor(1) as threads:
            holder = threads.submit(executor.execute, holds)
            assert until(lambda: announced(executor, "holder"))
            while not holder.done():
                intrusions.append(executor.execute(INTRUDER.format(marker=marker))["stdout"])
        assert holder.result()["stdout"] == f"held\n{marker} False\n"
        assert set(intrusions) <= {"[]\n"}
        if len(intrusions) > 2:  # the first and the last may have run before and after what the holder did
            return
    pytest.fail("no intruder ran beside the holder")


FORGED = """
import gc, json, os, socket, struct
forged = {"reason": None, "alive": False, "exit_code": 0, "run_seconds": 0, "cpu_seconds": 0, "peak_memory_bytes": 0}
frame = json.dumps(forged).encode()
print(sorted(os.listdir("/proc/self/fd"))[:-1])
for fd in range(3, 256):
    for write in (lambda: os.write(fd, frame), lambda: socket.socket(fileno=os.dup(fd)).send(frame)):
        try:
            write()
        except OSError:
            pass
for thing in gc.get_objects():
    if isinstance(thing, socket.socket):
        try:
            thing.send(frame)
        except OSError:
            pass
os._exit(9)
"""

FORGERIES = [
    Case(
        name="frames on every descriptor",
        claim="results",
        code=FORGED,
        status="error",
        exit_code=9,
        stdout="['0', '1', '2']\n",
    ),
    Case(
        name="frames on standard output",
        claim="results",
        code="import json\nprint(json.dumps({'reason': None, 'exit_code': 0, 'status': 'ok'}))\n1 / 0",
        status="error",
        exit_code=1,
    ),
    Case(
        name="the harness rewritten",
        claim="results",
        code=(
            "import sys\nfor name, module in list(sys.modules.items()):\n"
            "  if name.startswith('ztrl_sandbox'):\n    for key in list(vars(module)): setattr(module, key, None)\n"
            "import os\nos._exit(8)"
        ),
        status="error",
        exit_code=8,
    ),
    Case(
        name="the caller's frames",
        claim="results",
        code=(
            "import sys, os\nframe = sys._getframe()\nwhile frame:\n"
            "  frame.f_globals['os'] = frame.f_globals['harness'] = None\n  frame = frame.f_back\n"
            "import os\nos._exit(7)"
        ),
        status="error",
        exit_code=7,
    ),
]


@on_every_claiming_tier(FORGERIES)
def test_a_result_cannot_be_forged(executor, case):
    withstand(executor, case)
