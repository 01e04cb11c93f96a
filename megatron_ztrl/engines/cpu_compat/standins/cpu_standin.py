"""What a stand-in answers for a name that it does not provide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def missing_functions(module: str) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` (PEP 562): every unknown name imports, and raises as soon as it is
    called.
    """

    def __getattr__(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):  # the import system probes __path__, __spec__ and friends
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"{module}.{name} has no CPU stand-in")

        missing.__name__ = name
        return missing

    return __getattr__
