"""Ctrl-C while a run starts: there is nothing to save, and nothing is left."""

import signal
import time

import pytest
from running import LIMIT_SECONDS, QUICKSTART, SMALL, assert_nothing_left, processes_of, ztrl


def an_engine_runs(marker):
    """It will need seconds more for its imports alone."""
    return any("sglang.launch_server" in (process.info["cmdline"] or []) for process in processes_of(marker))


@pytest.mark.parametrize("is_time", [lambda marker: True, an_engine_runs], ids=["at once", "an engine runs"])
def test_ctrl_c_while_the_servers_start_ends_everything_at_once(tmp_path, marker, is_time):
    process = ztrl("train", str(QUICKSTART), f"run.directory={tmp_path / 'run'}", "train.num_steps=3", *SMALL)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Megatron ranks, SGLang engines"):
            break
    while not is_time(marker):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=LIMIT_SECONDS) == 130, lines + [rest]
    assert rest.splitlines() == ["stopping at once; the last saved checkpoint stays"]
    assert_nothing_left(marker)
