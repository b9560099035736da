"""Define the experiment file as frozen pydantic models.

One JSON file describes a run completely. Unknown keys are refused, wrong combinations are named
with their key, value, what is accepted and the fix. Sections are flat: a key that its section's
`type` does not use is kept but has no effect, so `--data.type=synthetic` is one override. Only
where it asks for what that type cannot do, it is refused.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dtr_scale.config.combinations import batch_problem, combination_problems
from dtr_scale.config.fields import (
    Count,
    Fraction,
    HalfOpenFraction,
    Int,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    RelativeWidth,
    Section,
    SectionOrFile,
    Seed,
    Whole,
    comma_separated,
    local_path,
    refuse,
    renamed,
)
from dtr_scale.config.network import ModelConfig
from dtr_scale.errors import ConfigError


class DiffusionConfig(Section):
    noise_schedule: Literal["linear", "cosine"] = "cosine"
    """How noise grows over the timesteps: the paper's cosine, or DiT's linear."""
    num_timesteps: Annotated[int, Field(ge=2), Whole] = 1000
    """Timesteps of the diffusion that is trained."""


class ObjectiveConfig(Section):
    type: Literal["vanilla", "min_snr", "p2", "ant_uw"] = "vanilla"
    """Loss weights of the timesteps: none, Min-SNR, P2, or ANT-UW's, which are learnt."""
    gamma: PositiveFloat | None = None
    """Bound of min_snr's SNR (null: 5), or exponent of p2 (null: 1)."""
    k: PositiveFloat = 1.0
    """What p2 adds to the SNR."""
    num_clusters: PositiveInt = 8
    """Clusters that ant_uw weights; for the others, equal strata of the timesteps drawn."""
    clusters: Literal["timestep", "log_snr", "gradient"] = "timestep"
    """How ant_uw cuts the timesteps: evenly, by log SNR, or at `boundaries`."""
    boundaries: list[Int] | None = None
    """First timestep of each gradient cluster, then num_timesteps; by `dtr-scale affinity`."""
    lr: PositiveFloat = 0.025
    """Learning rate of ant_uw's log-variances."""


class DataConfig(Section):
    type: Annotated[Literal["shards", "synthetic"], BeforeValidator(renamed)] = "shards"
    """`shards`: what `dtr-scale prepare` wrote; `synthetic`: noise, which needs no data."""
    shards: str | None = None
    """Folder or s3:// prefix that holds manifest.json and the shards."""
    num_workers: Count = 4
    """Processes of each rank that read ahead; 0: the training reads by itself."""
    num_lanes: PositiveInt = 1
    """Parts of an epoch that are read side by side; a node reads those of its ranks' places alone.
    Divides train.global_batch_size; the order of samples depends on it, for the whole run."""
    window_shards: PositiveInt = 8
    """Shards of a lane whose samples are mixed with each other; a rank holds two windows of each
    of its lanes. The order of samples depends on it."""
    cache_dir: str | None = None
    """Where the processes of a node keep shards from object storage, and note which files they
    have verified; default: dtr_scale/shards in XDG_CACHE_HOME or ~/.cache."""
    cache_gb: Annotated[float, Field(ge=0.0)] = 64
    """Most that is kept there, more than a node's windows; what is needed last goes first.
    0: no local disk is used, each process holds the shards of its windows in memory."""
    horizontal_flip: bool = True
    """Mirror each sample half of the time; false for digits, text and the like."""
    storage_options: dict[str, Any] = Field(default={})
    """For s3fs: endpoint_url, key, secret, ...; better given by the usual AWS environment."""

    @model_validator(mode="after")
    def _has_shards(self) -> "DataConfig":
        if self.type == "shards" and not self.shards:
            raise refuse(
                "data.shards is missing; give the folder or s3:// prefix that `dtr-scale prepare` "
                "wrote, or try --data.type=synthetic"
            )
        return self


class TrainConfig(Section):
    max_steps: PositiveInt = 400_000
    """Updates of the weights, from the run's beginning."""
    max_minutes: PositiveFloat | None = None
    """Checkpoint and leave with exit code 75 after so long, ahead of a scheduler's limit."""
    global_batch_size: PositiveInt = 256
    """Samples of one update, over all ranks."""
    micro_batch_size: PositiveInt = 32
    """Samples per forward on one rank, at most the rank's share of the global batch."""
    lr: PositiveFloat = 1e-4
    """Learning rate of AdamW; with a warm-up or a schedule its highest value."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises from 0 to `lr`."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """The learning rate after the warm-up: `cosine` falls to `final_lr` at max_steps, `wsd`
    (warm-up, stable, decay) falls linearly in the last `decay_steps`."""
    decay_steps: PositiveInt | None = None
    """wsd: how long the fall takes; null: a tenth of max_steps."""
    final_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """cosine, wsd: where the learning rate ends, at most `lr`."""
    betas: tuple[HalfOpenFraction, HalfOpenFraction] = (0.9, 0.999)
    """Adam's decays of its two moments."""
    eps: PositiveFloat = 1e-8
    """What Adam adds to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of AdamW."""
    decayed: Literal["all", "matrices"] = "all"
    """What weight_decay shrinks; matrices: no biases, norms and embeddings."""
    freeze: Annotated[list[str], BeforeValidator(comma_separated)] = Field(default=[])
    """Patterns of parameters that stay as they begin, for example `blocks.*.attn.*`; on the command
    line separated by commas. Names are those of `dtr-scale checkpoint inspect`."""
    ema_decay: OpenFraction = 0.9999
    """Decay of the averaged weights that samples are drawn with."""
    ema_decays: list[OpenFraction] = Field(default=[])
    """Decays of further averages, kept in checkpoints under ema_<decay>."""
    ema_sigma_rel: list[RelativeWidth] = Field(default=[])
    """Widths of EDM2's power-function averages, for example [0.05, 0.1]: `dtr-scale export
    --sigma-rel` makes one of any width of those in the kept checkpoints."""
    grad_clip: PositiveFloat | None = None
    """Largest global gradient norm; null: no clipping (the norm is logged all the same)."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """Skip an update whose mse or gradient norm exceeds so many times its median over the last 128
    updates; null: only one that is not finite."""
    rollback_after: PositiveInt = 10
    """Skipped updates in a row after which the run goes back to a checkpoint and draws anew."""
    max_rollbacks: Count = 3
    """To one checkpoint, before the run ends as diverged; 0, with rollback_after = 1: it ends at
    the first update that would be skipped."""
    seed: Seed = 0
    """Of initial weights, order of samples, noise, timesteps and dropped labels."""
    log_every: PositiveInt = 100
    """Steps between two lines of the log."""

    @model_validator(mode="after")
    def _ends_below_its_peak(self) -> Self:
        if self.schedule != "constant" and self.final_lr > self.lr:
            raise refuse(
                f"train.final_lr = {self.final_lr} exceeds train.lr = {self.lr}, its highest "
                "value; give at most that"
            )
        return self

    @model_validator(mode="after")
    def _averages_differ(self) -> Self:
        for key in ("ema_decays", "ema_sigma_rel"):
            by_name: dict[str, float] = {}
            for value in getattr(self, key):
                name = f"{value:g}"  # as checkpoints name the average
                if name in by_name:
                    raise refuse(
                        f"train.{key} = {getattr(self, key)}: {by_name[name]!r} and {value!r} are "
                        f"both kept as {name}, so one average would be lost; remove one of them"
                    )
                by_name[name] = value
        return self


class EngineConfig(Section):
    type: Literal["single", "deepspeed", "fsdp2", "flat"] = "deepspeed"
    """flat: as ZeRO-1, written for networks that fit a GPU whole."""
    zero_stage: Annotated[int, Field(ge=0, le=3), Whole] = 1
    """DeepSpeed's: 0 shards nothing, 1 Adam's state, 2 gradients too, 3 weights too."""
    deepspeed_config: SectionOrFile = None
    """DeepSpeed's own settings, or the JSON file that holds them, laid over this trainer's."""
    shard: PositiveInt | None = None
    """fsdp2: ranks that share one copy of the weights; null: all that `replicate` leaves."""
    replicate: PositiveInt | None = None
    """fsdp2: copies of the weights (HSDP), for example one per node; null: what `shard` leaves."""
    reshard_after_forward: Literal[True, False, "auto"] = "auto"
    """fsdp2: drop gathered weights between forward and backward: less memory, more traffic.

    auto: from a billion parameters on."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU, or the CPU where none was allotted; cpu: hide the GPUs that are there."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of matrix products; weights and Adam's state are fp32 in both."""
    exchange: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed over ranks in: bf16 halves the bytes, and rounds each sum."""
    compile: Literal[True, False, "auto"] = "auto"
    """Compile each block with torch.compile (not under ZeRO-3, whose hooks would break it up).

    auto: on a GPU, where the node has a compiler for it."""
    cuda_graphs: Literal[True, False, "auto"] = "auto"
    """flat, single in bf16: launch a micro-step as one CUDA graph, for networks that compute faster
    than a host launches (S, B).

    auto: not yet, as long as no GPU has timed it."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward: less memory, a third more time."""

    @model_validator(mode="after")
    def _flat_is_zero_1(self) -> Self:
        if self.type != "flat":
            return self
        # `zero_stage` has no null. 0 and 1 ask for no more than flat gives.
        asked = {
            "deepspeed_config": ("deepspeed", self.deepspeed_config, "null"),
            "zero_stage": ("deepspeed", self.zero_stage if self.zero_stage > 1 else None, "1"),
            "shard": ("fsdp2", self.shard, "null"),
            "replicate": ("fsdp2", self.replicate, "null"),
        }
        for key, (owner, value, accepted) in asked.items():
            if value is not None:
                raise refuse(
                    f"engine.{key} = {json.dumps(value)} is a setting of engine.type = "
                    f'"{owner}"; "flat" holds all weights and gradients on each rank; set '
                    f"engine.{key}={accepted}, or engine.type={owner}"
                )
        return self

    @model_validator(mode="after")
    def _graphs_are_flat(self) -> Self:
        # In bf16 on a GPU "single" is the flat engine of one rank.
        is_flat = self.type == "flat" or (self.type, self.precision) == ("single", "bf16")
        if self.cuda_graphs is True and not (is_flat and self.device != "cpu"):
            raise refuse(
                f'engine.cuda_graphs = true with engine.type = "{self.type}", engine.precision = '
                f'"{self.precision}" and engine.device = "{self.device}": only "flat", and '
                '"single" in bf16, have weights and gradients that stay where they are in a GPU\'s '
                "memory; set engine.cuda_graphs=false, or engine.type=flat on a GPU"
            )
        return self

    def mesh(self, world_size: int) -> tuple[int, int]:
        """Return (replicate, shard) for `world_size` ranks; ConfigError if they do not fit."""
        # shard is 0 where there are more replicas than ranks, which is refused below.
        shard = self.shard or world_size // (self.replicate or 1)
        replicate = self.replicate or world_size // max(shard, 1)
        if replicate * shard == world_size:
            return replicate, shard
        given = {"replicate": self.replicate, "shard": self.shard}
        told = " and ".join(f"engine.{k} = {v}" for k, v in given.items() if v is not None)
        raise ConfigError(
            f"{told} do not fit {world_size} ranks: replicate x shard must be {world_size}; set "
            "one of them to null, which takes what the other leaves, or start other ranks"
        )


class CheckpointConfig(Section):
    dir: str | None = None
    """Folder or s3:// prefix; default: checkpoints/ in the run directory."""
    every_steps: PositiveInt = 5000
    """Steps between two checkpoints; the last step has one besides."""
    keep_last: PositiveInt = 3
    """How many of the newest are kept."""
    keep_every: Count = 100_000
    """Checkpoints of every n-th step are kept for ever; 0: none."""
    keep_best: Count = 0
    """How many of the best checkpoints by `best_metric` are kept besides; 0: none."""
    best_metric: str = "loss_mean"
    """Less is better: a key of the journal, or of the periodic evaluation, such as
    `pixel_frechet_distance`; `loss` is of that step alone."""
    max_failures: PositiveInt = 3
    """Saves that fail in a row before the run stops."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint; `never` insists on a fresh start."""
    start_from: str | None = None
    """Weights that a run without checkpoints starts from: see start_kind."""
    start_kind: Literal["auto", "dit", "dtr", "adm", "run", "export", "universal"] = "auto"
    """An official .pt of DiT, DTR or guided-diffusion; a run, a checkpoint.dir or one step_* folder
    (weights and average, fresh optimizer); a file or pipeline of `dtr-scale export`; a folder of
    DeepSpeed's universal format (moments and step too). auto: whichever it is."""
    start_adapt: bool = False
    """Take what fits of the weights and begin the rest afresh: for another number of classes, image
    size, conditioning or routing. The log lists both. false: weights must fit exactly."""
    allow_changes: Annotated[list[str], BeforeValidator(comma_separated)] = Field(default=[])
    """Keys of model, diffusion, objective, batch size, seed or data (`data.shards` for its
    manifest) that may differ from the checkpoint's; on the command line separated by commas."""


class TrackingConfig(Section):
    type: Literal["mlflow", "none"] = "mlflow"
    """`none`: the journal in the run's directory alone."""
    experiment: str = "dtr-scale"
    """The experiment of MLflow that the run is listed in."""
    uri: str | None = None
    """MLflow tracking server or database; default: MLFLOW_TRACKING_URI, else mlflow.db beside the
    run's directory."""
    prometheus: bool = False
    """Keep `run_dir/metrics.prom` at the newest logged step, for node_exporter's textfile
    collector."""


class EvaluationConfig(Section):
    every_steps: Count = 0
    """Sample and evaluate during training, by the averaged weights; 0: never."""
    num_samples: PositiveInt = 10_000
    """Samples that an evaluation draws."""
    cfg_scale: Annotated[float, Field(ge=1.0)] = 1.5
    """Classifier-free guidance; 1: none."""
    cfg_channels: PositiveInt | None = None
    """Guided channels: DTR's code guides all 4, DiT's only 3; null: all."""
    cfg_interval: tuple[Count, PositiveInt] | None = None
    """[lo, hi]: timesteps lo <= t < hi alone are guided; null: all."""
    sampler: Literal["ddpm", "ddim", "dpm_solver"] = "ddpm"
    """ddpm is the paper's; ddim and dpm_solver do with fewer steps."""
    eta: Fraction = 0.0
    """DDIM's noise: 0 none, 1 that of the posterior, as in DDPM."""
    num_sampling_steps: (
        Annotated[int, Field(ge=2), Whole] | Annotated[str, Field(pattern=r"^ddim\d+$")]
    ) = 250
    """Timesteps that are kept, evenly spread; "ddim50": at one whole-number stride."""
    clip_denoised: bool = False
    """Clip each predicted x_0 to [-1, 1]: right for pixels, wrong for latents."""
    batch_size: PositiveInt = 64
    """Samples per forward on one rank; the samples' last digits depend on it."""
    loss_samples: Count = 2048
    """Held-out draws whose loss is measured in training: fixed noise, 8 fixed timesteps per
    cluster; 0: none."""
    features: Annotated[
        list[Literal["inception", "efficientnet", "dinov2"]], BeforeValidator(comma_separated)
    ] = Field(default=[])
    """Networks that pictures are measured by, the first of which ranks checkpoints; none named:
    the smallest pictures by their pixels, others by inception if its weights are on this disk,
    else by efficientnet."""
    reference: str | None = None
    """An .npz of `dtr-scale evaluate reference` or ADM; null: the data's held-out pictures, or
    the training pictures where there are none."""
    inception_weights: str | None = None
    """torch-fidelity's .pth; null: its download, if it is on this disk."""
    dinov2_weights: str | None = None
    """DINOv2's .pth or .safetensors."""
    vae: str | None = None
    """Decodes latents; null: what encoded the data, if it is on this disk."""
    labels: Literal["balanced", "random"] = "balanced"
    """Classes of samples: each equally often, in turn, or drawn by the sample's own index."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Of `dtr-scale sample` and `evaluate`; auto: bf16 on a GPU, fp32 on a CPU. In training samples
    are drawn as the engine computes."""

    @model_validator(mode="after")
    def _interval_is_one(self) -> Self:
        if self.cfg_interval and not self.cfg_interval[0] < self.cfg_interval[1]:
            raise refuse(
                f"evaluation.cfg_interval = {list(self.cfg_interval)} is empty; give [lo, hi] with "
                "lo < hi, for example [200, 700], or null to guide at every timestep"
            )
        return self


class Experiment(Section):
    """One experiment: what `dtr-scale train --config FILE` reads."""

    schema_: str | None = Field(default=None, alias="$schema")
    """For editors: where the JSON Schema of this file lies."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Of the run, its folder below runs/ and its row in MLflow."""
    run_dir: Annotated[str | None, AfterValidator(local_path)] = None
    """Where the run writes, an expert in expert_<k> below; default: runs/<name>."""
    description: str = ""
    """Free text, shown by MLflow."""
    expected: dict[str, float] = Field(default={})
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
        """Where the run writes; an expert in a folder of its own, beside its fellows."""
        path = Path(self.run_dir or f"runs/{self.name}")
        expert = f"expert_{self.model.expert}"
        # A config.json that an expert's run has kept names its folder already.
        if self.model.expert is None or path.name == expert:
            return path
        return path / expert

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if problems := combination_problems(self):
            raise refuse("\n".join(problems))
        return self

    def micro_batch_size(self, world_size: int) -> int:
        """Return the samples per forward when `world_size` ranks share the global batch."""
        if problem := batch_problem(self, world_size):
            raise ConfigError(problem)
        return min(self.train.micro_batch_size, self.train.global_batch_size // world_size)


def experiment_schema() -> str:
    """Return the JSON Schema for editors, configs/experiment.schema.json, as text."""
    return json.dumps(Experiment.model_json_schema(by_alias=True), indent=2) + "\n"
