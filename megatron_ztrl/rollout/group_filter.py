"""The accuracy filter of a run, which does not let it wait for ever without a word."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ztrl.algorithms.filters import keep_group
from megatron_ztrl.config.schema import AlgorithmConfig
from megatron_ztrl.types import RolloutGroup


class GroupFilter:
    """`keep_group`, which tells the user each time that it has refused so many groups in a row.

    A policy that solves none of the problems, or all of them, leaves a filter nothing to train on.

    Args:
        config: The bounds.
        patience_groups: How many.
        note: Tells the user.
    """

    def __init__(self, config: AlgorithmConfig, *, patience_groups: int, note: Callable[[str], None]) -> None:
        self._config = config
        self._patience_groups = patience_groups
        self._note = note
        self._refused: list[float | None] = []
        """Accuracies of the last groups, all of them refused; None where the infrastructure failed every rollout."""

    def __call__(self, group: RolloutGroup) -> bool:
        """Whether to train on a group."""
        if keep_group(group, self._config):
            self._refused.clear()
            return True
        failed = not any(rollout.trainable for rollout in group.rollouts)
        self._refused.append(None if failed else group.accuracy)
        if len(self._refused) == self._patience_groups:
            self._note(self._warning())
            self._refused.clear()
        return False

    def _warning(self) -> str:
        scored = [accuracy for accuracy in self._refused if accuracy is not None]
        why = []
        if scored:
            bounds = f"{self._config.min_accuracy:g} to {self._config.max_accuracy:g}"
            why.append(
                f"{len(scored)} have accuracies from {min(scored):.3f} to {max(scored):.3f}, where "
                f"algorithm.min_accuracy and max_accuracy want {bounds}"
            )
        if len(scored) < len(self._refused):
            why.append(f"the infrastructure failed all rollouts of {len(self._refused) - len(scored)}")
        return f"warning: no group to train on among the last {len(self._refused)}: {'; '.join(why)}"
