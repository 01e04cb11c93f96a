"""Peak of live tensor bytes on any device, to check predictions against: it sees what an allocator would."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return inside the ``with`` block, until each is freed.

    Storages that were there before count only if an operator returned a view of one, so name those in
    ``existing``. Collectives' and kernels' internal workspaces are not seen.
    """

    def __init__(self, existing: list[torch.Tensor]) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, Any] = {}
        for tensor in existing:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage  # held, so that its id is not used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = None
        self.now_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now_bytes -= size
