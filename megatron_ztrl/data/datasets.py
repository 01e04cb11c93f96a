"""Reads problems from JSONL, JSON and parquet files, or through Hugging Face ``datasets``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ztrl.config.schema import DatasetConfig
from megatron_ztrl.data.formats import parse_record


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemRow:
    """One problem as published."""

    row: int
    """From 1: the line of a JSONL file, the position in any other."""
    problem: str
    answer: str
    metadata: dict[str, Any]
    """Short scalar fields of the record, such as level or subject."""


@dataclass(frozen=True, slots=True)
class _Record:
    where: str
    """For error messages: ``file:line`` or ``file: row n``."""
    row: int
    value: Any


def load_problems(config: DatasetConfig) -> list[ProblemRow]:
    """Reads up to ``config.limit`` problems.

    ``config.path`` is a file ending in .jsonl, .json or .parquet; anything else is a hub id, or a directory
    laid out like a hub repository. See ``data.formats`` for the record formats.

    Raises:
        ValueError: The file or hub data set is missing, broken or empty, or a row lacks a problem or an
            answer; the message names file and row.
    """
    rows = []
    for record in itertools.islice(_records(config), config.limit):
        try:
            problem, answer, metadata = parse_record(
                record.value, problem_key=config.problem_key, answer_key=config.answer_key
            )
        except ValueError as error:
            raise ValueError(f"data set {config.name!r}: {record.where}: {error}") from error
        rows.append(ProblemRow(row=record.row, problem=problem, answer=answer, metadata=metadata))
    if not rows:
        raise ValueError(f"data set {config.name!r}: {config.path} holds no problems")
    return rows


def _records(config: DatasetConfig) -> Iterator[_Record]:
    path = Path(config.path)
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        return _read_hub(config)
    if not path.is_file():
        raise ValueError(f"data set {config.name!r}: no such file: {path}")
    return readers[path.suffix](path)


def _read_json_lines(path: Path) -> Iterator[_Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    value = json.loads(_text(line, where))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from error
                yield _Record(where, number, value)


def _read_json(path: Path) -> Iterator[_Record]:
    text = _text(path.read_bytes(), str(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; is it one object per line? then name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}{hint}"
        ) from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a list of records, found {type(values).__name__}")
    return _number(path, values)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error


def _read_parquet(path: Path) -> Iterator[_Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    return _number(path, itertools.chain.from_iterable(batch.to_pylist() for batch in batches))


def _read_hub(config: DatasetConfig) -> Iterator[_Record]:
    import datasets

    try:
        rows = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise ValueError(
            f"data set {config.name!r}: cannot load {config.path!r} (subset {config.subset!r}, split "
            f"{config.split!r}) from the hub: {error}; give an existing id, subset and split, or a path "
            "ending in .jsonl, .json or .parquet"
        ) from error
    return _number(config.path, rows)


def _number(path: Path | str, values: Iterable[Any]) -> Iterator[_Record]:
    return (_Record(f"{path}: row {row}", row, value) for row, value in enumerate(values, start=1))
