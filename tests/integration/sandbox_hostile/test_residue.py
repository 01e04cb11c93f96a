"""What a snippet leaves behind is gone before the next one starts in its place."""

import pytest
from hostile import ALL, CLAIMS, WORKERS, calm, undisturbed
from sandbox_server import until

NAMESPACED_SETTINGS = [
    *(
        "net/ipv4/ip_default_ttl",
        "net/ipv4/ip_local_port_range",
        "net/core/somaxconn",
        "net/unix/max_dgram_qlen",
    ),
    *("kernel/msgmax", "kernel/shmmax", "kernel/shmall", "kernel/hostname"),
]
"""All of them belong to a namespace: should a tier fail, the machine's own are safe."""

FINGERPRINT_OF_ITS_OWN = """
import builtins, math, os, resource, signal, sys
def describe(path):
    status = os.lstat(path)
    return path, oct(status.st_mode), status.st_uid, status.st_nlink, os.listxattr(path, follow_symlinks=False)
print("directory", describe(os.getcwd())[1:], os.listdir("."))
print("environment", sorted(os.environ.items()))
print("process", os.nice(0), sorted(os.sched_getaffinity(0)), os.umask(0), os.getpriority(os.PRIO_USER, 0))
print("limits", [resource.getrlimit(getattr(resource, "RLIMIT_" + kind)) for kind in ("NOFILE", "NPROC", "FSIZE")])
print("signals", signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getitimer(signal.ITIMER_REAL))
print("handlers", [signal.getsignal(number) for number in sorted(signal.valid_signals())])
print("modules", sys.path, hasattr(math, "residue"), builtins.len("four"), len(sys.modules))
"""

FINGERPRINT_OF_THE_SLOT = """
for top, directories, files in os.walk("/snippet"):
    print("tree", [describe(os.path.join(top, name)) for name in sorted(directories + files)])
print("roots", describe("/snippet"), describe("/"), describe("/dev/shm"), sorted(os.listdir("/tmp")))
for kind in ("shm", "msg", "sem"):
    print("system v", open(f"/proc/sysvipc/{kind}").read())
print("sockets", open("/proc/net/unix").read())
for name in {settings}:
    print(name, open("/proc/sys/" + name).read())
print("processes", sum(name.isdigit() for name in os.listdir("/proc")))
print("keys", [(fields[:2], fields[4:]) for fields in map(str.split, open("/proc/keys"))])  # no counts, no clocks
"""

LEAVES = {
    "files": """
import os, tempfile
for d in {os.getcwd(), tempfile.gettempdir()}:
    open(f"{d}/left", "w").write("x")
    os.mkfifo(f"{d}/fifo")
    os.makedirs(f"{d}/a/b/c", exist_ok=True)
    os.symlink("/usr", f"{d}/link")
    os.symlink("loop", f"{d}/loop")
    open(os.fsencode(d) + b"/\\xff\\xfe", "w")
""",
    "hidden directories": """
import os
os.mkdir("closed")
os.mkdir("closed/inner")
open("closed/inner/file", "w")
os.chmod("closed/inner", 0)
os.chmod("closed", 0)
""",
    "a deep tree": """
import os
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
""",
    "many files": "import os\nfor k in range(3000): os.mknod(str(k))",
    "a directory of its own mode": """
import os
for path in (os.getcwd(), os.environ["TMPDIR"]):
    os.chmod(path, 0o1777)
    try:
        os.setxattr(path, "user.residue", b"x")
    except OSError:
        pass  # this file system has none
""",
    "no directory at all": """
import os, shutil
for path in {os.getcwd(), os.environ["TMPDIR"]}:
    try:
        os.rmdir(path)
    except OSError:
        os.chmod(path, 0)
""",
    "a changed process": """
import builtins, math, os, resource, signal, sys
os.nice(19)
os.umask(0o777)
os.environ["RESIDUE"] = "x"
os.sched_setaffinity(0, {0})
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
signal.setitimer(signal.ITIMER_REAL, 50)
math.residue = 1
sys.path.insert(0, "/residue")
sys.modules["residue"] = math
builtins.len = lambda thing: 0
""",
    "signals on their way": """
import os, signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
    for target in (os.getppid(), 0, -1)[: 1 if os.getppid() == 1 else 0]:
        try:
            os.kill(target, number)
        except OSError:
            pass
""",
}
"""What any tier cleans up."""

LEAVES_ELSEWHERE = {
    "files in every writable directory": """
import os
for top in ("/snippet", "/snippet/work", "/snippet/tmp", "/snippet/shm", "/tmp", "/dev/shm", "/dev", "/"):
    try:
        open(f"{top}/left", "w").write("x")
        os.symlink("/usr", f"{top}/link")
        os.mkdir(f"{top}/directory", 0)
    except OSError:
        pass
""",
    "other directories than there were": """
import os
for action in (
    lambda: os.rename("/snippet/work", "/snippet/work2"),
    lambda: os.rename("/snippet/tmp", "/snippet/work"),
    lambda: os.symlink("/usr", "/snippet/tmp"),
    lambda: os.rmdir("/snippet/shm"),
    lambda: os.symlink("/proc/1", "/snippet/shm"),
    lambda: os.chmod("/snippet", 0o1777),
    lambda: os.setxattr("/snippet", "user.residue", b"x"),
    lambda: os.chmod("/snippet", 0),
):
    try:
        action()
    except OSError:
        pass
""",
    "ipc": """
import ctypes, socket
libc = ctypes.CDLL(None)
libc.shmget(4711, 4096, 0o1666)
libc.semget(4711, 1, 0o1666)
libc.msgget(4711, 0o1666)
libc.mq_open(b"/residue", 0o102, 0o600, None)
s = socket.socket(socket.AF_UNIX)
s.bind("\\0residue")
t = socket.socket(socket.AF_UNIX)
t.bind("/snippet/tmp/residue")
""",
    "settings of its namespaces": """
for name in {settings}:
    try:
        open("/proc/sys/" + name, "w").write("2000 3000" if "range" in name else "77")
    except OSError:
        pass
""",
}
"""What only a tier with namespaces cleans up."""

CASES = [
    pytest.param(tier, code, id=f"{name}-{tier}")
    for tier in ALL
    for claim, leaves in (
        ("residue in the working directory", LEAVES),
        ("residue elsewhere", LEAVES_ELSEWHERE),
    )
    for name, code in leaves.items()
    if tier in CLAIMS[claim]
]


@pytest.mark.parametrize(("executor", "code"), CASES, indirect=["executor"])
def test_the_next_snippet_finds_everything_as_the_first_did(executor, code):
    fingerprint = FINGERPRINT_OF_ITS_OWN
    if executor.isolation in CLAIMS["residue elsewhere"]:
        fingerprint += FINGERPRINT_OF_THE_SLOT.replace("{settings}", str(NAMESPACED_SETTINGS))
    assert until(lambda: calm(executor))
    before = [executor.execute(fingerprint) for _ in range(WORKERS)]
    assert {result["status"] for result in before} == {"ok"}, before
    for _ in range(WORKERS):
        result = executor.execute(code.replace("{settings}", str(NAMESPACED_SETTINGS)))
        assert result["status"] == "ok", result
    after = [executor.execute(fingerprint) for _ in range(WORKERS)]
    assert [result["stdout"] for result in after] == [result["stdout"] for result in before]
    with undisturbed(executor):
        pass
