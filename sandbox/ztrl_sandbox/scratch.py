"""Removal of what a snippet leaves on disk, however it is built."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Remove a directory; what cannot be removed stays.

    ``shutil.rmtree`` descends by recursion, which a tree of a few thousand levels exhausts. Here whatever is not
    empty is moved to the top and emptied there. Links are never followed, also not if somebody swaps one in.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except OSError:
        return
    prefix = secrets.token_hex(8)
    names = (f"{prefix}-{number}" for number in itertools.count())
    try:
        full = _empty(top, top, names)
        while full:
            name = full.pop()
            with contextlib.suppress(OSError):
                directory = os.open(name, _DIRECTORY, dir_fd=top)
                try:
                    full += _empty(directory, top, names)
                finally:
                    os.close(directory)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        path.rmdir()


def _empty(directory: int, top: int, names: Iterator[str]) -> list[str]:
    """Unlink the files in ``directory`` and move its directories to ``top``; returns their new names."""
    moved = []
    with os.scandir(directory) as entries:
        found = list(entries)
    for entry in found:
        with contextlib.suppress(OSError):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=directory)
                continue
            if os.geteuid() != 0:  # root needs no permission
                os.chmod(entry.name, 0o700, dir_fd=directory)
            name = next(names)
            os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=top)
            moved.append(name)
    return moved
