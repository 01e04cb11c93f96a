"""The corpus of the quickstart's base policy is, token for token, what a rollout leaves behind."""

from __future__ import annotations

import asyncio
import random
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(EXAMPLE))

from corpus import EOS, build_tokenizer, format_reply, sample_document  # noqa: E402
from problems import Split, sample_problems, split_of  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from megatron_ztrl.config.schema import ToolConfig  # noqa: E402
from megatron_ztrl.envs.python_tool import PythonTool  # noqa: E402
from megatron_ztrl.types import ExecutionResult, ExecutionStatus  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EXAMPLE / "base")


def document_with_calls(num_calls: int) -> tuple[str, str]:
    rng = random.Random(0)
    while True:
        document = sample_document(rng, code_share=1.0)
        if document.response.count("```python") == len(document.problem.steps) == num_calls:
            return document.prompt, document.response


def test_no_product_of_the_evaluation_or_of_training_occurs_in_the_corpus() -> None:
    rng = random.Random(11)
    written: set[tuple[int, int]] = set()
    for _ in range(50_000):
        document = sample_document(rng, code_share=0.5)
        pairs = re.findall(r"(\d+) ?\* ?(\d+)", document.prompt + document.response)
        assert pairs
        written.update((int(left), int(right)) for left, right in pairs)
    assert {split_of(factors) for factors in written} == {Split.CORPUS}
    assert len(written) > 20_000
    for split in (Split.TRAIN, Split.EVAL):
        assert not written & {problem.factors for problem in sample_problems(split, 2048)}


def test_a_solution_with_python_reads_as_the_interaction_protocol_prescribes() -> None:
    prompt, response = document_with_calls(2)
    match = re.fullmatch(r"Question: (\d+) \+ (\d+) \* (\d+) = \?\nAnswer:", prompt)
    c, a, b = map(int, match.groups())
    assert response == (
        f"\n```python\nprint({a}*{b})\n```\n```output\n{a * b}\n```\n"
        f"```python\nprint({c}+{a * b})\n```\n```output\n{c + a * b}\n```\n"
        f"\\boxed{{{c + a * b}}}"
    )


def test_the_replies_in_the_corpus_are_those_of_the_environment() -> None:
    """Plays a document of the corpus through the tool, from stop to stop."""
    ran: list[str] = []

    async def execute(code: str) -> ExecutionResult:
        ran.append(code)
        output = str(eval(code.strip().removeprefix("print"))) + "\n"
        return ExecutionResult(
            status=ExecutionStatus.OK, stdout=output, stderr="", run_seconds=0.0, queue_seconds=0.0
        )

    async def play(response: str) -> str:
        tool = PythonTool(execute, len, env_iterations=2, template_stop=(), config=ToolConfig())
        text = ""
        while True:
            turn = response[len(text) :]
            keep = tool.find_stop(turn)
            text += turn[:keep]
            reaction = await tool.react(turn[:keep], ended=keep is None)
            if reaction.finished:
                return text
            text += reaction.reply or ""
            assert response.startswith(text)

    _, response = document_with_calls(2)
    assert asyncio.run(play(response)) == response
    assert len(ran) == 2


@pytest.mark.parametrize("num_calls", [1, 2])
def test_segments_tokenised_on_their_own_join_to_the_tokens_of_the_document(
    tokenizer: PreTrainedTokenizerBase, num_calls: int
) -> None:
    """Prompt, model text up to the closing fence, reply, model text: each is encoded without the others."""
    prompt, response = document_with_calls(num_calls)
    segments = [prompt, *re.split(r"(?s)(\n```output\n.*?\n```\n)", response)]
    assert len(segments) == 2 * num_calls + 2
    joined = [token for text in segments for token in tokenizer(text, add_special_tokens=False).input_ids]
    assert joined == tokenizer(prompt + response, add_special_tokens=False).input_ids
    assert tokenizer.decode(joined) == prompt + response


def test_the_fences_at_which_generation_stops_are_whole_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("\n```python\nprint(4)\n```") == (
        ["Ċ", "```", "python", "Ċ", "print", "(", "4", ")", "Ċ", "```"]
    )
    assert tokenizer.tokenize(format_reply("8968"))[:2] == ["Ċ", "```"]


def test_the_committed_tokenizer_adds_nothing_and_ends_documents_with_end_of_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt, _ = document_with_calls(1)
    assert tokenizer(prompt).input_ids == tokenizer(prompt, add_special_tokens=False).input_ids
    assert tokenizer(EOS).input_ids == [tokenizer.eos_token_id]


def test_the_committed_tokenizer_reads_the_corpus_as_the_one_that_the_base_was_trained_with(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """`AutoTokenizer` puts Qwen2's own pre-tokenizer in place of ours; it must make no difference."""
    trained_with = build_tokenizer()
    assert trained_with.get_vocab() == tokenizer.get_vocab()
    rng = random.Random(5)
    for _ in range(200):
        document = sample_document(rng, code_share=0.5)
        text = document.prompt + document.response + EOS
        assert tokenizer(text).input_ids == trained_with(text).input_ids
