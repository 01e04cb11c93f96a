"""Ctrl-C while a run starts: there is nothing to save, and nothing is left."""

import signal
import time

import pytest
from running import QUICKSTART, SMALL, assert_nothing_left, ztrl


@pytest.mark.parametrize("seconds", [0.0, 4.0])
def test_ctrl_c_while_the_servers_start_ends_everything_at_once(tmp_path, marker, seconds):
    process = ztrl("train", str(QUICKSTART), f"run.directory={tmp_path / 'run'}", "train.num_steps=3", *SMALL)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Megatron ranks, SGLang engines"):
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130, lines + [rest]
    assert rest.splitlines() == ["stopping at once; the last saved checkpoint stays"]
    assert_nothing_left(marker)
