"""TRL's side of trl_comparison.py, run by the interpreter that has TRL: `python _trl_grpo.py SPEC RESULT`.

Both arguments are JSON files. The result lists, for each optimizer step, the seconds since the step before it
ended and the completion tokens that were sampled.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

BOXED = re.compile(r"\\boxed\{([^}]*)\}")


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    # What TRL's environment lacks comes from ours: both sides run the same torch and transformers.
    sys.path.append(spec["shared_packages"])
    import torch
    import transformers
    import trl

    steps = train(spec, trl, transformers)
    versions = {package.__name__: package.__version__ for package in (trl, transformers, torch)}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "steps": steps}))


def train(spec: dict[str, Any], trl: Any, transformers: Any) -> list[dict[str, float]]:
    """One optimizer step per batch of completions, on-policy, without a reference model."""
    from datasets import Dataset

    completion_tokens: list[int] = []
    step_ends: list[float] = []

    def reward(
        completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        completion_tokens.append(sum(len(ids) for ids in completion_ids))
        boxes = [BOXED.findall(text) for text in completions]
        return [float(bool(box) and box[-1] == truth) for box, truth in zip(boxes, answer, strict=True)]

    class StepTimes(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_ends.append(time.perf_counter())

    trainer = trl.GRPOTrainer(
        model=spec["policy"],
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=spec["scratch"],
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            max_steps=spec["steps"],
            per_device_train_batch_size=spec["prompts_per_step"] * spec["group_size"],
            num_generations=spec["group_size"],
            max_completion_length=spec["completion_tokens"],
            temperature=spec["temperature"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant",
            seed=spec["seed"],
            shuffle_dataset=False,
            gradient_checkpointing=False,  # it saves memory and costs a forward pass
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(spec["prompts"]),
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(
            spec["policy"], padding_side="left"
        ),
        callbacks=[StepTimes()],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = [end - start for start, end in zip([started, *step_ends], step_ends, strict=False)]
    return [
        {"seconds": elapsed, "completion_tokens": tokens}
        for elapsed, tokens in zip(seconds, completion_tokens, strict=True)
    ]


if __name__ == "__main__":
    main()
