"""Whatever a snippet has built on disk can be removed, and nothing else is."""

import os
import subprocess
import sys
from pathlib import Path

from ztrl_sandbox.scratch import remove_tree

BUILD = """
import os
for _ in range({depth}):
    os.mkdir("d" * {name_length})
    os.chdir("d" * {name_length})
    open("f", "w").close()
"""


def build_deep(directory: Path, depth: int, name_length: int) -> None:
    """In a process of its own, since it changes the working directory."""
    code = BUILD.format(depth=depth, name_length=name_length)
    subprocess.run([sys.executable, "-c", code], cwd=directory, check=True)


def test_a_tree_deeper_than_any_recursion_and_any_path(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    build_deep(root, 3000, 1)
    build_deep(root, 100, 200)
    remove_tree(root)
    assert list(tmp_path.iterdir()) == []


def test_links_are_removed_and_not_followed(tmp_path):
    kept, root = tmp_path / "kept", tmp_path / "root"
    kept.mkdir()
    (kept / "file").touch()
    (root / "d").mkdir(parents=True)
    (root / "d" / "link").symlink_to(kept)
    (root / "link").symlink_to(kept / "file")
    remove_tree(root)
    assert list(tmp_path.iterdir()) == [kept] and (kept / "file").exists()
    link = tmp_path / "link"
    link.symlink_to(kept)
    remove_tree(link)
    assert (kept / "file").exists()


def test_closed_directories_and_wide_ones(tmp_path):
    root = tmp_path / "root"
    for number in range(300):
        (root / str(number) / "x").mkdir(parents=True)
        (root / str(number) / "f").touch()
    os.chmod(root / "7" / "x", 0)
    os.chmod(root / "8", 0o500)
    remove_tree(root)
    assert not root.exists()


def test_what_does_not_exist_is_no_error(tmp_path):
    remove_tree(tmp_path / "nothing")
