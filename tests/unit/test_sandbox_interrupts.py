"""SIGINT in a session stops the code that it was meant for, even code that has not begun."""

import subprocess
import sys
from pathlib import Path

import ztrl_sandbox

PROGRAM = """
import json, os, signal, socket, sys, tempfile
from ztrl_sandbox import harness

def file(text):
    written = tempfile.TemporaryFile("w+")
    written.write(text)
    written.flush()
    return os.dup(written.fileno())

def descriptors(code):
    return [file(code), file(""), os.dup(1), os.dup(2)]

ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
options = {"print_last_expression": False}
socket.send_fds(theirs, [json.dumps(options).encode()], descriptors("print('second')"))
theirs.close()
reader, ended = os.pipe()
interrupts = harness.Interrupts()
signal.signal(signal.SIGINT, interrupts.on_signal)
os.kill(os.getpid(), signal.SIGINT)
harness.run_session(ours, ended, interrupts, options, descriptors("print('first')"))
print(list(os.read(reader, 16)))
"""


def test_one_that_comes_before_the_first_code_stops_it_and_nothing_after_it():
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": str(Path(ztrl_sandbox.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.stdout == "second\n[1, 0]\n", finished.stderr
    assert finished.stderr.strip().endswith("KeyboardInterrupt")
