"""``ztrl doctor`` says what is there, what is missing, what that costs and how to get it."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ztrl import cli, doctor
from megatron_ztrl.doctor import Finding, State


def test_the_installed_torch_and_a_free_port_are_found() -> None:
    findings = {finding.name: finding for finding in doctor.examine()}
    found, _, _ = findings["torch"].found.partition("+")  # a CUDA build says so behind a plus
    assert found == importlib.metadata.version("torch").partition("+")[0]
    assert findings["loopback port"].state is State.OK
    assert {"CPU cores", "memory", "CUDA", "sglang", "ray", "sandbox", "disk", "/dev/shm"} <= findings.keys()


def test_whatever_is_not_in_order_says_what_it_costs() -> None:
    for finding in doctor.examine():
        if (
            finding.state is not State.OK and finding.name != "GPU"
        ):  # CUDA, the line after it, speaks for both
            assert finding.cost, finding.name


def test_a_torch_that_does_not_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ztrl.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
    )
    assert (done.returncode, done.stderr) == (cli.FAILED, "")
    (torch,) = (finding for finding in json.loads(done.stdout) if finding["name"] == "torch")
    assert (torch["found"], torch["blocks"]) == ("does not import: libcudart.so.13: cannot open", True)


def test_a_missing_package_that_nothing_runs_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = doctor._package("megatron-core", cost="nothing trains", fix="pip install it", blocks=True)
    assert (finding.state, finding.blocks) == (State.MISSING, True)


@pytest.mark.parametrize("blocks", [True, False])
def test_the_exit_code_and_the_verdict_tell_whether_training_can_start(
    blocks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding(
        name="ray", state=State.MISSING, found="not installed", cost="c", fix="f", blocks=blocks
    )
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    assert cli.main(["doctor"]) == (cli.FAILED if blocks else 0)
    out = capsys.readouterr().out
    assert ("cannot train: ray missing" if blocks else "ready to train") in out
    assert "→ f" in out


def test_too_little_of_something_is_limited_and_enough_is_fine() -> None:
    assert doctor._at_least("disk", 1 << 30, 2 << 30, cost="c", fix="f").state is State.LIMITED
    assert doctor._at_least("disk", 2 << 30, 2 << 30, cost="c", fix="f") == Finding(
        name="disk", state=State.OK, found="2.0 GiB"
    )


def test_json_holds_the_same_findings() -> None:
    finding = Finding(name="ray", state=State.OK, found="2.60.0")
    (row,) = json.loads(doctor.to_json([finding]))
    assert (row["name"], row["state"], row["found"], row["blocks"]) == ("ray", "ok", "2.60.0", False)


def test_the_table_fits_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=60)
    doctor.print_table([Finding(name="GPU", state=State.MISSING, found="none", cost="slow " * 30)], console)
    assert max(map(len, console.file.getvalue().splitlines())) <= 60  # type: ignore[attr-defined]
