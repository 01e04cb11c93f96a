"""Prompt templates."""

import typing

import pytest

from megatron_ztrl.config.schema import DataConfig
from megatron_ztrl.envs.prompt_templates import get_template

NAMES = typing.get_args(typing.get_type_hints(DataConfig)["prompt_template"])
ORZ = [name for name in NAMES if name.startswith("orz")]


@pytest.mark.parametrize("name", NAMES)
def test_every_template_of_the_schema_renders_latex_untouched(name: str):
    template, problem = get_template(name), r"Simplify \frac{1}{2} {problem {x}}."
    assert template.name == name
    assert template.text.count("{problem}") == 1
    assert template.render(problem).count(problem) == 1


@pytest.mark.parametrize("name", ORZ)
def test_orz_prompts_open_the_reasoning_and_stop_at_the_next_speaker_or_a_closed_answer(name: str):
    template = get_template(name)
    assert template.render("2+2?").endswith("2+2?\nAssistant: <think>")
    assert template.stop == ("User:", "Human:", "Assistant:", "</answer>")
    assert template.uses_answer_tags
    assert r"\boxed{}" in template.text


def test_only_the_tir_templates_speak_of_python_and_only_the_explicit_one_of_execution():
    assert ["Python" in get_template(n).text for n in ("orz_tir", "orz_tir_explicit", "orz")] == [
        True,
        True,
        False,
    ]
    assert [n for n in NAMES if "executed" in get_template(n).text] == ["orz_tir_explicit"]


def test_plain_is_the_bare_question():
    template = get_template("plain")
    assert template.render("1+1?") == "Question: 1+1?\nAnswer:"
    assert template.stop == ()
    assert not template.uses_answer_tags


def test_an_unknown_template_is_refused_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"data.prompt_template: no template 'orz_tri'; did you mean 'orz_tir'"
    ):
        get_template("orz_tri")
