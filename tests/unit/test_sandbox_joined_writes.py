"""The head and the body of an answer leave the server in one piece."""

import asyncio

from ztrl_sandbox.server import JoinedWrites


class Recorder:
    """A transport that remembers what it was asked to do."""

    def __init__(self):
        self.calls = []

    def write(self, data):
        self.calls.append(data)

    def close(self):
        self.calls.append("close")

    def is_closing(self):
        return "close" in self.calls


def test_writes_of_one_turn_are_one_and_those_of_the_next_another():
    async def scenario():
        recorder = Recorder()
        transport = JoinedWrites(recorder)
        transport.write(b"head ")
        transport.write(b"body")
        assert recorder.calls == []
        await asyncio.sleep(0)
        transport.write(b"next")
        await asyncio.sleep(0)
        return recorder.calls

    assert asyncio.run(scenario()) == [b"head body", b"next"]


def test_closing_sends_what_was_written_first_and_nothing_twice():
    async def scenario():
        recorder = Recorder()
        transport = JoinedWrites(recorder)
        transport.write(b"head ")
        transport.write(b"body")
        transport.close()
        assert transport.is_closing()
        await asyncio.sleep(0)
        return recorder.calls

    assert asyncio.run(scenario()) == [b"head body", "close"]
