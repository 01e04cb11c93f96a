"""Where the answer is found, and when the format gate is shut."""

import pytest

from megatron_ztrl.rewards.format import extract_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2^{3}}} is it", r"\frac{1}{2^{3}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x : x > 0\right.}", r"\left\{x : x > 0\right."),  # an escaped brace may stand alone
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\text{a } b} }", r"\text{a } b"),
        (r"\boxed{1} and \boxed{2", None),  # cut off: the model did not finish its answer
        (r"\boxed{}", None),
        (r"\boxed{ends in a backslash\\"[:-1], None),
        ("no box: 42", None),
    ],
)
def test_the_last_box_counts_with_its_braces_balanced(text: str, content: str | None):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r" 6*7 </think> <answer> \boxed{42} </answer>", "42"),
        (r" 6*7 <answer>The result is \boxed{42}.</answer>" + "<|endoftext|>", "42"),
        (r"a guess \boxed{1} </think> <answer>\boxed{42}</answer>", "42"),
        (r" 6*7 \boxed{42} </think> <answer> 42 </answer>", None),  # the box is outside
        (r"<answer>\boxed{42}", None),  # never closed
        (r"\boxed{42}</answer>", None),  # never opened
        (r"<answer>\boxed{1}</answer><answer>\boxed{42}</answer>", None),  # two attempts
        (r"<answer><answer>\boxed{42}</answer>", None),
        (r"</answer>\boxed{42}<answer>", None),
        (r"</answer><answer>\boxed{42}", None),
        (r"<answer>\boxed{42}</answer> but let me go on with this", None),  # over five tokens
    ],
)
def test_the_gate_wants_one_pair_of_tags_with_the_box_inside_at_the_end(response: str, answer: str | None):
    assert extract_answer(response, require_answer_tags=True) == answer


def test_without_the_gate_tags_do_not_matter():
    assert extract_answer(r"</answer> \boxed{42} and more words after it", require_answer_tags=False) == "42"
