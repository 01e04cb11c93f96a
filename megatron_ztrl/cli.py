"""The command ``ztrl``. What a user got wrong is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_ztrl import __version__

if TYPE_CHECKING:
    from megatron_ztrl.config.schema import Config

FAILED = 1
"""A server would not run, or ``ztrl doctor`` misses something."""
USER_ERROR = 2
INTERRUPTED = 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUR_PACKAGES = ("megatron_ztrl", "ztrl_sandbox", "__main__")

_EXAMPLES = """\
examples:
  ztrl train config.yaml
  ztrl train config.yaml rollout.env_iterations=4 actor.learning_rate=1e-6 --resume
  ztrl eval config.yaml run.directory=runs/demo-eval model.path=runs/demo/policy
  ztrl plan config.yaml --model qwen2.5-32b --gpus 64 --png plan.png
  ztrl report runs/demo --control runs/demo-no-tool
  ztrl engines runs/demo --count 3
  ztrl doctor
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for what the user got wrong, 130 when interrupted, else 1."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("ZTRL_TRACEBACK") == "1" or not _is_for_the_user(error):
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return USER_ERROR if isinstance(error, ValueError | OSError) else FAILED


def _train(options: argparse.Namespace) -> int:
    config = _load(options.config, options.words)
    _refuse_to_mix_runs(config, options.resume)
    from megatron_ztrl.runtime.processes import sole_driver
    from megatron_ztrl.runtime.scaling import forget_requests

    with sole_driver(Path(config.run.directory)):
        from asyncio import CancelledError

        from megatron_ztrl.loop import run_training

        if not options.resume:
            forget_requests(Path(config.run.directory))
        try:
            run_training(config, resume=options.resume)
        except CancelledError:  # interrupted while it started or ended
            raise KeyboardInterrupt from None
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    # What training evaluates in between has nothing to agree with here.
    config = _load(options.config, [*options.words, "eval.interval_env_iterations=[]"])
    from megatron_ztrl.runtime.processes import sole_driver

    with sole_driver(Path(config.run.directory)):
        from megatron_ztrl.evaluate import run_evaluation

        run_evaluation(config)
    return 0


def _plan(options: argparse.Namespace) -> int:
    for option, path in (("--png", options.png), ("--json", options.json)):
        if path is not None:
            _check_writable(option, path.absolute())
    from megatron_ztrl.config.load import check_config
    from megatron_ztrl.config.native import check_native

    config = _load_checked(options.config, options.words, check_config, check_native)
    from megatron_ztrl.trainer.planner.command import Options, run_plan

    with _ending_with_the_reader():
        run_plan(config, Options(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}))
    return 0


def _check_writable(option: str, path: Path) -> None:
    """Refuses a file that could not be written, before there is anything to write."""
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no directory {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a directory; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")


def _engines(options: argparse.Namespace) -> int:
    from megatron_ztrl.runtime.processes import read_processes
    from megatron_ztrl.runtime.scaling import request_engines

    if options.count is not None:
        request_engines(options.run_directory, options.count)
        print(f"asked for {options.count} engines; the run says when they serve")
        return 0
    servers = read_processes(options.run_directory)["servers"]
    with _ending_with_the_reader():
        if not servers:
            print("no server of the run has started yet")
        for name, row in servers.items():
            print(
                f"{name:12} {row['state']:18} pid {row['pid']:<8} {row['url']:28} restarts {row['restarts']}"
            )
    return 0


def _report(options: argparse.Namespace) -> int:
    from megatron_ztrl.observability.report import write_report

    runs = [options.run_directory, *map(Path, options.words)]
    print(write_report(runs, control=options.control))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from megatron_ztrl.doctor import examine, print_table, to_json

    findings = examine()
    with _ending_with_the_reader():
        if options.json:
            print(to_json(findings))
        else:
            print_table(findings)
    return FAILED if any(finding.blocks for finding in findings) else 0


@contextlib.contextmanager
def _ending_with_the_reader() -> Iterator[None]:
    """As other tools do when ``head`` has seen enough. Else the signal is nobody's: sockets break, too."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="ztrl",
        description="Teach a base language model to use Python while it solves maths.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ztrl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: object, summary: str) -> _Parser:
        subparser = commands.add_parser(name, help=summary, description=summary)
        subparser.set_defaults(command=command, parser=subparser)
        return subparser

    train = add("train", _train, "Train a policy.")
    evaluate = add("eval", _evaluate, "Evaluate model.path on data.eval, for each N of eval.env_iterations.")
    plan = add(
        "plan", _plan, "Show what a configuration takes on GPUs, without any: memory, and time of a step."
    )
    for subparser in (train, evaluate, plan):
        subparser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
        subparser.add_argument(
            "words",
            nargs="*",
            default=[],
            metavar="a.b=c",
            help="overrides, e.g. actor.learning_rate=1e-6 or eval.env_iterations=[0,4]",
        )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in run.directory, if there is one",
    )
    _add_plan_options(plan)
    report = add("report", _report, "Write report.html, its figures and summary.json into a run directory.")
    report.add_argument("run_directory", type=Path, metavar="RUN_DIR", help="the run to report on")
    report.add_argument("words", nargs="*", default=[], metavar="RUN_DIR", help="more runs, drawn beside it")
    report.add_argument(
        "--control",
        type=Path,
        metavar="RUN_DIR",
        help="the same run without the tool (rollout.env_iterations=0)",
    )
    engines = add("engines", _engines, "Show the servers of a run that is going on, or change its engines.")
    engines.add_argument("run_directory", type=Path, metavar="RUN_DIR", help="run.directory of the run")
    engines.add_argument("--count", type=int, help="make it so many engines; rollouts lose no token")
    doctor = add("doctor", _doctor, "Show what this machine can run, what is missing, and how to get it.")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _add_plan_options(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--model", help="a well-known shape (qwen2.5-1.5b, -7b, -32b) or a local checkpoint, not model.path"
    )
    plan.add_argument(
        "--gpus", type=_count, metavar="COUNT", help="also search for the quickest layouts of so many GPUs"
    )
    plan.add_argument(
        "--memory-gb",
        type=_positive,
        default=80.0,
        metavar="GB",
        help="of one GPU, in 10^9 bytes (default 80)",
    )
    plan.add_argument(
        "--prompt-tokens",
        type=_positive,
        metavar="MEAN",
        help="of a prompt; default: a quarter of data.max_prompt_tokens",
    )
    plan.add_argument(
        "--response-tokens",
        type=_positive,
        metavar="MEAN",
        help="of a response; default: half of rollout.max_response_tokens",
    )
    plan.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write its figures")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Like ``parse_args``, but options may stand between the words: ``train CONFIG a=1 --resume b=2``."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if "config" in options and word.startswith("--") and "." in word.partition("=")[0]:
            options.parser.error(
                f"unrecognized argument: {word}; overrides have no dashes: {word.lstrip('-')}"
            )
        if word.startswith("-") or "words" not in options:
            options.parser.error(f"unrecognized argument: {word}")
        options.words = [*options.words, word]
    return options


def _load(path: Path, overrides: list[str]) -> Config:
    """The configuration after every check that needs no process, with a local ``model.path``."""
    from megatron_ztrl.config.load import check_config
    from megatron_ztrl.config.native import check_native
    from megatron_ztrl.trainer.topology import check_topology, resolve_checkpoint

    config = _load_checked(path, overrides, check_config, check_native, check_topology)
    local = str(resolve_checkpoint(config.model.path))  # a hub id becomes the directory of its snapshot
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=local))


def _load_checked(path: Path, overrides: list[str], *checks: Callable[[Config], None]) -> Config:
    from megatron_ztrl.config.load import ConfigError, load_config

    config = load_config(path, overrides)
    for check in checks:
        try:
            check(config)
        except ValueError as error:
            if not _is_for_the_user(error):
                raise
            raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error
    return config


def _refuse_to_mix_runs(config: Config, resume: bool) -> None:
    from megatron_ztrl.config.load import ConfigError
    from megatron_ztrl.observability.names import METRICS_FILE

    metrics = Path(config.run.directory) / METRICS_FILE
    if not resume and metrics.exists() and metrics.stat().st_size:
        raise ConfigError(
            f"run.directory: {config.run.directory} already holds a run; "
            "add --resume to go on with it, or choose another directory"
        )


def _is_for_the_user(error: Exception) -> bool:
    """Whether it says all there is to say; anything else is a bug, and keeps its traceback.

    So does what our own code raised as a ``ValueError``, or as a class of its own; a file that our code could not use;
    and a full disk, wherever it was noticed.
    """
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    if not isinstance(error, ValueError | OSError):
        return _is_ours(type(error).__module__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):  # files are opened by the standard library
        while modules and modules[-1].partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
            modules.pop()
    return bool(modules) and _is_ours(modules[-1])


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _OUR_PACKAGES


if __name__ == "__main__":
    sys.exit(main())
