"""Random Qwen2 checkpoints that the real server loads in no time."""

from pathlib import Path

import torch
from small_qwen2 import make_qwen2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 294
END_OF_TEXT = "<|endoftext|>"
MERGES = [
    ("`", "`"),
    ("``", "`"),
    ("```", "Ċ"),
    ("p", "y"),
    ("t", "h"),
    ("py", "th"),
    ("o", "n"),
    ("pyth", "on"),
]


def byte_tokenizer():
    """One token per byte, plus the merges above ("Ċ" is a newline) and unused ids."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    vocab[END_OF_TEXT] = len(vocab)
    while len(vocab) < VOCAB_SIZE:
        vocab[f"<|unused{len(vocab)}|>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def random_qwen2(seed):
    """Grouped queries and tied embeddings."""
    return make_qwen2(
        seed=seed,
        noise=0.2,
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=byte_tokenizer().eos_token_id,
        initializer_range=0.08,
        dtype="float32",
    )


def save_checkpoint(directory: Path, seed):
    """Write model and tokenizer; returns the model."""
    model = random_qwen2(seed)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


@torch.no_grad()
def logprobs_under(model, prompt_ids, token_ids, temperature=1.0):
    """Log-probs of ``token_ids`` after ``prompt_ids``, in nats, by Hugging Face's implementation."""
    logits = model(torch.tensor([list(prompt_ids) + list(token_ids)])).logits[0] / temperature
    logprobs = logits.log_softmax(-1)
    return [logprobs[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(token_ids)]


@torch.no_grad()
def only_writes(model, text):
    """Change ``model`` so that it continues everything with the one token that spells ``text``."""
    (token,) = byte_tokenizer().encode(text, add_special_tokens=False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 1.0
    embedding[token, 0] = 4.0  # the logit of a token is its embedding times what the norm lets through
    model.model.norm.weight.zero_()
    model.model.norm.weight[0] = 50.0
    return model
