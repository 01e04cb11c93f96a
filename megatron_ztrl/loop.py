"""The training loop, synchronous and asynchronous alike.

``rollout.max_staleness = 0`` generates, trains and publishes in turn; a larger value keeps generating while
the actor trains, and bounds how many steps any sampled token lags behind. The rest is one code path.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.batches import pack_minibatches, with_targets
from megatron_ztrl.data.prompts import PromptSource, load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.evaluate import Evaluator, load_eval_prompts
from megatron_ztrl.observability.clock import PhaseClock
from megatron_ztrl.observability.names import FINISHED_FILE
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.observability.run_info import write_run_info
from megatron_ztrl.runtime.checkpoints import CheckpointStore, read_state, verify
from megatron_ztrl.runtime.driver_state import DriverState
from megatron_ztrl.runtime.garbage import collect_garbage_rarely
from megatron_ztrl.runtime.interrupt import StopRequest, unless_stopped
from megatron_ztrl.runtime.system import launch
from megatron_ztrl.session import TrainingSession
from megatron_ztrl.trainer.topology import check_same_model, read_architecture
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader
from megatron_ztrl.weights.publish import check_engines
from megatron_ztrl.weights.transports import TrainerDied


async def train(session: TrainingSession) -> bool:
    """Runs the loop to its last step, or until ``session.stop`` is set.

    Returns:
        Whether the last step was reached. The state is saved either way.
    """
    config, system, evaluations = session.config, session.system, session.evaluations
    version = await session.restore()
    await system.publish(version)
    session.start()
    while version < config.train.num_steps and not session.stop.is_set():
        await unless_stopped(session.stop, evaluations.start_if_due(version))
        clock = PhaseClock()
        with clock.phase("rollout"):
            taken = await session.take_groups()
        if taken is None:  # told to stop: nothing of this step has happened yet
            break
        # In threads: at full size these take seconds, and rollouts go on meanwhile.
        rng = session.rng(version)
        minibatches = await asyncio.to_thread(pack_minibatches, taken.groups, config, rng)
        with clock.phase("logprobs"):
            scores = await asyncio.gather(*(system.scores(minibatch) for minibatch in minibatches))
        minibatches, batch_statistics = await asyncio.to_thread(
            with_targets, minibatches, scores, config, version
        )
        with clock.phase("train"):
            statistics = [
                batch_statistics | await system.train_step(minibatch, version) for minibatch in minibatches
            ]
        version += 1
        with clock.phase("evaluation"):
            await system.while_engines_serve(evaluations.wait_before_publish(version))
        with clock.phase("publish"):
            await system.publish(version)
        session.release(taken)  # only now: this is what bounds the staleness
        session.log_step(version, taken, statistics, clock)
        await session.save_if_due(version)
    return await session.finish(version)


def run_training(config: Config, *, resume: bool) -> None:
    """Runs a whole training job in this process.

    Args:
        config: Checked; ``model.path`` is a local directory.
        resume: Go on from the newest checkpoint in ``run.directory``, if there is one.

    Raises:
        ValueError: Something the user gave is missing or wrong.
        TrainerDied: A Megatron rank's process has ended; says how to go on.
        KeyboardInterrupt: The run was interrupted; its state is saved.
    """
    collect_garbage_rarely()
    try:
        finished = asyncio.run(_run(config, resume=resume))
    except TrainerDied as error:
        raise TrainerDied(f"{error}; {_way_on(Path(config.run.directory))}") from error
    if not finished:
        raise KeyboardInterrupt


async def _run(config: Config, *, resume: bool) -> bool:
    # Everything that the user may have got wrong is read before the first process starts.
    HFCheckpointReader(Path(config.model.path))
    check_engines(config)
    tokenizer = PolicyTokenizer(Path(config.model.path))
    source = PromptSource(
        load_prompts(config.data.train, get_template(config.data.prompt_template).render),
        seed=config.run.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
        tokenize=tokenizer.encode,
    )
    eval_prompts = load_eval_prompts(config, tokenizer.encode)
    directory = Path(config.run.directory)
    checkpoint = CheckpointStore(directory / "checkpoints", keep_last=1).latest() if resume else None
    if checkpoint is not None:
        verify(checkpoint)
        if _has_finished(config, read_state(checkpoint)["version"]):
            print(f"{directory} has already reached step {config.train.num_steps} (train.num_steps)")
            return True
        _check_resumable(config, checkpoint, source)
    write_run_info(config)
    with Progress(config.train.num_steps) as progress:
        stop = StopRequest(progress.note)
        if source.left_out:
            progress.note(f"{source.left_out} prompts are longer than data.max_prompt_tokens: left out")
        with stop.listening():
            async with launch(config, directory, tokenizer, progress) as system:
                session = TrainingSession(
                    system,
                    source,
                    Evaluator(system.rollouts, eval_prompts),
                    decode=tokenizer.decode_all,
                    resume=resume,
                    checkpoint=checkpoint,
                    progress=progress,
                    stop=stop.event,
                )
                stop.loop_is_running = True
                async with session:
                    finished = await train(session)
                stop.loop_is_running = False
                return finished


def _way_on(directory: Path) -> str:
    """What to do after a run has ended before its time."""
    version = CheckpointStore(directory / "checkpoints", keep_last=1).latest_version()
    where = "begins again: nothing was saved" if version is None else f"goes on from step {version}"
    return f"ztrl train CONFIG run.directory={directory} --resume {where}"


def _check_resumable(config: Config, checkpoint: Path, source: PromptSource) -> None:
    """Refuses the checkpoint of a run that was another, before the record of that run is overwritten.

    Raises:
        ValueError: It has other prompts, another model, or no critic.
    """
    state = DriverState.read(checkpoint)
    if state.source is not None:
        source.restore(state.source)
    check_same_model(checkpoint / "actor", read_architecture(Path(config.model.path)))
    if config.algorithm.advantage == "gae" and not (checkpoint / "critic").is_dir():
        raise ValueError(f"{checkpoint} has no critic: it is of a run with another algorithm.advantage")


def _has_finished(config: Config, version: int) -> bool:
    """Whether nothing is left to do: a run may also have died after its last step, while it evaluated or exported."""
    marker = Path(config.run.directory) / FINISHED_FILE
    return version > config.train.num_steps or (
        version == config.train.num_steps and marker.exists() and int(marker.read_text()) == version
    )
