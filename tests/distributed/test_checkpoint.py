"""A resumed run goes on as if it had not been interrupted, though training went on while it was saved."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from random_policies import LEARNING_RATE
from torch.distributed.checkpoint import FileSystemReader

from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()

from megatron_ztrl.trainer import checkpoint  # noqa: E402
from megatron_ztrl.trainer.integrity import find_damage  # noqa: E402
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout  # noqa: E402


def test_resumed_run_equals_the_uninterrupted_one(
    checkpoints: list[dict[str, Any]], pair: tuple[str, str]
) -> None:
    """``_continue`` holds the writing back until three more steps have changed every weight."""
    tolerance = 0.0 if pair[0] == pair[1] else 1e-6
    runs = [ranks["-to-".join(pair)] for ranks in checkpoints]
    assert not any(run["uninterrupted"]["written_early"] for run in runs)
    expected, found = (
        [entry for run in runs for entry in run[which]["stats"]] for which in ("uninterrupted", "resumed")
    )
    assert len(expected) == len(found) == 3
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=tolerance, rel=0)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], abs=3 * tolerance, rel=0)
    expected_outputs, found_outputs = (
        {index: output for run in runs for index, output in run[which]["outputs"].items()}
        for which in ("uninterrupted", "resumed")
    )
    assert expected_outputs.keys() == found_outputs.keys() and len(found_outputs) == 12
    gap = max(float(np.abs(expected_outputs[i] - found_outputs[i]).max()) for i in found_outputs)
    assert gap <= 5 * tolerance


def test_every_file_of_a_checkpoint_has_a_record(
    checkpoints: list[dict[str, Any]], pair: tuple[str, str], root: Path
) -> None:
    records = {}
    for ranks in checkpoints:
        records |= ranks["-to-".join(pair)]["uninterrupted"]["records"]
    directory = root / f"checkpoint-{'-'.join(pair)}"
    assert {path.name for path in directory.iterdir()} == set(records)
    assert find_damage(directory, records) is None


def test_every_data_parallel_rank_writes_the_optimizer_state_that_it_has(
    checkpoints: list[dict[str, Any]], root: Path
) -> None:
    metadata = FileSystemReader(root / "checkpoint-dp2-dp2").read_metadata()
    states = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if "optimizer.state" in name
    }
    sizes = {(name, chunk.offsets): chunk.sizes for name, entry in states.items() for chunk in entry.chunks}
    elements = Counter()
    for index, where in metadata.storage_data.items():
        if index.fqn in states:
            elements[where.relative_path] += math.prod(sizes[index.fqn, index.offset])
    assert sum(elements.values()) == sum(math.prod(entry.size) for entry in states.values())
    # Half of the padded buffer each.
    assert elements["__0_0.distcp"] == pytest.approx(elements["__1_0.distcp"], rel=0.01)


def test_a_checkpoint_of_another_model_is_refused(checkpoints: list[dict[str, Any]], root: Path) -> None:
    """Same shapes, other rotary base: nothing in the tensors would show it."""
    config = json.loads((root / "qwen2" / "config.json").read_text())
    changed = replace(Architecture.from_hf_config(config), rope_theta=1e6)
    directory = root / "checkpoint-dp2-dp2"
    with pytest.raises(
        ValueError, match=r"is not of this model: rope theta: 10000.0 in the checkpoint, 1000000"
    ):
        checkpoint.load(directory, [], None, ParallelLayout(data_size=2), changed)


def test_a_failed_write_is_raised_where_training_goes_on(
    checkpoints: list[dict[str, Any]], root: Path
) -> None:
    for rank, results in enumerate(checkpoints):
        file = root / "failed" / f"__{rank}_0.distcp"
        assert results["failed write"] == f"{file} could not be written: no space left on device"


def test_a_step_whose_gradients_are_no_numbers_is_refused_and_leaves_the_weights(
    checkpoints: list[dict[str, Any]],
) -> None:
    for results in checkpoints:
        assert "found NaN in local grad norm" in results["no number"]["error"]
        assert results["no number"]["unchanged"]


class AdamWithTypes(torch.optim.Optimizer):
    """Stands for Transformer Engine's, which needs a GPU: both arguments of ``initialize_state`` are required."""

    store_param_remainders = False

    def initialize_state(self, parameter: torch.Tensor, store_param_remainders: bool) -> None:
        assert not store_param_remainders
        self.state[parameter]["master_param"] = parameter.detach().float()


def test_states_of_chosen_types_exist_before_the_first_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    adam = AdamWithTypes([parameter], {})
    settings = SimpleNamespace(use_precision_aware_optimizer=True)
    part = SimpleNamespace(optimizer=adam, config=settings, init_state_fn=pytest.fail)
    checkpoint._give_every_parameter_adam_state(SimpleNamespace(chained_optimizers=[part]))
    assert adam.state[parameter]["master_param"].tolist() == [1.0, 1.0]


def test_a_resumed_run_has_the_settings_of_its_own_configuration(checkpoints: list[dict[str, Any]]) -> None:
    for results in checkpoints:
        found = results["other settings"]
        assert found["adam"] == [((0.9, 0.5), 1e-3)] * len(found["adam"])
        assert found["steps"] == [5.0]  # two were saved, three made


def test_the_actors_warm_up_begins_when_the_critics_has_ended(checkpoints: list[dict[str, Any]]) -> None:
    rates = next(r["other settings"]["rates"] for r in checkpoints if r["other settings"]["rates"])
    assert rates == [
        LEARNING_RATE * 0.5,
        LEARNING_RATE,
        LEARNING_RATE,
    ]  # steps 3, 4 and 5; 3 are the critic's
