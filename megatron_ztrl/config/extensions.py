"""A user's own rewards, environments and prompt templates, which a configuration names."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ztrl.config.errors import ConfigError, did_you_mean


def is_reference(text: str) -> bool:
    """Whether it names an object as `load_object` takes it."""
    return ":" in text


def load_object(reference: str, *, key: str) -> Any:
    """The object that ``FILE.py:NAME`` or ``package.module:NAME`` names.

    A file is run once per process, however often it is named, and can be imported by its stem afterwards.

    Args:
        reference: Relative paths are relative to the working directory.
        key: The configuration's key, for the error.

    Raises:
        ConfigError: There is no such file, module or name, or running it failed.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise ConfigError(f"{key}: expected FILE.py:NAME or package.module:NAME, got {reference!r}")
    try:
        module = _run_file(Path(where).resolve()) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise ConfigError(f"{key}: there is no file {Path(where).resolve()}") from None
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{key}: {error} (for {reference!r}); install it, or name its file as path/to/it.py:{name}"
        ) from error
    except Exception as error:  # the user's code can raise anything
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{key}: running {where} failed: {type(error).__name__}: {error} ({line.filename}, line {line.lineno})"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}: {where} has no {name!r}{did_you_mean(name, vars(module))}")
    return getattr(module, name)


@functools.cache
def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    # So that pickle and dataclasses find it; a module of that name that is loaded already stays what it is.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
