"""The mirror of running requests gives what attention over SGLang's own cache would, whatever happens to requests."""

import random

import pytest
import torch

from megatron_ztrl.engines.cpu_compat.mirror import Mirror

SLOTS, ROWS, HEADS, KV_HEADS, WIDTH, LAYERS = 1024, 12, 4, 2, 8, 2


class Engine:
    """What SGLang does around a decoding pass: rows of its table, slots of its cache, requests that come and go."""

    def __init__(self, max_tokens: int) -> None:
        self.random = random.Random(0)
        torch.manual_seed(0)
        self.mirror = Mirror(max_tokens)
        self.table = torch.zeros(ROWS, 128, dtype=torch.int32)
        self.caches = [tuple(torch.randn(SLOTS, KV_HEADS, WIDTH) for _ in "kv") for _ in range(LAYERS)]
        self.free_slots = self.random.sample(range(SLOTS), SLOTS)
        self.lengths: dict[int, int] = {}

    def prefill(self, row: int, length: int) -> None:
        self.mirror.forget([row])
        self.lengths[row] = 0
        for _ in range(length):
            self.append(row)

    def append(self, row: int) -> None:
        slot = self.free_slots.pop()
        self.table[row, self.lengths[row]] = slot
        self.lengths[row] += 1
        for cache in self.caches:
            for side in cache:
                side[slot] = torch.randn(KV_HEADS, WIDTH)

    def finish(self, row: int) -> None:
        self.free_slots[:0] = self.table[row, : self.lengths.pop(row)].tolist()

    def decode(self, rows: list[int]) -> bool:
        """One pass over these rows, compared with the definition of attention. Whether it was mirrored."""
        for row in rows:
            self.append(row)
        lengths = torch.tensor([self.lengths[row] for row in rows])
        step = self.mirror.arrange(self.table, torch.tensor(rows), lengths)
        if step is None:
            return False
        for k_cache, v_cache in self.caches:
            query, output = (
                torch.randn(len(rows), HEADS, WIDTH),
                torch.full((len(rows), HEADS, WIDTH), torch.nan),
            )
            self.mirror.attend(step, query, output, k_cache, v_cache, None)
            torch.testing.assert_close(
                output, self.expected(rows, query, k_cache, v_cache), atol=1e-6, rtol=0
            )
        return True

    def expected(self, rows, query, k_cache, v_cache) -> torch.Tensor:
        outputs = torch.empty_like(query)
        for place, row in enumerate(rows):
            slots = self.table[row, : self.lengths[row]].long()
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                scores = k_cache[slots, kv_head].double() @ query[place, head].double() / WIDTH**0.5
                outputs[place, head] = scores.softmax(0) @ v_cache[slots, kv_head].double()
        return outputs


def test_requests_that_come_and_go_in_any_order_attend_to_their_own_tokens():
    engine = Engine(max_tokens=ROWS * 128)
    for _ in range(60):
        for row in range(ROWS):
            if row in engine.lengths and (engine.random.random() < 0.1 or engine.lengths[row] > 70):
                engine.finish(row)
            elif row not in engine.lengths and engine.random.random() < 0.4:
                engine.prefill(row, engine.random.randint(1, 40))
        rows = engine.random.sample(sorted(engine.lengths), len(engine.lengths))
        if rows:
            assert engine.decode(rows)


def test_a_row_that_is_taken_by_another_request_of_the_same_length_is_not_the_old_one():
    engine = Engine(max_tokens=ROWS * 128)
    engine.prefill(3, 5)
    engine.prefill(7, 9)
    assert engine.decode([3, 7])
    engine.finish(3)
    engine.prefill(3, 6)
    assert engine.decode([7, 3])


def test_a_request_that_sat_out_a_pass_is_complete_again():
    engine = Engine(max_tokens=ROWS * 128)
    for row in range(4):
        engine.prefill(row, 3 + row)
    assert engine.decode([0, 1, 2, 3])
    assert engine.decode([3, 1])
    assert engine.decode([0, 1, 2, 3])


def test_a_token_that_came_in_a_pass_of_another_kind_is_not_missed():
    engine = Engine(max_tokens=ROWS * 128)
    engine.prefill(0, 5)
    assert engine.decode([0])
    engine.append(0)
    assert engine.decode([0])


@pytest.mark.parametrize("longest", [33, 60])
def test_a_batch_that_is_too_large_is_left_to_others_and_the_next_that_fits_is_right(longest):
    engine = Engine(max_tokens=128)  # 4 requests of 32, or 2 of 64
    for row in range(4):
        engine.prefill(row, 10)
    assert engine.decode([0, 1, 2, 3])
    engine.prefill(4, longest)
    assert not engine.decode([0, 1, 2, 3, 4])
    assert engine.decode([4, 2])
    assert engine.decode([2, 4])
    assert engine.decode([0, 1, 2, 3])
