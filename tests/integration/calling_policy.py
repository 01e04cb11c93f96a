"""Random Qwen2 weights that call the Python tool all the time, in the shape that the session's server has.

Some tokens have an embedding dimension to themselves. Layer 0's MLP turns each scripted token into the one that
follows it, and layer 1's attention makes everything else be followed by the first. What is left of the random
weights makes all log-probs depend on the whole context, so that wrong KV shows.
"""

import torch
from tiny_model import byte_tokenizer, random_qwen2

SCRIPT = ["```", "python", "Ċ", "7", "```Ċ"]
"""As byte-level BPE spells them; "Ċ" is a newline."""
EMBEDDING = 0.75
"""Of a scripted token, in its dimension: a log-prob of about -0.05."""
CONTEXT = 0.05
"""Share that is left of the random attention and MLP."""
DEFAULT = 3.0
"""What pulls towards the first token, in embeddings."""
FIRING = 6.0
"""Gate and up of a scripted token's neuron."""


@torch.no_grad()
def tool_calling_qwen2():
    """A new model; perturb its weights by a tenth and it goes on calling."""
    model = random_qwen2(0)
    tokenizer = byte_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(SCRIPT)
    first, second = model.model.layers
    for layer in (first, second):
        layer.self_attn.o_proj.weight *= CONTEXT
        layer.mlp.down_proj.weight *= CONTEXT
    for norm in (first.post_attention_layernorm, model.model.norm):
        norm.weight.fill_(1.0)

    embedding = model.model.embed_tokens.weight
    embedding[:, : len(SCRIPT)] = 0.0
    for dimension, token in enumerate(ids):
        embedding[token] = 0.0
        embedding[token, dimension] = EMBEDDING

    # A value that is the same everywhere comes through attention as it is.
    second.self_attn.v_proj.weight[0] = 0.0
    second.self_attn.v_proj.bias[0] = 1.0
    second.self_attn.o_proj.weight[:, 0] = 0.0
    second.self_attn.o_proj.weight[0, 0] = DEFAULT * EMBEDDING

    width = model.config.hidden_size**0.5  # the norm of what the MLP reads
    for dimension in range(len(SCRIPT) - 1):
        for projection in (first.mlp.gate_proj, first.mlp.up_proj):
            projection.weight[dimension] = 0.0
            projection.weight[dimension, dimension] = FIRING / width
        written = torch.zeros(model.config.hidden_size)
        written[dimension] -= EMBEDDING
        written[dimension + 1] += 2 * EMBEDDING
        written[0] -= DEFAULT * EMBEDDING
        first.mlp.down_proj.weight[:, dimension] = written / FIRING**2
    return model
