"""Folders that diffusers loads as pipelines: their samples are ours."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dtr_scale.checkpoint.pipeline_folder import PipelineSettings, write_pipeline
from dtr_scale.config.load import validate_model
from dtr_scale.diffusion.schedule import beta_schedule
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.evaluation.sampling import KeyedNoise, Sampler, SamplingSettings
from tests.support.weights import ADM, CONFIG, batch, random_network

STEP = 1200
PLAIN = CONFIG | {"class_dropout_prob": 0.0, "learn_sigma": False, "routing": {"type": "ercddt"}}
EXPERTS = CONFIG | {"num_experts": 3, "qk_norm": True, "routing": {"type": "dtr"}}
NONE = CONFIG | {"conditioning": "none", "in_channels": 3, "routing": {"type": "cdtr"}}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """diffusers copies a pipeline's code into a cache, here one of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", place)
        yield


def load(folder, **options) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written(folder, config=CONFIG, schedule="linear", *, null_context=None, **settings):
    """Write a network as a pipeline and return it."""
    network = random_network(config)
    given = {"sampler": "ddim", "num_sampling_steps": 7} | settings
    betas = beta_schedule(schedule, 1000).tolist()
    pipeline = PipelineSettings(betas=betas, **given)
    section = validate_model(config, "the test").model_dump()
    write_pipeline(
        network, section, folder, pipeline, card="# Card", mask_step=STEP, null_context=null_context
    )
    return network


def ours(network, schedule, indices, *, conditions=None, null=None, **settings):
    """Our samples of a network, the noise they begin with and that of each step."""
    given = {"cfg_scale": 1.0, "cfg_channels": None, "clip_denoised": False} | settings
    sampling = SamplingSettings(schedule, 1000, seed=3, **given)
    shape = (network.in_channels, network.input_size, network.input_size)
    noise = KeyedNoise(3, indices, shape, torch.device("cpu"))
    given = {"conditions": conditions, "null_condition": null}
    sampler = Sampler(network, sampling, step=STEP, **given)
    steps = [noise[i] for i in range(sampler.num_steps - 1)]
    return sampler.draw(indices), noise.start, steps


def near(drawn, samples):
    # Random weights make samples of any size.
    assert (drawn - samples).abs().max() <= 1e-5 * samples.abs().max()


@pytest.mark.parametrize("routing", ["none", "dtr", "dtr_eq4", "random", "max_roaming"])
def test_the_network_computes_what_ours_does(tmp_path, routing):
    config = CONFIG | {"routing": {"type": routing}}
    network = written(tmp_path / "p", config)
    x, t, y = batch()
    model = load(tmp_path / "p").transformer
    assert len(model.masks) == {"dtr": 1, "dtr_eq4": 1}.get(routing, 3) if routing != "none" else (
        model.masks is None
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y).sample, network(x, t, y, STEP), rtol=0, atol=0)


def test_experts_and_norms_of_queries_are_computed_too(tmp_path):
    """Each sample by the expert of its timestep."""
    network = written(tmp_path / "p", EXPERTS)
    x, _, y = batch()
    t = torch.tensor([999, 0, 333, 332, 500, 666, 667, 40])[: len(x)]
    model = load(tmp_path / "p").transformer
    assert len(model.experts) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y).sample, network(x, t, y, STEP), rtol=0, atol=1e-6)
        one = t[:1]
        expected = network(x, one.expand(len(x)), y, STEP)
        torch.testing.assert_close(model(x, one, y).sample, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "schedule", "sampling"),
    [
        (EXPERTS, "cosine", {"sampler": "ddim", "num_sampling_steps": 9, "cfg_scale": 1.5}),
        (CONFIG, "cosine", {"sampler": "ddim", "num_sampling_steps": 10}),
        (CONFIG | {"routing": {"type": "dtr"}}, "cosine", {
            "sampler": "ddim", "num_sampling_steps": "ddim25", "cfg_scale": 2.0, "cfg_channels": 3,
        }),
        (CONFIG | {"routing": {"type": "random"}}, "linear", {
            "sampler": "ddpm", "num_sampling_steps": 12, "cfg_scale": 1.5,
            "cfg_interval": (200, 700),
        }),
        (CONFIG | {"routing": {"type": "max_roaming"}}, "linear", {
            "sampler": "ddim", "eta": 0.7, "num_sampling_steps": 9,
        }),
        (PLAIN, "linear", {"sampler": "ddpm", "num_sampling_steps": 8, "clip_denoised": True}),
        (NONE, "cosine", {"sampler": "dpm_solver", "num_sampling_steps": 11}),
    ],
)  # fmt: skip
def test_a_pipeline_draws_our_samples(tmp_path, config, schedule, sampling):
    network = written(tmp_path / "p", config, schedule, **sampling)
    samples, start, steps = ours(network, schedule, range(4), **sampling)
    classes = {"class_labels": list(range(4))}
    labels = {"num_images": 4} if network.conditioning == "none" else classes
    pipe = load(tmp_path / "p")
    noise = steps if sampling["sampler"] == "ddpm" or sampling.get("eta") else None
    drawn = pipe(**labels, latents=start, step_noise=noise, output_type="latent").images
    near(drawn, samples)
    # The training's own steps and guidance are defaults, which a call may change.
    other = {"num_inference_steps": 3, "guidance_scale": 1.0}
    drawn = pipe(**labels, latents=start, step_noise=noise, output_type="latent", **other).images
    changed = {"num_sampling_steps": 3, "cfg_scale": 1.0, "cfg_interval": None}
    near(drawn, ours(network, schedule, range(4), **sampling | changed)[0])


UNETS = [
    ADM | {"routing": {"type": "dtr"}},
    ADM | {"class_dropout_prob": 0.1, "resblock_updown": True, "use_scale_shift_norm": True,
           "num_head_channels": 16, "routing": {"type": "random"}},
    ADM | {"conditioning": "none", "use_new_attention_order": True, "num_heads": 2},
]  # fmt: skip


@pytest.mark.parametrize("config", UNETS)
def test_a_u_net_is_drawn_too(tmp_path, config):
    guided = {"cfg_scale": 2.0} if config.get("class_dropout_prob") else {}
    sampling = {"sampler": "ddim", "num_sampling_steps": 7, **guided}
    network = written(tmp_path / "p", config, **sampling)
    samples, start, _ = ours(network, "linear", range(4), **sampling)
    pipe = load(tmp_path / "p")
    assert type(pipe.transformer).__name__ == "DTRUNet2DModel"
    labels = {"class_labels": list(range(4))}
    given = {"num_images": 4} if network.conditioning == "none" else labels
    near(pipe(**given, latents=start, output_type="latent").images, samples)
    widths = {block.channels for block in network.routed_blocks()}
    masks = [name for name in pipe.transformer.state_dict() if name.startswith("masks")]
    assert len(masks) == {"dtr": len(widths), "random": len(network.routed_blocks())}.get(
        config.get("routing", {}).get("type"), 0
    )


@pytest.mark.parametrize("is_learned", [True, False])
def test_texts_are_drawn_by_their_tokens(tmp_path, is_learned):
    """The text that stands for none: zeros, for which the network has learned one, or tokens."""
    config = CONFIG | {"conditioning": "text", "context_length": 5, "context_dim": 8}
    config |= {"routing": {"type": "dtr"}, "num_experts": 2 if is_learned else 1}
    generator = torch.Generator().manual_seed(2)
    tokens, empty = torch.randn(3, 5, 8, generator=generator), torch.zeros(5, 8)
    if not is_learned:
        empty = torch.randn(5, 8, generator=generator)
    network = written(tmp_path / "p", config, "cosine", null_context=empty, cfg_scale=2.0)
    samples, start, _ = ours(
        network, "cosine", range(3), conditions=lambda indices: tokens[list(indices)], null=empty,
        sampler="ddim", num_sampling_steps=7, cfg_scale=2.0,
    )  # fmt: skip
    pipe = load(tmp_path / "p")
    near(pipe(prompt_embeds=tokens, latents=start, output_type="latent").images, samples)
    for wrong in {"class_labels": [1]}, {"prompt_embeds": tokens[:, :4]}:
        with pytest.raises(ValueError, match=r"give prompt_embeds \[N, 5, 8\]"):
            pipe(**wrong)


def test_pictures_names_and_seeds(tmp_path):
    names = {0: "cat", 1: "dog, big"}
    written(tmp_path / "p", CONFIG | {"in_channels": 3, "num_classes": 2}, id2label=names)
    pipe = load(tmp_path / "p")
    assert pipe.get_label_ids(["dog, big", "cat"]) == [1, 0]

    def draw(labels, seed, **options):
        return pipe(labels, generator=torch.Generator().manual_seed(seed), **options).images

    (picture,) = draw(["cat"], 1)
    assert (picture.size, picture.mode) == ((8, 8), "RGB")
    tensor = draw([0], 1, output_type="pt")
    assert (tensor.min(), tensor.max()) >= (0, 0) and tensor.max() <= 1
    assert draw([0], 1, output_type="np").shape == (1, 8, 8, 3)
    assert torch.equal(draw([0], 1, output_type="pt"), tensor)
    assert not torch.equal(draw([0], 2, output_type="pt"), tensor)
    for wrong, reason in (["bird"], "unknown classes"), ([2], "give 0 to 1"), (None, "missing"):
        with pytest.raises(ValueError, match=reason):
            pipe(wrong)
    with pytest.raises(ValueError, match="give 1 to 3"):
        pipe([0], guidance_scale=2.0, guidance_channels=4)


def test_half_precision_keeps_masks_and_timesteps(tmp_path):
    network = written(tmp_path / "p", CONFIG | {"routing": {"type": "dtr"}})
    pipe = load(tmp_path / "p", dtype=torch.bfloat16)
    assert pipe.transformer.masks.dtype is torch.bool
    x, t, y = batch()
    with torch.no_grad():
        drawn, expected = pipe.transformer(x, t, y).sample.float(), network(x, t, y)
    assert (drawn - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_schedulers_of_diffusers_take_its_place(tmp_path, name):
    import diffusers

    written(tmp_path / "p", CONFIG | {"routing": {"type": "dtr"}})
    pipe = load(tmp_path / "p")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert pipe([1], output_type="latent").images.isfinite().all()
    if name == "EulerDiscreteScheduler":
        with pytest.raises(ValueError, match="takes no step_noise"):
            pipe([1], step_noise=[torch.zeros(1, 4, 8, 8)] * 9)


def test_what_was_saved_again_loads_again(tmp_path):
    config = CONFIG | {"routing": {"type": "dtr"}}
    network = written(tmp_path / "p", config, id2label={3: "three"})
    load(tmp_path / "p").save_pretrained(tmp_path / "again")
    pipe = load(tmp_path / "again")
    samples, start, _ = ours(network, "linear", range(2), sampler="ddim", num_sampling_steps=7)
    near(pipe([0, 1], latents=start, output_type="latent").images, samples)
    assert pipe.labels == {"three": 3}


def test_nothing_loads_in_part(tmp_path):
    written(tmp_path / "p", CONFIG | {"routing": {"type": "dtr"}})
    path = tmp_path / "p" / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["layout"] == "dtr_transformer.py, for diffusers"
    weights = load_file(path)
    for name in ("masks", "blocks.1.mlp.fc2.bias"):
        save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"does not hold the weights.*{name}"):
            load(tmp_path / "p")
    save_file(weights | {"odd": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected_keys.*odd"):
        load(tmp_path / "p")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "p")


def test_what_has_no_pipeline_is_refused_and_nothing_is_left(tmp_path):
    experts = ADM | {"num_experts": 2}
    with pytest.raises(
        ConfigError, match=r"a network of MultiExperts has no pipeline; .* a DiT, ex"
    ):
        written(tmp_path / "p", experts)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Directory not empty"):
        written(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_index_tells_what_there_is(tmp_path):
    written(tmp_path / "p", vae_name="some/vae", cfg_scale=2.5)
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["_class_name"] == ["dtr_pipeline", "DTRPipeline"]
    assert (index["vae"], index["vae_name"]) == ([None, None], "some/vae")
    assert index["guidance_scale"] == 2.5
