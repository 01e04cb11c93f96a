"""Prompts and the resumable stream of them."""

import itertools
import json
from pathlib import Path

import pytest

from megatron_ztrl.config.schema import DatasetConfig
from megatron_ztrl.data.prompts import PromptSource, load_prompts
from megatron_ztrl.types import Prompt


def _prompts(count: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=f"d:{i}", problem="q", text="x" * (i + 1), ground_truth="1", data_source="d")
        for i in range(count)
    ]


def _source(count: int = 10, *, seed: int = 0, max_prompt_tokens: int = 100) -> PromptSource:
    return PromptSource(
        _prompts(count),
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
        tokenize=lambda text: list(text.encode()),
    )


def _ids(source: PromptSource, count: int) -> list[str]:
    return [prompt.prompt_id for prompt in itertools.islice(source, count)]


def test_prompts_carry_the_rendered_text_and_an_id_that_names_the_row(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"problem": "1+1?", "answer": 2, "level": 1}\n\n{"problem": "2+2?", "answer": "4"}\n')
    first, second = load_prompts(DatasetConfig(name="sums", path=str(path)), lambda problem: f"Q: {problem}")
    assert first == Prompt(
        prompt_id="sums:1",
        problem="1+1?",
        text="Q: 1+1?",
        ground_truth="2",
        data_source="sums",
        metadata={"level": 1},
    )
    assert second.prompt_id == "sums:3"  # its line; the blank one counts


def test_every_epoch_visits_each_prompt_once_in_an_order_of_its_own():
    ids = _ids(_source(10), 30)
    epochs = [ids[:10], ids[10:20], ids[20:]]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_alone_decides_the_order():
    assert _ids(_source(seed=3), 25) == _ids(_source(seed=3), 25)
    assert _ids(_source(seed=3), 25) != _ids(_source(seed=4), 25)


@pytest.mark.parametrize("taken", [0, 4, 10, 27])
def test_a_restored_cursor_continues_the_very_same_stream(taken: int):
    source = _source()
    _ids(source, taken)
    state = json.loads(json.dumps(source.state()))
    resumed = _source()
    resumed.restore(state)
    assert _ids(resumed, 25) == _ids(source, 25)


def test_a_cursor_of_other_prompts_or_another_seed_is_refused():
    state = _source().state()
    for other in (_source(11), _source(seed=1), _source(max_prompt_tokens=5)):
        with pytest.raises(ValueError, match=r"other training prompts.*data\.train"):
            other.restore(state)


def test_prompts_over_the_token_limit_are_left_out_and_counted():
    source = _source(10, max_prompt_tokens=7)
    assert (len(source), source.left_out) == (7, 3)
    assert set(_ids(source, 14)) == {f"d:{i}" for i in range(7)}
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens=0 leaves out all 10 prompts"):
        _source(10, max_prompt_tokens=0)
