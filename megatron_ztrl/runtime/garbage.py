"""Python's garbage collector in a driver that holds the tokens of thousands of rollouts."""

from __future__ import annotations

import gc

_NEW_OBJECTS = 50_000
"""More than one engine's reply is made of."""
_YOUNGER_COLLECTIONS = 20


def collect_garbage_rarely() -> None:
    """Lets the collector look for cycles once in a while, instead of several times in every reply of an engine.

    A reply holds a list for each of its tokens. With Python's thresholds, made for 700 new objects, those few
    milliseconds of life set off one collection after the other; some walk through every token of every rollout in
    flight, and stop the event loop for a second where there are 10^8 of them. What has no cycles needs no collector.
    """
    gc.set_threshold(_NEW_OBJECTS, _YOUNGER_COLLECTIONS, _YOUNGER_COLLECTIONS)
