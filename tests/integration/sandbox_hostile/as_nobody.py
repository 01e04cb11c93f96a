"""Gives up root for a user that owns nothing, then becomes the command in ``argv``.

Where that user may not reach the interpreter (it lies in /root, say), it is bound into an otherwise empty
directory there first, in mounts that only this process and its children see.
"""

import os
import sys
from pathlib import Path

import ztrl_sandbox
from ztrl_sandbox import linux

UID = 65533
"""Not 65534, which is also what the kernel calls users that a namespace does not know."""


def closed_parent(path: Path) -> Path | None:
    """The outermost directory that other users may not enter; None when they reach ``path``."""
    parents = [*reversed(path.parents), path]
    return next((parent for parent in parents if parent.stat().st_mode & 0o005 != 0o005), None)


def open_up(paths: set[Path]) -> None:
    """Make ``paths`` readable by everyone, by hiding what else their closed parents hold."""
    hidden = {path: parent for path in paths if (parent := closed_parent(path)) is not None}
    if not hidden:
        return
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    staging = Path("/mnt")  # of these mounts; the machine's stays as it is
    linux.mount("tmpfs", str(staging), "tmpfs", 0)
    for number, path in enumerate(hidden):
        (staging / str(number)).mkdir()
        linux.mount(str(path), str(staging / str(number)), None, linux.MS_BIND)
    for parent in set(hidden.values()):
        linux.mount("tmpfs", str(parent), "tmpfs", 0, "mode=755")
    for number, path in enumerate(hidden):
        path.mkdir(parents=True)
        linux.mount(str(staging / str(number)), str(path), None, linux.MS_BIND)


def main() -> None:
    package_root = Path(ztrl_sandbox.__file__).parent.parent
    open_up({Path(path).resolve() for path in (sys.prefix, sys.base_prefix, package_root)})
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    os.chdir("/")
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
