"""YAML and ``a.b=c`` overrides in, a validated frozen `Config` out, and back to YAML."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from megatron_ztrl.config.check import check_config
from megatron_ztrl.config.errors import ConfigError, did_you_mean
from megatron_ztrl.config.schema import Config

__all__ = ["ConfigError", "check_config", "load_config", "save_config"]

_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
"""A path that ends like this is a file, never a hub id."""
_INPUTS = (
    *("model.path", "critic.path", "engine.path", "data.train.path", "sandbox.token_file"),
    *("data.prompt_template", "reward.function", "tool.environment"),
)
"""Keys that may name a local file; so do the paths of ``data.eval``."""


def load_config(path: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies ``a.b=c`` overrides, validates, and makes paths absolute.

    ``model.path``, ``critic.path``, ``engine.path``, the data sets' ``path``, ``sandbox.token_file`` and every
    ``FILE.py:NAME`` are relative to the file they are written in, or to the current directory when an override gives
    them; hub ids stay as they are. ``run.directory`` is relative to the current directory.

    Raises:
        ConfigError: One line per problem.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    tree = _read_yaml(path)
    try:
        in_file = _make_absolute(tree, path.parent)
        overridden = [_apply_override(tree, override) for override in overrides]
        # What a path refers to may be overridden, so those come last.
        for key, written in _make_absolute(tree, Path.cwd()).items():
            text = OmegaConf.select(tree, key)
            if isinstance(text, str):
                base = path.parent if in_file.get(key) == written else Path.cwd()
                OmegaConf.update(tree, key, _escape(_resolve(text, base)))
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_first_line(error)}") from error
    try:
        # Validating JSON is strict about scalars and still builds dataclasses from mappings.
        config = TypeAdapter(Config).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(error, path, overridden))) from error
    directory = str(Path(config.run.directory).expanduser().absolute()) if config.run.directory else ""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=directory))


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes YAML from which `load_config` builds an equal `Config`."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(_escape(dataclasses.asdict(config)))), "utf-8")


def _escape(value: Any) -> Any:
    """Keeps a literal ``${`` from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {_first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: must be a mapping of sections such as 'run:', 'model:' and 'data:'")
    return tree


def _apply_override(tree: DictConfig, override: str) -> str:
    """Applies one ``a.b=c`` (the value is YAML) and returns its config path."""
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        # Unresolved, so that an interpolation sees the whole tree.
        parsed = typing.cast(
            dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        )
        OmegaConf.update(tree, key, parsed["value"], force_add=True)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML; text may need quotes"
        ) from error
    except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
        on_the_way = isinstance(error, IndexError) or not isinstance(error, OmegaConfBaseException)
        reason = f"there is no {key}: the entries of a list are numbers from 0 on"
        raise ConfigError(f"override {override!r}: {reason if on_the_way else _first_line(error)}") from error
    return key


def _make_absolute(tree: DictConfig, base: Path) -> dict[str, str]:
    """Makes the paths of files that are read absolute, where they are local.

    Returns:
        Those that refer to other keys, by their own, as they are written: they are left alone.
    """
    references = {}
    evaluated = OmegaConf.select(tree, "data.eval")
    count = len(evaluated) if isinstance(evaluated, ListConfig) else 0
    for key in (*_INPUTS, *(f"data.eval.{index}.path" for index in range(count))):
        section_key, _, name = key.rpartition(".")
        section = OmegaConf.select(tree, section_key)
        if not isinstance(section, DictConfig):
            continue
        written = typing.cast(dict[str, Any], OmegaConf.to_container(section)).get(name)
        if isinstance(written, str) and "${" in written:
            references[key] = written
        elif isinstance(written, str):
            OmegaConf.update(tree, key, _resolve(written, base))
    return references


def _resolve(text: str, base: Path) -> str:
    file, _, name = text.rpartition(":")
    if file.endswith(".py"):  # what `load_object` takes
        return f"{os.path.normpath((base / Path(file).expanduser()).absolute())}:{name}"
    if text.startswith("~"):
        return str(Path(text).expanduser())
    local = text.startswith(("./", "../", "/")) or text in (".", "..")
    if local or text.endswith(_DATA_SUFFIXES) or (text and (base / text).exists()):
        return os.path.normpath((base / text).absolute())
    return text


def _describe(error: ValidationError, path: Path, overridden: list[str]) -> list[str]:
    """One line for each problem pydantic found."""
    lines = []
    for problem in error.errors():
        *parents, name = problem["loc"]
        config_path = ".".join(map(str, problem["loc"]))
        from_override = any(_contains(config_path, key) or _contains(key, config_path) for key in overridden)
        where = f"{'override' if from_override else path}: {config_path}"
        match problem["type"]:
            case "unexpected_keyword_argument":
                known = [field.name for field in dataclasses.fields(_section(parents))]
                hint = did_you_mean(str(name), known) or f"; known keys: {', '.join(known)}"
                lines.append(f"{where}: unknown key{hint}")
            case "missing":
                lines.append(f"{where}: required, but missing")
            case "dataclass_type":
                lines.append(f"{where}: must be a mapping of keys, got {json.dumps(problem['input'])}")
            case _:
                got = json.dumps(problem["input"])
                wanted = problem["msg"].replace("Input should", "must").replace("valid array", "list")
                lines.append(f"{where}: {wanted}, got {got}")
    return lines


def _contains(outer: str, inner: str) -> bool:
    return f"{inner}.".startswith(f"{outer}.")


def _section(path: list[Any]) -> type:
    """The dataclass that lies at a config path."""
    section: type = Config
    for name in path:
        if not isinstance(name, int):  # an index into a list of sections keeps the section
            hint = typing.get_type_hints(section)[name]
            section = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    return section


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
