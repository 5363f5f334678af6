"""Typed parameters, one class a section of `params.yaml`.

- The sections are what `params/` composes; a key that is not listed here is an error.
- What cannot hold at once (r != r_s + n * r_n, top_k > n) is refused here, before any work.
- Nothing here says where a run takes place: `compute` is the one section that no stage's identity includes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_core.config_agreement import check_blocks, check_levels, check_samples, check_widths, check_workers
from moe_core.errors import ConfigError

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six task kinds, by the tags of its own files."""

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into a token."""

ComputingStage = Literal[
    "teacher", "shard", "importance", "shared_expert_kd", "moe_kd", "mob_kd", "evaluate", "latency"
]
"""The stages that take from `compute`."""

Kind = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]


Part = Literal["shared", "conditioning", "experts", "router", "group_blocks", "block_router", "all"]
"""Parts of a student, as `kd.*.train` names them."""

NOT_YET: Mapping[str, set[str]] = {
    "shared_expert": {"experts", "router", "group_blocks", "block_router"},
    "moe": {"group_blocks", "block_router"},
}
"""Parts that a stage's student does not have: they come with a later stage."""


class Section(BaseModel):
    """A part of the parameters: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(Section):
    """The optimizer and its schedule, for one training run."""

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the linear layers' matrices, AdamW for the rest (`moe_core.muon`)"
    )
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="global batch, over all workers")
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear warm-up; one_cycle: length of the rise")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast of the forward pass; weights stay fp32"
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimizerConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be less than steps, which is {self.steps}")
        return self


class TimestepConfig(Section):
    """Which noise levels sigma in (0, 1] training and distillation draw."""

    kind: Literal["logit_normal", "discrete"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="FLUX's resolution shift: sigma -> shift*sigma / (1 + (shift-1)*sigma)")
    steps: int = Field(8, gt=0, description="kind=discrete: the sigmas of a sampler of so many steps")


class TransformerConfig(Section):
    """Arguments of diffusers' `FluxTransformer2DModel`, for a teacher trained here."""

    num_layers: int = Field(gt=0)
    num_single_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(gt=0)
    axes_dims_rope: tuple[int, int, int]
    guidance_embeds: bool = True

    @model_validator(mode="after")
    def _rope_fills_the_head(self) -> TransformerConfig:
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(a % 2 for a in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {list(self.axes_dims_rope)}; it must be even numbers that sum to"
                f" attention_head_dim, which is {self.attention_head_dim}"
            )
        return self


class VAEConfig(Section):
    """The small `AutoencoderKL`; its downsampling factor is 2 ** (len(block_out_channels) - 1)."""

    latent_channels: int = Field(gt=0)
    block_out_channels: tuple[int, ...]
    layers_per_block: int = Field(1, gt=0)
    norm_num_groups: int = Field(8, gt=0)
    mid_block_attention: bool = Field(True, description="attention at the VAE's lowest resolution, as FLUX's has")
    kl_weight: float = Field(1e-6, ge=0)

    @property
    def factor(self) -> int:
        """Pixels a side of one latent pixel."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @model_validator(mode="after")
    def _groups_fit(self) -> VAEConfig:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}; it must be a multiple of norm_num_groups, which is {self.norm_num_groups}"
                )
        return self


class TextConfig(Section):
    """The small T5 (token features) and CLIP (pooled vector) encoders."""

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    max_sequence_length: int = Field(gt=0, description="T5 tokens a prompt")
    context_words: int = Field(3, gt=0, description="how far to either side a T5 token learns to tell its neighbours")

    @model_validator(mode="after")
    def _heads_fit(self) -> TextConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of num_heads, which is {self.num_heads}"
            )
        return self


class TeacherTrainingConfig(Section):
    """How a teacher is trained from nothing: the VAE, then the text encoders, then the transformer."""

    vae: OptimizerConfig
    text: OptimizerConfig
    transformer: OptimizerConfig
    timesteps: TimestepConfig
    validate_every: int = Field(gt=0)


class ModelConfig(Section):
    """The dense teacher."""

    name: str
    source: Literal["train", "folder", "hub"]
    path: str | None = Field(None, description="a diffusers pipeline folder, or a hub id")
    revision: str | None = None
    transformer: TransformerConfig | None = None
    vae: VAEConfig | None = None
    text: TextConfig | None = None
    training: TeacherTrainingConfig | None = None
    resolution: int = Field(gt=0, description="side of the square image, pixels")
    guidance_scale: float = Field(3.5, gt=0)
    num_inference_steps: int = Field(gt=0)
    max_sequence_length: int = Field(512, gt=0, description="T5 tokens a prompt, in training and sampling")

    @model_validator(mode="before")
    @classmethod
    def _given_says_what_it_is(cls, values: Any) -> Any:
        # A preset describes the teacher that it trains. Of a given one its own files say all that.
        if isinstance(values, Mapping) and values.get("source") in ("folder", "hub"):
            return {**values, **dict.fromkeys(("transformer", "vae", "text", "training"))}
        return values

    @model_validator(mode="after")
    def _complete(self) -> ModelConfig:
        if self.source == "train":
            missing = [k for k in ("transformer", "vae", "text", "training") if getattr(self, k) is None]
            if missing:
                raise ValueError(f"source is 'train'; then {', '.join(missing)} must be given")
        elif not self.path:
            raise ValueError(f"source is '{self.source}'; then path must be given")
        if self.vae is not None and self.resolution % (self.vae.factor * LATENT_PATCH):
            raise ValueError(
                f"resolution is {self.resolution}; it must be a multiple of {self.vae.factor * LATENT_PATCH}: the VAE's"
                f" factor {self.vae.factor} times the patch of {LATENT_PATCH}"
            )
        if self.text is not None and self.max_sequence_length > self.text.max_sequence_length:
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}; it must be at most text.max_sequence_length,"
                f" which is {self.text.max_sequence_length}"
            )
        return self


class EmbeddedDataConfig(Section):
    """Scenes made from scikit-learn's handwritten digits."""

    samples: int = Field(gt=0)
    kinds: tuple[Kind, ...] = Field(
        min_length=1, description="drawn with equal chance; one listed twice is trained on twice as often"
    )
    canvas: int = Field(16, description="side of the picture, pixels; a multiple of 8 * grid")
    grid: int = Field(2, ge=1, le=2, description="cells a side; a cell shows one digit or nothing")
    max_digits: int = Field(4, ge=1, le=4)
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "white")
    generator_share: float = Field(0.7, gt=0, lt=1, description="leading share of the digits that scenes may use")


class ShardConfig(Section):
    """How image-text pairs become shards."""

    samples_per_shard: int = Field(gt=0)
    validation_samples: int = Field(gt=0)
    calibration_samples: int = Field(gt=0)
    max_reject_share: float = Field(0.01, ge=0, lt=1)
    max_caption_chars: int = Field(2000, gt=0)
    batch_size: int = Field(
        64, gt=0, description="images encoded at once; fixed, so that the latents do not depend on workers"
    )


class DataConfig(Section):
    """The image-text data."""

    name: str
    kind: Literal["embedded", "webdataset"]
    path: str | None = Field(
        None, description="kind=webdataset: folder of .tar files with image, .txt and optional .json members"
    )
    embedded: EmbeddedDataConfig | None = None
    shard: ShardConfig

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.kind == "embedded" and self.embedded is None:
            raise ValueError("kind is 'embedded'; then embedded must be given")
        kept = self.shard.validation_samples + self.shard.calibration_samples
        if self.embedded is not None and self.embedded.samples <= kept:
            raise ValueError(
                f"embedded.samples is {self.embedded.samples}; shard.validation_samples + shard.calibration_samples ="
                f" {kept} leave none to train on"
            )
        if self.kind == "webdataset" and not self.path:
            raise ValueError("kind is 'webdataset'; then path must be given")
        if self.kind == "webdataset" and self.embedded is not None:
            raise ValueError("kind is 'webdataset'; then embedded must be null (the preset data=webdataset has it so)")
        return self


class MoEConfig(Section):
    """Sec. 3.1: what an FFN becomes."""

    expansion_ratio: float = Field(4.0, gt=0, description="r: hidden width of the dense FFN over the model's width")
    shared_ratio: float = Field(gt=0, description="r_s")
    normal_ratio: float = Field(gt=0, description="r_n")
    num_experts: int = Field(gt=0, description="n")
    top_k: int = Field(gt=0, description="k")
    split: Literal["taylor", "random"] = "taylor"
    gate_norm: Literal["renormalize", "scale_to_k", "unit"] = Field(
        "renormalize", description="eq. 3; the same times k; or 1 for each active expert"
    )
    balance_probs: Literal["softmax", "gate"] = "softmax"
    router_init_std: float = Field(0.02, gt=0)
    dense_double_blocks: tuple[int, ...] = Field((0,), description="double blocks that keep their FFNs")
    conditioning_dim: int | None = Field(
        None, gt=0, description="width of the compressed AdaLN conditioning; null: not compressed"
    )
    ridge: float = Field(1e-3, gt=0, description="ridge of the AdaLN regression, relative to the mean variance")

    @model_validator(mode="after")
    def _adds_up(self) -> MoEConfig:
        total = self.shared_ratio + self.num_experts * self.normal_ratio
        if abs(total - self.expansion_ratio) > 1e-9:
            raise ValueError(
                f"expansion_ratio is {self.expansion_ratio:g}, but shared_ratio + num_experts * normal_ratio ="
                f" {self.shared_ratio:g} + {self.num_experts} * {self.normal_ratio:g} = {total:g}; they must be equal"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {self.num_experts} experts")
        return self


class MoBGroupsConfig(Section):
    """The groups among one kind of block: chosen (number and size) or written out."""

    groups: int = Field(0, ge=0)
    size: int = Field(0, ge=0)
    blocks: tuple[tuple[int, ...], ...] | None = Field(None, description="explicit groups of consecutive block indices")

    @model_validator(mode="after")
    def _sane(self) -> MoBGroupsConfig:
        if self.groups and self.blocks is not None:
            raise ValueError(f"groups is {self.groups} and blocks are written out; one of both must be left out")
        if self.groups and self.size < 2:
            raise ValueError(f"groups is {self.groups}; then size must be at least 2, not {self.size}")
        seen: set[int] = set()
        for group in self.blocks or ():
            if len(group) < 2 or list(group) != list(range(group[0], group[0] + len(group))):
                raise ValueError(f"group {list(group)} must be two or more consecutive block indices in rising order")
            if seen & set(group):
                raise ValueError(f"blocks {sorted(seen & set(group))} stand in two groups; a block may be in one")
            seen |= set(group)
        return self


class MoBLevelConfig(Section):
    """One sparsity level (M, S, XS)."""

    init: str = Field(
        description="model it starts from, below data: `checkpoints/moe`, `checkpoints/mob/M`, or `teacher`: dense"
    )
    double: MoBGroupsConfig = MoBGroupsConfig()
    single: MoBGroupsConfig = MoBGroupsConfig()


class MoBConfig(Section):
    """Sec. 3.1, Mixture of Blocks."""

    active: int = Field(1, gt=0, description="kappa: active blocks a group")
    contiguous: bool = Field(False, description="eq. 4's window of consecutive blocks instead of eq. 5's best kappa")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the features against the conditioning, eq. 5")
    balance_probs: Literal["softmax", "gate"] = "softmax"
    router_init_std: float = Field(0.02, gt=0)
    levels: Mapping[str, MoBLevelConfig]


class KDStageConfig(Section):
    """One distillation stage."""

    optimizer: OptimizerConfig
    lambda_feature: float = Field(1.0, ge=0)
    lambda_balance: float = Field(1e-2, ge=0)
    train: tuple[Part, ...] = Field(min_length=1, description="parts of the student whose weights change")
    gradient_checkpointing: bool = False
    validate_every: int = Field(gt=0)


class KDConfig(Section):
    """The distillation pipeline, Sec. 3.2."""

    timesteps: TimestepConfig
    validation_samples: int = Field(gt=0, description="fixed samples, noise and timesteps of the validation loss")
    importance_batch_size: int = Field(gt=0)
    joint: bool = Field(
        False, description="moe_kd starts from the teacher instead of the trained shared experts (Table 5)"
    )
    shared_expert: KDStageConfig
    moe: KDStageConfig
    mob: KDStageConfig

    @model_validator(mode="after")
    def _parts_are_there(self) -> KDConfig:
        for stage, missing in NOT_YET.items():
            if absent := [part for part in getattr(self, stage).train if part in missing]:
                raise ValueError(f"{stage}.train has {absent[0]}; the model of that stage has none yet")
        return self


class ClassifierConfig(Section):
    """The evaluator's digit classifier, trained on digits that no scene shows."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    width: int = Field(gt=0)
    test_share: float = Field(0.3, gt=0, lt=1)


class EvalConfig(Section):
    """What is generated and measured."""

    prompts: int = Field(gt=1, description="two at least: of one picture there is no covariance, hence no FID")
    batch_size: int = Field(gt=0, description="images a unit of work; fixed, so that results do not depend on workers")
    classifier: ClassifierConfig
    latency_batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = Field((1,), min_length=1)
    latency_rounds: int = Field(gt=0)
    gallery: int = Field(8, gt=0, description="prompts in the report's same-noise gallery")


class StageCompute(Section):
    """What one stage has otherwise than the others."""

    num_workers: int | None = Field(None, ge=0)
    cpus_per_worker: int | None = Field(None, gt=0)
    use_gpu: bool | None = None


class ComputeConfig(Section):
    """Where and how a run takes place; never part of a stage's identity."""

    num_workers: int = Field(1, ge=0, description="0 trains in the calling process: for unit tests only")
    cpus_per_worker: int = Field(2, gt=0)
    use_gpu: bool = False
    expert_backend: Literal["auto", "loop", "grouped_mm", "megablocks"] = "auto"
    checkpoint_every: int = Field(gt=0, description="steps between resume checkpoints")
    log_every: int = Field(gt=0)
    max_failures: int = Field(1, ge=0, description="worker crashes that Ray Train restarts from the last checkpoint")
    stages: dict[ComputingStage, StageCompute] = Field(
        default_factory=dict, description="stage (`mob_kd` for all its levels) -> what it has otherwise"
    )

    def of(self, stage: str) -> ComputeConfig:
        """What a stage, named as DVC addresses it (`mob_kd@M`), has: its own values where `stages` gives some."""
        own = {str(name): config.model_dump(exclude_none=True) for name, config in self.stages.items()}
        return self.model_copy(update=own.get(stage.partition("@")[0], {}))

    @property
    def most_cpus(self) -> int:
        """CPUs that the largest stage asks for."""
        every = [self, *(self.of(str(stage)) for stage in self.stages)]
        return max(max(each.num_workers, 1) * each.cpus_per_worker for each in every)


class Params(Section):
    """The whole of `params.yaml`."""

    experiment: str
    seed: int = Field(ge=0)
    model: ModelConfig
    data: DataConfig
    moe: MoEConfig
    mob: MoBConfig
    kd: KDConfig
    eval: EvalConfig
    compute: ComputeConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        check_levels(self.mob)
        check_samples(self)
        check_workers(self)
        if self.model.transformer is not None:
            shape = self.model.transformer
            check_blocks(self.moe, self.mob, shape.num_layers, shape.num_single_layers)
            check_widths(self.moe, shape.num_attention_heads * shape.attention_head_dim)
        return self


ConfigT = TypeVar("ConfigT", bound=Section)


def parse(kind: type[ConfigT], values: Any, where: str = "params.yaml") -> ConfigT:
    """Builds a section from plain values.

    Raises ConfigError with one line a fault: file, key, value and rule.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, fault) for fault in error.errors())) from None


def _explain(where: str, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "(whole)"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown parameter {key} = {fault['input']!r}; no such key is defined"
    if fault["type"] == "missing":
        return f"{where}: parameter {key} is missing; it must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {key}: {message}"
    return f"{where}: {key} = {fault['input']!r}: {message}"
