"""Prompt templates."""

import pytest

from megatron_ztrl.config.schema import PROMPT_TEMPLATES
from megatron_ztrl.envs.prompt_templates import PromptTemplate, get_template

ORZ = [name for name in PROMPT_TEMPLATES if name.startswith("orz")]


@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
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
    assert r"\boxed{}" in template.text


def test_only_the_tir_templates_speak_of_python_and_only_the_explicit_one_of_execution():
    assert ["Python" in get_template(n).text for n in ("orz_tir", "orz_tir_explicit", "orz")] == [
        True,
        True,
        False,
    ]
    assert [n for n in PROMPT_TEMPLATES if "executed" in get_template(n).text] == ["orz_tir_explicit"]


def test_plain_is_the_bare_question():
    template = get_template("plain")
    assert template.render("1+1?") == "Question: 1+1?\nAnswer:"
    assert template.stop == ()


def test_a_template_without_a_place_for_the_problem_is_refused():
    with pytest.raises(
        ValueError, match=r"prompt template 'mine': its text must contain \{problem\} once, not 0"
    ):
        PromptTemplate(name="mine", text="Solve this:")
