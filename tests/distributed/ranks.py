"""What the test ranks run: each function returns plain numbers, and the tests judge them."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case
from random_policies import STEPS, config, packed, spread
from reference import CANARY, reference_path

from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.packing import with_per_token
from megatron_ztrl.types import TensorSlice

_meetings: Counter[int] = Counter()


def build(
    case: Case, rank: int, scratch: Path, root: Path, change: Callable[[Config], Config] = lambda same: same
) -> Any:
    """This rank's actor or critic for a case. Ranks meet in a file of their own every time."""
    from megatron_ztrl.trainer.actor import ActorRank
    from megatron_ztrl.trainer.critic import CriticRank

    # Ranks may sit out a case, so only meetings of the same size are counted alike by all who take part.
    _meetings[case.world_size] += 1
    meeting = scratch / f"meeting-{case.world_size}-{_meetings[case.world_size]}"
    chosen = config(
        root / case.checkpoint,
        tp=case.tp,
        pp=case.pp,
        vp=case.vp,
        dp=case.dp,
        cp=case.cp,
        sp=case.sp,
        dtype=case.dtype,
        transformer=case.transformer,
        ddp=case.ddp,
    )
    kind = ActorRank if case.role == "actor" else CriticRank
    return kind(change(chosen), rank, case.world_size, f"file://{meeting}")


def run_parity_cases(rank: int, scratch: Path, root: Path, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Measures every case on the ranks that it has."""
    return {case.name: measure_parity(case, rank, scratch, root) for case in cases if rank < case.world_size}


def measure_parity(case: Case, rank: int, scratch: Path, root: Path) -> dict[str, Any]:
    """One case on one rank.

    Returns:
        ``gaps``: by type of the reference run, the largest absolute differences from it; ``compared``: how
        many elements of gradients that were; ``stats`` of every step; and a few facts.
    """
    runs = _reference_runs(case, root)
    batch = packed(
        next(iter(runs.values()))["targets"],
        dp=case.dp,
        tokens=case.tokens,
        multiple=case.tp,
        order=case.order,
    )
    model = build(case, rank, scratch, root)
    slices = model.parameter_slices()
    first = _outputs(model, batch)
    canary = model.canary_logprobs(CANARY) if case.role == "actor" else None
    model.export_hf(root / f"export-{case.name}")
    stats, gradients = _train(model, batch)
    final = _outputs(model, batch)
    mains = _main_weights(model)
    gaps = {
        dtype: {
            "outputs": _output_gap(model, batch, first, run["outputs"]),
            "canary": _canary_gap(canary, run["canary"]),
            "gradients": _slice_gap(slices, gradients, run["gradients"]),
            "parameters": _slice_gap(slices, mains, run["parameters"]),
            "final_outputs": _output_gap(model, batch, final, run["final_outputs"]),
        }
        for dtype, run in runs.items()
    }
    result: dict[str, Any] = {
        "gaps": gaps,
        "stats": stats,
        "microbatches": len(batch.microbatches[0]),
        "elements": sum(
            gradients[piece.param].narrow(piece.dim, piece.start, piece.length).numel() for piece in slices
        ),
        "compared": sum(int(torch.isfinite(part).sum()) for part, _ in _pairs(slices, gradients)),
    }
    if case.dtype == "bfloat16":
        result["main_weights"] = _main_weight_facts(model, mains)
        result["finer outputs"] = _finer_share(torch.from_numpy(np.concatenate(first or [np.zeros(1)])))
    if case.like is not None:
        result["invariance"] = _slice_gap(slices, gradients, torch.load(root / f"{case.like}.gradients"))
    elif case.world_size == 1:
        torch.save(_whole(slices, gradients), root / f"{case.name}.gradients")
    model.close()
    return result


def run_checkpoint_cases(
    rank: int, scratch: Path, root: Path, pairs: list[tuple[Case, Case]]
) -> dict[str, Any]:
    """Every pair saves under one layout and goes on, and loads under another and goes on.

    Returns:
        Both continuations by pair; ``other settings``, of a run that resumes with them; ``failed write``: what a save
        says that could not write; and ``no number``: what a step says whose gradients are NaN.
    """
    results: dict[str, Any] = {}
    for saver, loader in pairs:
        directory = root / f"checkpoint-{saver.name}-{loader.name}"
        results[f"{saver.name}-to-{loader.name}"] = {
            "uninterrupted": _continue(saver, rank, scratch, root, save_to=directory),
            "resumed": _continue(loader, rank, scratch, root, load_from=directory),
        }
    saver, loader = pairs[1]
    directory = root / f"checkpoint-{saver.name}-{loader.name}"
    results["other settings"] = _resume_with_other_settings(loader, rank, scratch, root, directory)
    results["failed write"] = _fail_to_write(pairs[0][0], rank, scratch, root)
    results["no number"] = _train_on_nan(loader, rank, scratch, root)
    return results


def _continue(
    case: Case,
    rank: int,
    scratch: Path,
    root: Path,
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> dict[str, Any]:
    """Three steps after loading; or two steps, a save, and three steps that the writing must outlast."""
    model = build(case, rank, scratch, root)
    targets = torch.load(reference_path(root, case.checkpoint), weights_only=False)["targets"]
    batch = packed(targets, dp=case.dp, tokens=case.tokens, multiple=case.tp)
    released = threading.Event()
    with _before_writing(released.wait):
        if load_from is not None:
            model.load_checkpoint(load_from)
        else:
            for step in range(2):
                model.train_step(batch, step)
            model.save_checkpoint(save_to)
        stats = [model.train_step(batch, step) for step in range(2, 5)]
        written_early = save_to is not None and model.checkpoint_written()
        released.set()
        records = model.finish_checkpoint() if save_to is not None else {}
    by_sample = {}
    outputs = _outputs(model, batch)
    if outputs is not None:
        for mb, array_T in zip(batch.microbatches[model.dp_rank], outputs, strict=True):
            for index, start, end in zip(mb.sample_indices, mb.cu_seqlens, mb.cu_seqlens[1:], strict=False):
                by_sample[index] = array_T[start:end]
    model.close()
    return {
        "stats": [entry for entry in stats if entry is not None],
        "outputs": by_sample,
        "written_early": written_early,
        "records": records,
    }


def _resume_with_other_settings(
    case: Case, rank: int, scratch: Path, root: Path, directory: Path
) -> dict[str, Any]:
    """Adam's settings, steps and learning rates after a resume: of an actor that waits for the critic's warm-up, in
    layers that have more state than those that were saved."""

    def change(config: Config) -> Config:
        algorithm = replace(config.algorithm, advantage="gae", critic_warmup_steps=3)
        return replace(
            config, actor=replace(config.actor, adam_beta2=0.5, adam_eps=1e-3), algorithm=algorithm
        )

    model = build(case, rank, scratch, root, change)
    targets = torch.load(reference_path(root, case.checkpoint), weights_only=False)["targets"]
    batch = packed(targets, dp=case.dp, tokens=case.tokens, multiple=case.tp)
    _have_more_extra_state(model)
    model.load_checkpoint(directory)
    stats = [model.train_step(batch, step) for step in range(3, 6)]
    optimizer = model._optimizer
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    model.close()
    return {
        "adam": [(tuple(group["betas"]), group["eps"]) for group in optimizer.param_groups],
        "steps": sorted({float(state["step"]) for adam in inner for state in adam.state.values()}),
        "rates": [entry["learning_rate"] for entry in stats if entry is not None],
    }


def _have_more_extra_state(model: Any) -> None:
    """As modules of Transformer Engine have, for which local layers save nothing."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    chunk, name = model._chunks[0], "decoder.final_layernorm._extra_state"
    of_local_layers = chunk.sharded_state_dict
    extra = ShardedObject(name, None, (1,), (0,), replica_id=model.dp_rank)
    chunk.sharded_state_dict = lambda **options: of_local_layers(**options) | {name: extra}


def _fail_to_write(case: Case, rank: int, scratch: Path, root: Path) -> str:
    model = build(case, rank, scratch, root)

    def fail() -> None:
        raise OSError("no space left on device")

    with _before_writing(fail):
        model.save_checkpoint(root / "failed")
        try:
            while not model.checkpoint_written():
                pass
        except OSError as error:
            return str(error)
        finally:
            model.close()
    return ""


def _train_on_nan(case: Case, rank: int, scratch: Path, root: Path) -> dict[str, Any]:
    """The error, and whether the weights are what they were."""
    model = build(case, rank, scratch, root)
    targets = torch.load(reference_path(root, case.checkpoint), weights_only=False)["targets"]
    batch = packed(targets, dp=case.dp, tokens=case.tokens, multiple=case.tp)
    nan = [[np.full(mb.loss_mask_T.shape, np.nan) for mb in replica] for replica in batch.microbatches]
    before = {name: model.parameter(name).clone() for name in model._parameters}
    error = ""
    try:
        model.train_step(with_per_token(batch, "advantages", nan), 0)
    except RuntimeError as raised:
        error = str(raised)
    unchanged = all(torch.equal(model.parameter(name), weight) for name, weight in before.items())
    model.close()
    return {"error": error, "unchanged": unchanged}


@contextlib.contextmanager
def _before_writing(do: Callable[[], Any]) -> Iterator[None]:
    """Calls ``do`` in the writing thread before it writes shards."""
    from torch.distributed.checkpoint import FileSystemWriter

    write_data = FileSystemWriter.write_data

    def wrapper(*args: Any) -> Any:
        do()
        return write_data(*args)

    FileSystemWriter.write_data = wrapper
    try:
        yield
    finally:
        FileSystemWriter.write_data = write_data


def _reference_runs(case: Case, root: Path) -> dict[str, dict[str, Any]]:
    """By type, float32 first."""
    types = (torch.float32, torch.float64, torch.bfloat16)
    paths = {
        str(dtype).removeprefix("torch."): reference_path(root, case.checkpoint, dtype) for dtype in types
    }
    return {name: torch.load(path, weights_only=False) for name, path in paths.items() if path.is_file()}


def _outputs(model: Any, batch: Any) -> list[np.ndarray] | None:
    return model.logprobs(batch) if hasattr(model, "logprobs") else model.values(batch)


def _train(model: Any, batch: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Statistics of ``STEPS`` steps, on the rank that reports them, and gradients of the first."""
    gradients: dict[str, torch.Tensor] = {}
    step_of_optimizer = model._optimizer.step

    def look_first() -> Any:
        if not gradients:  # summed over all ranks and not yet clipped
            gradients.update(_gradients(model))
        return step_of_optimizer()

    model._optimizer.step = look_first
    stats = [model.train_step(batch, step) for step in range(STEPS)]
    return [entry for entry in stats if entry is not None], gradients


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by parameter; NaN where another data-parallel rank has the sum."""
    return {
        name: _spread_owned(model, parameter, parameter.main_grad.flatten()[_owned(model, parameter)])
        for name, parameter in model._parameters.items()
    }


def _main_weights(model: Any) -> dict[str, torch.Tensor]:
    """What the optimizer updates: float32 copies under bfloat16, of which a rank may have a part; else NaN."""
    mains = {}
    for name, parameter in model._parameters.items():
        main = getattr(parameter, "main_param", None)
        if parameter.dtype is torch.float32:
            mains[name] = model.parameter(name)
        else:
            owned = torch.empty(0) if main is None else main.detach().flatten()
            mains[name] = _spread_owned(model, parameter, owned)
    return mains


def _main_weight_facts(model: Any, mains: dict[str, torch.Tensor]) -> dict[str, bool | float]:
    """Whether the model's weights are the main weights, rounded; share of these that rounding changes."""
    rounded = {name: main.to(torch.bfloat16) for name, main in mains.items()}
    owned = {name: ~main.isnan() for name, main in mains.items()}
    finer = [_finer_share(mains[name][mask]) * int(mask.sum()) for name, mask in owned.items()]
    return {
        "round to the model's": all(
            torch.equal(model.parameter(name)[mask], rounded[name][mask]) for name, mask in owned.items()
        ),
        "finer share": sum(finer) / sum(int(mask.sum()) for mask in owned.values()),
    }


def _finer_share(numbers: torch.Tensor) -> float:
    """Share of numbers that bfloat16 would change."""
    return (numbers != numbers.to(torch.bfloat16)).float().mean().item() if numbers.numel() else 0.0


def _owned(model: Any, parameter: torch.nn.Parameter) -> slice:
    """The part of the flattened parameter whose gradient this rank has in full, after the reduction."""
    for part in getattr(model._optimizer, "chained_optimizers", [model._optimizer]):
        if parameter in getattr(part, "model_param_gbuf_map", {}):
            mine = part._get_model_param_range_map(parameter)["param"]
            return slice(mine.start, mine.end)
    distributed = model._models[0].ddp_config.use_distributed_optimizer
    return slice(0, 0) if distributed else slice(0, parameter.numel())


def _spread_owned(model: Any, parameter: torch.nn.Parameter, owned: torch.Tensor) -> torch.Tensor:
    whole = torch.full((parameter.numel(),), torch.nan)
    whole[_owned(model, parameter)] = owned
    return whole.view(parameter.shape)


def _output_gap(model: Any, batch: Any, found: list[np.ndarray] | None, expected: list[np.ndarray]) -> float:
    if found is None:
        return 0.0
    wanted = spread(batch, expected)[model.dp_rank]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def _canary_gap(found: list[float] | None, expected: torch.Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0
    return (torch.tensor(found) - expected).abs().max().item()


def _pairs(
    slices: list[TensorSlice], local: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, TensorSlice]]:
    return ((local[s.param].narrow(s.dim, s.start, s.length), s) for s in slices)


def _slice_gap(
    slices: list[TensorSlice], local: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]
) -> float:
    """Over what this rank has (see ``_spread_owned``)."""
    gaps = [
        part - whole[s.tensor].narrow(s.dim, s.tensor_start, s.length) for part, s in _pairs(slices, local)
    ]
    return max(gap.abs().nan_to_num(0.0).max().item() for gap in gaps)


def _whole(slices: list[TensorSlice], local: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """HF tensors from the parameters of one rank that holds everything."""
    parts: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
    for part, s in _pairs(slices, local):
        parts.setdefault(s.tensor, []).append((s.tensor_start, s.dim, part))
    return {
        tensor: torch.cat([part for _, _, part in sorted(found, key=lambda row: row[0])], dim=found[0][1])
        for tensor, found in parts.items()
    }
