"""The command line: help with examples, exit codes, and errors in one line."""

import json
import os
import subprocess
import sys
from argparse import SUPPRESS, ArgumentTypeError, _SubParsersAction
from contextlib import nullcontext
from pathlib import Path

import pytest

import dtr_scale
from dtr_scale.cli import experiments
from dtr_scale.cli.arguments import positive_integer
from dtr_scale.cli.main import _parser, main
from dtr_scale.data.manifest import read_manifest
from dtr_scale.storage.folder import open_folder
from tests.support.terminal import shown_by, terminal

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo_digits.json")
COMMANDS = [
    "train",
    "health",
    "sample",
    "compare",
    "plots",
    "evaluate",
    "reproduce",
    "cka",
    "affinity",
    "prepare",
    "data",
    "convert",
    "checkpoint",
    "export",
    "bench",
    "plan",
    "config",
]
REFUSALS = ("No such file", "no run directory", "no checkpoint", "json is missing")
OF_A_RUN = ["sample", "evaluate", "cka", "affinity"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def refused(capsys, *arguments):
    """Run a command that must fail with exit code 2; return its only line."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    examples = out.partition("example")[2]
    assert f"dtr-scale {command}" in examples or "launch/train.py --config configs/" in examples
    assert "%(" not in out and "local_rank" not in out


# These need no file and would run.
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c not in ("bench", "health", "reproduce")]
)
def test_the_example_in_the_help_is_understood(command, capsys, tmp_path, monkeypatch):
    """Every example parses: what it is refused for is that there is no such file or run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = capsys.readouterr().out.strip().splitlines()[-1].split()
    arguments = example[1:] if example[0] == "dtr-scale" else ["train", *example[2:]]
    assert arguments[0] == command
    if command == "prepare":
        arguments[-1] = str(tmp_path / "out")
        assert main(arguments) == 0
    else:
        line = refused(capsys, *arguments)
        assert any(told in line for told in REFUSALS)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dtr-scale {dtr_scale.__version__}\n"


def test_of_a_trained_run_the_evaluation_alone_can_be_overridden(capsys):
    line = refused(capsys, "sample", "run", "--colums", "3")
    assert line == "error: unknown argument '--colums'; see dtr-scale sample -h"
    line = refused(capsys, "evaluate", "run", "--train.lr=3")
    assert line.startswith("error: unknown argument '--train.lr'; see")
    assert "unexpected argument 'extra'" in refused(capsys, "evaluate", "run", "extra")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["sample", "run", "--nmu-samples", "3"], "--num-samples"),
        (["sample", "run", "--num", "3"], "--num-samples"),
        (["sample", "run", "--nmu", "3"], "--num-samples"),
        (["sample", "run", "--sampler", "ddim"], "--evaluation.sampler"),
        (["evaluate", "run", "--evaluation.smapler=ddim"], "evaluation.sampler"),
        (["cka", "run", "--num-timestep=3"], "--num-timesteps"),
    ],
)
def test_what_was_meant_is_named(arguments, meant, capsys, tmp_path):
    (tmp_path / "config.json").write_text(Path(DEMO).read_text())
    arguments[1] = str(tmp_path)
    assert f"; did you mean {meant}?" in refused(capsys, *arguments)


def test_commands_are_grouped_by_what_a_user_does(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    groups = ["prepare data", "train", "look at a run", "export", "measure"]
    places = [out.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)
    for command in COMMANDS:
        assert out.count(f"\n  {command} ") == 1


def commands_of(parser):
    """Yield the parsers of all that can be called."""
    parts = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    for action in parts:
        for part in action.choices.values():
            yield from commands_of(part)
    if not parts:
        yield parser


ALL = {parser.prog: parser for parser in commands_of(_parser())}


@pytest.mark.parametrize("parser", ALL.values(), ids=ALL)
def test_every_help_tells_what_it_does_an_example_and_every_default(parser):
    told = " ".join(parser.format_help().split())
    assert parser.description and f"{parser.prog} " in told.partition("example: ")[2] + " "
    assert "None" not in told and "False" not in told
    assert told.startswith(f"usage: {parser.prog}")
    assert all(action.help for action in parser._actions)
    assert max(map(len, parser.format_help().partition("example:")[0].splitlines())) <= 80
    values = [a for a in parser._actions if a.option_strings and a.nargs != 0]
    shown = [a for a in values if a.help != SUPPRESS and not a.required]
    assert told.count("default: ") >= len(shown)


@pytest.mark.parametrize(
    ("command", "default"),
    [("cka", "(default: 64)"), ("affinity", "(default: 8)"), ("export", "(default: the newest)")],
)
def test_help_tells_the_defaults(command, default, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert default in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["cka", "run", "--colums", "3"],
        ["affinity", "run", "extra"],
        ["prepare", "digits", "--out", "there", "--fast"],
        ["config", "schema", "--indent=2"],
        ["bench", "checkpoint", "--fast"],
    ],
)
def test_an_unknown_argument_is_refused_in_one_line(arguments, capsys):
    line = refused(capsys, *arguments)
    assert line.startswith("error: unknown argument ")
    assert f"see dtr-scale {arguments[0]}" in line and line.endswith(" -h")


def test_an_error_is_red_on_a_terminal_alone(monkeypatch, capsys):
    """The launcher of DeepSpeed writes a dozen lines of its own around it."""
    monkeypatch.setenv("TERM", "xterm")
    for no_colour, begin in (("", "\033[1;31merror:\033[0m cannot"), ("1", "error: cannot")):
        monkeypatch.setenv("NO_COLOR", no_colour)
        with terminal(80) as screen:
            assert main(["config", "show", "nowhere.json"]) == 2
        assert shown_by(screen)[0].startswith(begin)
    assert main(["config", "show", "nowhere.json"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot")


def test_loading_pytorch_is_told_where_it_takes_long(monkeypatch, capsys):
    """From a shared file system it may take a minute, in which the launcher says nothing either."""
    told: list[str] = []
    monkeypatch.setattr(experiments, "telling", lambda what: told.append(what) or nullcontext())
    alone = ("--engine.type=single", "--tracking.type=none", "--data.shards=nowhere")
    assert main(["train", "--config", DEMO, *alone]) == 2
    assert told == ["loading PyTorch and what trains with it"]
    assert capsys.readouterr().err.startswith("error: data.shards: manifest.json is missing in now")


def test_each_mistake_of_a_file_is_an_error_of_its_own(capsys):
    assert main(["train", "--config", DEMO, "--train.lr=-1", "--model.depth=0"]) == 2
    depth, lr = capsys.readouterr().err.splitlines()
    assert depth.startswith("error: the command line: model.depth = 0: should be")
    assert lr.startswith("error: the command line: train.lr = -1: should be")


def test_a_whole_number_may_be_written_with_an_exponent():
    assert [positive_integer(text) for text in ("7", "1e3", "2.0")] == [7, 1000, 2]
    for text in ("0", "1.5", "-1", "inf", "nan", "many", "1e400"):
        with pytest.raises(ArgumentTypeError, match="is not accepted; give a whole number"):
            positive_integer(text)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "--conf", DEMO],
        ["prepare", "cifar", "--out", "there"],
        ["sample", "run", "--num-samples", "0"],
        ["sample", "run", "--num-samples", "-1"],
        ["evaluate", "run", "--num-samples", "many"],
        ["plan"],
        ["convert", "run", "--from", "run", "--to", "safetensors", "--out", "x"],
        ["bench"],
        ["bench", "checkpoint", "--rounds", "0"],
        ["bench", "train"],
        ["bench", "sample", "--config", DEMO, "--num-samples", "0"],
    ],
)
def test_a_command_that_cannot_be_understood_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err and "error: " in err.splitlines()[-1]


def test_config_show_fills_in_every_default_and_override(capsys):
    assert main(["config", "show", DEMO, "--train.lr=2e-4", "--model.depth", "2"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert (shown["train"]["lr"], shown["model"]["depth"]) == (2e-4, 2)
    run_dir = str(Path.cwd() / "runs" / "demo_digits")
    assert (shown["run_dir"], shown["tracking"]["type"]) == (run_dir, "mlflow")
    assert err == ""


def test_what_is_shown_can_be_run_again(capsys, tmp_path):
    assert main(["config", "show", DEMO]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.json").write_text(shown)
    assert main(["config", "show", str(tmp_path / "shown.json")]) == 0
    assert capsys.readouterr().out == shown


def test_secrets_are_not_shown(capsys):
    options = '--data.storage_options={"key": "KEY0", "secret": "SECRET0", "token": "TOKEN0"}'
    assert main(["config", "show", DEMO, options]) == 0
    shown = capsys.readouterr().out
    assert not [secret for secret in ("KEY0", "SECRET0", "TOKEN0") if secret in shown]


def test_config_explain_tells_a_key_or_lists_all(capsys):
    assert main(["config", "explain", "train.lr"]) == 0
    assert "Learning rate of AdamW" in capsys.readouterr().out
    assert main(["config", "explain"]) == 0
    assert "evaluation.sampler" in capsys.readouterr().out
    assert "did you mean train.lr?" in refused(capsys, "config", "explain", "lr")


def test_config_diff_tells_what_differs_and_what_makes_another_run(capsys, tmp_path):
    assert main(["config", "show", DEMO, "--train.lr=2e-3", "--model.depth=2"]) == 0
    (tmp_path / "config.json").write_text(capsys.readouterr().out)
    assert main(["config", "diff", DEMO, str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "model.depth: 4 -> 2  (another run)",
        "train.lr: 0.001 -> 0.002",
    ]
    assert main(["config", "diff", DEMO, DEMO]) == 0
    assert capsys.readouterr().out == "no setting differs\n"


def test_config_schema_is_a_json_schema(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "data", "train"} <= set(schema["properties"])


def test_prepare_writes_a_folder_and_says_what_is_in_it(tmp_path, capsys):
    assert main(["prepare", "digits", "--out", f"{tmp_path}/"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 1,500 samples in 3 shards",
        "val: 297 samples in 1 shard",
        f"manifest: {tmp_path}/manifest.json",
        f"next: dtr-scale config init --data {tmp_path} --out {tmp_path.name}.json",
    ]
    assert read_manifest(open_folder(tmp_path)).num_samples("train") == 1500


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "prepare", "digits", "--out", str(tmp_path / "file" / "digits"))
    assert "file/digits cannot be written: Not a directory" in line
    assert "unknown kind of folder" in refused(capsys, "prepare", "digits", "--out", "gs://a/b")


@pytest.mark.parametrize("command", OF_A_RUN)
def test_what_is_no_run_directory_is_refused(command, tmp_path, capsys):
    assert "is no run directory" in refused(capsys, command, str(tmp_path))
    assert "is no run directory" in refused(capsys, command, str(tmp_path / "missing"))


@pytest.mark.parametrize("command", OF_A_RUN)
def test_a_run_without_a_checkpoint_is_refused(command, tmp_path, digits, capsys):
    overrides = [f"--run_dir={tmp_path}", f"--data.shards={digits}"]
    assert main(["config", "show", DEMO, *overrides]) == 0
    (tmp_path / "config.json").write_text(capsys.readouterr().out)
    assert "holds no checkpoint" in refused(capsys, command, str(tmp_path))


def test_rank_0_alone_reports_an_error_of_the_experiment(monkeypatch, capsys):
    arguments = ["train", "--config", DEMO, "--local_rank=1", "--train.lrr=1"]
    assert "train.lrr; did you mean train.lr?" in refused(capsys, *arguments)
    monkeypatch.setenv("RANK", "1")
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("script", [["-m", "dtr_scale", "train"], ["launch/train.py"]])
def test_a_process_exits_with_the_code_and_without_a_traceback(script):
    command = [sys.executable, *script, "--local_rank=0", "--config", "missing.json"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: cannot read the experiment file 'missing.json'")
    assert len(ended.stderr.splitlines()) == 1
