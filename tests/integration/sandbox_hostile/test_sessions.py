"""Sessions of other rollouts, and sessions that abuse what a session has."""

import contextlib
import secrets

import pytest
from hostile import calm, memory_search, on_tiers, undisturbed
from sandbox_server import Executor, until


@contextlib.contextmanager
def session(executor: Executor):
    """Opens one; yields a function that runs code in it and returns the answer and its HTTP status."""
    status, opened, _ = executor.post("/v1/sessions")
    assert status == 201, opened
    path = f"/v1/sessions/{opened['session_id']}"

    def execute(code: str, run_timeout_seconds: float = 20.0) -> tuple[int, dict]:
        body = {"code": code, "run_timeout_seconds": run_timeout_seconds}
        return executor.post(f"{path}/execute", **body)[:2]

    execute.session_id = opened["session_id"]
    try:
        yield execute
    finally:
        executor.request("DELETE", path)


KEEP_SECRETS = """
import os, socket
kept = {marker!r}
os.environ["KEPT"] = kept
for directory in (".", os.environ["TMPDIR"]):
    open(os.path.join(directory, kept), "w").write(kept)
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + kept)
listener.listen()
print(kept)
"""

FIND_SECRETS = """
import os, socket
name = {marker!r}
found = [file for d in ("/snippet", "/tmp", "/dev") for _, _, files in os.walk(d) for file in files if file == name]
found += [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
found += [line for line in open("/proc/net/unix") if name in line]
try:
    socket.socket(socket.AF_UNIX).connect("\\0" + name)
    found.append("socket")
except OSError:
    pass
print(found)
"""


@on_tiers("residue elsewhere")
def test_the_session_of_another_rollout_is_out_of_reach(executor):
    marker = secrets.token_hex(16)
    with session(executor) as victim, session(executor) as thief:
        assert victim(KEEP_SECRETS.format(marker=marker))[1]["stdout"] == f"{marker}\n"
        for run in (thief, lambda code: (200, executor.execute(code))):
            assert run(FIND_SECRETS.format(marker=marker))[1]["stdout"] == "[]\n"
        assert victim("print(kept, open(kept).read())")[1]["stdout"] == f"{marker} {marker}\n"
    with session(executor) as next_in_the_slot:
        assert next_in_the_slot(FIND_SECRETS.format(marker=marker))[1]["stdout"] == "[]\n"


@on_tiers("environment")
def test_no_secret_of_a_session_is_in_the_memory_of_another(executor):
    marker = secrets.token_hex(16)
    with session(executor) as victim, session(executor) as thief:
        victim(KEEP_SECRETS.format(marker=marker))
        assert thief(memory_search(marker))[1]["stdout"] == "0\n"
        assert executor.execute(memory_search(marker))["stdout"] == "0\n"
    with session(executor) as next_in_the_slot:
        assert next_in_the_slot(memory_search(marker))[1]["stdout"] == "0\n"


@on_tiers("environment")
def test_the_id_of_a_session_cannot_be_guessed(executor):
    with session(executor) as one, session(executor) as other:
        ids = {one.session_id, other.session_id}
        assert len(ids) == 2 and min(map(len, ids)) >= 22  # 128 bits in base64
        assert len(set(zip(one.session_id, other.session_id, strict=True))) > 5  # no counter
        for guess in (one.session_id[:-1], one.session_id.swapcase(), "0", "..", "%00"):
            assert executor.post(f"/v1/sessions/{guess}/execute", code="print(1)")[0] == 404


ABUSES = {
    "frames on every descriptor": (
        "import os\nfor fd in range(3, 256):\n  try:\n    os.write(fd, bytes(8))\n  except OSError: pass"
    ),
    "every descriptor closed": "import os; os.closerange(0, 256)",
    "every descriptor closed long before the end": "import os, time\nos.closerange(3, 256)\ntime.sleep(60)",
    "requests read by a thread": (
        "import os, socket, threading\n"
        "def steal():\n  while True: socket.recv_fds(socket.socket(fileno=os.dup(3)), 4096, 4)\n"
        "threading.Thread(target=steal, daemon=True).start()"
    ),
    "handler of the interrupt replaced": (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    ),
    "daemons": "import os, time\nfor _ in range(20):\n  if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)",
    "child that answers instead": "import os\nif os.fork() != 0: os._exit(0)",
    "child that reads requests, too": "import os\nos.fork()",
    "memory": "kept = []\nwhile True: kept.append(b'x' * (1 << 20))",
    "deep tree": "import os\nfor _ in range(3000):\n  os.mkdir('d')\n  os.chdir('d')",
}


@pytest.mark.parametrize("abuse", ABUSES.values(), ids=ABUSES.keys())
@on_tiers("results")
def test_a_session_that_abuses_its_channels_harms_itself_only(executor, abuse):
    with undisturbed(executor):
        with session(executor) as hostile, session(executor) as honest:
            honest("x = 6")
            assert hostile(abuse, 1.0)[0] == 200
            hostile("print('again')", 1.0)  # whatever that gives
            assert honest("print(x * 7)")[1]["stdout"] == "42\n"
        assert until(lambda: calm(executor))
