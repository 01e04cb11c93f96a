"""Which isolation tier is in force."""

from __future__ import annotations

from ztrl_sandbox.isolation import BasicIsolation, Isolation
from ztrl_sandbox.namespaces import FullIsolation, UserIsolation

_STRONGEST_FIRST: tuple[type[Isolation], ...] = (FullIsolation, UserIsolation, BasicIsolation)


def choose(requested: str) -> tuple[Isolation, str]:
    """The tier to use and why; ``requested`` is ``auto`` or the name of one.

    Raises:
        ValueError: ``requested`` is unknown, or this machine cannot provide it.
    """
    names = [tier.name for tier in _STRONGEST_FIRST]
    if requested not in ("auto", *names):
        raise ValueError(f"isolation: unknown tier {requested!r}; use auto, {', '.join(names)}")
    obstacles: list[str] = []
    for kind in _STRONGEST_FIRST:
        if requested not in ("auto", kind.name):
            continue
        tier = kind()
        obstacle = tier.probe()
        if obstacle is None:
            return tier, "requested" if requested != "auto" else "; ".join(obstacles) or "strongest"
        obstacles.append(f"{kind.name} is not available: {obstacle}")
    raise ValueError(f"isolation: {obstacles[0]}; use auto or a weaker tier")
