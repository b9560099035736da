"""SkyPilot reads launch/skypilot.yaml as it is meant, and its nodes' command line trains."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from dtr_scale.jobs.train import EXIT_REQUEUE
from tests.support.processes import PATIENCE_SECONDS, free_port
from tests.support.runs import ROOT, journal

TASK = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
SKYPILOT = "skypilot==0.14.1"
PATH = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
READ = """
import json, sys, sky
task = sky.Task.from_yaml_config(json.load(sys.stdin))
(resources,) = task.resources
print(json.dumps({
    "num_nodes": task.num_nodes, "accelerators": resources.accelerators,
    "use_spot": resources.use_spot, "network_tier": resources.network_tier.value,
    "recover_on_exit_codes": resources.job_recovery["recover_on_exit_codes"],
    "secrets": [secret.name for secret in task.managed_secret_refs],
    "storage": {path: storage.mode.name for path, storage in task.storage_mounts.items()},
    "setup": task.setup, "run": task.run, "envs": task.envs,
}))
"""


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory):
    """Return a function that has SkyPilot read a task, in an environment that fits its packages."""
    place = tmp_path_factory.mktemp("skypilot")
    environment = os.environ | {
        "HOME": str(place), "PATH": PATH, "PYTHONPATH": "", "UV_SYSTEM_CERTS": "1",
        "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv")),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }  # fmt: skip

    def run(*command, given=None):
        return subprocess.run(
            command, env=environment, input=given, capture_output=True, text=True, cwd=place
        )

    assert run("uv", "venv", "--python", sys.executable, "venv").returncode == 0
    python = str(place / "venv" / "bin" / "python")
    installed = run("uv", "pip", "install", "--python", python, SKYPILOT)
    if installed.returncode:
        pytest.skip(f"{SKYPILOT} cannot be installed here: {installed.stderr.strip()}")
    return lambda task: run(python, "-c", READ, given=json.dumps(task))


@pytest.mark.slow
def test_skypilot_reads_the_task_as_it_is_meant(skypilot):
    answer = skypilot(TASK)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == {
        "num_nodes": 2, "accelerators": {"A100-80GB": 8}, "use_spot": True, "network_tier": "best",
        "recover_on_exit_codes": [EXIT_REQUEUE], "storage": {"/runs": "MOUNT_CACHED"},
        "secrets": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"],
        "setup": TASK["setup"], "run": TASK["run"], "envs": TASK["envs"],
    }  # fmt: skip
    misspelt = TASK | {"resources": TASK["resources"] | {"network_tiers": "best"}}
    assert "network_tiers" in skypilot(misspelt).stderr


@pytest.mark.slow
def test_the_nodes_command_line_trains(tmp_path, popen):
    """The task's script on two nodes that are processes here."""
    port = str(free_port())
    tiny = (
        f"--run_dir={tmp_path}/run --checkpoint.dir=null --data.num_workers=0 --tracking.type=none "
        "--data.type=synthetic --train.max_steps=2 --train.log_every=1 --engine.compile=false "
        "--model.hidden_size=32 --model.depth=2 --train.global_batch_size=8 "
        "--train.micro_batch_size=4 --evaluation.every_steps=0"
    )
    nodes = [
        popen(
            ["bash", "-c", TASK["run"].replace("29500", port)],
            cwd=ROOT, env=os.environ | TASK["envs"] | {
                "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank),
                "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n192.0.2.1",
                "PATH": PATH, "CONFIG": "configs/demo_digits.json", "OVERRIDES": tiny,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [node.wait(PATIENCE_SECONDS) for node in nodes] == [0, 0]
    assert [record["step"] for record in journal(tmp_path / "run")] == [1, 2]
