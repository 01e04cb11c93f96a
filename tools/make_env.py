"""Makes the virtual environment of this checkout, or repairs it; takes half a second when it is ready.

    python3 tools/make_env.py [--profile cpu | gpu]

Ready means: finished by this program, for this checkout and these requirements, and every file of every
pinned distribution lies there in its recorded size. So an interrupted install, a deleted package, a changed
pin and a moved Python are all noticed; what is wrong is installed again, and nothing else.

``ZTRL_TORCH_INDEX`` names the package index to take torch from. Without it, the CPU build comes from the
places that pip is configured with, else from PyTorch's own index, else PyPI's build is taken: it runs on CPU
too, but brings gigabytes of CUDA libraries. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from env_state import (
    HARMFUL_ON_CPU,
    PROFILES,
    PYTHON,
    ROOT,
    STAMP,
    VENV,
    SetupError,
    all_pins,
    broken,
    complaint,
    expected_stamp,
    harmful,
    installed,
    is_intact,
    read_pins,
    read_requirements,
    site_packages,
    summary,
)

SUPPORTED_PYTHONS = ("3.11", "3.12")
PIP_LOG = VENV / "pip.log"
PIP_SETTINGS = {"PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
IMPORTS = {"torch": "torch", "transformers": "transformers", "megatron-core": "megatron.core", "ray": "ray"}
REPORT_EVERY_SECONDS = 10.0
LARGE_DOWNLOAD_MEGABYTES = 50.0
NEEDED_DISK_GIGABYTES = 5.0


def say(message: str) -> None:
    print(f"[env] {message}", flush=True)


def is_repairable() -> bool:
    """Whether the environment's own Python and pip still run where they were made."""
    site, config = site_packages(), VENV / "pyvenv.cfg"
    if site is None or not PYTHON.exists() or not config.exists():
        return False
    if f" -m venv {VENV}\n" not in config.read_text():  # the checkout was moved or copied
        return False
    code = "import pip, sys; print('python%d.%d' % sys.version_info[:2])"
    answer = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return answer.returncode == 0 and answer.stdout.strip() == site.parent.name


def find_python() -> str:
    """A supported Python that can make virtual environments: the running one where it fits.

    Raises:
        SetupError: there is none.
    """
    running = getattr(sys, "_base_executable", sys.executable)  # not the one of an active environment
    others = [shutil.which(f"python{version}") for version in SUPPORTED_PYTHONS]
    code = "import sys; print('%d.%d' % sys.version_info[:2]); import venv, ensurepip"
    for python in filter(None, [running, *others]):
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if answer.stdout.strip() not in SUPPORTED_PYTHONS:
            continue
        if answer.returncode != 0:
            raise SetupError(f"{python} cannot make virtual environments: apt-get install python3-venv")
        return python
    wanted = " or ".join(SUPPORTED_PYTHONS)
    raise SetupError(f"Python {wanted} is needed, and {running} is another: make PYTHON=/path/to/python3.12")


def create() -> None:
    """A fresh, empty environment with pip."""
    python = find_python()
    free_gigabytes = shutil.disk_usage(ROOT).free / 1e9
    if free_gigabytes < NEEDED_DISK_GIGABYTES:
        raise SetupError(f"{free_gigabytes:.1f} GB free at {ROOT}; {NEEDED_DISK_GIGABYTES:.0f} GB are needed")
    if VENV.exists():
        shutil.rmtree(VENV)
    say(f"making {VENV.name} with {python}")
    answer = subprocess.run([python, "-m", "venv", VENV], capture_output=True, text=True)
    if answer.returncode != 0:
        raise SetupError(f"{python} -m venv failed:\n{answer.stdout}{answer.stderr}")


def tail_of_log() -> str:
    """What pip said last, without the index locations that it skipped."""
    lines = PIP_LOG.read_text(errors="replace").splitlines()
    said = [line[:200] for line in lines if not line.startswith("WARNING: Location")]
    return "\n".join(f"    {line}" for line in said[-12:])


def pip_install(arguments: list[str], lock_fd: int) -> bool:
    """Runs pip, its output in a log, and says every few seconds how far it is. False when pip failed."""
    command = [str(PYTHON), "-m", "pip", "install", *arguments]
    site, started = site_packages(), time.monotonic()
    assert site is not None
    with PIP_LOG.open("w") as log:
        # pip inherits the lock: if only this program is killed, the next one waits until pip has ended.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | PIP_SETTINGS, pass_fds=(lock_fd,)
        )
    announced: set[str] = set()
    total = sum("==" in argument for argument in arguments)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(REPORT_EVERY_SECONDS) == 0
        text = PIP_LOG.read_text(errors="replace")
        for name, megabytes in re.findall(r"Downloading \S*?([^/\s]+\.whl)\S* \(([\d.]+) MB\)", text):
            if float(megabytes) >= LARGE_DOWNLOAD_MEGABYTES and name not in announced:
                announced.add(name)
                say(f"  downloading {name} ({megabytes} MB)")
        if "Installing collected packages" in text:
            progress = f"installing: {len(installed(site))} packages are in place"
        else:
            progress = f"collecting: {text.count('Collecting ')} of {total} packages"
        say(f"  {time.monotonic() - started:.0f} s, {progress}")


def install_torch(version: str, constraints: list[str], lock_fd: int) -> None:
    """The CPU build where one is to be had.

    Raises:
        SetupError: no build could be installed.
    """
    index = os.environ.get("ZTRL_TORCH_INDEX")
    only_torch = ["--no-deps", "--retries=1", "--timeout=20"]
    attempts = [[*only_torch, f"torch=={version}+cpu"]]
    attempts += [[*only_torch, "--index-url", TORCH_CPU_INDEX, f"torch=={version}+cpu"]]
    if index:
        attempts = [["--no-deps", "--index-url", index, f"torch=={version}"]]
    say(f"torch {version}, CPU build")
    if any(pip_install(attempt, lock_fd) for attempt in attempts):
        return
    if index:
        raise SetupError(f"no torch {version} from ZTRL_TORCH_INDEX={index}\n{tail_of_log()}")
    say("no CPU build of torch within reach: taking PyPI's, with its CUDA libraries (gigabytes)")
    if not pip_install([*constraints, f"torch=={version}"], lock_fd):
        raise SetupError(f"pip could not install torch {version}\n{tail_of_log()}")


def install(profile: str, lock_fd: int) -> None:
    """Installs what is absent or broken, then this checkout.

    Raises:
        SetupError: pip failed.
    """
    site = site_packages()
    assert site is not None
    for leftover in site.glob("~*"):  # where pip keeps a package that it was replacing when it was stopped
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for name in harmful(profile):
        say(f"removing {name}: {HARMFUL_ON_CPU[name]}")
        subprocess.run([PYTHON, "-m", "pip", "uninstall", "-q", "-y", name], check=True)
    for step in PROFILES[profile]:
        pins = read_pins(step)
        wrong = broken(site, pins)
        for name, (_, info) in installed(site).items():
            if name in wrong and not is_intact(info):
                shutil.rmtree(info)  # else pip takes the package for installed
        if profile == "cpu" and "torch" in wrong:
            constraints = [f"--constraint={path}" for path in step.paths]
            install_torch(pins["torch"], constraints, lock_fd)
            wrong.remove("torch")
        if not wrong:
            continue
        say(f"{len(wrong)} packages: {summary(wrong)}")
        requirements = read_requirements(step)
        if not pip_install([*step.options, *(requirements[name] for name in wrong)], lock_fd):
            raise SetupError(f"pip failed (all of it: {PIP_LOG})\n{tail_of_log()}")
    say("megatron_ztrl and ztrl_sandbox, in place")
    if not pip_install(["--no-deps", "--no-build-isolation", "--editable", str(ROOT)], lock_fd):
        raise SetupError(f"pip could not install this checkout\n{tail_of_log()}")


def check_imports(profile: str) -> None:
    """Catches what no file list shows, such as a library that this processor or this system cannot load.

    Only on CPU: an image for GPUs is often built where there is no driver, and nothing would import.
    """
    modules = [module for name, module in IMPORTS.items() if name in all_pins(profile)]
    for module in modules if profile == "cpu" else ():
        answer = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, text=True)
        if answer.returncode != 0:
            lines = answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"]
            raise SetupError(f"`import {module}` fails in the new environment: {lines[-1]}")


def write_stamp(stamp: dict[str, str]) -> None:
    """In one piece, whatever happens meanwhile."""
    unfinished = STAMP.with_suffix(".tmp")
    unfinished.write_text(json.dumps(stamp, indent=2) + "\n")
    unfinished.replace(STAMP)


def make_ready(profile: str, lock_fd: int) -> None:
    """Brings the environment from whatever state it is in to ready."""
    all_pins(profile)  # a mistake in a list is told before any work is done
    # Not even repaired across profiles: a CPU build of torch satisfies the pin of the GPU list.
    if default_profile() != profile or not is_repairable():
        create()
    write_stamp({"profile": profile})  # unfinished
    install(profile, lock_fd)
    check_imports(profile)
    write_stamp(expected_stamp(profile))
    problem = complaint(profile)
    if problem:
        raise SetupError(f"still not right after the installation: {problem}")


@contextlib.contextmanager
def lock() -> Iterator[int]:
    """One installation at a time, in any process. A lock on a folder of the checkout leaves no file."""
    descriptor = os.open(ROOT / "requirements", os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another installation is running here: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def default_profile() -> str:
    """The one that the environment was made with: after `make gpu-setup`, `make test` must not undo it."""
    return json.loads(STAMP.read_text())["profile"] if STAMP.exists() else "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make or repair the virtual environment of this checkout.")
    parser.add_argument("--profile", choices=PROFILES, help="default: what there is, else cpu")
    profile = parser.parse_args().profile or default_profile()
    try:
        if not complaint(profile):
            return 0
        with lock() as lock_fd:
            problem = complaint(profile)  # again: another process may just have made it
            if not problem:
                return 0
            started = time.monotonic()
            say(f"setting up {VENV}: {problem}")
            make_ready(profile, lock_fd)
            say(f"ready after {time.monotonic() - started:.0f} s")
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted: the next `make env` goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
