"""The environment tool on a tiny checkout: real pip, a real virtual environment, wheels made here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 300  # a minute of work on a machine that has ten other things to do
BUILD_BACKEND = """
import shutil
from pathlib import Path

def build_editable(folder, config_settings=None, metadata_directory=None):
    wheel = next(Path("prebuilt").glob("*.whl"))
    shutil.copy(wheel, folder)
    return wheel.name
"""


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with one package of one module, whose ``VERSION`` is the version."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{name}/data.txt": "forty-two bytes of data, give or take two.\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{path},,{len(text)}\n" for path, text in files.items()]
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


class Checkout:
    """A tiny repository with the real tools/ and requirements of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wheels = root.parent / "wheels"
        self.stamp = root / ".venv" / "ztrl-stamp.json"

    @property
    def site(self) -> Path:
        return next(self.root.glob(".venv/lib/python3.*/site-packages"))

    def start(self, **variables: str) -> subprocess.Popen[str]:
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, str(self.root / "tools" / "make_env.py")]
        environment = os.environ | offline | variables
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def make_env(self, expect: int = 0, **variables: str) -> str:
        """Output of one run of the tool."""
        process = self.start(**variables)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == expect, output
        return output

    def version_of(self, name: str) -> str:
        code = f"import {name}; print({name}.VERSION)"
        python = self.root / ".venv" / "bin" / "python"
        return subprocess.check_output([python, "-P", "-c", code], text=True).strip()


def new_checkout(folder: Path) -> Checkout:
    root = folder / "checkout"
    shutil.copytree(REPOSITORY / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "requirements").mkdir()
    (root / "requirements" / "cpu.txt").write_text("# comment\ntorch==2.13.0  # any build\nalpha==1.0\n")
    (root / "requirements" / "dev.txt").write_text("Beta_Tools==1.0\n")
    (root / "requirements" / "sglang-cpu.txt").write_text("\n")
    (root / "megatron_ztrl").mkdir()
    (root / "megatron_ztrl" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (root / "setup.py").write_text("")
    (root / "backend.py").write_text(BUILD_BACKEND)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    write_wheel(root / "prebuilt", "megatron_ztrl", "0.1.0")
    wheels = {"torch": "2.13.0+cpu", "alpha": "1.0", "beta_tools": "1.0", "torchvision": "0.28.0"}
    for name, version in [*wheels.items(), ("alpha", "2.0")]:
        write_wheel(folder / "wheels", name, version)
    return Checkout(root)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str]:
    checkout = new_checkout(tmp_path_factory.mktemp("env"))
    return checkout, checkout.make_env()


@pytest.fixture
def checkout(first_run: tuple[Checkout, str]) -> Checkout:
    return first_run[0]


def test_the_first_run_installs_every_pin_the_cpu_build_of_torch_and_the_checkout(
    first_run: tuple[Checkout, str],
) -> None:
    checkout, output = first_run
    assert "there is none yet" in output
    assert checkout.version_of("torch") == "2.13.0+cpu"
    assert checkout.version_of("alpha") == checkout.version_of("beta_tools") == "1.0"
    assert checkout.version_of("megatron_ztrl") == "0.1.0"
    assert json.loads(checkout.stamp.read_text())["profile"] == "cpu"


def test_a_ready_environment_is_left_alone_in_silence(checkout: Checkout) -> None:
    before = checkout.stamp.stat().st_mtime_ns
    assert checkout.make_env() == ""
    assert checkout.stamp.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut-off file", "deleted package", "no record"])
def test_a_damaged_package_is_installed_again_and_nothing_else_is(checkout: Checkout, damage: str) -> None:
    data, record = checkout.site / "alpha" / "data.txt", checkout.site / "alpha-1.0.dist-info" / "RECORD"
    if damage == "cut-off file":
        data.write_text("forty-two")
    elif damage == "deleted package":
        shutil.rmtree(data.parent)
    else:
        record.unlink()  # pip writes it last, and was killed before
    output = checkout.make_env()
    assert "damaged or missing: alpha\n" in output
    assert "1 packages: alpha\n" in output
    assert data.stat().st_size == 43
    assert record.exists()
    assert checkout.make_env() == ""


def test_an_installation_that_was_stopped_is_finished(checkout: Checkout) -> None:
    checkout.stamp.write_text('{"profile": "cpu"}')
    shutil.rmtree(checkout.site / "beta_tools-1.0.dist-info")
    (checkout.site / "~eta_tools").mkdir()
    output = checkout.make_env()
    assert "never finished" in output
    assert "1 packages: beta-tools\n" in output
    assert not (checkout.site / "~eta_tools").exists()


def test_a_changed_pin_replaces_that_package(checkout: Checkout) -> None:
    pins = checkout.root / "requirements" / "cpu.txt"
    pins.write_text("torch==2.13.0\nalpha==2.0\n")
    assert "requirements changed" in checkout.make_env()
    assert checkout.version_of("alpha") == "2.0"


def test_torchvision_beside_a_cpu_torch_is_removed(checkout: Checkout) -> None:
    pip = [checkout.root / ".venv" / "bin" / "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, checkout.wheels / "torchvision-0.28.0-py3-none-any.whl"], check=True)
    assert "removing torchvision" in checkout.make_env()
    assert not (checkout.site / "torchvision").exists()


def test_of_two_at_once_one_works_and_the_other_waits_for_it(checkout: Checkout) -> None:
    (checkout.site / "beta_tools" / "data.txt").unlink()
    processes = [checkout.start(), checkout.start()]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("ready after") == 1
    assert checkout.make_env() == ""


@pytest.mark.slow
def test_an_environment_of_a_python_that_is_gone_is_made_anew(checkout: Checkout) -> None:
    python = checkout.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    output = checkout.make_env()
    assert "its Python is gone" in output
    assert "making .venv" in output
    assert checkout.version_of("beta_tools") == "1.0"


def test_a_python_without_ensurepip_gets_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "ensurepip.py").write_text("raise ImportError")
    output = new_checkout(tmp_path).make_env(expect=1, PYTHONPATH=str(tmp_path / "stub"))
    assert output.splitlines()[-1].endswith("apt-get install python3-venv")
    assert "Traceback" not in output


def test_a_requirement_without_a_version_is_refused_with_its_line(tmp_path: Path) -> None:
    checkout = new_checkout(tmp_path)
    (checkout.root / "requirements" / "dev.txt").write_text("alpha==1.0\ngamma\n")
    assert "dev.txt:2: write name==version, not 'gamma'" in checkout.make_env(expect=1)


def test_the_cpu_lists_hold_everything_that_their_packages_require() -> None:
    lines = [
        line.partition("#")[0].strip()
        for name in ("cpu.txt", "dev.txt")
        for line in (REPOSITORY / "requirements" / name).read_text().splitlines()
    ]
    pinned = {Requirement(line).name.lower().replace("_", "-"): Requirement(line) for line in lines if line}
    assert str(pinned["torch"].specifier) == "==2.13.0"
    assert "torchvision" not in pinned
    for name in pinned:
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                key = needed.name.lower().replace("_", "-")
                # A build of torch with CUDA libraries brings its own; the CPU build requires none of them.
                if not key.startswith(("nvidia-", "cuda-")):
                    assert key in pinned, f"{name} requires {text}"
                    (version,) = (clause.version for clause in pinned[key].specifier)
                    assert needed.specifier.contains(version, prereleases=True), f"{name} requires {text}"
