"""Append-only JSON lines with a ``step`` in every row, which a resumed run cuts back to where it restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ztrl.observability.names import STEP


class JsonLines:
    """One file, open for appending. Every row is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the rows past ``step``, and a last row that a crash left half written."""
        self._file.close()
        kept = [row for row in read_rows(self._path) if row[STEP] <= step]
        # Replaced in one step: a crash here leaves either the old file or the new one.
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; none when there is no such file.

    Raises:
        ValueError: A row that is not the last one is damaged.
    """
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # str.splitlines would also split at U+2028
            lines = file.readlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a file of JSON rows: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                return  # the process died while it wrote this row
            raise ValueError(f"{path}:{number}: not a JSON row: {error}") from error
        yield row
