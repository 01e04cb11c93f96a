"""Snippets that will not end."""

from hostile import Case, on_every_claiming_tier, withstand

ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "power of a big integer": "x = 3 ** (10 ** 9)",
    "backtracking regular expression": "import re; re.match('(a+)+b', 'a' * 64)",
    "signals ignored": "import signal\nfor s in range(10, 19): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "signals blocked": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: pass"
    ),
    "alarms cancelled": (
        "import signal\nsignal.alarm(0)\n"
        "for t in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF): signal.setitimer(t, 0)\n"
        "while True: pass"
    ),
    "loop in finally": "try:\n  1 / 0\nfinally:\n  while True: pass",
    "every exception caught": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "loop at exit": "import atexit\n@atexit.register\ndef f():\n  while True: pass",
    "thread that outlives the main thread": (
        "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()"
    ),
    "stopped by itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "another program": "import os; os.execv('/bin/sleep', ['sleep', '60'])",
    "child of another program": "import subprocess; subprocess.run(['sleep', '60'])",
    "child in a session of its own": "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: pass\nos.wait()",
    "children that replace one another": (
        "import os, time\nif os.fork() == 0:\n  for _ in range(2000):\n    time.sleep(0.01)\n"
        "    if os.fork() != 0: os._exit(0)\ntime.sleep(60)"
    ),
}


@on_every_claiming_tier(
    Case(
        name=name,
        claim="time",
        code="print('before')\n" + code,
        status="timeout",
        stdout="before\n",
        run_timeout_seconds=0.2,
        endless=True,
    )
    for name, code in ENDLESS.items()
)
def test_what_does_not_end_is_stopped_in_time_and_keeps_its_output(executor, case):
    withstand(executor, case)
