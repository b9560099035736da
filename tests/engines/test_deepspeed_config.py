import copy

import pytest

from dtr_scale.engines.deepspeed_config import build_deepspeed_config
from dtr_scale.errors import ConfigError

SETTINGS = {
    "global_batch_size": 256,
    "micro_batch_size": 32,
    "grad_accum_steps": 4,
    "grad_clip": None,
    "precision": "bf16",
    "zero_stage": 2,
}


def build(section, **changes):
    return build_deepspeed_config(section, **(SETTINGS | changes))


def test_the_experiment_alone():
    config = build(None, grad_clip=1.0)
    assert config["train_micro_batch_size_per_gpu"] == 32
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["communication_data_type"] == "fp32"
    assert build(None, exchange="bf16")["communication_data_type"] == "bf16"
    assert not config["timers"]["throughput"]["enabled"]
    assert not config["torch_autocast"]["enabled"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stage_0_computes_in_bf16_by_autocast(precision):
    config = build(None, zero_stage=0, precision=precision)
    assert not config["bf16"]["enabled"]
    assert config["torch_autocast"]["enabled"] == (precision == "bf16")


def test_stage_0_trains_masters_as_fp32_weights():
    config = build(None, zero_stage=0, precision="bf16", keeps_masters=True)
    assert not config["bf16"]["enabled"]
    assert not config["torch_autocast"]["enabled"]


@pytest.mark.parametrize(("stage", "overlap"), [(0, False), (1, True), (2, True), (3, True)])
def test_gradients_are_exchanged_during_the_backward_unless_they_are_offloaded(stage, overlap):
    assert build(None, zero_stage=stage)["zero_optimization"]["overlap_comm"] is overlap
    offloading = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config = build(offloading, zero_stage=stage)
    assert config["zero_optimization"]["overlap_comm"] is (stage == 3)


def test_the_users_section_lies_over_the_trainers_and_keeps_what_it_does_not_name():
    section = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 7},
        "bf16": {"check_grad_overflow": True},
        "timers": {"throughput": {"enabled": True}},
        "communication_data_type": "bf16",
        "comms_logger": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    given = copy.deepcopy(section)
    config = build(section)
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["timers"] == {"throughput": {"enabled": True}}
    assert config["communication_data_type"] == "bf16"
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert config["zero_optimization"]["stage"] == 2
    assert (config["comms_logger"], config["wall_clock_breakdown"]) == ({"enabled": True}, True)
    assert section == given


def test_what_agrees_with_the_experiment_is_accepted():
    section = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    config = build(section)
    assert config["train_batch_size"] == 256
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size = 8 contradicts train.global_batch_size = 256"),
        (
            {"train_micro_batch_size_per_gpu": "auto"},
            'train_micro_batch_size_per_gpu = "auto" contradicts train.micro_batch_size = 32',
        ),
        (
            {"gradient_accumulation_steps": 2},
            "contradicts the 4 of train.global_batch_size = 256 in parts of",
        ),
        ({"gradient_clipping": 1}, "gradient_clipping = 1 contradicts train.grad_clip = null"),
        (
            {"bf16": {"enabled": False}},
            "bf16.enabled = false contradicts engine.precision = 'bf16'",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true contradicts engine.precision"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled = true contradicts"),
        ({"zero_optimization": {"stage": 1}}, "stage = 1 contradicts engine.zero_stage = 2"),
    ],
)
def test_a_contradiction_names_both_sides(section, message):
    with pytest.raises(ConfigError) as caught:
        build(section)
    assert str(caught.value).startswith("engine.deepspeed_config.")
    assert message in str(caught.value)
    assert str(caught.value).endswith("; remove one")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"optimizer": {"type": "Lamb"}},
            "is refused: every engine has the AdamW of the train section",
        ),
        ({"scheduler": {}}, "scheduler = {} is refused: train.schedule sets the learning"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "round_robin_gradients = true is refused: it puts the fp32 weights where checkpoints",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device = "nvme" is refused: it puts the fp32 weights where '
            'checkpoints and EMA cannot reach them; set "none" or "cpu", or remove it',
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "compute_grad_norm = false is refused: a step is judged by the gradient's norm",
        ),
        ({"bf16": {"bf16_optimizer_states": True}}, "refused: Adam's moments are kept in fp32"),
        ({"bf16": True}, "engine.deepspeed_config.bf16 = true: should be an object"),
    ],
)
def test_what_cannot_work_is_refused(section, message):
    with pytest.raises(ConfigError) as caught:
        build(section)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
