"""The configuration of a run: frozen dataclasses, one per section, every default defined here and only here.

Paths written in a YAML file are relative to that file. Native options of Megatron and SGLang pass through
(`megatron.*`, `sglang.server_args`) and are checked against the upstream dataclasses by `config.native`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


class Section:
    """Tells pydantic to refuse unknown keys."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Identity of the run."""

    directory: str
    """Everything the run writes goes here."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The initial policy."""

    path: str
    """Hugging Face checkpoint: a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    backend: Literal["auto", "te", "local"] = "auto"
    """Megatron layer implementation; ``auto`` takes Transformer Engine when CUDA is there."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Section):
    """One set of problems: a local JSONL, JSON or parquet file, or a hub id."""

    name: str
    path: str
    split: str = "train"
    """Hub data sets only."""
    subset: str | None = None
    """Hub data sets only: the configuration name."""
    problem_key: str = "problem"
    answer_key: str = "answer"
    limit: int | None = None
    """Rows to read; None reads all."""


PROMPT_TEMPLATES = ("orz_tir", "orz_tir_explicit", "orz", "plain")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Problems and the template that turns a problem into a prompt."""

    train: DatasetConfig
    eval: list[DatasetConfig] = field(default_factory=list)
    prompt_template: str = "orz_tir"
    """One of `PROMPT_TEMPLATES`, or an own `PromptTemplate`: ``FILE.py:NAME`` or ``package.module:NAME``."""
    max_prompt_tokens: int = 1024
    """Longer training prompts are left out, and their number is reported."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """Generation during training."""

    groups_per_step: int = 128
    group_size: int = 16
    env_iterations: int = 2
    """N: the most tool executions in one rollout."""
    max_staleness: int = 0
    """Steps a sampled token may lag behind the trainer; 0 is synchronous and exactly on-policy."""
    max_response_tokens: int = 8192
    """Model and tool tokens together."""
    deadline_seconds: float | None = None
    """The longest that one rollout may take once it has an engine. One that misses it is left out of the loss, as if
    the infrastructure had failed it, so set it well above what the longest response takes: it is there for what
    hangs, and where it bites it favours short responses."""
    group_deadline_seconds: float | None = None
    """The same for all rollouts of a group, once the first of them has an engine."""
    max_call_tokens: int = 4096
    """The most tokens that one engine call samples: what a killed driver may lose of a rollout. The call after it
    finds its prefix cached."""
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ToolConfig(Section):
    """The Python tool."""

    environment: str | None = None
    """An own environment instead (`envs/base.py`): ``FILE.py:NAME`` or ``package.module:NAME`` of a class or
    function that takes a `RolloutContext`. The keys below then concern its calls of the sandbox."""
    run_timeout_seconds: float = 20.0
    max_output_tokens: int = 512
    """A longer reply is replaced by a request to check the code."""
    max_concurrent: int = 256
    """Snippets that one executor has at a time; more wait in the driver, for whichever is free first."""
    retries: int = 3
    """Attempts after an infrastructure failure, before the rollout is masked."""


@dataclass(frozen=True, kw_only=True)
class SandboxConfig(Section):
    """Executors."""

    urls: list[str] = field(default_factory=list)
    """Running executors; empty starts one on every node with the run, to which the keys below apply."""
    token_file: str | None = None
    """File with the bearer token of ``urls``."""
    isolation: Literal["auto", "full", "user", "basic"] = "auto"
    """Tier of isolation; ``auto`` takes the strongest that a node allows."""
    min_isolation: Literal["full", "user", "basic"] = "basic"
    """No executor starts below this tier."""
    workers: int | None = None
    """Snippets that one executor runs at once; by default one for each core of its node."""
    preload: list[str] = field(default_factory=lambda: ["math", "sympy"])
    """Modules that the warm interpreters have imported already."""
    memory_limit_bytes: int = 1 << 30
    max_restarts: int = 5
    """Like ``engine.max_restarts``."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """Outcome reward, 0 or 1."""

    function: str | None = None
    """An own reward instead: ``FILE.py:NAME`` or ``package.module:NAME`` of an ``async def`` that takes the
    response's text and the ground truth and returns a number from 0 to 1. The keys below then mean nothing."""
    require_answer_tags: bool = True
    """The boxed answer counts only inside one ``<answer>`` pair that ends the response."""
    verify_timeout_seconds: float = 5.0
    verifier_workers: int = 2


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(Section):
    """Advantages, loss and filters."""

    advantage: Literal["reinforce_pp_baseline", "grpo", "gae"] = "reinforce_pp_baseline"
    """``gae`` is PPO: it starts a critic, which the section ``critic`` describes."""
    gamma: float = 1.0
    """Discount between two consecutive model tokens; ``gae`` only."""
    gae_lambda: float = 1.0
    """``gae`` only."""
    critic_warmup_steps: int = 0
    """The first steps train the critic only, ``gae`` only."""
    kl_coefficient: float = 0.0
    """Weight of KL(policy || initial policy) in the loss; 0 starts no reference policy."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    minibatches: int = 1
    """Optimizer steps per training batch."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Denominator of the ratio: recomputed by Megatron, or as the engine reported them (saves one pass)."""
    importance_correction: Literal["none", "truncate", "mask"] | None = None
    """Whether a token's policy loss is multiplied by its probability in the trainer, at the start of the step, over
    that in the engine, when it was sampled (decoupled PPO): ``truncate`` cuts this weight at ``importance_cap``,
    ``mask`` leaves tokens out whose weight is outside ``[importance_floor, importance_cap]``. The loss is divided by
    all model tokens either way. None: ``none`` where both agree to rounding (float32 and ``rollout.max_staleness: 0``)
    and with ``old_logprobs: engine``, which is a ratio to the engine as it is; else ``truncate``."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """The weight of a token is its own; its whole response's, the product over model tokens (unbiased, and far from 1
    for long ones); or the geometric mean of that (then with bounds near 1, such as 1.002 and 0.998)."""
    importance_cap: float = 2.0
    importance_floor: float = 0.5
    """``mask`` only."""
    mismatch_alarm: float | None = None
    """Nats. Warns in every step in which trainer and engine differ by more, on average over the tokens that were
    sampled under the trainer's own weights: below 1e-6 in float32; bfloat16 rounds by 0.02 to 0.04. None never."""
    min_accuracy: float = 0.0
    """Groups below this mean reward are left out."""
    max_accuracy: float = 1.0
    """Groups above this mean reward are left out."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig(Section):
    """A model in Megatron: its layout and its optimizer. World size = tensor x pipeline x data x context size."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_size: int = 1
    """Model chunks of each pipeline stage; more than 1 is Megatron's interleaved schedule."""
    data_parallel_size: int = 1
    context_parallel_size: int = 1
    """Ranks that share every sequence: each has ``1 / N`` of its tokens and activations. For Transformer Engine, which
    exchanges keys and values while it computes; the local layers gather them, and gain nothing."""
    sequence_parallel: bool = False
    max_tokens_per_microbatch: int = 16384
    """Padded tokens of one packed microbatch, which context-parallel ranks share; also the longest sequence that can be
    trained."""
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Linear warm-up, in training steps. The actor's begins after ``algorithm.critic_warmup_steps``."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ActorConfig(WorldConfig):
    """The policy."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(WorldConfig):
    """The critic of PPO (``algorithm.advantage: gae``): a world of its own, with a layout of its own."""

    path: str | None = None
    """Hugging Face checkpoint to start from, with or without a value head; None is ``model.path``."""
    learning_rate: float = 5e-6
    value_clip: float | None = 0.2
    """A value may move this far from its old one before its gradient is cut off; None never cuts it."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Section):
    """The frozen initial policy, for ``algorithm.kl_coefficient``."""

    placement: Literal["actor", "world"] = "actor"
    """In the actor's ranks, weights kept in host memory and swapped in; or ranks of its own, laid out alike."""


@dataclass(frozen=True, kw_only=True)
class MegatronConfig(Section):
    """Native options, passed through to Megatron's own dataclasses."""

    transformer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """SGLang servers."""

    path: str | None = None
    """Hugging Face checkpoint that engines start from, where it is not ``model.path``: the same model in block-wise FP8
    (``tools/convert_checkpoint.py hf-to-fp8``). Its config.json says how engines hold their weights, and every publish
    quantises accordingly. Needs GPUs, ``model.dtype: bfloat16`` and ``publish.transport: shards``."""
    count: int = 1
    tensor_parallel_size: int = 1
    port: int | None = None
    """Port of the first engine; None picks free ones."""
    max_running_requests: int = 256
    startup_timeout_seconds: float = 600.0
    request_timeout_seconds: float = 3600.0
    max_restarts: int = 5
    """Times in a row that an engine is started again, each death within ten minutes of its start; then it is given
    up, and the last one ends the run."""
    health_timeout_seconds: float = 300.0
    """An engine that answers no health check for so long, publishes aside, is replaced."""


@dataclass(frozen=True, kw_only=True)
class SGLangConfig(Section):
    """Native options, passed through to SGLang's ``ServerArgs``."""

    server_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PublishConfig(Section):
    """Weight publishing and its check."""

    interruption: Literal["retract", "abort", "in_place"] = "retract"
    """What happens to running requests: the server keeps them and computes their KV anew (``retract``); they
    return what they have, and the client sends them again (``abort``); or they go on with the KV of the old
    weights (``in_place``). The last is inexact, and turns the engines' prefix cache off. ``retract`` is the
    default because it pauses more briefly than ``abort`` and sends nothing twice (benchmarks/interruption.py)."""
    transport: Literal["shards", "broadcast", "disk"] = "shards"
    """Every engine rank receives exactly its slices from the ranks that hold them (``shards``); one trainer rank
    gathers whole tensors and broadcasts them, SGLang's own way (``broadcast``); or through a checkpoint in the run
    directory, which all nodes must see (``disk``)."""
    bucket_bytes: int = 16 << 20
    """Size of one message. Sending or receiving shards, a rank needs twice this memory, whatever the model's size."""
    checksums: bool = True
    """``shards`` only: compare the sum of every block's bit patterns, in the engine's parameter and where it was
    sent."""
    verify_interval_steps: int = 1
    """How often the canary prompt's log-probs are compared; 0 never."""
    max_logprob_gap: float | None = None
    """Nats, over the canary's tokens. None: 1e-4 in float32, which agrees to 1e-5, 0.1 in bfloat16, and 3 for FP8
    engines (``engine.path``), whose policy is another one."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Length of the run."""

    num_steps: int


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluation on ``data.eval``."""

    interval_steps: int = 20
    """0 never; otherwise also before the first and after the last step."""
    env_iterations: list[int] = field(default_factory=lambda: [2])
    """One evaluation per value of N, before and after training."""
    interval_env_iterations: list[int] = field(default_factory=list)
    """The values of N evaluated in between; empty means all."""
    beside_steps: int = 0
    """How many training steps may end while an evaluation between the first and the last step runs. 0: training waits
    for it. 1: it runs beside the next step, and the publish that ends this waits for it, so that every token is of the
    evaluated policy. k: beside k steps; up to k - 1 later policies may then write a part of its rollouts, and
    ``eval/newest_version`` says which was the last."""
    beside_share: float = 0.25
    """Of the rollouts that all engines run at once, what an evaluation beside training may take."""
    samples_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Resumable state and the final export."""

    interval_steps: int = 0
    """0 saves only when interrupted and at the end."""
    keep_last: int = 2
    export_hf: bool = True
    """Write the final policy in Hugging Face format to ``<run>/policy``."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = True
    wandb_project: str | None = None
    sample_rollouts: int = 4
    """Rollouts written to ``rollouts.jsonl`` each step."""


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Everything about a run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tool: ToolConfig = field(default_factory=ToolConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
