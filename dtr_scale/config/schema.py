"""The experiment file, as frozen pydantic models.

One JSON file describes a run completely. Unknown keys are refused, wrong combinations are named
with their key, value, what is accepted and the fix. Sections are flat: a key that its section's
`type` does not use is kept but has no effect, so `--data.type=synthetic` is one override.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dtr_scale.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0)]

VARIANT_SIZES = ("S", "B", "L", "XL")
VARIANT_PATCHES = (2, 4, 8)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _refuse(message: str) -> PydanticCustomError:
    """A cross-field error whose message already names its keys."""
    return PydanticCustomError("combination", "{text}", {"text": message})


def _variant_name(variant: str | None) -> str | None:
    names = [f"DiT-{size}/{patch}" for size in VARIANT_SIZES for patch in VARIANT_PATCHES]
    if variant is not None and variant not in names:
        raise PydanticCustomError("variant", "accepted are {names}", {"names": ", ".join(names)})
    return variant


def _local_path(path: str | None) -> str | None:
    if path is not None and "://" in path:
        raise PydanticCustomError(
            "local_path", "must be a local folder; checkpoints can go to s3:// by checkpoint.dir"
        )
    return path


class RoutingConfig(Section):
    type: Literal["dtr", "dtr_eq4", "none"] = "none"
    """`dtr` is the official code's window, `dtr_eq4` equation 4's, `none` plain DiT."""
    alpha: PositiveFloat = 4.0
    """How the window's shift is spread over timesteps; above 1, more of it at high noise."""
    beta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Share of the channels that each timestep sees."""


class ModelConfig(Section):
    type: Literal["dit"] = "dit"
    variant: Annotated[str | None, AfterValidator(_variant_name)] = None
    """`DiT-S/2` to `DiT-XL/8`; or give hidden_size, depth, num_heads and patch_size instead."""
    hidden_size: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    input_size: PositiveInt = 32
    """Height and width of a sample (latents of a 256x256 picture: 32)."""
    in_channels: PositiveInt = 4
    num_classes: PositiveInt = 1000
    conditioning: Literal["class", "none"] = "class"
    class_dropout_prob: Fraction = 0.1
    learn_sigma: bool = True
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    routing: RoutingConfig = RoutingConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        free = {k: getattr(self, k) for k in ("hidden_size", "depth", "num_heads", "patch_size")}
        given = [k for k, v in free.items() if v is not None]
        missing = [k for k, v in free.items() if v is None]
        if self.variant and given:
            raise _refuse(
                f"model.variant = {self.variant!r} and model.{given[0]} = {free[given[0]]} exclude "
                f"each other; remove one (a variant sets {', '.join(free)})"
            )
        if not self.variant and missing:
            raise _refuse(
                f"model.{missing[0]} is missing; set model.variant (for example 'DiT-L/2') "
                f"or all of {', '.join(free)}"
            )
        if self.hidden_size and self.num_heads and self.hidden_size % self.num_heads:
            raise _refuse(
                f"model.hidden_size = {self.hidden_size} is not divisible by "
                f"model.num_heads = {self.num_heads}; choose a multiple of {self.num_heads}"
            )
        if self.hidden_size and self.hidden_size % 4:
            raise _refuse(
                f"model.hidden_size = {self.hidden_size} must be a multiple of 4 "
                "(sine and cosine positions for two axes)"
            )
        patch = int(self.variant.split("/")[1]) if self.variant else self.patch_size
        if patch and self.input_size % patch:
            raise _refuse(
                f"model.input_size = {self.input_size} is not divisible by the patch size {patch}; "
                f"choose a multiple of {patch} or another patch size"
            )
        return self


class DiffusionConfig(Section):
    noise_schedule: Literal["linear", "cosine"] = "cosine"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000


class ObjectiveConfig(Section):
    type: Literal["vanilla", "ant_uw"] = "vanilla"
    num_clusters: PositiveInt = 8
    """Timestep clusters: weighted by `ant_uw`, and the strata of the timesteps in any case."""
    clusters: Literal["timestep"] = "timestep"
    lr: PositiveFloat = 0.025
    """Learning rate of ant_uw's log-variances."""


class DataConfig(Section):
    type: Literal["latents", "synthetic"] = "latents"
    shards: str | None = None
    """Folder or s3:// prefix that holds manifest.json and the shards."""
    num_workers: Count = 4
    cache_dir: str | None = None
    """Where shards from object storage are kept; default: a folder under the temporary one."""
    cache_gb: PositiveFloat = 64
    horizontal_flip: bool = True
    storage_options: dict[str, Any] = {}
    """For s3fs: endpoint_url, key, secret, ...; better given by the usual AWS environment."""

    @model_validator(mode="after")
    def _has_shards(self) -> "DataConfig":
        if self.type == "latents" and not self.shards:
            raise _refuse(
                "data.shards is missing; give the folder or s3:// prefix that `dtr-scale prepare` "
                "wrote, or try --data.type=synthetic"
            )
        return self


class TrainConfig(Section):
    max_steps: PositiveInt = 400_000
    global_batch_size: PositiveInt = 256
    micro_batch_size: PositiveInt = 32
    """Samples per forward on one rank, at most the rank's share of the global batch."""
    lr: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    ema_decay: OpenFraction = 0.9999
    grad_clip: PositiveFloat | None = None
    """Largest global gradient norm; null: no clipping (the norm is logged all the same)."""
    seed: Count = 0
    log_every: PositiveInt = 100


class EngineConfig(Section):
    type: Literal["single", "deepspeed"] = "deepspeed"
    zero_stage: Annotated[int, Field(ge=0, le=2)] = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    """Compile each block with torch.compile."""
    activation_checkpointing: bool = False


class CheckpointConfig(Section):
    dir: str | None = None
    """Folder or s3:// prefix; default: checkpoints/ in the run directory."""
    every_steps: PositiveInt = 5000
    keep_last: PositiveInt = 3
    keep_every: Count = 100_000
    """Checkpoints of every n-th step are kept for ever; 0: none."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint; `never` insists on a fresh start."""


class TrackingConfig(Section):
    type: Literal["mlflow", "none"] = "mlflow"
    experiment: str = "dtr-scale"
    uri: str | None = None
    """MLflow tracking server; default: MLFLOW_TRACKING_URI, else mlflow.db in the run directory."""


class EvaluationConfig(Section):
    every_steps: Count = 0
    """Sample and evaluate during training; 0: never."""
    num_samples: PositiveInt = 10_000
    cfg_scale: Annotated[float, Field(ge=1.0)] = 1.5
    cfg_channels: PositiveInt | None = None
    """Guided channels: DTR's code guides all 4, DiT's only 3; null: all."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    num_sampling_steps: Annotated[int, Field(ge=2)] = 250
    clip_denoised: bool = False
    """Clip each predicted x_0 to [-1, 1]: right for pixels, wrong for latents."""
    batch_size: PositiveInt = 64
    """Samples per forward on one rank; the samples do not depend on it."""


class Experiment(Section):
    """One experiment: what `dtr-scale train --config FILE` reads."""

    schema_: str | None = Field(default=None, alias="$schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: Annotated[str | None, AfterValidator(_local_path)] = None
    """Where the run writes; default: runs/<name>."""
    description: str = ""
    expected: dict[str, float] = {}
    """Published figures of this setting, to compare with."""
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @model_validator(mode="after")
    def _sections_fit(self) -> "Experiment":
        if problem := self._batch_problem(world_size=1):
            raise _refuse(problem)
        num_timesteps, clusters = self.diffusion.num_timesteps, self.objective.num_clusters
        if num_timesteps % clusters:
            divisors = [k for k in range(1, min(num_timesteps, 64) + 1) if num_timesteps % k == 0]
            raise _refuse(
                f"objective.num_clusters = {clusters} does not divide diffusion.num_timesteps = "
                f"{num_timesteps}; choose one of {', '.join(map(str, divisors))}"
            )
        sampling = self.evaluation
        if sampling.num_sampling_steps > num_timesteps:
            raise _refuse(
                f"evaluation.num_sampling_steps = {sampling.num_sampling_steps} exceeds "
                f"diffusion.num_timesteps = {num_timesteps}; choose at most {num_timesteps}"
            )
        if sampling.cfg_channels and sampling.cfg_channels > self.model.in_channels:
            raise _refuse(
                f"evaluation.cfg_channels = {sampling.cfg_channels} exceeds model.in_channels = "
                f"{self.model.in_channels}; choose at most that, or null for all"
            )
        guided = sampling.cfg_scale != 1.0
        unguidable = self.model.conditioning == "none" or not self.model.class_dropout_prob
        if guided and unguidable:
            raise _refuse(
                f"evaluation.cfg_scale = {sampling.cfg_scale} needs a network that knows the null "
                "label; set evaluation.cfg_scale=1, or train with model.conditioning=class and "
                "model.class_dropout_prob > 0"
            )
        return self

    def micro_batch_size(self, world_size: int) -> int:
        """Return the samples per forward when `world_size` ranks share the global batch."""
        if problem := self._batch_problem(world_size):
            raise ConfigError(problem)
        return min(self.train.micro_batch_size, self.train.global_batch_size // world_size)

    def _batch_problem(self, world_size: int) -> str | None:
        """Say why the global batch cannot be cut over `world_size` ranks, None if it can."""
        batch_size, micro = self.train.global_batch_size, self.train.micro_batch_size
        share, rest = divmod(batch_size, world_size)
        if rest or not share:
            return (
                f"train.global_batch_size = {batch_size} is not divisible by {world_size} ranks; "
                f"choose a multiple of {world_size} or another number of ranks"
            )
        if share % min(micro, share):
            nearest = next(size for size in range(micro, 0, -1) if share % size == 0)
            return (
                f"train.micro_batch_size = {micro} does not divide the {share} samples per rank "
                f"(train.global_batch_size = {batch_size}, ranks: {world_size}); choose {nearest} "
                f"or another divisor of {share}"
            )
        return None
