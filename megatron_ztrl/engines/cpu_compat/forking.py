"""Lets a server fork its scheduler and its detokenizer, which then find everything imported.

SGLang spawns them, since CUDA does not survive a fork; two thirds of what a start costs are then their imports. This
plugin of SGLang's (see ``attention``) makes the choice again where there is no CUDA.
"""

from __future__ import annotations

import multiprocessing


def register() -> None:
    """Entry point: runs in the server before it chooses how its processes start."""
    set_start_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork", force)

    multiprocessing.set_start_method = fork
