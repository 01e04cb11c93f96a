"""What the documents name is there: files, commands with their options and keys, metrics."""

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from megatron_ztrl import cli
from megatron_ztrl.config.load import load_config
from megatron_ztrl.config.schema import Config
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
QUOTED = re.compile(r"`([^`\n]+)`")
SECTIONS = {
    name: {field.name for field in fields(section)}
    for name, section in get_type_hints(Config).items()
    if is_dataclass(section)
}
PLACES = [ROOT, ROOT / "megatron_ztrl", ROOT / "sandbox"]
"""What the path of a file may be relative to, besides the document."""


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


def anchors(document: Path) -> set[str]:
    """What a link may have behind its ``#``, as GitHub makes it of a heading."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_headings_lead_to_one():
    links = [
        (document, file, anchor)
        for document in DOCUMENTS
        for file, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)", document.read_text())
    ]
    assert len(links) > 10
    dead = [
        f"{document.relative_to(ROOT)}: {file}#{anchor}"
        for document, file, anchor in links
        if anchor not in anchors(document.parent / file if file else document)
    ]
    assert dead == []


def quoted(document: Path) -> list[str]:
    """What stands between backticks, blocks of code aside."""
    return QUOTED.findall(FENCED.sub("", document.read_text()))


def test_every_file_of_the_documents_exists():
    files = [
        (document, name)
        for document in DOCUMENTS
        for name in quoted(document)
        if re.fullmatch(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|sbatch)", name)
    ]
    assert len(files) > 30
    missing = [
        f"{document.relative_to(ROOT)}: {name}"
        for document, name in files
        if not any((place / name).exists() for place in (*PLACES, document.parent))
    ]
    assert missing == []


def test_every_key_of_the_configuration_in_the_documents_is_one():
    keys = [
        (document, *found.groups())
        for document in DOCUMENTS
        for name in quoted(document)
        if (found := re.match(r"(\w+)\.(\w+)", name)) and not re.fullmatch(r"[\w.]+\.(py|jsonl?|yaml)", name)
    ]
    named = [(document, section, key) for document, section, key in keys if section in SECTIONS]
    assert len(named) > 100
    unknown = [
        f"{document.relative_to(ROOT)}: {section}.{key}"
        for document, section, key in named
        if key not in SECTIONS[section]
    ]
    assert unknown == []


def test_every_piece_of_a_configuration_in_the_documents_has_known_keys():
    blocks = [
        (document, yaml.safe_load(block))
        for document in DOCUMENTS
        for language, block in FENCED.findall(document.read_text())
        if language == "yaml"
    ]
    assert len(blocks) > 3
    unknown = [
        f"{document.relative_to(ROOT)}: {section}.{key}"
        for document, block in blocks
        for section, keys in block.items()
        for key in keys
        if key not in SECTIONS.get(section, ())
    ]
    assert unknown == []


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
