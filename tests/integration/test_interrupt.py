"""What a signal does to a driver that has started Ray, which brings handlers of its own."""

import subprocess
import sys

DRIVER = """
import asyncio, os, signal
from megatron_ztrl.runtime.cluster import ray_cluster
from megatron_ztrl.runtime.interrupt import StopRequest

async def drive():
    stop = StopRequest(print)
    stop.loop_is_running = True
    with stop.listening(), ray_cluster():
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.event.wait()
        await asyncio.sleep(5)  # to save takes longer than the three seconds after which Ray's handler aborts
        print("saved")

asyncio.run(drive())
"""


def test_a_driver_that_is_told_to_end_has_the_time_to_save():
    driver = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=300)
    assert driver.returncode == 0, driver.stderr
    assert driver.stdout.splitlines()[-1] == "saved"
    assert "SIGTERM" not in driver.stderr
