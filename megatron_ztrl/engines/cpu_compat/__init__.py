"""What SGLang needs on a machine without CUDA: imports that have no CPU build, and flags of its torch path.

``standins/`` goes on the *server process's* ``PYTHONPATH`` only, and only where CUDA is absent, so no other
process can mistake a stand-in for the real package. Whatever a stand-in lacks raises ``NotImplementedError``
with its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

STANDINS = Path(__file__).parent / "standins"

SERVER_ARGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    # There is no device to overlap with, and it samples one token too many at the end of every call.
    "disable_overlap_schedule": True,
    # SGLang would otherwise zero half of the host's memory for KV (10 GiB take 7 s of the start).
    "max_total_tokens": 131072,
    # Forward passes between two looks at what has arrived; see `environment`.
    "scheduler_recv_interval": 16,
}
"""Defaults on a CPU machine; ``sglang.server_args`` overrides them."""


def environment(tensor_parallel_size: int) -> dict[str, str]:
    """Return the variables that a server on CPU needs, besides ``PYTHONPATH``."""
    variables = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "CUDA_VISIBLE_DEVICES": "",
        # glibc gives every freed tensor of some size back to the kernel, and the next one costs a page fault
        # per 4 KiB, which takes longer than filling it.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        # Tool replies come one by one, and a prefill goes before decoding: with a look at the requests after every
        # pass, more passes prefilled three or four replies than decoded. So prefills count as passes between two
        # looks, too (by default each is followed by one); an idle engine looks always.
        "SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_DEFAULT": "1",
        "SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_NONE": str(SERVER_ARGS["scheduler_recv_interval"]),
    }
    if tensor_parallel_size > 1:  # without a binding SGLang wants one NUMA node for each rank
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = _cores_by_rank(tensor_parallel_size)
    return variables


def _cores_by_rank(ranks: int) -> str:
    """Share this process's cores among the ranks, as ``0,1|2,3``; ranks beyond the cores share."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in share) for share in shares)
