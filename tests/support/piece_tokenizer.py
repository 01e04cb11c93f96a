"""A tokenizer for simulated policies that needs no file."""

from __future__ import annotations

from collections.abc import Sequence


class PieceTokenizer:
    """Four characters to a token, from a vocabulary that grows as it reads."""

    def __init__(self) -> None:
        self._pieces = [""]  # 0 ends a sequence
        self._ids: dict[str, int] = {}

    def encode(
        self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> list[int]:
        assert not add_special_tokens
        return [self._id(text[start : start + 4]) for start in range(0, len(text), 4)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join([self._pieces[token_id] for token_id in token_ids])

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]
