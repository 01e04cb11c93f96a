r"""What the base policy of the quickstart has read: documents, and the tokenizer made from them.

A document is a problem in the `plain` prompt template followed by either a guess or a solution with Python:

    Question: 472 * 19 = ?        Question: 472 * 19 = ?
    Answer: \boxed{8968}          Answer:
                                  ```python
                                  print(472*19)
                                  ```
                                  ```output
                                  8968
                                  ```
                                  \boxed{8968}

This is the text that a tool-integrated rollout leaves behind, so the policy, which stops at the fence that
closes its code, finds the environment's reply exactly where the corpus has it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from problems import ArithmeticProblem, Split, sample_problem
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ztrl.envs.prompt_templates import get_template

PAD, EOS = "<|pad|>", "<|endoftext|>"
STEP_WEIGHTS = {1: 0.35, 2: 0.65}
"""Share of the problems by number of operations."""
FULL_SOLUTION_SHARE = 0.9
"""The other solutions with Python stop an operation or more early and do the rest by heart."""


@dataclass(frozen=True)
class Document:
    """``prompt + response``; the policy is trained on the response only."""

    prompt: str
    response: str
    problem: ArithmeticProblem


def format_prompt(question: str) -> str:
    return get_template("plain").render(question)


def format_call(code: str) -> str:
    """What the policy writes, up to the fence at which generation stops."""
    return f"```python\n{code}\n```"


def format_reply(output: str) -> str:
    """What the environment appends."""
    return f"\n```output\n{output}\n```\n"


def format_answer(answer: str | int) -> str:
    return f"\\boxed{{{answer}}}"


def sample_document(rng: random.Random, code_share: float) -> Document:
    """Draws a document; with probability ``code_share`` it solves its problem with Python."""
    num_steps = rng.choices(list(STEP_WEIGHTS), list(STEP_WEIGHTS.values()))[0]
    problem = sample_problem(rng, Split.CORPUS, num_steps)
    if rng.random() >= code_share:
        return Document(format_prompt(problem.question), " " + format_answer(problem.answer), problem)
    written = num_steps
    if num_steps > 1 and rng.random() >= FULL_SOLUTION_SHARE:
        written = rng.randint(1, num_steps - 1)
    calls = (
        format_call(f"print({step.expression})") + format_reply(str(step.value))
        for step in problem.steps[:written]
    )
    response = "\n" + "".join(calls) + format_answer(problem.answer)
    return Document(format_prompt(problem.question), response, problem)


def build_tokenizer(num_documents: int = 4000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on the corpus, with every digit and every newline a token of its own.

    Isolated digits make numbers copyable; isolated newlines keep a fence and the newline after it apart, so
    the tokens of a policy's text and of the environment's reply join to exactly the tokens of the corpus.
    No merge then crosses a newline, so Qwen2's own pre-tokenizer, which ``AutoTokenizer`` puts in place of
    this one because the model is a Qwen2, yields the same tokens.
    """

    def texts() -> Iterator[str]:
        rng = random.Random(seed)
        for _ in range(num_documents):
            document = sample_document(rng, code_share=0.5)
            yield document.prompt + document.response

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
