"""Tables for people, which are never cut: not in a file, and not on a narrow terminal."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

_PAGE_COLUMNS = 120
"""Width of text that no terminal shows; rich would take 80."""
_UNLIMITED_COLUMNS = 10_000


def open_console(*, stderr: bool = False) -> Console:
    """As wide as the terminal, or as ``COLUMNS`` says; a page in a file or a pipe."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PAGE_COLUMNS
    return console


def print_whole(console: Console, table: Table) -> None:
    """Prints a table at the width that it needs where the console is narrower: rich would shorten its cells."""
    given = console.width
    unlimited = console.options.update(max_width=_UNLIMITED_COLUMNS)
    console.width = max(given, console.measure(table, options=unlimited).maximum)
    console.print(table)
    console.width = given
