r"""Where in a response the final answer stands: ``\boxed{}``, and the ``<answer>`` tags around it."""

from __future__ import annotations

_BOX = r"\boxed{"
_OPEN, _CLOSE = "<answer>", "</answer>"
_MAX_TRAILING_CHARACTERS = 20
"""About five tokens may follow the closing tag: an end-of-sequence marker, a full stop."""


def extract_answer(response: str, *, require_answer_tags: bool) -> str | None:
    r"""The content of the last ``\boxed{}``, or None without one or with the format gate shut.

    Args:
        response: What followed the prompt (so a ``<think>`` that ends the prompt is not in it).
        require_answer_tags: The gate: the response holds ``<answer>`` and ``</answer>`` exactly once each,
            the box stands between them, and next to nothing follows.
    """
    if not require_answer_tags:
        return last_boxed(response)
    if response.count(_OPEN) != 1 or response.count(_CLOSE) != 1:
        return None
    inside, close, trailing = response.partition(_OPEN)[2].partition(_CLOSE)
    if not close or len(trailing.strip()) > _MAX_TRAILING_CHARACTERS:
        return None
    return last_boxed(inside)


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{}``; None if there is none, or it is empty or unclosed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth, position = 1, start
    while position < len(text):
        match text[position]:
            case "\\":
                position += 1  # an escaped brace is a character, not a bracket
            case "{":
                depth += 1
            case "}":
                depth -= 1
        if depth == 0:
            return text[start:position].strip() or None
        position += 1
    return None
