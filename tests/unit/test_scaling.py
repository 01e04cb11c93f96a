"""``ztrl engines``: what it shows of a run, and what it asks the run for."""

import asyncio

import pytest

from megatron_ztrl.cli import main
from megatron_ztrl.runtime import scaling
from megatron_ztrl.runtime.processes import PROCESSES_FILE, ProcessTable, read_processes
from megatron_ztrl.runtime.scaling import REQUEST_FILE, follow_requests


@pytest.fixture
def table(tmp_path):
    table = ProcessTable(tmp_path)
    table.update("engine 1", url="http://127.0.0.1:7", pid=7, state="serves")
    table.update("engine 0", url="http://127.0.0.1:6", pid=6, state="serves")
    return table


def test_the_servers_of_a_run_are_shown_with_their_restarts(table, tmp_path, capsys):
    table.update("engine 0", pid=8, state="waits for weights")
    table.count_restart("engine 0")
    assert main(["engines", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert " ".join(first.split()) == "engine 0 waits for weights pid 8 http://127.0.0.1:6 restarts 1"
    assert " ".join(second.split()) == "engine 1 serves pid 7 http://127.0.0.1:7 restarts 0"
    table.remove("engine 1")
    assert list(read_processes(tmp_path)["servers"]) == ["engine 0"]
    table.close()
    assert not (tmp_path / PROCESSES_FILE).exists()


def test_asking_where_no_run_is_going_on_is_one_clear_line(tmp_path, capsys):
    assert main(["engines", str(tmp_path), "--count", "3"]) == 2
    assert "no run is going on there" in capsys.readouterr().err
    assert not (tmp_path / REQUEST_FILE).exists()


async def test_the_driver_does_what_was_asked_for_once_and_says_what_it_cannot_do(
    table, tmp_path, monkeypatch
):
    monkeypatch.setattr(scaling, "POLL_SECONDS", 0.0)
    (tmp_path / REQUEST_FILE).write_text("9\n")  # to a driver that was killed
    asked, notes = [], []

    async def scale(count):
        if count < 1:
            raise ValueError(f"a run needs at least one engine, got {count}")
        asked.append(count)

    following = asyncio.create_task(follow_requests(tmp_path, scale, notes.append))
    await asyncio.sleep(0)
    for count in (3, 0, 2):
        assert main(["engines", str(tmp_path), "--count", str(count)]) == 0
        async with asyncio.timeout(5):
            while (tmp_path / REQUEST_FILE).exists():  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.sleep(0)
    following.cancel()
    assert asked == [3, 2]
    assert [note.endswith("a run needs at least one engine, got 0") for note in notes] == [True]
