"""Data sets in every published format, and the errors a broken one gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ztrl.config.schema import DatasetConfig
from megatron_ztrl.data.datasets import load_problems

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $x$.\n\nSecond "
    'line.\n\nRemember to put your answer on its own line after "Answer:".'
)


def _write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _load(path: str, **options: Any) -> list[tuple[str, str]]:
    return [
        (row.problem, row.answer) for row in load_problems(DatasetConfig(name="set", path=path, **options))
    ]


FORMATS = {
    "plain": ({"problem": "Find x.", "answer": "3"}, "Find x.", "3"),
    "a number as answer (MathArena)": (
        {"problem_idx": 4, "problem": "Find x.", "answer": 70},
        "Find x.",
        "70",
    ),
    "leading zeros are kept": ({"problem": "Find x.", "answer": "023"}, "Find x.", "023"),
    "MATH-500": (
        {
            "problem": "Find x.",
            "solution": "s",
            "answer": r"\frac{1}{2}",
            "level": 3,
            "unique_id": "a/b.json",
        },
        "Find x.",
        r"\frac{1}{2}",
    ),
    "GSM8K": ({"question": "Count.", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"}, "Count.", "1,072"),
    "DeepMath": ({"question": "Find x.", "final_answer": "0", "difficulty": 4.5}, "Find x.", "0"),
    "OlympiadBench's list": ({"question": "Find x.", "final_answer": ["2"]}, "Find x.", "2"),
    "ORZ eval": ({"prompt": [{"from": "user", "value": "Find x."}], "final_answer": "3"}, "Find x.", "3"),
    "verl with a system message and a boxed truth (ToRL)": (
        {
            "data_source": "m",
            "prompt": [{"role": "system", "content": "Use code."}, {"role": "user", "content": "Find x."}],
            "reward_model": {"style": "rule", "ground_truth": r"\boxed{\frac{1}{2}}"},
            "extra_info": {"index": 0, "split": "train"},
        },
        "Find x.",
        r"\frac{1}{2}",
    ),
    "DAPO": (
        {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "34"}},
        "Find $x$.\n\nSecond line.",
        "34",
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_published_format_is_read_from_every_kind_of_file(tmp_path: Path, name: str, suffix: str):
    record, problem, answer = FORMATS[name]
    assert _load(_write(tmp_path / f"set{suffix}", [record, record])) == [(problem, answer)] * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_orz_nested_lists_are_read(tmp_path: Path, suffix: str):
    record = [
        {"from": "human", "value": "Find n."},
        {"from": "assistant", "ground_truth": {"value": "n = 4", "pass_at_n": 0.75}},
    ]
    [row] = load_problems(DatasetConfig(name="orz", path=_write(tmp_path / f"orz{suffix}", [record])))
    assert (row.problem, row.answer, row.metadata) == ("Find n.", "n = 4", {"pass_at_n": 0.75})


def test_a_directory_in_hub_layout_is_read_through_hugging_face_datasets(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "repository"
    directory.mkdir()
    _write(
        directory / "test.jsonl",
        [{"question": "Count.", "answer": "#### 5"}, {"question": "Add.", "answer": "6"}],
    )
    assert _load(str(directory), split="test") == [("Count.", "5"), ("Add.", "6")]
    with pytest.raises(
        ValueError, match=r"data set 'set': cannot load .*split 'tset'.*from the hub.*Unknown split"
    ):
        _load(str(directory), split="tset")


def test_limit_reads_the_first_rows_and_never_the_broken_ones_behind(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"problem": "a", "answer": 1}\n{"problem": "b", "answer": 2}\n{broken\n')
    assert _load(str(path), limit=2) == [("a", "1"), ("b", "2")]


def test_named_keys_are_read_and_a_wrong_one_gets_a_suggestion(tmp_path: Path):
    path = _write(tmp_path / "set.jsonl", [{"Problem text": "a", "question": "no", "Answer": 1, "answer": 2}])
    assert _load(path, problem_key="Problem text", answer_key="Answer") == [("a", "1")]
    with pytest.raises(
        ValueError, match=r"set.jsonl:1: no key 'Problem_text'; did you mean 'Problem text'.*problem_key"
    ):
        _load(path, problem_key="Problem_text")


def test_metadata_holds_short_scalars_only(tmp_path: Path):
    record = {
        "problem": "a",
        "answer": 1,
        "level": 5,
        "subject": "Algebra",
        "solution": "s" * 300,
        "tags": ["x"],
    }
    [row] = load_problems(DatasetConfig(name="set", path=_write(tmp_path / "set.jsonl", [record])))
    assert row.metadata == {"level": 5, "subject": "Algebra"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"problem": "a", "answer": "1"}\n\n{"problem": "b"}\n',
            r"set.jsonl:3: no key 'answer'.*the row has: problem",
        ),
        ('{"problem": "a", "answer": ""}\n', r"set.jsonl:1: 'answer' holds no answer: ''"),
        ('{"problem": "a", "answer": null}\n', r"set.jsonl:1: 'answer' holds no answer: None"),
        ('{"problem": " ", "answer": "1"}\n', r"set.jsonl:1: 'problem' holds no problem"),
        (
            '{"prompt": [{"role": "system", "content": "s"}], "answer": 1}\n',
            r"set.jsonl:1: 'prompt' holds no user message",
        ),
        (
            '{"problem": "a", "answer": "1"}\n{"problem": \n',
            r"set.jsonl:2: broken JSON: Expecting value at column",
        ),
        ('"a string"\n', r"set.jsonl:1: expected an object"),
        ('[{"from": "human", "value": "a"}]\n', r"set.jsonl:1: no key 'answer'"),
        ("\n", r"set.jsonl holds no problems"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        _load(str(path))


def test_text_in_another_encoding_is_named_by_file_and_line_and_a_byte_order_mark_is_none(tmp_path: Path):
    row = '{"problem": "café", "answer": "1"}\n'
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() * 2)
    assert _load(str(path)) == [("café", "1")] * 2
    path.write_bytes(row.encode() + row.encode("latin-1"))
    with pytest.raises(ValueError, match=r"set.jsonl:2: not UTF-8: invalid continuation byte at byte 16"):
        _load(str(path))
    (tmp_path / "set.json").write_bytes(row.encode("latin-1"))
    with pytest.raises(ValueError, match=r"set.json: not UTF-8"):
        _load(str(tmp_path / "set.json"))


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data set 'set': no such file: .*missing.jsonl"):
        _load(str(tmp_path / "missing.jsonl"))
    (tmp_path / "lines.json").write_text('{"problem": "a", "answer": 1}\n{"problem": "b", "answer": 2}\n')
    with pytest.raises(ValueError, match=r"lines.json:2: broken JSON: Extra data.*name it .jsonl"):
        _load(str(tmp_path / "lines.json"))
    (tmp_path / "object.json").write_text('{"problem": "a", "answer": 1}')
    with pytest.raises(ValueError, match=r"object.json: expected a list of records, found dict"):
        _load(str(tmp_path / "object.json"))
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(ValueError, match=r"text.parquet: not a parquet file"):
        _load(str(tmp_path / "text.parquet"))


@pytest.mark.parametrize(
    ("file", "rows"),
    [("eval/math500.jsonl", 500), ("eval/gsm8k_test.jsonl", 1319), ("eval/cmimc_2025.jsonl", 40)],
)
def test_real_problem_sets_are_read_whole(file: str, rows: int):
    if not (SHARED_DATA / file).is_file():
        pytest.skip(f"needs {file} in a 'shared/data' folder next to the repository")
    assert len(_load(str(SHARED_DATA / file))) == rows
