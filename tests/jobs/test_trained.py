"""What a run has trained is found again with keys that the run itself does not keep."""

import os
import subprocess
import sys

import pytest

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


def test_a_run_whose_keys_were_overrides_can_be_sampled(digits, tmp_path, s3_url):
    """In processes of their own: s3fs keeps a connection without keys for whoever comes later."""
    hidden = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}

    def run(*command):
        command = [sys.executable, "-m", "dtr_scale", *command]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    places = [f"--data.shards={digits}", f"--checkpoint.dir={s3_url}", f"--run_dir={tmp_path}/run"]
    steps = [*SMALL, *SINGLE, *places, "--train.max_steps=1"]
    assert run("train", "--config", str(DEMO), *steps, *OPTIONS).returncode == 0
    sample = ["sample", f"{tmp_path}/run", "--out", f"{tmp_path}/out.png"]
    sample += ["--evaluation.num_sampling_steps=2"]
    assert run(*sample, *OPTIONS).returncode == 0
    assert (tmp_path / "out.png").stat().st_size
    refused = run(*sample)
    assert refused.returncode == 2
    assert "Unable to locate credentials" in refused.stderr
