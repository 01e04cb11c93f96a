"""Which groups are worth training on."""

from __future__ import annotations

from megatron_ztrl.config.schema import AlgorithmConfig
from megatron_ztrl.types import RolloutGroup


def keep_group(group: RolloutGroup, config: AlgorithmConfig) -> bool:
    """Whether a group's accuracy lies in ``[min_accuracy, max_accuracy]``, both ends included.

    A group whose rollouts all got the same reward carries no gradient of its own (its centred rewards are
    zero); bounds strictly inside (0, 1), such as 0.01 and 0.8, leave those out (DAPO's dynamic sampling,
    arXiv:2503.14476). A group in which the infrastructure failed every rollout is always left out.
    """
    if not any(rollout.trainable for rollout in group.rollouts):
        return False
    return config.min_accuracy <= group.accuracy <= config.max_accuracy
