"""Sends megatron-core's hard-coded ``torch.cuda`` calls to the CPU.

Megatron asks for ``torch.cuda.current_device()`` and ``device="cuda"`` in some thirty places, also on gloo.
Here the *name* ``torch`` inside ``megatron.*`` modules, those loaded already and those still to come, is
replaced by a view of torch whose ``cuda`` is the CPU. The real ``torch`` is left alone but for
``Tensor.cuda()`` and ``Module.cuda()``, which become the identity. With CUDA present nothing happens at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
) + ("empty_like", "zeros_like", "ones_like", "full_like", "linspace", "eye", "triu_indices", "empty_strided")


def install() -> None:
    """Makes megatron-core run on the CPU; does nothing where CUDA is available. May be called again."""
    if torch.cuda.is_available() or any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    view = _torch_view()
    sys.meta_path.insert(0, _MegatronFinder(view))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            _use_view(module, view)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    _patch_type_checks()


class _View(types.ModuleType):
    """A module with some names replaced."""

    def __init__(self, real: types.ModuleType, **replaced: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _torch_view() -> _View:
    get_rng = lambda *args, **kwargs: torch.get_rng_state()  # noqa: E731
    set_rng = lambda state, *args, **kwargs: torch.set_rng_state(state)  # noqa: E731
    nothing = lambda *args, **kwargs: None  # noqa: E731
    cuda = _View(
        torch.cuda,
        current_device=lambda: _CPU,
        set_device=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        Stream=_Stream,
        Event=_Event,
        current_stream=_Stream,
        default_stream=_Stream,
        stream=lambda stream: contextlib.nullcontext(),
        is_current_stream_capturing=lambda: False,
        get_rng_state=get_rng,
        set_rng_state=set_rng,
        manual_seed=torch.manual_seed,
        random=types.SimpleNamespace(get_rng_state=get_rng, set_rng_state=set_rng),
        nvtx=types.SimpleNamespace(range_push=nothing, range_pop=nothing),
    )
    return _View(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if isinstance(wanted, int) or (wanted is not None and torch.device(wanted).type == "cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


class _Stream:
    """A CUDA stream where work is done by the time a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: _Stream) -> None: ...
    def wait_event(self, event: _Event) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


def _use_view(module: types.ModuleType, view: _View) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = view


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Gives ``megatron.*`` modules the view as soon as they have run."""

    def __init__(self, view: _View) -> None:
        self._view = view

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _use_view(module, self._view)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch_type_checks() -> None:
    """Some optimizer code compares ``tensor.type()`` with CUDA names, or wants the CUDA generator."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for owner in (optimizer.Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        owner.__init__ = _with_cuda_type_names(owner.__init__)
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    for module in (clip_grads, optimizer):
        module.clip_grad_by_total_norm_fp32 = clip


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    real = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = real(self, dtype, *args, **kwargs) if dtype is not None else real(self)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_name  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]
