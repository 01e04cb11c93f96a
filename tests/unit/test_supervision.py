"""Servers that die are started again, with pauses and a limit; who waits for them learns what is wrong."""

import asyncio

import pytest

from megatron_ztrl.runtime import supervision
from megatron_ztrl.runtime.services import ServerDied, Started
from megatron_ztrl.runtime.supervision import ServerKeepsDying, Supervisor


class Host:
    """A `HostedServer` in memory."""

    def __init__(self):
        self.failing_starts = 0
        self.starts = 0
        self.end()

    def end(self, reason="code -9\nlast words"):
        """The process ends now (or will have ended when it is waited for)."""
        self.ended = asyncio.Event()
        self.reason = reason
        self.ended.set()

    async def wait(self):
        await self.ended.wait()
        return self.reason

    async def restart(self):
        if self.failing_starts:
            self.failing_starts -= 1
            raise ServerDied("no memory\nend of the log")
        self.ended = asyncio.Event()
        self.starts += 1
        return Started(f"http://{self.starts}", self.starts)


class Charge:
    def __init__(self, max_restarts=3, others=False):
        self.name = "engine 0"
        self.server = Host()
        self.max_restarts = max_restarts
        self.others = others
        self.events = []
        self.condemned = asyncio.Event()

    async def fails(self):
        await self.condemned.wait()
        self.condemned.clear()
        return "answers nothing"

    def went_down(self):
        self.events.append("down")

    def came_up(self, started):
        self.events.append(started.url)

    def give_up(self):
        self.events.append("given up")
        return self.others


@pytest.fixture
def pauses(monkeypatch):
    """The pauses before starts, which take no time here."""
    taken = []
    pause_seconds = supervision._pause_seconds

    def no_pause(deaths):
        taken.append(pause_seconds(deaths))
        return 0.0

    monkeypatch.setattr(supervision, "_pause_seconds", no_pause)
    return taken


async def events(charge, count):
    for _ in range(10_000):
        if len(charge.events) >= count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"only {charge.events}")


async def supervised(charge, body):
    async with Supervisor(lambda note: None) as supervisor:
        supervisor.watch(charge)
        await body


async def test_a_server_that_ended_starts_again_at_once_and_so_does_one_that_hangs(pauses):
    charge, notes = Charge(), []
    async with Supervisor(notes.append) as supervisor:
        supervisor.watch(charge)
        await events(charge, 2)
        charge.condemned.set()
        await events(charge, 4)
    assert charge.events == ["down", "http://1", "down", "http://2"]
    assert pauses == [0.0, 1.0]
    assert [note.splitlines()[0] for note in notes if "starts again" in note] == [
        "code -9: engine 0 starts again",
        "answers nothing: engine 0 starts again",
    ]


async def test_starts_that_fail_are_repeated_ever_more_rarely(pauses):
    charge = Charge(max_restarts=10)
    charge.server.failing_starts = 8
    async with Supervisor(lambda note: None) as supervisor:
        supervisor.watch(charge)
        await events(charge, 2)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert charge.events == ["down", "http://1"]


async def test_the_last_server_that_keeps_dying_ends_what_waits_for_it_with_its_last_words(pauses):
    charge = Charge(max_restarts=2)
    charge.server.failing_starts = 100
    match = r"(?s)engine 0 died 3 times in a row.*no memory\nend of the log"
    with pytest.raises(ServerKeepsDying, match=match):
        await supervised(charge, asyncio.Event().wait())
    assert charge.events == ["down", "given up"]
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_one_of_many_that_keeps_dying_is_given_up_and_the_run_goes_on(pauses):
    charge, notes = Charge(max_restarts=1, others=True), []
    charge.server.failing_starts = 100
    async with Supervisor(notes.append) as supervisor:
        await supervisor.watch(charge)
    assert charge.events == ["down", "given up"]
    assert "end of the log" in notes[-1]


async def test_a_server_that_served_for_long_has_all_its_starts_again(pauses, monkeypatch):
    monkeypatch.setattr(supervision, "STEADY_SECONDS", 0.0)
    charge = Charge(max_restarts=1)
    async with Supervisor(lambda note: None) as supervisor:
        supervisor.watch(charge)
        for start in range(1, 5):
            await events(charge, 2 * start)
            charge.server.ended.set()
    assert charge.events[1:8:2] == ["http://1", "http://2", "http://3", "http://4"]
    assert set(pauses) == {0.0}


async def test_a_server_that_was_added_is_started_first(pauses):
    charge = Charge()
    async with Supervisor(lambda note: None) as supervisor:
        supervisor.watch(charge, started=False)
        await events(charge, 1)
    assert charge.events == ["http://1"]


async def test_an_error_of_the_block_is_its_own(pauses):
    async def fail():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await supervised(Charge(), fail())


async def test_an_error_of_a_watcher_is_raised_though_the_block_ends_at_the_same_moment(pauses):
    async def fail():
        raise ServerDied("at last")

    async def end_with_a_watcher_that_fails():
        async with Supervisor(lambda note: None) as supervisor:
            await asyncio.wait({supervisor.spawn(fail())})
            # Nothing is awaited any more, so that the cancellation meets what comes after the block.

    with pytest.raises(ServerDied, match="at last"):
        await end_with_a_watcher_that_fails()
    await asyncio.sleep(0)  # and is over


async def test_a_watcher_that_fails_while_it_is_ended_is_heard(pauses):
    async def fail_late():
        try:
            await asyncio.Event().wait()
        finally:
            raise ServerDied("late")

    async def end_a_watcher_that_fails():
        async with Supervisor(lambda note: None) as supervisor:
            supervisor.spawn(fail_late())
            await asyncio.sleep(0)

    with pytest.raises(ServerDied, match="late"):
        await end_a_watcher_that_fails()
    await asyncio.sleep(0)
