#!/usr/bin/env python
"""Hugging Face checkpoints to Megatron's distributed checkpoints and back, in any layout, on one CPU process.

    python tools/convert_checkpoint.py hf-to-megatron HF_DIR OUT --tp 2 --pp 2
    python tools/convert_checkpoint.py megatron-to-hf runs/demo/checkpoints/step_000200/actor OUT
    python tools/convert_checkpoint.py hf-to-fp8 HF_DIR OUT         # what engines in FP8 start from (engine.path)

It streams: memory holds about one shard. docs/checkpoints.md says what is checked. Exit codes: 0 done, 1 the result
was not what was read (a bug or a bad disk), 2 the input does not fit, 130 interrupted. OUT is complete or absent.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from megatron_ztrl.observability.console import open_console, print_whole
from megatron_ztrl.weights.convert import Conversion, check_target, hf_to_megatron, megatron_to_hf
from megatron_ztrl.weights.describe import Field, shown
from megatron_ztrl.weights.fp8_checkpoint import hf_to_fp8
from megatron_ztrl.weights.hf_mapping import ParallelLayout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    options = _parser().parse_args(arguments)
    console = open_console(stderr=True)
    torch.set_num_threads(1)  # it only copies and compares: more threads would wait for each other
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was written so far goes either way
    try:
        _run(options, console)
    except (ValueError, OSError) as error:
        _fail(console, str(error))
        return 2
    except RuntimeError as error:
        _fail(console, str(error))
        return 1
    except KeyboardInterrupt:
        _fail(console, f"interrupted; {options.target} was not made")
        return 130
    return 0


def _run(options: argparse.Namespace, console: Console) -> None:
    check_target(options.target)
    if options.direction == "hf-to-fp8":
        hf_to_fp8(options.source, options.target)
        console.print(f"quantised: {options.target}", soft_wrap=True)
        return
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.direction == "hf-to-megatron":
        layout = ParallelLayout(tensor_size=options.tp, pipeline_size=options.pp, virtual_size=options.vp)
        conversion = hf_to_megatron(options.source, layout, dtype, lambda fields: _show(console, fields))
    else:
        conversion = megatron_to_hf(
            options.source, options.like, dtype, lambda fields: _show(console, fields)
        )
    started_seconds = time.monotonic()
    _convert(conversion, options.target, options.verify, console)
    seconds = time.monotonic() - started_seconds
    done = "converted and verified" if options.verify else "converted"
    size = f"{conversion.weight_bytes / 1e9:.2f} GB of {str(conversion.dtype).removeprefix('torch.')}"
    rate = conversion.weight_bytes / seconds / 1e6
    console.print(f"{done} {size} in {seconds:.1f} s ({rate:,.0f} MB/s): {options.target}", soft_wrap=True)


def _convert(conversion: Conversion, target: Path, verify: bool, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, count: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=conversion.weight_bytes)
            progress.advance(tasks[phase], count)

        conversion.run(target, advance=advance, verify=verify)


def _show(console: Console, fields: list[Field]) -> None:
    sources = dict.fromkeys(source for field in fields for source in field.values)
    table = Table("", *sources, box=None)
    for field in fields:
        cells = [shown(field.values[source]) if source in field.values else "" for source in sources]
        table.add_row(field.name, *cells, style=None if field.agrees else "red")
    print_whole(console, table)
    unchecked = [field for field in fields if set(field.values) == {"--like"}]
    if unchecked:
        names = ", ".join(f"{field.name} {shown(field.values['--like'])}" for field in unchecked)
        console.print(f"CKPT does not record, and --like is believed in: {names}", soft_wrap=True)


def _fail(console: Console, message: str) -> None:
    console.print(Text(f"error: {message}", style="red"), soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_megatron = directions.add_parser("hf-to-megatron", help="for a tensor, pipeline and virtual size")
    to_megatron.add_argument("source", type=Path, metavar="HF_DIR")
    for name, what in (
        ("--tp", "tensor parallel size"),
        ("--pp", "pipeline parallel size"),
        ("--vp", "model chunks per pipeline stage"),
    ):
        to_megatron.add_argument(name, type=_positive, default=1, metavar="N", help=f"{what} (1)")
    to_hf = directions.add_parser("megatron-to-hf", help="from a run's checkpoint, or a converted one")
    to_hf.add_argument(
        "source", type=Path, metavar="CKPT", help="e.g. runs/demo/checkpoints/step_000200/actor"
    )
    to_hf.add_argument(
        "--like",
        type=Path,
        metavar="HF_DIR",
        help="where config.json and the tokenizer come from (default: what CKPT was made from)",
    )
    to_fp8 = directions.add_parser("hf-to-fp8", help="linear layers in block-wise FP8, for engine.path")
    to_fp8.add_argument("source", type=Path, metavar="HF_DIR")
    to_fp8.add_argument("target", type=Path, metavar="OUT", help="directory to make")
    for direction in (to_megatron, to_hf):
        direction.add_argument("target", type=Path, metavar="OUT", help="directory to make")
        direction.add_argument("--dtype", choices=DTYPES, help="of the result (default: as it is)")
        direction.add_argument(
            "--verify",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="read the result again and compare it bitwise with the source",
        )
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
