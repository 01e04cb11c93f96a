"""Snippets that reach for the kernel's larger interfaces."""

import errno
import platform

import pyseccomp as seccomp
import pytest
from hostile import Case, on_every_claiming_tier, on_tiers, withstand

SYSCALLS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(256)
for number, arguments in {calls}:
    arguments = [buffer if argument == "buffer" else argument for argument in arguments]
    print(ctypes.get_errno() if libc.syscall(number, *arguments) < 0 else "done")
"""
_AT_FDCWD = -100
_O_RDWR_CREAT = 0o102
_CLONE_NEWUSER, _CLONE_NEWNS, _SIGCHLD = 0x10000000, 0x20000, 17

DENIED = {
    "ptrace": [("ptrace", 0, 0, 0, 0), ("ptrace", 16, 1, 0, 0)],
    "memory of other processes": [
        ("process_vm_readv", 1, "buffer", 1, "buffer", 1, 0),
        ("process_vm_writev", 1, "buffer", 1, "buffer", 1, 0),
        ("pidfd_getfd", 0, 0, 0),
        ("kcmp", 1, 1, 0, 0, 0),
    ],
    "mounts": [
        ("mount", "buffer", "buffer", "buffer", 0, 0),
        ("umount2", "buffer", 0),
        ("pivot_root", "buffer", "buffer"),
        ("chroot", "buffer"),
        ("fsopen", "buffer", 0),
        ("open_tree", _AT_FDCWD, "buffer", 1),
        ("move_mount", 0, "buffer", 0, "buffer", 0),
    ],
    "namespaces": [
        ("unshare", _CLONE_NEWUSER),
        ("unshare", _CLONE_NEWUSER | _CLONE_NEWNS),
        ("setns", 0, 0),
        ("clone", _CLONE_NEWUSER | _SIGCHLD, 0, 0, 0, 0),
    ],
    "bpf": [("bpf", 0, "buffer", 128)],
    "io_uring": [("io_uring_setup", 8, "buffer"), ("io_uring_enter", 0, 1, 0, 0, 0, 0)],
    "asynchronous files, of which the whole machine has 65,536": [("io_setup", 1024, "buffer")],
    "keyrings": [
        ("keyctl", 0, -3, 1),
        ("add_key", "buffer", "buffer", "buffer", 1, -3),
        ("request_key", "buffer", 0, 0, -3),
    ],
    "page faults and counters": [("userfaultfd", 1), ("perf_event_open", "buffer", 0, -1, -1, 0)],
    "memory that no limit counts": [("memfd_create", "buffer", 0), ("memfd_secret", 0)],
    "system v": [("shmget", 4711, 4096, 0o1600), ("semget", 4711, 1, 0o1600), ("msgget", 4711, 0o1600)],
    "message queues": [("mq_open", "buffer", _O_RDWR_CREAT, 0o600, 0)],
    "modules, kernels, power": [
        ("init_module", "buffer", 8, "buffer"),
        ("finit_module", 0, "buffer", 0),
        ("kexec_load", 0, 0, 0, 0),
        ("syslog", 3, "buffer", 128),
        ("swapon", "buffer", 0),
    ],
    "file handles": [
        ("open_by_handle_at", _AT_FDCWD, "buffer", 0),
        ("name_to_handle_at", _AT_FDCWD, "buffer", "buffer", "buffer", 0),
    ],
    "clocks and names": [
        ("settimeofday", "buffer", 0),
        ("clock_settime", 0, "buffer"),
        ("sethostname", "buffer", 4),
    ],
    "personality": [("personality", 0x0040000)],
    "fanotify": [("fanotify_init", 0, 0)],
}


def kernel_cases() -> list[Case]:
    cases = []
    for name, calls in DENIED.items():
        numbered = [
            (seccomp.resolve_syscall(seccomp.Arch.NATIVE, call), arguments) for call, *arguments in calls
        ]
        code = SYSCALLS.format(calls=numbered)
        cases.append(Case(name=name, claim="kernel", code=code, stdout=f"{errno.EPERM}\n" * len(calls)))
    return cases


@on_every_claiming_tier(kernel_cases())
def test_what_mathematics_does_not_need_is_denied(executor, case):
    withstand(executor, case)


@on_tiers("kernel")
def test_namespaces_cannot_be_made_through_clone3(executor):
    number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, "clone3")
    code = SYSCALLS.format(calls=[(number, ["buffer", 88])])
    assert executor.execute(code)["stdout"] == f"{errno.ENOSYS}\n"  # libc then uses clone


@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 is x86's")
@on_tiers("kernel")
def test_the_32_bit_entry_is_no_way_around_the_filter(executor):
    withstand(
        executor,
        Case(
            name="int 0x80",
            claim="kernel",
            # mov eax, 310 (unshare); mov ebx, CLONE_NEWUSER; int 0x80; ret
            code="""
import ctypes, mmap
code = bytes.fromhex("b836010000" "bb00000010" "cd80" "c3")
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(code)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print("before", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
""",
            status="killed",
            stdout="before\n",
        ),
    )


@on_tiers("kernel")
def test_a_snippet_has_no_capability_and_gets_none(executor):
    code = """
import ctypes, os
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(*(status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp")))
for action in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try:
        action()
    except OSError:
        pass
os.execv("/bin/grep", ["grep", "CapEff", "/proc/self/status"])
"""
    lines = executor.execute(code)["stdout"].splitlines()
    none = "0" * 16
    assert lines == [f"{none} {none} {none} {none} 1 2", f"CapEff:\t{none}"]
