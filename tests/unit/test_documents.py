"""What the documents name is there: files, commands with their options and keys, metrics."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_ztrl import cli
from megatron_ztrl.config.load import load_config
from megatron_ztrl.observability import names
from megatron_ztrl.rollout.statistics import rollout_statistics
from megatron_ztrl.types import Prompt, Rollout, StopReason

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("examples/*/README.md"),
    ROOT / "sandbox/README.md",
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """What follows ``program`` in blocks of code; a line with ``...`` is no whole command."""
    found = []
    for document in sorted(DOCUMENTS):
        text = document.read_text()
        fenced = [block for language, block in FENCED.findall(text) if language in ("", "bash")]
        for block in fenced + INDENTED.findall(FENCED.sub("", text)):
            for line in block.replace("\\\n", " ").splitlines():
                if line.split()[:1] and Path(line.split()[0]).name == program and "..." not in line:
                    found.append(shlex.split(line, comments=True)[1:])
    return found


def test_links_between_documents_lead_somewhere():
    dead = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text())
        if not target.startswith("http") and not (document.parent / target).exists()
    ]
    assert dead == []


@pytest.mark.parametrize("words", commands("ztrl"), ids=" ".join)
def test_every_command_of_the_documents_is_one(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = cli._parse(words)
    if "config" in options and options.config.exists():
        load_config(options.config, options.words)


def test_every_metric_is_explained():
    explained = set(re.findall(r"`([\w/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    prompt = Prompt(prompt_id="p", problem="", text="", ground_truth="", data_source="d")
    rollout = Rollout(
        rollout_id="0.0", prompt=prompt, prompt_ids=[0], stop_reason=StopReason.STOP, reward=1.0
    )
    measures = (names.GAP_MEAN, names.GAP_P99, names.GAP_MAX, names.GAP_KL)
    keys = {
        *(
            value
            for value in vars(names).values()
            if isinstance(value, str) and re.fullmatch(r"\w+/\w+", value)
        ),
        *(
            names.gap_key(group, measure)
            for group in (names.MISMATCH, names.STALENESS)
            for measure in measures
        ),
        *rollout_statistics([rollout]),
        *names.PLACES,
    }
    assert len(keys) > 50
    assert sorted(key for key in keys if not {key, key.removeprefix("train/")} & explained) == []
