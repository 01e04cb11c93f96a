"""What the virtual environment of this checkout should hold, and what it does hold. Changes nothing.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ztrl-stamp.json"
HARMFUL_ON_CPU = {"torchvision": "beside a CPU build of torch it breaks `import transformers`"}


class SetupError(Exception):
    """What the person at the keyboard has to know, in a line or two."""


@dataclass(frozen=True)
class Step:
    """One call of ``pip install``."""

    requirements: tuple[str, ...]
    """Files in requirements/; every line is ``name==version``."""
    options: tuple[str, ...] = ()

    @property
    def paths(self) -> list[Path]:
        return [ROOT / "requirements" / name for name in self.requirements]


PROFILES = {
    # The CPU lists are complete, and sglang's own requirements must not come along.
    "cpu": (Step(("cpu.txt", "dev.txt", "sglang-cpu.txt"), ("--no-deps",)),),
    "gpu": (
        Step(("gpu.txt", "dev.txt")),
        Step(("gpu-build.txt",), ("--no-build-isolation",)),  # compiled against the torch of the first step
    ),
}


def normalise(name: str) -> str:
    """One spelling for every spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(step: Step) -> dict[str, str]:
    """The requirement, such as ``ray==2.60.0``, by normalised name.

    Raises:
        SetupError: a line is not ``name==version``.
    """
    requirements = {}
    for path in step.paths:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            requirement = line.partition("#")[0].strip()
            if requirement and "==" not in requirement:
                raise SetupError(f"{path}:{number}: write name==version, not {requirement!r}")
            if requirement:
                requirements[normalise(re.split(r"[\[=]", requirement)[0])] = requirement
    return requirements


def read_pins(step: Step) -> dict[str, str]:
    """Version by normalised name."""
    return {name: requirement.partition("==")[2] for name, requirement in read_requirements(step).items()}


def project_pin() -> dict[str, str]:
    """This checkout itself, which is installed in place."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_ztrl/__init__.py").read_text())
    assert found is not None
    return {"megatron-ztrl": found[1]}


def expected_stamp(profile: str) -> dict[str, str]:
    """What the stamp says of an environment that is up to date."""
    files = [path for step in PROFILES[profile] for path in step.paths]
    digest = hashlib.sha256()
    for path in [*files, ROOT / "setup.py", ROOT / "megatron_ztrl/__init__.py"]:
        digest.update(path.read_bytes())
    return {
        "profile": profile,
        "directory": str(VENV),
        "python": os.path.realpath(PYTHON),
        "requirements": digest.hexdigest(),
    }


def site_packages() -> Path | None:
    """Of the environment; None when there is none, or more than one Python has been at work in it."""
    found = list(VENV.glob("lib/python3.*/site-packages"))
    return found[0] if len(found) == 1 else None


def installed(site: Path) -> dict[str, tuple[str, Path]]:
    """Version and dist-info folder by normalised name."""
    found = {}
    for info in site.glob("*.dist-info"):
        name, _, version = info.name[: -len(".dist-info")].rpartition("-")
        found[normalise(name)] = (version, info)
    return found


def is_intact(info: Path) -> bool:
    """Every file in RECORD is there in its recorded size. pip writes RECORD last: half installed has none."""
    site = str(info.parent)  # tens of thousands of files: no Path objects here
    try:
        with (info / "RECORD").open(newline="") as lines:
            for path, _, size in csv.reader(lines):
                if not path.endswith(".pyc"):
                    actual = os.stat(f"{site}/{path}").st_size
                    if size and actual != int(size):
                        return False
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: RECORD itself was cut off
        return False
    return True


def broken(site: Path, pins: dict[str, str]) -> list[str]:
    """The pinned distributions that are absent, damaged or of another version."""
    have = installed(site)
    wrong = []
    for name, version in pins.items():
        if name not in have:
            wrong.append(name)
            continue
        actual, info = have[name]
        # A pin without a local part ("2.13.0") is satisfied by any ("2.13.0+cpu").
        same = version in (actual, actual.partition("+")[0])
        if not same or not is_intact(info):
            wrong.append(name)
    return wrong


def all_pins(profile: str) -> dict[str, str]:
    pins = project_pin()
    for step in PROFILES[profile]:
        pins |= read_pins(step)
    return pins


def harmful(profile: str) -> list[str]:
    """Distributions that were added by hand and do damage."""
    site = site_packages()
    return sorted(HARMFUL_ON_CPU.keys() & installed(site).keys()) if site and profile == "cpu" else []


def complaint(profile: str) -> str:
    """Why the environment is not ready; empty when it is."""
    site = site_packages()
    if not VENV.exists():
        return "there is none yet"
    if site is None or not PYTHON.exists():
        return "its Python is gone"
    try:
        stamp = json.loads(STAMP.read_text())
    except FileNotFoundError:
        return "it was never finished"
    if stamp == {"profile": profile}:
        return "it was never finished"
    changed = [key for key, value in expected_stamp(profile).items() if stamp.get(key) != value]
    if changed:
        return f"{' and '.join(changed)} changed"
    wrong = broken(site, all_pins(profile))
    if wrong:
        return f"damaged or missing: {summary(wrong)}"
    return "; ".join(f"{name} is installed: {HARMFUL_ON_CPU[name]}" for name in harmful(profile))


def summary(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
