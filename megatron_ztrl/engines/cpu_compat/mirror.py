"""Keys and values of the running requests side by side, so that decoding need not gather them for every token.

SGLang's cache has the tokens of a request wherever there was room. To decode is to read all of them, once for each new
token; gathering them first takes longer than the attention. So each running request has a place in a mirror of the
cache, to which every pass adds one token.

Shapes: ``B`` requests, ``L`` longest sequence, ``H`` query heads, ``K`` KV heads, ``G = H / K``, ``D`` head width; of
the mirror ``P`` places, ``C`` tokens that each has room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GRAIN_TOKENS = 32
"""Room grows by so much, since growing means to gather everything again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What all layers of one decoding pass share. The request at place ``p`` is ``request_B[p]`` of the batch."""

    request_B: torch.Tensor
    place_B: torch.Tensor
    """0, 1, ..., B - 1."""
    newest_B: torch.Tensor
    """Position of the newest token of the request at each place."""
    newest_slot_B: torch.Tensor
    """Its slot of SGLang's cache."""
    moved_from: torch.Tensor
    moved_to: torch.Tensor
    """Places whose contents move, before anything is written."""
    filled: torch.Tensor
    """Places of requests that the mirror does not have yet."""
    filled_slot: torch.Tensor
    """[filled, L] their slots of SGLang's cache; any slot past a sequence's end."""
    bias_B11L: torch.Tensor
    """0 within the sequence, minus infinity past its end."""


class Mirror:
    """The mirror, of every layer.

    Args:
        max_tokens: Of ``P * C``; a batch that needs more is not mirrored.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._shape = (0, 0)
        """``(P, C)``"""
        self._held: dict[int, tuple[int, int]] = {}
        """Row of SGLang's request table → place, and how many of its tokens are there."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Address of a layer's keys in SGLang's cache → keys and values, [P, K, C, D]."""

    def forget(self, rows: Sequence[int]) -> None:
        """The requests in these rows of the table are prefilled: other requests, or other tokens."""
        for row in rows:
            self._held.pop(row, None)

    def arrange(self, req_to_token: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor) -> Step | None:
        """Give every request of a decoding pass its place.

        Args:
            req_to_token: [rows, >= L] cache slot of every position.
            rows: [B] the requests' rows of that table.
            seq_lens: [B] with the token that is new in this pass.

        Returns:
            For ``attend``; None if the batch is too large.
        """
        import torch

        row_of, length_of = rows.tolist(), seq_lens.tolist()
        longest = max(length_of)
        if not self._has_room(len(row_of), longest):
            return None
        places, moves, filled_places = self._place(row_of, length_of)
        self._held = {
            row: (place, length) for row, place, length in zip(row_of, places, length_of, strict=True)
        }

        request_B = torch.tensor(places).argsort()
        row_B, length_B = rows[request_B], seq_lens[request_B]
        past_BL = torch.arange(longest) >= length_B[:, None]
        filled = torch.tensor(filled_places, dtype=torch.int64)
        return Step(
            request_B=request_B,
            place_B=torch.arange(len(row_of)),
            newest_B=length_B - 1,
            newest_slot_B=req_to_token[row_B, length_B - 1],
            moved_from=torch.tensor([source for source, _ in moves], dtype=torch.int64),
            moved_to=torch.tensor([target for _, target in moves], dtype=torch.int64),
            filled=filled,
            filled_slot=req_to_token[row_B[filled], :longest],
            bias_B11L=torch.zeros(past_BL.shape).masked_fill_(past_BL, -torch.inf)[:, None, None],
        )

    def _has_room(self, requests: int, longest: int) -> bool:
        """Grow if need be, which empties the mirror."""
        places, tokens = self._shape
        if requests <= places and longest <= tokens:
            return True
        needed = -(-longest // _GRAIN_TOKENS) * _GRAIN_TOKENS
        grown, least = (max(places, requests), max(tokens, needed)), (requests, needed)
        self._shape = next((s for s in (grown, least) if s[0] * s[1] <= self._max_tokens), (0, 0))
        self._held.clear()
        self._layers.clear()
        return self._shape != (0, 0)

    def _place(
        self, row_of: Sequence[int], length_of: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Every request's place below ``B``, the moves that this takes, and the places of what is not there yet."""
        known: dict[int, int] = {}
        for row, length in zip(row_of, length_of, strict=True):
            place, held = self._held.get(row, (0, -1))
            if held == length - 1:
                known[row] = place
        free = iter(sorted(set(range(len(row_of))).difference(known.values())))
        places, moves, filled = [], [], []
        for row in row_of:
            if row not in known:
                places.append(next(free))
                filled.append(places[-1])
            elif known[row] >= len(row_of):
                places.append(next(free))
                moves.append((known[row], places[-1]))
            else:
                places.append(known[row])
        return places, moves, filled

    def attend(
        self,
        step: Step,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """Attention of each request's newest token to its sequence, in one layer.

        Args:
            step: Of ``arrange``, in this pass.
            query: [B, H, D]
            output: [B, H, D] written in place.
            k_cache, v_cache: [slots, K, D], the newest tokens included.
            scaling: of the scores; None is ``D ** -0.5``.
        """
        if k_cache.data_ptr() not in self._layers:
            self._layers[k_cache.data_ptr()] = (self._empty(k_cache), self._empty(v_cache))
        requests, longest = len(step.request_B), step.bias_B11L.shape[-1]
        sides = self._layers[k_cache.data_ptr()]
        for side, cache in zip(sides, (k_cache, v_cache), strict=True):
            if len(step.moved_to):
                side[step.moved_to] = side[step.moved_from]
            if len(step.filled):
                side[step.filled, :, :longest] = take(cache, step.filled_slot).transpose(1, 2)
            side[step.place_B, :, step.newest_B] = cache[step.newest_slot_B]
        key_BKLD, value_BKLD = (side[:requests, :, :longest] for side in sides)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query_BKGD = (query[step.request_B] * scaling).unflatten(1, (k_cache.shape[1], -1))
        weight_BKGL = (query_BKGD @ key_BKLD.transpose(2, 3)).add_(step.bias_B11L).softmax(-1)
        output.index_copy_(0, step.request_B, (weight_BKGL @ value_BKLD).flatten(1, 2))

    def _empty(self, cache: torch.Tensor) -> torch.Tensor:
        """Zeros, since what lies past a sequence's end is multiplied by a weight of 0."""
        places, tokens = self._shape
        return cache.new_zeros(places, cache.shape[1], tokens, cache.shape[2])


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]``; four times as fast on a CPU."""
    return table.flatten(1).index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])
