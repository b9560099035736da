"""What a run has trained is found again with keys that the run itself does not keep."""

import pytest

from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.trained import load_run
from tests.conftest import KEY, SECRET
from tests.support.runs import DEMO, SINGLE, SMALL, train

OPTIONS = [f"--data.storage_options.key={KEY}", f"--data.storage_options.secret={SECRET}"]


def test_keys_can_be_given_for_a_trained_run_and_other_data_cannot(digits, tmp_path):
    assert train(digits, tmp_path, "--train.max_steps=1") == 0
    options = load_run(tmp_path, OPTIONS).experiment.data.storage_options
    assert options == {"key": KEY, "secret": SECRET}
    for other in ("--data.shards=elsewhere", "--data.storage_optionsx=1", "--evaluationx=1"):
        with pytest.raises(ConfigError, match=r"of a trained run evaluation.*storage_options"):
            load_run(tmp_path, [other])


def test_a_run_whose_keys_were_overrides_can_be_sampled(
    digits, tmp_path, s3_url, monkeypatch, capsys
):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    run = str(tmp_path / "run")
    places = [f"--data.shards={digits}", f"--checkpoint.dir={s3_url}", f"--run_dir={run}"]
    command = ["train", "--config", str(DEMO), *SMALL, *SINGLE, *places, "--train.max_steps=1"]
    assert main([*command, *OPTIONS]) == 0
    sample = ["sample", run, "--out", f"{tmp_path}/out.png", "--evaluation.num_sampling_steps=2"]
    assert main([*sample, *OPTIONS]) == 0
    assert (tmp_path / "out.png").stat().st_size
    capsys.readouterr()
    # Another option is another connection: s3fs keeps one without keys for later tests.
    assert main([*sample, "--data.storage_options.max_attempts=1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "no access" in line.lower() or "credentials" in line.lower()
