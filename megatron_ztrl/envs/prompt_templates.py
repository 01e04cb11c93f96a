r"""Plain-text prompts for base models: no chat template, and the stop strings that belong to each.

The ``orz*`` templates are a User/Assistant dialogue in the sense of Open-Reasoner-Zero (arXiv:2503.24290):
the model is to reason inside ``<think>`` (which the prompt already opens) and to answer inside ``<answer>``,
with the result in ``\boxed{}``. ``orz_tir`` adds that Python may be used (ZeroTIR, arXiv:2505.07773),
``orz_tir_explicit`` also that the code is run at once. ``plain`` is the bare question, for tasks whose base
model knows the format.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ztrl.config.extensions import is_reference, load_object

_PLACEHOLDER = "{problem}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTemplate:
    """How a problem becomes a prompt, and what ends the response besides the end-of-sequence token."""

    name: str
    text: str
    """Contains ``{problem}`` once; all other braces are literal."""
    stop: tuple[str, ...] = ()
    """The stop string stays in the response."""

    def __post_init__(self) -> None:
        if self.text.count(_PLACEHOLDER) != 1:
            raise ValueError(
                f"prompt template {self.name!r}: its text must contain {_PLACEHOLDER} once, not "
                f"{self.text.count(_PLACEHOLDER)} times"
            )

    def render(self, problem: str) -> str:
        """The prompt text of one problem."""
        # Not str.format: problems and templates are full of LaTeX braces.
        return self.text.replace(_PLACEHOLDER, problem)


_DIALOGUE = (
    "The following is a dialogue between User and Assistant. User poses a problem and Assistant solves it. "
    "Assistant first works through the problem step by step and only then tells User the answer. The "
    "reasoning is written between <think> and </think>, the answer between <answer> and </answer>: "
    "<think> reasoning goes here </think> <answer> answer goes here </answer>."
)
_MAY_USE_PYTHON = (
    " While reasoning, Assistant may write Python code in a ```python block to calculate or to check a step."
)
_CODE_IS_RUN = (
    " Such code is executed immediately, and what it prints is given back in an ```output block before the "
    "reasoning goes on."
)
_TASK = (
    "\nUser: Solve the problem below. Write the final result inside \\boxed{}, and put it between the answer "
    "tags, as in <answer> \\boxed{result} </answer>. This is the problem:\n{problem}\nAssistant: <think>"
)
_DIALOGUE_STOP = ("User:", "Human:", "Assistant:", "</answer>")

_TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate(
            name="orz_tir",
            text=_DIALOGUE + _MAY_USE_PYTHON + _TASK,
            stop=_DIALOGUE_STOP,
        ),
        PromptTemplate(
            name="orz_tir_explicit",
            text=_DIALOGUE + _MAY_USE_PYTHON + _CODE_IS_RUN + _TASK,
            stop=_DIALOGUE_STOP,
        ),
        PromptTemplate(
            name="orz",
            text=_DIALOGUE + _TASK,
            stop=_DIALOGUE_STOP,
        ),
        PromptTemplate(
            name="plain",
            text="Question: {problem}\nAnswer:",
            stop=(),
        ),
    )
}


def get_template(name: str) -> PromptTemplate:
    """The template that ``data.prompt_template`` names: one of these, or a user's own.

    Raises:
        ValueError: What the reference names is none.
    """
    if is_reference(name):
        template = load_object(name, key="data.prompt_template")
        if not isinstance(template, PromptTemplate):
            raise ValueError(
                f"data.prompt_template: {name} is no PromptTemplate but {type(template).__name__}"
            )
        return template
    return _TEMPLATES[name]
