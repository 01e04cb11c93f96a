"""Which pairs of answers strings and plain numbers settle, and which they leave to algebra."""

import pytest

from megatron_ztrl.rewards.answers import same_answer

EQUAL = [
    ("42", "42"),
    ("023", "23"),
    ("1,234", "1234"),
    ("1{,}234{,}567.50", r"1\,234\,567.5"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "1/2"),
    (r"\dfrac12", r"\tfrac{1}{2}"),
    ("-3", "\u22123"),
    ("7.", "7.0"),
    (r"\frac{-6}{4}", "-1.5"),
    (r"$\frac{13}{32}$", r"\(\frac{13}{32}\)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"x^{2}+1", "x^2 + 1"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"2\cdot 3^n", r"2 \times 3^{n}"),
    (r"995\text{ dollars}", "995"),
    ("995", r"995\text{ dollars}"),
    ("12 cm", "12"),
    (r"90^\circ", "90"),
    (r"50\%", "50"),
    (r"\$12", "12"),
    ("x=5", "5"),
    ("4", "n = 4"),
    (r"x \in [1,2]", "[1,2]"),
    ("(C)", "C"),
]
DIFFERENT = [
    ("42", "43"),
    ("0.33", "1/3"),
    ("1234", "12.34"),
    ("-3", "3"),
    (r"\frac{1}{2}", "2"),
    ("1/2", "0.51"),
]
UNDECIDED = [
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x=5", "y=5"),
    ("2x", "2"),  # a variable is no unit
    ("2i", "2"),
    (r"2\mathrm{i}", "2"),
    (r"5\text{ am}", r"5\text{ pm}"),
    ("1,2", "12"),
    ("(1,234)", "1234"),
    ("1/0", "0"),
    ("10\\frac{1}{12}", "10"),
    ("52_8", "528"),
    ("9" * 5000, "9" * 4999),  # too long to be read as a number in reasonable time
]


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_writing_does_not_matter(answer: str, truth: str):
    assert same_answer(answer, truth) is True


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_two_plain_numbers_are_decided_without_algebra(answer: str, truth: str):
    assert same_answer(answer, truth) is False


@pytest.mark.parametrize(("answer", "truth"), UNDECIDED)
def test_everything_else_is_left_to_algebra(answer: str, truth: str):
    assert same_answer(answer, truth) is None
