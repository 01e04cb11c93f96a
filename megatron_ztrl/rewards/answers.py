r"""Compares two answers as strings and plain numbers: fast, exact, and silent where it cannot tell."""

from __future__ import annotations

import re
from fractions import Fraction

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("[\u2212\u2013]", "-"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\\[!,;: ]|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"\\(le|ge)(?![a-zA-Z])", r"\\\1q"),
        (r"\\(?:cdot|times)(?![a-zA-Z])", "*"),
        (r"([\^_])\{(\w)\}", r"\1\2"),
        (r"\{,\}", ","),
        (r"\s+", ""),
        (r"^\(([A-Z])\)$", r"\1"),  # a multiple-choice letter
        (r"^(-?\d{1,3})((?:,\d{3})+)(?=\.|$)", lambda match: match[0].replace(",", "")),  # thousands
    )
]
_MATH_DELIMITERS = re.compile(
    r"\$(?P<dollar>[^$]*)\$|\\\((?P<paren>.*)\\\)|\\\[(?P<bracket>.*)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"(?P<sign>-?)(?:(?P<decimal>\d{1,100}(?:\.\d{0,100})?|\.\d{1,100})"
    r"|(?:\\frac\{(?P<top>-?\d{1,100})\}\{(?P<bottom>\d{1,100})\}|(?P<over>\d{1,100})/(?P<under>\d{1,100})))"
)
_CURRENCY = re.compile(r"^\\?\$")
_UNIT = re.compile(
    # Two letters at least: \mathrm{i} and \mathrm{e} are numbers.
    r"(?:\\(?:text|mathrm|mbox)\s*\{[^{}a-zA-Z]*[a-zA-Z]{2}[^{}]*\}(?:\^\{?\d\}?)?"
    r"|\^\{?\\circ\}?|\\degree|\\?%|(?<=\d)\s*(?:[mck]m|kg|ft|feet|inches|units|degrees|dollars|cents))$"
)
_LEFT_HAND_SIDE = re.compile(r"^[a-zA-Z](?:_\w|\([a-z]\))?\s*(?:=|\\in(?![a-zA-Z]))")


def same_answer(answer: str, truth: str) -> bool | None:
    r"""True or False where strings and plain numbers settle it, None where algebra is needed.

    Spacing, ``\dfrac``, thousands separators, leading zeros and math delimiters do not matter. A unit, or the
    ``x =`` of a solution, may be missing on one side; two different ones are never taken for equal.
    """
    value, true_value = _canonical(answer), _canonical(truth)
    if value == true_value or value in _bare(truth) or true_value in _bare(answer):
        return True
    if isinstance(value, Fraction) and isinstance(true_value, Fraction):
        return False
    return None


def _bare(text: str) -> list[str | Fraction]:
    """The answer without its unit, and without its left-hand side, where it has one."""
    text = _without_delimiters(text)
    shorter = [_UNIT.sub("", text), _CURRENCY.sub("", text), _LEFT_HAND_SIDE.sub("", text)]
    return [_canonical(short) for short in shorter if short not in ("", text)]


def _canonical(text: str) -> str | Fraction:
    """A plain number as a fraction, anything else as a normalised string."""
    text = _without_delimiters(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    number = _NUMBER.fullmatch(text)
    if not number:
        return text
    if number["decimal"]:
        value = Fraction(number["decimal"].removesuffix("."))
    else:
        denominator = int(number["bottom"] or number["under"])
        if denominator == 0:
            return text
        value = Fraction(int(number["top"] or number["over"]), denominator)
    return -value if number["sign"] else value


def _without_delimiters(text: str) -> str:
    text = text.strip().removesuffix(".").strip()
    delimited = _MATH_DELIMITERS.fullmatch(text)
    if delimited:
        text = next(group for group in delimited.groups() if group is not None).strip()
    return text
