"""Snippets that fill, read or change what is not theirs."""

import os

from hostile import Case, attempt, on_every_claiming_tier, on_tiers, undisturbed, withstand

FULL_DISK = "No space left on device"

FILLING = [
    Case(
        name="disk",
        claim="scratch space",
        code="for k in range(3): open(f'{k}', 'wb').write(bytes(40 << 20))",
        status="error",
        stderr_end=FULL_DISK,
    ),
    Case(
        name="disk through every directory",
        claim="scratch space",
        code="for d in ('.', '/snippet/tmp', '/dev/shm'): open(f'{d}/x', 'wb').write(bytes(40 << 20))",
        status="error",
        stderr_end=FULL_DISK,
    ),
    Case(
        name="disk with deleted files",
        claim="scratch space",
        code="import tempfile\nf = [tempfile.TemporaryFile() for _ in range(3)]\nfor x in f: x.write(bytes(40 << 20))",
        status="error",
        stderr_end=FULL_DISK,
    ),
    Case(
        name="inodes",
        claim="scratch space",
        code="import os\nfor k in range(10_000): os.mknod(str(k))",
        status="error",
        stderr_end=f"{FULL_DISK}",
    ),
    Case(
        name="one file",
        claim="file size",
        code="open('x', 'wb').truncate(1 << 40)",
        status="error",
        stderr_end="File too large",
    ),
    Case(
        name="descriptors",
        claim="descriptors",
        code="kept = [open('/dev/null') for _ in range(10_000)]",
        status="error",
        stderr_end="Too many open files: '/dev/null'",
    ),
]


@on_every_claiming_tier(FILLING)
def test_space_is_limited(executor, case):
    withstand(executor, case)


WRITABLE = """
import os, sys
found = []
for top, directories, _ in os.walk("/"):
    if top.startswith(("/proc/", "/snippet")) or top.count("/") > 3:
        directories.clear()
        continue
    probe = os.path.join(top, "ztrl-probe")
    for action in (lambda: open(probe, "x").close(), lambda: os.mkdir(probe), lambda: os.symlink("x", probe)):
        try:
            action()
            found.append(top)
        except OSError:
            pass
print(found)
"""

CHANGE = attempt(
    "import json, os, sys",
    "open(json.__file__, 'a')",
    "open(sys.executable, 'r+b')",
    "open('/etc/passwd', 'a')",
    "os.chmod(json.__file__, 0o777)",
    "os.utime(json.__file__)",
    "os.unlink(json.__file__)",
    "os.rename(json.__file__, 'stolen')",
    "os.link(json.__file__, 'linked')",
    "os.truncate(json.__file__, 0)",
    "os.setxattr(json.__file__, 'user.x', b'x')",
    "os.chown('/', 0, 0)",
    "os.mknod('device', 0o600 | 0o20000, os.makedev(1, 1))",
    "open('/dev/mem', 'rb')",
    "open('/dev/kmsg', 'w')",
    "open('/proc/sysrq-trigger', 'w')",
    "open('/proc/sys/kernel/core_pattern', 'w')",
    "open('/proc/sys/vm/drop_caches', 'w')",
    "os.listdir('/sys')[0] and os.listdir('/sys/kernel')",
)

CHANGES = [
    Case(name="new files anywhere", claim="files of the host", code=WRITABLE, stdout="[]\n"),
    Case(
        name="files of the system",
        claim="files of the host",
        code=CHANGE,
        stdout="denied\n" * CHANGE.count("lambda"),
    ),
]


@on_every_claiming_tier(CHANGES)
def test_nothing_outside_the_scratch_directory_can_be_written(executor, case):
    withstand(executor, case)


@on_tiers("files of the host")
def test_no_path_leads_to_a_file_of_the_host(executor, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    for directory in (tmp_path, *tmp_path.parents):
        if os.stat(directory).st_mode & 0o005 != 0o005 and os.stat(directory).st_uid == os.geteuid():
            directory.chmod(directory.stat().st_mode | 0o005)
    up = "/".join([".."] * 64)
    code = attempt(
        "import os, sys",
        *(f"print(open({path!r}).read())" for path in (str(secret), "/etc/shadow", f"{up}{secret}")),
        f"print(open('/proc/self/root{secret}').read())",
        f"print(open('/proc/self/cwd/{up}{secret}').read())",
        f"print(open('/proc/1/root{secret}').read())",
        f"[os.symlink({str(secret)!r}, 'link'), print(open('link').read())]",
        f"[os.mkdir('sub'), os.chroot('sub'), os.chdir({up!r}), os.chroot('.'), print(open({str(secret)!r}).read())]",
        f"print(os.open({str(secret)[1:]!r}, os.O_RDONLY, dir_fd=os.open('/..', os.O_RDONLY)))",
        f"os.stat({__file__!r})",
        "os.listdir('/root/.ssh')",
        "os.listdir('/home')",
        "os.listdir('/var')",
        "os.listdir('/run')",
        "os.listdir('/sys/fs/cgroup')",
    )
    with undisturbed(executor):
        result = executor.execute(code)
    assert result["stdout"] == "denied\n" * code.count("lambda"), result
    assert "s3cr3t" not in str(result)


@on_tiers("files of the host")
def test_the_tree_holds_an_interpreter_and_little_else(executor):
    code = """
import os
print(sorted(os.listdir("/dev")), sorted(os.listdir("/etc")))
mounts = [line.split() for line in open("/proc/self/mountinfo")]
mounts = {fields[4]: set(fields[5].split(",")) for fields in mounts if not fields[4].startswith("/dev/")}
print(sorted(point for point, flags in mounts.items() if "nosuid" not in flags))
print(sorted(point for point, flags in mounts.items() if "ro" not in flags))
"""
    assert executor.execute(code)["stdout"].splitlines() == [
        "['full', 'null', 'random', 'shm', 'urandom', 'zero'] ['ld.so.cache', 'passwd']",
        "[]",
        "['/proc', '/snippet']",
    ]
