"""``ztrl engines``: what it shows of a run, and what it asks the run for."""

import asyncio
import json
import subprocess
import sys

import pytest

from megatron_ztrl.cli import main
from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.runtime import scaling
from megatron_ztrl.runtime.processes import PROCESSES_FILE, ProcessTable, read_processes, sole_driver
from megatron_ztrl.runtime.scaling import (
    REQUEST_FILE,
    follow_requests,
    forget_requests,
    with_standing_count,
)


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
        asked.append(count)

    following = asyncio.create_task(follow_requests(tmp_path, 2, scale, notes.append))
    await asyncio.sleep(0)
    for text in ("3", "many", "4"):
        scaling._write(tmp_path / REQUEST_FILE, text)
        async with asyncio.timeout(5):
            while (tmp_path / REQUEST_FILE).exists():  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.sleep(0)
    following.cancel()
    assert asked == [3, 4]
    assert [note.partition(": ")[2] for note in notes] == ["invalid literal for int() with base 10: 'many'"]
    # A driver that is started again has as many, unless the user has changed his mind in the configuration.
    assert with_standing_count(config(2), tmp_path) == config(4)
    assert with_standing_count(config(3), tmp_path) == config(3)
    forget_requests(tmp_path)
    assert with_standing_count(config(2), tmp_path) == config(2)


def config(engines):
    return Config(
        run=RunConfig(directory="run"),
        model=ModelConfig(path="model"),
        data=DataConfig(train=DatasetConfig(name="none", path="none")),
        train=TrainConfig(num_steps=1),
        engine=EngineConfig(count=engines, max_running_requests=7),
    )


def test_no_engines_at_all_are_refused_where_they_are_asked_for(table, tmp_path, capsys):
    assert main(["engines", str(tmp_path), "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: --count: a run needs at least one engine, got 0\n"
    assert not (tmp_path / REQUEST_FILE).exists()


def test_a_run_that_was_killed_is_told_from_one_that_is_going_on(tmp_path, capsys):
    table = (
        "import sys; from pathlib import Path; from megatron_ztrl.runtime.processes import ProcessTable;"
        "ProcessTable(Path(sys.argv[1])).update('engine 0', url='http://x', pid=1, state='serves')"
    )
    driver = subprocess.Popen([sys.executable, "-c", table, str(tmp_path)])
    assert driver.wait() == 0
    for arguments in ([], ["--count", "2"]):
        assert main(["engines", str(tmp_path), *arguments]) == 2
        message = capsys.readouterr().err
        assert f"no run is going on there: its driver, process {driver.pid}, was killed" in message
        assert len(message.splitlines()) == 1
    # One on another machine of a cluster cannot be asked from here.
    content = json.loads((tmp_path / PROCESSES_FILE).read_text())
    content["driver"]["host"] = "elsewhere"
    (tmp_path / PROCESSES_FILE).write_text(json.dumps(content))
    assert main(["engines", str(tmp_path)]) == 0


def test_a_directory_has_one_driver_at_a_time_and_a_killed_one_is_no_obstacle(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from megatron_ztrl.runtime.processes import sole_driver\n"
        "with sole_driver(Path(sys.argv[1])): print('mine', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    try:
        with (
            pytest.raises(ValueError, match="a run is going on in .*/run; wait"),
            sole_driver(tmp_path / "run"),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with sole_driver(tmp_path / "run"):
        pass


def test_a_run_directory_that_cannot_be_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"^run.directory: Not a directory: .*file/run; choose another$"),
        sole_driver(tmp_path / "file" / "run"),
    ):
        pass
