"""A paused SGLang server that rests.

While generation is paused the stock scheduler asks for requests without a break (with ``sleep_on_idle``, too), and with
tensor parallelism all its ranks do. On a small machine these are the cores that the trainer sends its weights with.
This plugin (entry point group ``sglang.srt.plugins``, found through ``standins/*.dist-info``) lets a paused scheduler
wait for the next request as an idle one does.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point: runs in every server process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine"
    HookRegistry.register(target, _rest, HookType.AFTER)


def _rest(_: None, scheduler: Any) -> None:
    scheduler.maybe_sleep_on_idle()
