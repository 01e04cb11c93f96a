"""The process group that carries weights from trainer ranks to engine ranks, and how its members agree.

Both ends import this module, the receiving one inside the SGLang server, so it needs torch only. The group
is made of torch's process-group objects directly on a store: neither end's default group is touched, and no
private function of torch is called.

Nothing is written before everybody is ready: each publish begins at a gate that opens when all members have
checked what they will do, or closes with the reason of whoever refused; two gates before it are passed once, when
the group is formed. A member that fails later leaves the group, which ends the waiting of its peers at once; what
became of everyone is in their reports.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist

CONNECT_SECONDS = 60.0
"""The longest that members who are all present take to connect. Who has died meanwhile is not waited for so long."""
JOINED = "joined"
CONNECTED = "connected"
FORMING = (JOINED, CONNECTED)
"""The gates that a member passes once."""
OPEN = "open"


class Refused(RuntimeError):
    """A member would not begin, so nothing was written; the message says who and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Where the ranks meet: senders are ``0 .. S - 1``, then come the ranks of engine 0, 1, and so on."""

    name: str
    """Unique for each membership: a group is joined once, and a new one made when an engine is replaced."""
    address: str
    port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    bucket_bytes: int
    """Of one message; a rank stages two."""
    checksums: bool
    timeout_seconds: float
    """The longest wait for a peer that lives and does nothing."""

    def gate(self, publish: int) -> str:
        """Name of the gate at which publish ``publish`` of this group begins."""
        return f"{publish}/checked"


class Channel(Protocol):
    """The part of torch's process groups that is used here; each call returns at once."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> dist.Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> dist.Work: ...

    def abort(self) -> None: ...


class Member:
    """One rank's membership in a group."""

    def __init__(self, group: WeightGroup, rank: int) -> None:
        """Enter the group; returns when all ranks have, and are connected.

        Raises:
            Refused: somebody cannot come.
            RuntimeError: not everybody came within the time-out; names the group and the rank.
        """
        self.group = group
        self.rank = rank
        self._timeout = timedelta(seconds=group.timeout_seconds)
        self._store = self._connect_store()
        self.gate(JOINED)
        self.channel = self._connect()

    def gate(self, name: str) -> None:
        """Wait until every member has come to this gate.

        Raises:
            Refused: somebody closed it.
            RuntimeError: not everybody came within the time-out.
        """
        self._arrive(self._store, name)
        self._await_verdict(name)

    def _arrive(self, store: dist.Store, name: str) -> None:
        if store.add(f"{name}/arrived", 1) == self.group.world_size:
            close_gate(store, name, OPEN)

    def _await_verdict(self, name: str) -> None:
        key = f"{name}/verdict"
        try:
            self._store.wait([key], self._timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"weight group {self.group.name}: {self._store.add(f'{name}/arrived', 0)} of"
                f" {self.group.world_size} ranks came within {self.group.timeout_seconds:.0f} s: {error}"
            ) from error
        verdict = self._store.get(key).decode()
        if verdict != OPEN:
            raise Refused(verdict)

    def refuse(self, publish: int, reason: str) -> None:
        """Keep everybody from beginning."""
        close_gate(self._store, self.group.gate(publish), reason)

    def report(self, publish: int, report: dict[str, Any]) -> None:
        """Leave word for the driver of what became of this rank."""
        self._store.set(f"{publish}/report/{self.rank}", json.dumps(report))

    @contextlib.contextmanager
    def transfer(self, publish: int) -> Iterator[Channel]:
        """The channel, for as long as everybody goes on; an error inside leaves the group."""
        if self.group.backend == "nccl":
            threading.Thread(target=self._abort_when_told, args=(publish,), daemon=True).start()
        try:
            yield self.channel
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Close all connections, so that no peer waits for this rank."""
        if self.group.backend == "nccl":
            self.channel.abort()
        del self.channel  # gloo closes its sockets with the last reference

    def _abort_when_told(self, publish: int) -> None:
        """NCCL does not notice that a peer died; the driver does, and says so."""
        store, key = self._connect_store(), f"{publish}/over"
        store.wait([key], self._timeout)
        if store.get(key) != b"done":
            self.channel.abort()

    def _connect_store(self) -> dist.Store:
        group = self.group
        try:
            store = dist.TCPStore(group.address, group.port, is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"weight group {group.name}: rank {self.rank} of {group.world_size} cannot reach"
                f" {group.address}:{group.port} within {group.timeout_seconds:.0f} s: {error}"
            ) from error
        return dist.PrefixStore(group.name, store)

    def _connect(self) -> Channel:
        """Connect to all others; ends at once when anybody cannot.

        Gloo by itself would wait for a member that died since it joined: only the driver knows. So gloo waits in a
        thread, which is left to itself when the gate closes. NCCL connects with the first message.

        Raises:
            Refused: somebody cannot connect, or is dead.
        """
        group = self.group
        if group.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            store = dist.PrefixStore("connect", self._store)
            return cast(Channel, dist.ProcessGroupNCCL(store, self.rank, group.world_size, options))
        own = self._connect_store()  # a thread that waits keeps its connection to itself
        made: queue.SimpleQueue[Channel] = queue.SimpleQueue()

        def connect() -> None:
            with contextlib.suppress(RuntimeError):  # the driver is gone, and nobody waits at its gates
                try:
                    made.put(self._connect_gloo(own))
                except RuntimeError as error:
                    close_gate(own, CONNECTED, f"rank {self.rank} of weight group {group.name}: {error}")
                else:
                    self._arrive(own, CONNECTED)

        threading.Thread(target=connect, daemon=True).start()
        self._await_verdict(CONNECTED)
        return made.get()

    def _connect_gloo(self, store: dist.Store) -> Channel:
        store, size = dist.PrefixStore("connect", store), self.group.world_size
        timeout = timedelta(seconds=min(CONNECT_SECONDS, self.group.timeout_seconds))
        return cast(Channel, dist.ProcessGroupGloo(store, self.rank, size, timeout))


def why_not_formed(store: dist.Store) -> str | None:
    """Why the members of a group have not come together, where they have not."""
    keys = [f"{gate}/verdict" for gate in FORMING]
    verdicts = [store.get(key).decode() for key in keys if store.check([key])]
    return next((verdict for verdict in verdicts if verdict != OPEN), None)


def close_gate(store: dist.Store, name: str, verdict: str) -> None:
    """Decide a gate, unless it is decided already; ``OPEN`` opens it, any other text is why not."""
    store.compare_set(f"{name}/verdict", "", verdict)
