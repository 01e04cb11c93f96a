"""Tables reach a file, a pipe and a narrow terminal with every character of theirs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from megatron_ztrl.observability.console import open_console, print_whole


def table_of(cells: int) -> Table:
    table = Table()
    for index in range(cells):
        table.add_column(f"column {index}", justify="right")
    table.add_row(*(f"{index}" * 12 for index in range(cells)))
    return table


@pytest.mark.parametrize("width", [20, 80, 1000])
def test_no_cell_of_a_wide_table_is_cut(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_whole(console, table_of(10))
    header, row = (line for line in console.file.getvalue().splitlines() if "0" in line)  # type: ignore[attr-defined]
    assert header.split("┃")[1:-1] == [f"     column {index} " for index in range(10)]
    assert row.split("│")[1:-1] == [f" {f'{index}' * 12} " for index in range(10)]
    assert console.width == width


def test_a_file_gets_pages_of_120_columns_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert open_console().width == 120
    monkeypatch.setenv("COLUMNS", "100")
    assert open_console().width == 100
