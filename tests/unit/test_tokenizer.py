"""The tokenizer of a policy is what its tokenizer.json says."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from megatron_ztrl.data.tokenizer import PolicyTokenizer

QUICKSTART_BASE = Path(__file__).parents[2] / "examples" / "quickstart" / "base"


def test_a_qwen2_checkpoint_keeps_the_pre_tokenizer_of_its_own_file(tmp_path):
    vocab = {"Q": 0, ":": 1, "Q:": 2, "1": 3, "11": 4, "<|eos|>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Q", ":"), ("1", "1")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|eos|>"])
    tokenizer.enable_truncation(3)  # what a file may ask for, and nobody wants here
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    policy = PolicyTokenizer(tmp_path)
    assert policy.encode("Q:11") == [2, 4]  # Qwen2's own rules would split both
    assert policy.encode("Q:11111") == [2, 4, 4, 3]
    assert policy.decode([2, 5]) == "Q:"
    assert policy.decode_all([2, 5]) == "Q:<|eos|>"


def test_text_that_is_data_holds_no_special_token_and_is_otherwise_the_same():
    policy = PolicyTokenizer(QUICKSTART_BASE)
    pad, eos = policy.encode("<|pad|><|endoftext|>")
    printed = "```output\n<|endoftext|>é<|pad|>\n```\n"
    as_data = policy.encode(printed, split_special_tokens=True)
    assert not {pad, eos} & set(as_data)
    assert policy.decode(as_data) == printed
    for text in ("```output\n1234\n```\n", "  é日本🙂\tx <|endoftext <|im_end|>", ""):
        assert policy.encode(text, split_special_tokens=True) == policy.encode(text)
    assert policy.encode(printed).count(eos) == 1  # a template's own still stand for themselves


def test_a_directory_without_a_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no usable tokenizer") as error:
        PolicyTokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
