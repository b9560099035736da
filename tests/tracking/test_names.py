"""Names of metrics, params and tags, as MLflow's own validation judges them."""

from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_param_name

from dtr_scale.tracking.names import evaluation_name, journal_key, metric_name, valid_names


def test_a_name_keeps_what_mlflow_takes():
    assert valid_names({"a.b/c_d-e: 1": 2}) == {"a.b/c_d-e: 1": 2}
    odd = {"FID@50k": 1, "FID_50k": 2, "FID%50k": 3, "../up": 4, "": 5}
    assert valid_names(odd) == {
        "FID_50k": 1, "FID_50k_2": 2, "FID_50k_3": 3, "___up": 4, "_": 5,
    }  # fmt: skip


@given(st.dictionaries(st.text(max_size=300), st.none(), max_size=5))
@example(dict.fromkeys(["", ".", "..", "/", "a/./b", "a/", "x" * 300, "x" * 301, "é", "a@", "a!"]))
def test_mlflow_takes_every_valid_name_and_none_is_lost(entries):
    names = valid_names(entries)
    assert len(names) == len(entries)
    for name in names:
        _validate_param_name(name)
    assert valid_names(names) == names


def test_metrics_stand_in_sections():
    keys = ("loss", "loss_cluster_7", "uw_log_var_3", "mfu", "gpu_hours", "something_new")
    assert [metric_name(key) for key in keys] == [
        "train/loss", "clusters/loss_7", "uw/log_var_3", "perf/mfu", "gpu_hours",
        "train/something_new",
    ]  # fmt: skip
    assert [journal_key(metric_name(key)) for key in keys] == list(keys)
    assert [journal_key(name) for name in ("eval/fid_10k", "system/host/cpu")] == [None, None]
    told = [("fid", 10_000), ("inception_score", 50_000), ("fd_dinov2", 500), ("fid_30k", 10_000)]
    assert [evaluation_name(*each) for each in told] == [
        "eval/fid_10k", "eval/is_50k", "eval/fd_dinov2_500", "eval/fid_30k"
    ]  # fmt: skip
    assert evaluation_name("eval_loss", 500) == "eval/eval_loss"
    assert evaluation_name("fid", None) == "eval/fid"
