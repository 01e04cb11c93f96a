"""Prompts with stable ids, and the endless, resumable stream of them that training reads."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_ztrl.config.schema import DatasetConfig
from megatron_ztrl.data.datasets import load_problems
from megatron_ztrl.types import Prompt


def load_prompts(config: DatasetConfig, render: Callable[[str], str]) -> list[Prompt]:
    """Reads a data set and puts every problem into the template.

    A prompt's id is ``<data set name>:<row>``, so it says where to look the problem up.

    Args:
        config: The data set; its name becomes the prompts' ``data_source``.
        render: Problem to prompt text, ``PromptTemplate.render``.

    Raises:
        ValueError: See ``load_problems``.
    """
    return [
        Prompt(
            prompt_id=f"{config.name}:{row.row}",
            problem=row.problem,
            text=render(row.problem),
            ground_truth=row.answer,
            data_source=config.name,
            metadata=row.metadata,
        )
        for row in load_problems(config)
    ]


class PromptSource(Iterator[Prompt]):
    """An endless stream of prompts: every epoch visits each once, in an order of its own.

    Args:
        prompts: Prompts that tokenise to more than ``max_prompt_tokens`` are left out.
        seed: Determines the order of every epoch.
        max_prompt_tokens: ``data.max_prompt_tokens``.
        tokenize: Prompt text to token ids.

    Raises:
        ValueError: No prompt is short enough.
    """

    left_out: int
    """Prompts that were too long."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        max_prompt_tokens: int,
        tokenize: Callable[[str], Sequence[int]],
    ) -> None:
        self._prompts = [prompt for prompt in prompts if len(tokenize(prompt.text)) <= max_prompt_tokens]
        self.left_out = len(prompts) - len(self._prompts)
        if not self._prompts:
            raise ValueError(
                f"data.max_prompt_tokens={max_prompt_tokens} leaves out all {len(prompts)} prompts: raise it"
            )
        self._seed = seed
        self._fingerprint = _fingerprint(self._prompts, seed)
        self._start_epoch(0)

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    def __next__(self) -> Prompt:
        if self._position == len(self._order):
            self._start_epoch(self._epoch + 1)
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        return prompt

    def state(self) -> dict[str, Any]:
        """The cursor, as JSON values; ``restore`` continues the stream after the last prompt given out."""
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a cursor from ``state()``.

        Raises:
            ValueError: The cursor belongs to other prompts or another seed.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the checkpoint was made with other training prompts: run.seed, data.train, "
                "data.prompt_template or data.max_prompt_tokens has changed. Undo that, or start a new "
                "run.directory"
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(self._order)


def _fingerprint(prompts: Sequence[Prompt], seed: int) -> str:
    """Tells streams apart that would give out different prompts."""
    digest = hashlib.sha256(f"{seed}".encode())
    for prompt in prompts:
        digest.update(f"\0{prompt.prompt_id}\0{prompt.text}".encode())
    return digest.hexdigest()[:16]
