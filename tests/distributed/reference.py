"""What plain transformers and torch make of a checkpoint: the independent implementation to compare with.

It shares no code with the trainer: one sequence at a time, full logits, torch's AdamW on main weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_policies import (
    ADAM_BETAS,
    ADAM_EPS,
    CHECKPOINTS,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    STEPS,
    TEMPERATURE,
    VALUE_CLIP,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Role,
    samples,
    save_checkpoint,
)
from torch import Tensor

CANARY = list(range(1, 20))


def prepare(root: Path, names: Iterable[str], dtypes: Sequence[torch.dtype]) -> None:
    """Writes checkpoints to ``root/<name>``, and what ``train`` makes of each to ``root/<name>.<dtype>.pt``."""
    for name in names:
        role, weighted = CHECKPOINTS[name].role, CHECKPOINTS[name].weighted
        for dtype in dtypes:
            model = save_checkpoint(name, root / name)
            with torch.no_grad():
                targets = make_targets(role, [output.numpy() for output in outputs(model, role)], weighted)
            run = train(in_dtype(model, dtype), role, targets)
            torch.save(run | {"targets": targets}, reference_path(root, name, dtype))


def reference_path(root: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Where ``prepare`` puts a run."""
    return root / f"{name}.{str(dtype).removeprefix('torch.')}.pt"


def make_targets(role: Role, start: list[np.ndarray], weighted: bool = False) -> dict[str, list[np.ndarray]]:
    """Per-sample targets of the losses: [L - 1] float32 each.

    Old outputs are near the first ones: some inside the clip, some outside, none at its edge, where rounding
    would decide whether a token has a gradient. Some importance weights are 0, as of masked tokens.
    """
    random = np.random.default_rng(2)
    near = [
        array + (random.choice([-0.5, -0.1, 0.1, 0.5], array.size) + random.normal(0, 0.01, array.size))
        for array in start
    ]
    near = [array.astype(np.float32) for array in near]
    free = [random.normal(0, 1, array.size).astype(np.float32) for array in start]
    first, second = ("old_logprobs", "advantages") if role == "actor" else ("old_values", "returns")
    if not weighted:
        return {first: near, second: free}
    weights = [random.choice([0.0, 0.5, 1.3, 2.0], array.size).astype(np.float32) for array in start]
    return {first: near, second: free, "importance_weights": weights}


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with weights of this type. In float64 the norms compute in it, too, which transformers' do not.

    The rotary table stays float32 in every type: it is the one that transformers defines.
    """
    model.to(dtype)
    for module in model.modules():
        if dtype is torch.float64 and type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    return model


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    scale = (hidden.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * hidden * scale


def outputs(model: Any, role: Role, temperature: float = TEMPERATURE) -> Iterator[Tensor]:
    """For each sample, [L - 1]: log-probs of its tokens after the first, or the values before them."""
    for sample in samples():
        ids = torch.tensor(sample.token_ids)
        logits = model(ids[None]).logits[0, :-1]
        if role == "critic":
            yield logits[:, 0]
        else:
            logits = logits if logits.dtype is torch.float64 else logits.float()
            yield (logits / temperature).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """(losses, where the clip cut the gradient off) of single tokens."""
    ratio = (logp - old_logp).exp()
    gain, bounded = ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage
    return -weight * torch.minimum(gain, bounded), bounded < gain


def value_loss(value: Tensor, old_value: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, where the clip cut the gradient off) of single tokens."""
    bounded = value.clamp(min=old_value - VALUE_CLIP, max=old_value + VALUE_CLIP)
    error, bounded_error = (value - target) ** 2 / 2, (bounded - target) ** 2 / 2
    return torch.where(bounded_error > error, bounded_error, error), bounded_error > error


def train(model: Any, role: Role, targets: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Outputs, gradients of the first step before clipping, and main weights after ``STEPS`` steps."""
    main_dtype = torch.float64 if model.dtype is torch.float64 else torch.float32
    mains = {name: p.detach().to(main_dtype, copy=True) for name, p in model.named_parameters()}
    groups = [
        {"params": [p for p in mains.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in mains.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPS)
    result: dict[str, Any] = {"losses": [], "grad_norms": [], "clip_fractions": []}
    with torch.no_grad():
        result["outputs"] = _arrays(model, role)
        result["canary"] = _canary(model) if role == "actor" else None
    for step in range(STEPS):
        loss, clip_fraction = _backward(model, role, targets)
        for name, parameter in model.named_parameters():
            mains[name].grad = parameter.grad.to(main_dtype)
        if step == 0:
            result["gradients"] = {name: main.grad.clone() for name, main in mains.items()}
        norm = torch.nn.utils.clip_grad_norm_(mains.values(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(mains[name])
        result["losses"].append(loss)
        result["grad_norms"].append(norm.item())
        result["clip_fractions"].append(clip_fraction)
    result["parameters"] = {name: main.detach() for name, main in mains.items()}
    with torch.no_grad():
        result["final_outputs"] = _arrays(model, role)
    return result


def _backward(model: Any, role: Role, targets: dict[str, list[np.ndarray]]) -> tuple[float, float]:
    """Leaves the gradient in the model. Returns (mean loss, share of clipped tokens)."""
    token_loss: Callable[..., tuple[Tensor, Tensor]] = policy_loss if role == "actor" else value_loss
    masks = [torch.tensor(sample.loss_mask[1:]) for sample in samples()]
    trained = sum(int(mask.sum()) for mask in masks)
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    model.zero_grad()
    for output, mask, *wanted in zip(outputs(model, role), masks, *targets.values(), strict=True):
        loss, is_clipped = token_loss(output, *(torch.tensor(array).to(output) for array in wanted))
        total = total + loss[mask].sum()
        clipped += int(is_clipped[mask].sum())
    (total / trained).backward()
    return total.item() / trained, clipped / trained


def _arrays(model: Any, role: Role) -> list[np.ndarray]:
    return [(o if o.dtype is torch.float64 else o.float()).numpy() for o in outputs(model, role)]


def _canary(model: Any) -> Tensor:
    ids = torch.tensor(CANARY)
    logits = model(ids[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
