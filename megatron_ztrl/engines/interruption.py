"""What a publish does to the requests that an engine is running: the strategies of ``publish.interruption``.

| strategy | running requests | their KV | KV of finished ones |
|---|---|---|---|
| ``retract`` | stay in the server | computed anew | flushed |
| ``abort`` | return what they have; the caller resumes them | computed anew | flushed |
| ``in_place`` | stay in the server | kept: inexact | never shared (the server has no prefix cache) |

Whatever the strategy, requests that arrive meanwhile wait in the server until ``resume``, and each token
carries the version of the weights that sampled it. ``retract`` and ``abort`` are exact: every log-prob is
that of the token's own version given the whole sequence.

SGLang's own pause with mode ``abort`` is not used: it polls once a second, and its scheduler goes on, so that
a request that slips in is running when the cache has to be flushed. Here the scheduler stands still in every
strategy, and the flush is a request of its own, made before any weight changes, so that a refusal is an error here
and not the death of the server.
"""

from __future__ import annotations

from typing import Literal

from megatron_ztrl.engines.client import EngineClient

Strategy = Literal["retract", "abort", "in_place"]


async def pause(engine: EngineClient, strategy: Strategy) -> None:
    """Stop an engine between two tokens and, unless ``in_place``, have it forget all cached KV.

    Its weights may change when this returns; ``EngineClient.resume`` lets it go on under them. Nothing is cached
    before that, so there is nothing left to forget after the change.

    Raises:
        EngineError: the engine failed, or could not forget its KV and stays paused.
    """
    if strategy == "abort":
        await engine.abort_in_flight()
    # After an abort, requests that came in since are what is left to retract.
    await engine.pause("in_place" if strategy == "in_place" else "retract")
    if strategy != "in_place":  # SGLang flushes nothing while requests hold their KV
        await engine.flush_cache()
