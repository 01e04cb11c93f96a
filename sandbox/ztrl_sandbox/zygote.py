"""The fork server: imports the preload set once, then forks workers on request.

Started by the server under a scrubbed environment. One SOCK_SEQPACKET socket joins the two:

* zygote → server, once: ``{"ready": true, "isolation": tier, "isolation_reason": why, "layers": [...]}``, or
  ``{"error": text}``
* server → zygote: ``{"spawn": slot}`` with the worker's two sockets and, if there is one, the directory of the
  slot's cgroup

It must stay single-threaded (it forks), and holds no request data. Workers outlive it: they depend only on
the server.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import sys
import traceback
from pathlib import Path

from ztrl_sandbox import cgroup, isolation, linux, proctree, tiers
from ztrl_sandbox.cgroup import SlotMemory
from ztrl_sandbox.protocol import Limits
from ztrl_sandbox.scratch import remove_tree
from ztrl_sandbox.worker import Worker

_FRAME_BYTES = 4096

_IMPORTED_ON_FIRST_USE = {
    "sympy": (
        "sympy.assumptions.wrapper",
        "sympy.combinatorics",
        "sympy.physics.units",
        "sympy.sets.setexpr",
        "sympy.tensor.tensor",
    )
}
"""What a module imports only when it is used: 50 ms of ``sympy.expand`` in every snippet."""


class Zygote:
    """The zygote's loop."""

    def __init__(
        self,
        tier: isolation.Isolation,
        limits: Limits,
        scratch_root: Path,
        server: socket.socket,
        cgroups: tuple[int, str] | None,
    ) -> None:
        self._tier = tier
        self._limits = limits
        self._scratch_root = scratch_root
        self._server = server
        self._cgroups = cgroups
        self._poller = select.poll()
        self._worker_pidfds: dict[int, int] = {}
        """pidfd → pid."""

    def run(self) -> None:
        """Fork workers until the server closes its socket."""
        # A killed worker's orphans come here, not to the host's init.
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        self._poller.register(self._server, select.POLLIN)
        while True:
            ready = {fd for fd, _ in self._poller.poll()}
            for pidfd in self._worker_pidfds.keys() & ready:
                self._bury(pidfd)
            if self._server.fileno() not in ready:
                continue
            message, fds, _, _ = socket.recv_fds(self._server, _FRAME_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
            if not message:
                break
            self._spawn(json.loads(message)["spawn"], fds)
        # After a clean stop nothing is left to do here; after the server's sudden death there is.
        proctree.kill_children()
        remove_tree(self._scratch_root)
        if self._cgroups is not None:
            cgroup.remove(*self._cgroups)

    def _spawn(self, index: int, fds: list[int]) -> None:
        slot = isolation.Slot(index=index, limits=self._limits, scratch_root=self._scratch_root)

        def work() -> None:
            self._server.close()
            for pidfd in self._worker_pidfds:
                os.close(pidfd)
            requests, control = (socket.socket(fileno=fd) for fd in fds[:2])
            memory = None
            if len(fds) > 2:
                memory = SlotMemory(fds[2])
                os.close(fds[2])
            Worker(slot, self._tier, requests, control, memory).run()

        try:
            pid = self._tier.fork_worker(slot, work)
        except OSError:
            traceback.print_exc()  # the server sees the worker's sockets close, and tries again
            return
        finally:
            for fd in fds:
                os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._worker_pidfds[pidfd] = pid
        self._poller.register(pidfd, select.POLLIN)

    def _bury(self, pidfd: int) -> None:
        os.waitpid(self._worker_pidfds.pop(pidfd), 0)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        proctree.kill_children(spare=set(self._worker_pidfds.values()))


def main() -> None:
    """``argv``: the server socket's descriptor, then a JSON object of settings."""
    server = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    sys.argv = [""]
    try:
        for name in settings["preload"]:
            for module in (name, *_IMPORTED_ON_FIRST_USE.get(name, ())):
                importlib.import_module(module)
        tier, reason = tiers.choose(settings["isolation"])
        scratch_root = Path(settings["scratch_root"])
        tier.prepare(scratch_root)
    except Exception as error:  # noqa: BLE001  # importing a module can raise anything
        server.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()[:_FRAME_BYTES])
        sys.exit(1)
    gc.collect()
    gc.freeze()
    # Not dumpable: a snippet that shares our uid must not read our memory or borrow our descriptors.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    ready = {"ready": True, "isolation": tier.name, "isolation_reason": reason, "layers": tier.layers}
    server.send(json.dumps(ready).encode())
    cgroups = settings["cgroups"] and tuple(settings["cgroups"])
    Zygote(tier, Limits(**settings["limits"]), scratch_root, server, cgroups).run()
