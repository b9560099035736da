"""The lab of docker/compose.yaml, started without Docker: a cluster that trains over TLS."""

import contextlib
import http.client
import json
import socket
import ssl

import pytest

from dtr_scale.jobs.train import train_experiment
from tests.support.compose import compose_services
from tests.support.ranks import run_on_ranks
from tests.support.runs import demo_experiment, journal

pytestmark = pytest.mark.slow
CONFIG = "configs/demo_digits.json"
STEPS = 20
OVERRIDES = (f"--train.max_steps={STEPS}", "--train.log_every=1", "--evaluation.every_steps=0")
# The demo's own network, which `demo_experiment` makes smaller.
NETWORK = ("--model.hidden_size=128", "--model.depth=4", "--data.num_workers=1")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The lab after its training has ended; its servers go on."""
    with compose_services(tmp_path_factory.mktemp("lab")) as services:
        services.up("node-1", arguments=OVERRIDES)
        code = services["node-1"].wait()
        assert code == 0, services["node-1"].output
        yield services


def ask_mlflow(lab, path, body=None, authority=None):
    """Return MLflow's answer over https, whose certificate must be signed by `authority`."""
    authority = authority or lab["mlflow"].volume("trust") / "ca.pem"
    context = ssl.create_default_context(cafile=authority)
    method, content = ("POST", json.dumps(body)) if body else ("GET", None)
    # As a browser on the machine of the lab asks, where the port is published.
    headers = {"Content-Type": "application/json", "Origin": "https://localhost:5000"}
    with (
        socket.create_connection((lab["mlflow"].host.address, 5000)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        connection = http.client.HTTPConnection("localhost:5000")
        connection.sock = secure
        connection.request(method, f"/api/2.0/mlflow/{path}", content, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return json.load(answer)


def test_two_nodes_write_the_journal_of_one(lab, digits, tmp_path):
    """Data and checkpoints on S3, a rank on each host; against two ranks and disks of one host."""
    plain = demo_experiment(digits, tmp_path / "one", *NETWORK, *OVERRIDES)
    assert run_on_ranks(2, train_experiment, plain) == [0, 0]
    expected = journal(tmp_path / "one")
    assert len(expected) == STEPS
    assert journal(lab["node-1"].volume("shared") / "runs" / "demo_digits") == expected


def test_mlflow_shows_each_step_once(lab):
    runs = ask_mlflow(lab, "runs/search", {"experiment_ids": ["1"]})["runs"]
    told = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
    ((run, tags),) = [pair for pair in zip(runs, told, strict=True) if "model" in pair[1]]
    assert run["info"]["status"] == "FINISHED"
    assert tags["checkpoint"] == f"s3://lab/runs/demo_digits/step_{STEPS:08d}"
    assert tags["world_size"] == "2"
    history = f"metrics/get-history?metric_key=train/loss&run_id={run['info']['run_id']}"
    points = ask_mlflow(lab, history)["metrics"]
    assert [point["step"] for point in points] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("variable", "command"),
    [
        ("AWS_CA_BUNDLE", "data verify s3://lab/digits/"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", f"train --config {CONFIG} --engine.type=single"),
    ],
)
def test_a_server_of_an_unknown_authority_is_refused_in_one_line(lab, variable, command):
    """S3 and MLflow, by the nodes' own commands, when their authority is not told."""
    refused = lab["node-2"].call("env", "-u", variable, "dtr-scale", *command.split())
    assert refused.returncode == 2
    (line,) = refused.stdout.strip().splitlines()
    assert "the server's certificate is not trusted: unable to get local issuer" in line
    assert f"set {variable} to the certificate of the authority that signed it" in line


def test_without_tls_no_server_answers(lab):
    for name, port in (("mlflow", 5000), ("s3", 9000)):
        with contextlib.closing(
            http.client.HTTPConnection(lab[name].host.address, port, timeout=10)
        ) as plain:
            plain.request("GET", "/")
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                plain.getresponse()
