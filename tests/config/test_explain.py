"""`dtr-scale config explain`: every key is told, with what it accepts and who reads it."""

import pytest

from dtr_scale.config.explain import explain_key, list_keys, settings
from dtr_scale.config.messages import known_keys
from dtr_scale.errors import ConfigError


def test_every_key_is_told():
    keys = {setting.key for setting in settings()}
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    assert keys | sections == set(known_keys())
    for setting in settings():
        assert setting.told, f"{setting.key} has no description: write it below the field"
        assert setting.read_by


def test_a_key_is_told_with_all_that_matters():
    assert explain_key("engine.zero_stage").splitlines() == [
        "engine.zero_stage",
        "  does     DeepSpeed's: 0 shards nothing, 1 Adam's state, 2 gradients too, 3 weights too.",
        "  accepts  integer from 0 to 3",
        "  default  1",
        "  read by  train, bench train",
    ]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("evaluation.sampler", 'accepts  "ddpm", "ddim", "dpm_solver"'),
        ("evaluation.sampler", "sample and evaluate, as an override"),
        ("engine.compile", 'accepts  true, false, "auto"'),
        ("evaluation.cfg_interval", "accepts  [integer from 0, integer from 1] or null"),
        ("train.ema_decays", "accepts  list of: number above 0 below 1"),
        ("train.ema_decays", "default  []"),
        ("name", "default  none, it must be given"),
        ("checkpoint.dir", "all commands on a run"),
    ],
)
def test_what_a_key_accepts_is_in_words(key, told):
    assert told in explain_key(key)


def test_what_networks_have_alike_stands_once():
    assert explain_key("model.learn_sigma").count("model.learn_sigma") == 1
    dit, adm = explain_key("model.in_channels").split("\n\n")
    assert dit.startswith("model.in_channels  (of dit)") and "default  4" in dit
    assert adm.startswith("model.in_channels  (of adm)") and "default  3" in adm
    assert list_keys().count("model.num_classes") == 1


def test_a_section_is_told_key_by_key():
    told = explain_key("model.routing").split("\n\n")
    assert [one.split()[0] for one in told] == [k for k in known_keys() if "model.routing." in k]


def test_what_is_no_key_is_refused_with_what_was_meant():
    with pytest.raises(ConfigError, match=r"unknown key lr; did you mean train\.lr\?"):
        explain_key("lr")
