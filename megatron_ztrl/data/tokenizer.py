"""The policy's tokenizer, as rollouts use it: plain text in, no special tokens added, none shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class PolicyTokenizer:
    """A Hugging Face tokenizer without its conveniences, which would change tokens behind our back.

    Raises:
        ValueError: The directory holds no tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        # What transformers' own methods come down to, without what they add to every call: a thread pool for one text,
        # and a check of every single token, which takes thrice as long as the decoding.
        self._backend = _load(directory).backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(
        self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: Of any kind.
            add_special_tokens: Add those that the tokenizer puts around a text.
            split_special_tokens: The name of a special token in the text is text like any other.
        """
        self._backend.encode_special_tokens = split_special_tokens
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included: for people to read."""
        return self._backend.decode(token_ids, skip_special_tokens=False)


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer goes by the model's type: it would give every Qwen2 checkpoint Qwen2's own pre-tokenizer,
    # whatever tokenizer.json says.
    loader = PreTrainedTokenizerFast if (directory / "tokenizer.json").exists() else AutoTokenizer
    try:
        return loader.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.path={directory}: no usable tokenizer ({reason})") from error
