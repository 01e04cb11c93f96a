"""Small Qwen2 models that several folders of tests use: a config.json, and random weights."""

from __future__ import annotations

from typing import Any

import torch

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 7,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
"""So small that slices of its tensors can be written down."""


def make_qwen2(*, seed: int = 0, noise: float, **options: Any) -> Any:
    """A ``Qwen2ForCausalLM`` in float32 that no token begins.

    Args:
        seed: Of the weights.
        noise: See ``unsettle``.
        **options: Of ``transformers.Qwen2Config``.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(bos_token_id=None, **options)).float().eval()
    unsettle(model, noise)
    return model


@torch.no_grad()
def unsettle(model: torch.nn.Module, noise: float) -> None:
    """Moves biases and norms off 0 and 1, where the library starts them and mistakes would not show.

    Args:
        model: Of any family.
        noise: Standard deviation of what is added.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * noise)
