"""A Qwen2 checkpoint that says what it is told to: its greedy continuation of every token is written down.

The residual stream is the embedding (attention and MLP write zeros), embeddings are one-hot, and row ``j`` of
the LM head reads the tokens that ``j`` follows. So the real engine, and Hugging Face's implementation, both
speak a script: tokens may complete a stop string in their middle, or carry a part of a character.
"""

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HIDDEN_SIZE = 320
EOS = "<|eos|>"
SHARPNESS = 0.35
"""Of the LM head: the scripted token gets about half of the probability, so that log-probs say something."""


def byte_level(text_or_bytes):
    """How byte-level BPE spells bytes."""
    raw = text_or_bytes if isinstance(text_or_bytes, bytes) else text_or_bytes.encode()
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = {byte: 256 + index for index, byte in enumerate(b for b in range(256) if b not in kept)}
    return "".join(chr(byte if byte in kept else others[byte]) for byte in raw)


def make_tokenizer(directory, long_tokens):
    """Single bytes, and the given longer tokens with all their beginnings, merged wherever they occur."""
    vocab = {character: index for index, character in enumerate(sorted(byte_level(bytes(range(256)))))}
    merges = []
    for token in map(byte_level, long_tokens):
        for end in range(2, len(token) + 1):
            if token[:end] not in vocab:
                vocab[token[:end]] = len(vocab)
                merges.append((token[: end - 1], token[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    wrapped.save_pretrained(directory)
    return wrapped


def save_checkpoint(directory: Path, *, long_tokens, script):
    """Writes model and tokenizer.

    Args:
        directory: Where to.
        long_tokens: Texts or bytes that are one token each.
        script: Texts or bytes; each is one token, and follows the one before it.
    """
    tokenizer = make_tokenizer(directory, long_tokens)
    ids = [token_id(tokenizer, piece) for piece in script]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    assert config.vocab_size <= HIDDEN_SIZE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size, HIDDEN_SIZE))
        model.lm_head.weight.normal_(std=0.01)
        successors = {}
        for token, following in itertools.pairwise(ids):
            assert successors.setdefault(token, following) == following, "a token has one successor"
            model.lm_head.weight[following, token] = SHARPNESS
    model.save_pretrained(directory)
    return model.eval(), tokenizer


def token_id(tokenizer, piece):
    """The id of a text or of bytes that are one token."""
    found = tokenizer.convert_tokens_to_ids(byte_level(piece))
    assert found is not None, f"{piece!r} is not one token"
    return found
