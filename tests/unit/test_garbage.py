"""The driver's garbage collector leaves the replies of engines alone."""

import gc

import orjson
import pytest

from megatron_ztrl.runtime.garbage import collect_garbage_rarely

TOKENS, REPLIES = 4096, 50


@pytest.fixture
def _thresholds():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def collections_of_some_replies():
    """How often the collector ran while replies of 4,096 tokens were read, one after the other."""
    reply = orjson.dumps([[-0.5, token, None] for token in range(TOKENS)])
    found = []

    def note(phase, info):
        found.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        for _ in range(REPLIES):
            assert len(orjson.loads(reply)) == TOKENS
    finally:
        gc.callbacks.remove(note)
    return found.count("stop")


@pytest.mark.usefixtures("_thresholds")
def test_reading_replies_sets_off_no_collection_and_cycles_are_found_all_the_same():
    gc.set_threshold(700, 10, 10)  # Python's own
    assert collections_of_some_replies() > REPLIES
    collect_garbage_rarely()
    assert collections_of_some_replies() == 0
    found = []
    gc.callbacks.append(lambda phase, info: found.append(info["collected"]) if phase == "stop" else None)
    try:
        for _ in range(60_000):
            cycle = []
            cycle.append(cycle)
    finally:
        gc.callbacks.pop()
    assert sum(found) > 40_000
