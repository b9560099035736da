"""The manifests of launch/k8s fit their schemas, and their pods' command lines train and go on.

There is no cluster here. What Kubernetes, JobSet and Trainer make of a manifest is written down in
`pods` and `action`.
"""

import copy
import functools
import operator
import os
import re
import signal
import sysconfig
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import ValidationError
from kubeflow_trainer_api import models

from dtr_scale.config.load import load_experiment
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.train import EXIT_FAILED, EXIT_REQUEUE, train_experiment
from tests.support.processes import free_port, wait_for
from tests.support.runs import ROOT, journal, status, steps_in

MANIFESTS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "launch" / "k8s").glob("*.yaml"))
}
MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}
KUBERNETES = "1.37"
FREE = {"labels", "limits", "requests"}  # maps with anybody's keys
IMAGE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
PORT = "29500"

TINY = (
    "--data.type=synthetic", "--data.num_workers=0", "--tracking.type=none",
    "--evaluation.every_steps=0", "--model.variant=null", "--model.hidden_size=32",
    "--model.depth=2", "--model.num_heads=2", "--model.patch_size=2", "--model.input_size=8",
    "--train.global_batch_size=16", "--train.micro_batch_size=8", "--train.log_every=1",
    "--engine.precision=fp32", "--engine.compile=false",
)  # fmt: skip


def jobset(manifest):
    """Return the spec of the JobSet that a manifest is or is a template of, None for others."""
    if manifest["kind"] == "JobSet":
        return manifest["spec"]
    return manifest["spec"]["template"]["spec"] if manifest["kind"] == "TrainingRuntime" else None


JOBS = {
    f"{name}-{job['name']}": (spec, job)
    for name, manifest in MANIFESTS.items()
    if (spec := jobset(manifest))
    for job in spec["replicatedJobs"]
}
STARTED = {  # what starts training: the manifest, and how many ranks it means to
    name: manifest
    for name, manifest in MANIFESTS.items()
    if manifest["kind"] in ("TrainJob", "JobSet")
}


def pod_of(job):
    """Return the pod of a replicated job, and its only container."""
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def runtime_of(trainjob):
    """Return the runtime that a TrainJob names."""
    reference = trainjob["spec"]["runtimeRef"]
    (runtime,) = (
        manifest
        for manifest in MANIFESTS.values()
        if (manifest["kind"], manifest["metadata"]["name"])
        == (reference["kind"], reference["name"])
    )
    return runtime


def arguments(manifest):
    """Return the arguments that a manifest gives to the image's entrypoint."""
    if manifest["kind"] == "TrainJob":
        return manifest["spec"]["trainer"]["args"]
    return pod_of(manifest["spec"]["replicatedJobs"][0])[1]["args"]


def pods(manifest):
    """Return each pod's own variables: what Trainer's torch plugin or the JobSet's env sets."""
    name = manifest["metadata"]["name"]
    if manifest["kind"] == "TrainJob":
        trainer = manifest["spec"]["trainer"]
        assert runtime_of(manifest)["spec"]["mlPolicy"]["torch"] == {}
        return [
            {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
                "PET_MASTER_PORT": PORT,
            }
            for rank in range(trainer["numNodes"])
        ]
    job = manifest["spec"]["replicatedJobs"][0]
    _, container = pod_of(job)
    fields = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {
            variable["name"]: variable["value"]
            if "value" in variable
            else {fields: str(index)}[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for variable in container["env"]
        }
        for index in range(job["template"]["spec"]["completions"])
    ]


def action(spec, job, *, exit_code=None, condition=None):
    """Return what a JobSet does when a pod of `job` ends so: its policies, rule by rule."""
    policy = job["template"]["spec"]
    assert policy["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(policy["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"operator": "In", "values": [], "containerName": "node"})
        assert (codes["operator"], codes["containerName"]) == ("In", pod_of(job)[1]["name"])
        conditions = [pattern["type"] for pattern in rule.get("onPodConditions", [])]
        if exit_code in codes["values"] or condition in conditions:
            what = f"Container node for pod default/p failed with exit code {exit_code}"
            if condition in conditions:
                what = f"Pod default/p has condition {condition}"
            reason = "PodFailurePolicy"
            message = f"{what} matching {rule['action']} rule at index {index}"
            break
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def validate(manifest):
    """Raise an error if a manifest has a key that its kind has not, or a wrong value."""
    if model := MODELS.get(manifest["kind"]):
        # The models drop what they do not know, without a word.
        assert model.from_dict(manifest).to_dict() == manifest
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def keys(value, place=()):
    """Yield the place of every key that a schema knows, as a tuple of keys and indices."""
    for key in value if isinstance(value, dict) else range(len(value)):
        if isinstance(value, dict) and (not place or place[-1] not in FREE):
            yield (*place, key)
        if isinstance(value[key], dict | list):
            yield from keys(value[key], (*place, key))


def misspelt(manifest, place):
    """Return a copy of a manifest with another name for one key."""
    changed = copy.deepcopy(manifest)
    *above, key = place
    section: Any = functools.reduce(operator.getitem, above, changed)
    section[f"{key}s"] = section.pop(key)
    return changed


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_schema_and_would_not_with_a_misspelt_key(name):
    manifest = MANIFESTS[name]
    validate(manifest)
    for place in keys(manifest):
        if place not in {("apiVersion",), ("kind",)}:  # they choose the schema
            with pytest.raises((AssertionError, ValueError, ValidationError)):
                validate(misspelt(manifest, place))


@pytest.mark.parametrize("name", JOBS)
def test_a_job_fits_the_schema_of_kubernetes(name):
    _, job = JOBS[name]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}} | job["template"]
    validate(job)
    place = (
        "spec",
        "template",
        "spec",
        "containers",
        0,
        "securityContext",
        "readOnlyRootFilesystem",
    )
    with pytest.raises(ValidationError, match="readOnlyRootFilesystems"):
        validate(misspelt(job, place))


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_is_locked_down_and_writes_to_volumes_alone(name):
    pod, container = pod_of(JOBS[name][1])
    (user,) = set(re.findall(r"^USER ([1-9]\d*)$", IMAGE, re.M))
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # The image says where it writes.
    (written,) = re.findall(r"^VOLUME (.*)$", IMAGE, re.M)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() >= set(yaml.safe_load(written))
    assert set(mounts.values()) == volumes.keys()
    claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
    assert claim == MANIFESTS["storage"]["metadata"]["name"]
    # A checkpoint has this time, and a rank that hangs a shorter one.
    assert pod["terminationGracePeriodSeconds"] == 600
    if not name.endswith("-launcher"):  # it trains nothing
        assert container["livenessProbe"]["terminationGracePeriodSeconds"] == 30
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert container["livenessProbe"]["exec"]["command"] == ["entrypoint.sh", "health"]
        assert container["envFrom"] == [{"secretRef": {"name": "dtr-scale"}}]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"exit_code": EXIT_REQUEUE}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"exit_code": ConfigError.exit_code}, "FailJobSet"),
        ({"exit_code": EXIT_FAILED}, "RestartJobSet"),
        ({"exit_code": 128 + signal.SIGKILL}, "RestartJobSet"),
    ],
    ids=["checkpointed", "evicted", "mistake", "failed", "killed"],
)
def test_what_ended_a_pod_decides_whether_the_run_goes_on(name, end, expected):
    assert action(*JOBS[name], **end) == expected


@pytest.mark.parametrize("name", STARTED)
def test_a_manifest_starts_an_experiment_that_fits_its_ranks(name):
    manifest = STARTED[name]
    words = arguments(manifest)
    experiment = load_experiment(
        ROOT / words[words.index("--config") + 1], words[words.index("--config") + 2 :]
    )
    if manifest["kind"] == "TrainJob":
        trainer = manifest["spec"]["trainer"]
        num_ranks = trainer["numNodes"] * trainer["numProcPerNode"]
        resources = trainer.get("resourcesPerNode")
        if words[0] == "deepspeed":  # a TrainJob's own are the launcher's
            resources = pod_of(JOBS["runtime-deepspeed-node"][1])[1]["resources"]
        num_gpus = trainer["numNodes"] * resources["limits"]["nvidia.com/gpu"]
        steps = runtime_of(manifest)["spec"]["template"]["spec"]["replicatedJobs"]
        labelled = [s["name"] for s in steps if "labels" in s["template"].get("metadata", {})]
        assert labelled == ["launcher" if words[0] == "deepspeed" else "node"]
    else:
        environments = pods(manifest)
        subdomain = manifest["metadata"]["name"]
        for environment in environments:
            assert environment["PET_NNODES"] == str(len(environments))
            assert environment["PET_MASTER_ADDR"] == f"{subdomain}-node-0-0.{subdomain}"
        num_ranks = len(environments) * int(environments[0]["PET_NPROC_PER_NODE"])
        job = manifest["spec"]["replicatedJobs"][0]
        num_pods_at_once = job["template"]["spec"]["parallelism"]
        num_gpus = num_pods_at_once * pod_of(job)[1]["resources"]["limits"]["nvidia.com/gpu"]
    assert num_gpus == num_ranks
    assert experiment.micro_batch_size(num_ranks) >= 16
    assert experiment.engine.mesh(num_ranks) in [(2, 8), (1, 16)]
    assert experiment.checkpoint.dir and experiment.checkpoint.dir.startswith("s3://")


def test_deepspeeds_nodes_wait_for_the_launcher_on_the_images_port():
    spec, node = JOBS["runtime-deepspeed-node"]
    _, launcher = JOBS["runtime-deepspeed-launcher"]
    _, container = pod_of(node)
    assert container["args"] == ["sshd"]
    (port,) = re.findall(r"^EXPOSE (\d+)$", IMAGE, re.M)
    assert [entry["containerPort"] for entry in container["ports"]] == [int(port)]
    assert container["readinessProbe"]["tcpSocket"]["port"] == int(port)
    assert launcher["dependsOn"] == [{"name": node["name"], "status": "Ready"}]
    assert spec["successPolicy"]["targetReplicatedJobs"] == [launcher["name"]]
    # It has no GPU: all ranks are on the nodes.
    mpi = MANIFESTS["runtime-deepspeed"]["spec"]["mlPolicy"]["mpi"]
    assert mpi["runLauncherAsNode"] is False
    assert "--force_multi" in arguments(MANIFESTS["trainjob-deepspeed"])


@pytest.fixture
def start(tmp_path, popen):
    """Start a manifest's pods as processes of this machine, one rank each."""

    def start(manifest, *overrides, only=None):
        here = {
            "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(free_port()),
        }  # fmt: skip
        own = (f"--run_dir={tmp_path}/run", f"--checkpoint.dir={tmp_path}/checkpoints")
        words = [*arguments(manifest), *TINY, "--engine.shard=1", *own, *overrides]
        path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
        processes = []
        for i, pod in enumerate(pods(manifest)):
            if only in (None, i):
                with (tmp_path / f"pod_{i}.log").open("a") as log:
                    environment = os.environ | pod | here | {"PATH": path}
                    processes.append(
                        popen(words, cwd=ROOT, env=environment, stdout=log, stderr=STDOUT)
                    )
        return processes

    return start


@pytest.mark.slow
def test_a_preempted_pod_takes_all_along_and_the_run_goes_on(tmp_path, start):
    """Two pods of the TrainJob; one gets SIGTERM, as at a node's drain, and all start again."""
    trainjob, run_dir = MANIFESTS["trainjob-torch"], tmp_path / "run"
    preempted = start(trainjob, "--train.max_steps=100000")
    wait_for(lambda: steps_in(run_dir) > 2, *preempted)
    preempted[1].terminate()
    assert [pod.wait(120) for pod in preempted] == [EXIT_REQUEUE] * 2
    left = status(run_dir)
    assert (left["outcome"], left["saved_step"]) == ("preempted", left["step"])

    steps = f"--train.max_steps={left['step'] + 3}"
    again = start(trainjob, steps)
    assert [pod.wait(120) for pod in again] == [0, 0]
    words = arguments(trainjob)
    alone = (f"--run_dir={tmp_path}/alone", "--checkpoint.dir=null", "--engine.type=single")
    config = words[words.index("--config") + 1]
    assert train_experiment(load_experiment(ROOT / config, [*TINY, *alone, steps])) == 0
    found, expected = journal(run_dir), journal(tmp_path / "alone")
    assert len(found) == left["step"] + 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_jobsets_pods_are_started_as_a_trainjobs():
    """The same launcher with the same variables, so the run above is theirs, too."""
    words = [arguments(MANIFESTS[name]) for name in ("jobset", "trainjob-torch")]
    assert (
        words[0][:4]
        == words[1][:4]
        == ["python", "launch/torchrun.py", "launch/train.py", "--config"]
    )
    ours, theirs = pods(MANIFESTS["jobset"]), pods(MANIFESTS["trainjob-torch"])
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k != "PET_MASTER_ADDR"} == {
            k: v for k, v in other.items() if k != "PET_MASTER_ADDR"
        }


def test_a_mistake_and_a_pod_that_is_still_alone_have_exit_codes_of_their_own(tmp_path, start):
    jobset = MANIFESTS["jobset"]
    (alone,) = start(jobset, only=1)

    def hears_signals():
        (caught,) = re.findall(
            r"^SigCgt:\t(\w+)$", Path(f"/proc/{alone.pid}/status").read_text(), re.M
        )
        return int(caught, 16) >> (signal.SIGTERM - 1) & 1

    pair = start(jobset, "--engine.zero_stge=1")
    assert [pod.wait(120) for pod in pair] == [ConfigError.exit_code] * 2
    assert "did you mean engine.zero_stage?" in (tmp_path / "pod_0.log").read_text()
    wait_for(hears_signals, alone)
    alone.terminate()
    assert alone.wait(60) == EXIT_REQUEUE
