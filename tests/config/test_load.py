import json
from pathlib import Path

import pytest

from dtr_scale.config.changes import flatten
from dtr_scale.config.load import load_experiment, parse_overrides, resolved
from dtr_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FLAGSHIP = CONFIGS / "dit_l_dtr_antuw.json"


def test_overrides_are_json_else_strings_in_both_spellings():
    arguments = ["--a.b=1e-4", "--c", "true", "--d=s3://x/", "--e=[1, 2]", "--f=null", "--g="]
    assert list(parse_overrides(arguments)) == [
        ("a.b", 1e-4), ("c", True), ("d", "s3://x/"), ("e", [1, 2]), ("f", None), ("g", ""),
    ]  # fmt: skip


def test_overrides_reach_the_experiment():
    experiment = load_experiment(
        FLAGSHIP, ["--train.lr=2e-4", "--model.routing.type", "none", "--data.type=synthetic"]
    )
    assert experiment.train.lr == 2e-4
    assert experiment.model.routing.type == "none"
    assert experiment.data.shards == "s3://dtr-latents/imagenet-256/"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--engine.zero_stge=1", "unknown key engine.zero_stge; did you mean engine.zero_stage?"),
        ("--lr=1", "unknown key lr; did you mean train.lr?"),
        ("--data.foo=1", "unknown key data.foo; known are data.type, data.shards"),
        ("--train.betas=[0.9]", "train.betas = [0.9]: a value is missing"),
        ("--train.betas=[0.9, 0.95, 1]", "should have at most 2 values, not 3"),
        ("--model.num_res_blocks=2", "model.num_res_blocks is a setting of another model.type"),
        ("--train.lr=fast", 'train.lr = "fast": should be a valid number'),
        ("--train.max_steps=true", "train.max_steps = true: should be a valid integer"),
        ("--train.max_steps=0", "train.max_steps = 0: should be greater than or equal to 1"),
        ("--engine.type=zero", "\"zero\": should be 'single', 'deepspeed', 'fsdp2' or 'flat'"),
        ("--engine.compile=maybe", "engine.compile = \"maybe\": should be true, false or 'auto'"),
        ("--engine.zero_stage=4", "engine.zero_stage = 4: should be less than or equal to 3"),
        ("--engine.shard=0", "engine.shard = 0: should be greater than or equal to 1"),
        ("--engine.deepspeed_config=5", "engine.deepspeed_config = 5: should be"),
        (
            "--engine.deepspeed_config=no.json",
            "cannot read engine.deepspeed_config 'no.json': No such file or directory; give a JSON",
        ),
        ("--model.variant=DiT-M/2", 'model.variant = "DiT-M/2": accepted are DiT-S/2'),
        ("--model.depth=3", "model.variant = 'DiT-L/2' and model.depth = 3 exclude each other"),
        ("--model.input_size=33", "model.input_size = 33 is not divisible by the patch size 2"),
        ("--model.variant=null", "model.hidden_size is missing; set model.variant"),
        ("--objective.num_clusters=1001", "exceeds diffusion.num_timesteps = 1000; choose at most"),
        ("--objective.num_clusters=0", "objective.num_clusters = 0: should be greater than or"),
        ("--objective.type=p3", "objective.type = \"p3\": should be 'vanilla', 'min_snr', 'p2' or"),
        ("--objective.gamma=0", "objective.gamma = 0: should be greater than 0"),
        ("--objective.k=-1", "objective.k = -1: should be greater than 0"),
        ("--objective.boundaries=[0, 0.5]", "objective.boundaries"),
        ("--train.micro_batch_size=48", "choose 32 or another divisor of 256"),
        ("--evaluation.cfg_channels=5", "exceeds model.in_channels = 4"),
        ("--evaluation.num_sampling_steps=2000", "choose at most 1000"),
        ("--model.class_dropout_prob=0", "evaluation.cfg_scale = 1.5 needs a network that knows"),
        ("--data.shards=null", "data.shards is missing"),
        ("--train=5", "train = 5: should be an object"),
        (
            "--checkpoint.allow_changes=train.seed,model.dept",
            "allow_changes names an unknown key model.dept; did you mean model.depth?",
        ),
        ("--checkpoint.allow_changes=5", "checkpoint.allow_changes = 5: should be a valid"),
        ("--train.lr.x=5", "override --train.lr.x: 'lr' is a value, not a section"),
        ("train.lr=5", "unexpected argument 'train.lr=5'"),
        ("--train.lr", "override --train.lr has no value; write --train.lr=VALUE"),
        ("--run_dir=s3://b/run", 'run_dir = "s3://b/run": must be a local folder'),
        ("--name=a/b", 'name = "a/b": is a folder\'s name; give letters, digits, '),
        ("--train.lrr=3", "the command line: unknown key train.lrr; did you mean train.lr?"),
        ("--model.type=unet", 'the command line: model.type = "unet" is unknown; accepted are dit'),
        ("--model.routing.foo=1", "unknown key model.routing.foo; did you mean model.routing.type"),
        (
            "--train.momenta=[0.9, 0.95]",
            "unknown key train.momenta; known are train.max_steps, train.",
        ),
        ("--train.zero_stage=1", "unknown key train.zero_stage; did you mean engine.zero_stage?"),
        ("--train.max_steps=1.5", "train.max_steps = 1.5: should be a valid integer"),
        ("--train.seed=18446744073709551616", "train.seed = 18446744073709551616: should be less"),
        ("--model.routing.seed=1e30", "should be less than 18446744073709551616"),
        (
            "--evaluation.num_sampling_steps=ddim300",
            "evaluation.num_sampling_steps = 'ddim300': no whole-number stride keeps 300 of 1000 "
            "timesteps; give 'ddim334', the nearest",
        ),
        (
            "--evaluation.num_sampling_steps=ddim1",
            "evaluation.num_sampling_steps = 'ddim1': no whole-number stride keeps 1 of 1000",
        ),
        (
            "--evaluation.num_sampling_steps=ddim",
            'evaluation.num_sampling_steps = "ddim": should be a valid integer or a whole-number '
            "stride as 'ddim50'",
        ),
        ("--diffusion.num_timesteps=100", "evaluation.num_sampling_steps = 250: 250 steps of 100"),
        (
            "--train.ema_decays=[0.99, 0.9999, 0.99990000001]",
            "0.9999 and 0.99990000001 are both kept as 0.9999, so one average would be lost",
        ),
        ("--train.ema_sigma_rel=[0.1, 0.1]", "train.ema_sigma_rel = [0.1, 0.1]: 0.1 and 0.1 are"),
        (
            '--model.routing={"alpha": 3}',
            "model.routing.type is missing, with which alpha = 3 would have no effect; give "
            'model.routing.type = "dtr"',
        ),
        ("--model.routing={}", "model.routing.type is missing; give model.routing.type ="),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_fix(override, message):
    with pytest.raises(ConfigError) as caught:
        load_experiment(FLAGSHIP, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_is_no_value_of_the_one_before():
    with pytest.raises(ConfigError, match=r"--run_dir has no value before --train\.lr=5e-4; wr"):
        load_experiment(FLAGSHIP, ["--run_dir", "--train.lr=5e-4"])
    assert load_experiment(FLAGSHIP, ["--run_dir=--odd"]).run_dir == "--odd"
    assert list(parse_overrides(["--a", "-1"])) == [("a", -1)]


def test_every_mistake_is_told_on_a_line_of_its_own():
    with pytest.raises(ConfigError) as caught:
        load_experiment(FLAGSHIP, ["--model.routing.alpha=-4", "--model.routing.beta=2"])
    assert str(caught.value).splitlines() == [
        "the command line: model.routing.alpha = -4: should be greater than 0",
        "the command line: model.routing.beta = 2: should be less than or equal to 1",
    ]


def test_settings_that_do_not_fit_each_other_are_told_together():
    with pytest.raises(ConfigError) as caught:
        load_experiment(FLAGSHIP, ["--data.num_lanes=3", "--train.micro_batch_size=48"])
    batch, lanes = str(caught.value).splitlines()
    assert batch.startswith("the command line: train.micro_batch_size = 48 does not divide")
    assert lanes.startswith("the command line: data.num_lanes = 3 does not divide")


def test_each_mistake_blames_who_made_it(tmp_path):
    path = tmp_path / "mine.json"
    raw = json.loads(FLAGSHIP.read_text())
    raw["train"] |= {"lr": -1, "momenta": [0.9, 0.95]}
    raw["evaluation"]["cfg_channels"] = 5
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, ["--train.max_steps=0", "--train.seed=3", "--model.type=unet"])
    blamed = [line.partition(": ")[::2] for line in str(caught.value).splitlines()]
    assert [(who, told.split()[0]) for who, told in blamed] == [
        ("the command line", "model.type"),
        ("the command line", "train.max_steps"),
        (str(path), "train.lr"),
        (str(path), "unknown"),
    ]
    del raw["train"]["momenta"], raw["train"]["lr"]
    path.write_text(json.dumps(raw))
    for override, who in [("--train.seed=3", str(path)), ("--model.in_channels=3", "the command")]:
        with pytest.raises(ConfigError, match=f"^{who}.*cfg_channels = 5 exceeds"):
            load_experiment(path, [override])


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"name": "a", "name": "b"}', "name"),
        ('{"train": {"lr": 1e-3}, "data": {}, "train": {"seed": 1}}', "train"),
        ('{"model": {"routing": {"type": "dtr", "beta": 0.5, "beta": 0.8}}}', "model.routing.beta"),
        ('{"name": "a", "name": "b", "train": {"lr": 1, "lr": 2}}', "name,train.lr"),
    ],
)
def test_what_stands_twice_is_refused(tmp_path, text, key):
    path = tmp_path / "experiment.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    told = "stands twice, and the first would have no effect; make them one"
    assert str(caught.value) == "\n".join(f"{path}: {one} {told}" for one in key.split(","))


def test_settings_that_look_odd_but_fit_are_accepted():
    odd = load_experiment(
        FLAGSHIP,
        [
            "--train.max_steps=1e3",
            "--diffusion.num_timesteps=1e3",
            "--engine.zero_stage=1.0",
            "--objective.boundaries=[0, 1e3]",
            f"--train.seed={2**64 - 1}",
            "--evaluation.num_sampling_steps=ddim250",
            "--train.ema_decays=[0.999, 0.9999]",
        ],
    )
    assert (odd.train.max_steps, odd.train.seed) == (1000, 2**64 - 1)
    assert (odd.diffusion.num_timesteps, odd.engine.zero_stage) == (1000, 1)
    assert odd.objective.boundaries == [0, 1000]


def test_shards_that_are_called_latents_are_read_as_before():
    old = load_experiment(FLAGSHIP, ["--data.type=latents"])
    assert resolved(old) == resolved(load_experiment(FLAGSHIP, ["--data.type=shards"]))
    assert old.data.type == "shards"
    with pytest.raises(ConfigError, match="should be 'shards' or 'synthetic'"):
        load_experiment(FLAGSHIP, ["--data.type=pixels"])


@pytest.mark.parametrize("num_clusters", [1, 7, 1000])
def test_any_number_of_clusters_is_accepted(num_clusters):
    overrides = [f"--objective.num_clusters={num_clusters}"]
    assert load_experiment(FLAGSHIP, overrides).objective.num_clusters == num_clusters


@pytest.mark.parametrize(
    "boundaries",
    [
        "null",
        "[]",
        "[0, 400]",
        "[1, 400, 1000]",
        "[0, 400, 999]",
        "[0, 0, 1000]",
        "[0, 1001, 1000]",
    ],
)
def test_gradient_clusters_need_boundaries_that_fit(boundaries):
    overrides = ["--objective.clusters=gradient", f"--objective.boundaries={boundaries}"]
    with pytest.raises(ConfigError) as caught:
        load_experiment(FLAGSHIP, [*overrides, "--objective.num_clusters=2"])
    message = str(caught.value)
    assert f"objective.boundaries = {boundaries} do not fit objective.clusters" in message
    assert "give objective.num_clusters + 1 = 3 ascending whole numbers from 0 to " in message
    assert "diffusion.num_timesteps = 1000, as `dtr-scale affinity RUN_DIR`" in message


def test_an_expert_alone_has_no_gradient_clusters():
    expert = ["--model.num_experts=4", "--model.expert=1", "--evaluation.every_steps=0"]
    with pytest.raises(ConfigError, match="trains an interval of them; choose 'timestep'"):
        load_experiment(FLAGSHIP, [*expert, "--objective.clusters=gradient"])
    load_experiment(FLAGSHIP, [*expert, "--objective.clusters=log_snr"])


def test_boundaries_matter_to_gradient_clusters_alone():
    fitting = ["--objective.num_clusters=2", "--objective.boundaries=[0, 400, 1000]"]
    gradient = load_experiment(FLAGSHIP, [*fitting, "--objective.clusters=gradient"])
    assert gradient.objective.boundaries == [0, 400, 1000]
    load_experiment(FLAGSHIP, ["--objective.boundaries=[5]"])
    load_experiment(FLAGSHIP, ["--objective.type=p2", "--objective.clusters=gradient"])


@pytest.mark.parametrize(
    "value", ["model.depth,train.seed", '["model.depth", "train.seed"]', "[]", "train.seed"]
)
def test_allowed_changes_are_a_list_or_separated_by_commas(value):
    loaded = load_experiment(FLAGSHIP, [f"--checkpoint.allow_changes={value}"])
    known = ["model.depth", "train.seed"]
    assert loaded.checkpoint.allow_changes == [key for key in known if key in value]


def test_free_sizes_must_fit():
    sizes = ["--model.variant=null", "--model.depth=2", "--model.patch_size=2"]
    with pytest.raises(ConfigError, match=r"hidden_size = 50 is not divisible by .*num_heads = 4"):
        load_experiment(FLAGSHIP, [*sizes, "--model.hidden_size=50", "--model.num_heads=4"])
    fitting = load_experiment(FLAGSHIP, [*sizes, "--model.hidden_size=48", "--model.num_heads=4"])
    assert fitting.model.model_dump()["hidden_size"] == 48


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "the experiment file is a JSON object"), (None, "cannot read")],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, content, message):
    path = tmp_path / "experiment.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_experiment(path)


def test_resolved_loads_again_and_keeps_no_secret():
    experiment = load_experiment(
        FLAGSHIP,
        [
            '--data.storage_options={"key": "AK", "secret": "hush", "token": "hush", '
            '"region": "eu", "endpoint_url": "https://me:hush@s3.local"}',
            "--tracking.uri=postgresql+psycopg2://me:hush@db.local:5432/runs",
        ],
    )
    data = resolved(experiment)
    assert data["run_dir"] == str(Path.cwd() / "runs/dit_l_dtr_antuw")
    options = {"region": "eu", "endpoint_url": "https://s3.local"}
    assert data["data"]["storage_options"] == options
    assert data["tracking"]["uri"] == "postgresql+psycopg2://db.local:5432/runs"
    assert "hush" not in json.dumps(data)
    assert experiment.data.storage_options["secret"] == "hush"


def test_what_a_run_keeps_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "data.shards": ("data/digits/", "{}/data/digits"),
        "data.cache_dir": ("/fast/cache", "/fast/cache"),
        "checkpoint.dir": ("s3://bucket/run/", "s3://bucket/run/"),
        "checkpoint.start_from": ("../dit.pt", "{}/../dit.pt"),
        "tracking.uri": ("sqlite:///ml.db?timeout=9", "sqlite:///{}/ml.db?timeout=9"),
        "run_dir": ("runs/x", "{}/runs/x"),
    }
    overrides = [f"--{key}={before}" for key, (before, _) in given.items()]
    data = flatten(resolved(load_experiment(FLAGSHIP, overrides)))
    kept = {key: data[key] for key in given}
    assert kept == {key: after.format(tmp_path) for key, (_, after) in given.items()}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(resolved(load_experiment(FLAGSHIP, overrides))))
    monkeypatch.chdir("/")
    assert flatten(resolved(load_experiment(path))) == data


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "databricks", "databricks://me", "sqlite:///:memory:", "file:/x"]
)
def test_a_tracking_server_is_no_path(uri):
    experiment = load_experiment(FLAGSHIP, [f"--tracking.uri={uri}"])
    assert resolved(experiment)["tracking"]["uri"] == uri


def test_text_that_cannot_be_written_tells_no_secret():
    with pytest.raises(ConfigError, match="holds text that is not Unicode") as caught:
        load_experiment(
            FLAGSHIP, ['--data.storage_options={"secret": "hush"}', r'--description="\ud800"']
        )
    assert "hush" not in str(caught.value)


def test_a_mistake_in_storage_options_tells_no_secret():
    options = '{"key": "AK", "secret": "hush"'  # the brace is missing
    with pytest.raises(ConfigError, match=r"data\.storage_options: should be an obj") as caught:
        load_experiment(FLAGSHIP, [f"--data.storage_options={options}"])
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("lanes", [3, 0])
def test_lanes_divide_the_batch(lanes):
    with pytest.raises(ConfigError, match=r"data\.num_lanes = "):
        load_experiment(FLAGSHIP, [f"--data.num_lanes={lanes}"])
    assert load_experiment(FLAGSHIP, ["--data.num_lanes=8"]).data.num_lanes == 8


def test_a_file_of_deepspeed_settings_is_read_with_the_experiment(tmp_path):
    section = {"zero_optimization": {"overlap_comm": True}}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(section))
    for override in (str(path), json.dumps(section)):
        experiment = load_experiment(FLAGSHIP, [f"--engine.deepspeed_config={override}"])
        assert resolved(experiment)["engine"]["deepspeed_config"] == section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--engine.zero_stage=3", 'zero_stage = 3 is a setting of engine.type = "deepspeed"'),
        (
            '--engine.deepspeed_config={"a": 1}',
            r'deepspeed_config = \{"a": 1\} .*deepspeed_config=null',
        ),
        (
            "--engine.shard=8",
            'shard = 8 is .* "fsdp2"; .* set engine.shard=null, or engine.type=fsdp2',
        ),
        ("--engine.replicate=2", "replicate = 2 is"),
    ],
)
def test_the_flat_engine_refuses_what_it_would_not_do(override, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(FLAGSHIP, ["--engine.type=flat", override])
    # One override is enough to train the flagship, whose zero_stage = 1 is what it does.
    assert load_experiment(FLAGSHIP, ["--engine.type=flat"]).engine.type == "flat"


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2], "e": {}}


@pytest.mark.parametrize(
    ("world_size", "micro"), [(1, 64), (4, 64), (8, 32), (16, 16), (64, 4), (256, 1)]
)
def test_micro_batches_are_at_most_the_share_of_a_rank(world_size, micro):
    assert load_experiment(FLAGSHIP).micro_batch_size(world_size) == micro


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="256 is not divisible by 3 ranks"):
        load_experiment(FLAGSHIP).micro_batch_size(3)
    shared = load_experiment(
        FLAGSHIP, ["--train.global_batch_size=40", "--train.micro_batch_size=8"]
    )
    with pytest.raises(ConfigError, match="does not divide the 20 samples per rank"):
        shared.micro_batch_size(2)
