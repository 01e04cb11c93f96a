"""Results used again: for code that gives the same output whenever it runs, such as a replay of rollouts."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ztrl_sandbox.protocol import ExecutionResult, Status

_REPEATABLE = (Status.OK, Status.ERROR)
"""The other statuses depend on how busy the machine was, or say nothing about the snippet."""


class Memo:
    """The most recently used results, by code, options and what ran before in the same session.

    Args:
        max_entries: Results kept.
    """

    def __init__(self, max_entries: int) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, got {max_entries}")
        self.hits = 0
        self.misses = 0
        self._max_entries = max_entries
        self._results: OrderedDict[bytes, ExecutionResult] = OrderedDict()

    def __len__(self) -> int:
        return len(self._results)

    def key(self, prefix: bytes, body: Mapping[str, Any]) -> bytes:
        """Identifies a call.

        Args:
            prefix: Key of the call before it in its session; anything else that tells the start.
            body: Code and options.
        """
        digest = hashlib.sha256(prefix)
        digest.update(json.dumps(body, sort_keys=True).encode())
        return digest.digest()

    def get(self, key: bytes) -> ExecutionResult | None:
        """What this call gave before."""
        result = self._results.get(key)
        if result is None:
            self.misses += 1
        else:
            self.hits += 1
            self._results.move_to_end(key)
        return result

    def put(self, key: bytes, result: ExecutionResult) -> bool:
        """Remember it, unless another run might end differently; returns whether it is remembered."""
        if result.status not in _REPEATABLE:
            return False
        self._results[key] = result
        self._results.move_to_end(key)
        if len(self._results) > self._max_entries:
            self._results.popitem(last=False)
        return True
