"""`dtr-scale prepare`: its commands as they are typed, exit codes, and errors in one line."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dtr_scale.cli.main import main
from dtr_scale.data.manifest import read_manifest
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import class_folders, small_autoencoder, tar_of
from tests.support.processes import wait_for

ROOT = Path(__file__).parents[2]
SOURCES = ["imagefolder", "coco", "ffhq", "webdataset", "digits"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("source") / "train", {"cat": 30, "dog": 34})


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return small_autoencoder(tmp_path_factory.mktemp("vae") / "vae")


def prepare(*arguments):
    return main(["prepare", *map(str, arguments)])


def data(*arguments):
    return main(["data", *map(str, arguments)])


def refused(capsys, *arguments, run=prepare):
    """Run a command that must fail with exit code 2; return its only line."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ")
    return line


def command(*arguments):
    return [sys.executable, "-m", "dtr_scale", "prepare", *map(str, arguments)]


@pytest.mark.parametrize("name", SOURCES)
def test_help_of_every_source_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare(name, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  dtr-scale prepare {name} " in out
    assert "%(" not in out


def test_the_way_from_pictures_to_a_contact_sheet(source, s3_url, vae_path, tmp_path, capsys):
    options = ("--vae", vae_path, "--size", 32, "--shard-mb", 0.06, "--batch-size", 8)
    assert prepare("imagefolder", source, "--out", f"{s3_url}/", *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 64 samples in 5 shards",
        f"manifest: {s3_url}/manifest.json",
        f"next: dtr-scale config init --data {s3_url} --out {s3_url.rpartition('/')[2]}.json",
    ]
    assert data("verify", s3_url) == 0
    assert capsys.readouterr().out == f"{s3_url}: 10 files as written, 0.000 GB\n"

    sheet = tmp_path / "sheet.png"
    assert data("inspect", s3_url, "--num-samples", 16, "--sheet", sheet) == 0
    told = capsys.readouterr().out.splitlines()
    assert "train: 64 samples, 5 shards, 0.000 GB, 2 classes of 30 to 34 samples" in told
    assert told[-1] == f"contact sheet of train: {sheet}"
    with Image.open(sheet) as picture:
        assert picture.width == 4 * 66 + 2, "four columns, of two classes in turn"
        assert 4 * 66 + 10 < picture.height < 4 * 66 + 30, "four rows below the classes' names"
    assert data("inspect", s3_url, "--sheet", sheet) == 0
    folder = open_folder(s3_url)
    assert folder.read_bytes("contact_sheet_train.png") == sheet.read_bytes()

    content = bytearray(folder.read_bytes("train-000003.tar"))
    content[5000] ^= 1
    folder.write_bytes("train-000003.tar", bytes(content))
    capsys.readouterr()
    assert data("verify", s3_url) == 1
    assert capsys.readouterr().out.splitlines() == [
        "train-000003.tar: its bytes are not those that were written",
        f"{s3_url}: 1 of 10 files damaged, 0.000 GB",
    ]


def test_pixels_and_a_second_start(source, tmp_path, capsys):
    arguments = ("imagefolder", source, "--out", tmp_path / "out", "--pixels")
    assert prepare(*arguments) == 0
    manifest = read_manifest(open_folder(tmp_path / "out"))
    assert (manifest.encoding, manifest.shape) == ("pixels", (3, 64, 64))
    first = capsys.readouterr()
    assert prepare(*arguments) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "all of it is there already" in second.err
    sheet = tmp_path / "sheet.png"
    assert data("inspect", tmp_path / "out", "--sheet", sheet) == 0
    beside = tmp_path / "out" / "contact_sheet_train.png"
    assert beside.read_bytes() == sheet.read_bytes()
    assert "contact sheet: " in first.err and "contact sheet: " not in second.err


def test_tars_of_webdataset_with_classes(source, tmp_path, capsys):
    members = {}
    for i, path in enumerate(sorted(source.rglob("*.png"))):
        members |= {f"{i}.png": path.read_bytes(), f"{i}.cls": b"%d" % (i % 3)}
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    out = ("--out", tmp_path / "out", "--pixels", "--size", 16)
    assert prepare("webdataset", tmp_path / "x.tar", *out, "--split", "val") == 0
    assert capsys.readouterr().out.startswith("val: 64 samples in 1 shard\n")
    assert read_manifest(open_folder(tmp_path / "out"), "val").num_classes == 3


def test_latents_without_their_autoencoder_have_no_sheet(source, vae_path, tmp_path, capsys):
    (tmp_path / "vae").symlink_to(vae_path)
    out = ("--out", tmp_path / "out", "--size", 16)
    assert prepare("imagefolder", source, *out, "--vae", tmp_path / "vae") == 0
    (tmp_path / "vae").unlink()
    capsys.readouterr()
    sheet = ("--sheet", tmp_path / "sheet.png")
    assert data("inspect", tmp_path / "out", *sheet) == 0
    assert "no contact sheet: the autoencoder " in capsys.readouterr().out
    assert not (tmp_path / "sheet.png").exists()
    assert data("inspect", tmp_path / "out", *sheet, "--vae", vae_path) == 0
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagefolder", "missing", "--out", "o"], "missing is no folder; fix: give the local"),
        (["ffhq", "SRC", "--out", "gs://a/b"], "unknown kind of folder gs:// in gs://a/b; accep"),
        (["ffhq", "SRC", "--out", "o"], "; or give --pixels, which needs no autoencoder"),
        (["ffhq", "SRC", "--out", "o", "--vae", "VAE", "--size", "33"], "--size=33 is not accept"),
        (["ffhq", "SRC", "--out", "FILE/o", "--pixels"], "FILE/o cannot be written: Not a direc"),
        (["ffhq", "SRC", "--out", "o", "--fast"], "unknown argument '--fast'; see dtr-scale prep"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, source, vae_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    places = {"SRC": str(source), "VAE": str(vae_path)}
    assert message in refused(capsys, *(places.get(value, value) for value in arguments))


@pytest.mark.parametrize("action", ["verify", "inspect"])
def test_data_that_is_not_there_is_named(action, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "manifest.json is missing in o" in refused(capsys, action, "o", run=data)


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "0"],
        ["--shard-mb", "-1"],
        ["--shard-mb", "much"],
        ["--max-unreadable", "2"],
        ["--workers", "0"],
        ["--split", "a/b"],
        ["--vae", "x", "--pixels"],
    ],
)
def test_a_value_that_is_not_accepted_exits_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare("ffhq", "src", "--out", "o", *options)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_too_many_unreadable_pictures_exit_2(tmp_path, capsys):
    root = class_folders(tmp_path / "src", {"a": 10})
    (root / "a" / "003.png").write_bytes(b"")
    arguments = ("imagefolder", root, "--out", tmp_path / "out", "--pixels", "--size", 16)
    assert prepare(*arguments) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert "warning: train/a/003.png cannot be read: UnidentifiedImageError" in warning
    assert error.startswith("error: 1 of 10 pictures cannot be read")
    assert prepare(*arguments, "--max-unreadable", 0.1) == 0
    assert "unreadable: 1 pictures, listed in the manifest" in capsys.readouterr().out


def test_rank_0_alone_writes_the_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert prepare("--local_rank=1", "digits", "--out", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["finished", "unfinished", "damaged"])
def test_digits_are_not_written_over_other_data(state, source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    if state == "unfinished":
        monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ("imagefolder", source, "--out", out, "--pixels", "--shard-mb", 0.5)
    assert prepare(*arguments) == 0
    assert (out / "manifest.json").exists() != (state == "unfinished")
    if state == "damaged":
        (out / "manifest.json").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    told = {
        "finished": f"error: {out} holds data of other settings: class_names is ",
        "unfinished": f"error: {out} holds unfinished data of other settings: class_names is ",
        "damaged": f"error: {out}/manifest.json is empty, a JSON manifest is expected; fix: ",
    }
    assert refused(capsys, "digits", "--out", out).startswith(told[state])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_cut_shard_is_made_again_and_a_changed_one_once_it_is_removed(tmp_path, capsys):
    assert prepare("digits", "--out", tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "train-000000.tar").write_bytes(b"damaged")
    assert prepare("digits", "--out", tmp_path) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    name = "train-000001.tar"
    (tmp_path / name).write_bytes(before[name][:-1] + b"!")
    capsys.readouterr()
    assert prepare("digits", "--out", tmp_path) == 0
    assert "by its sizes; data verify reads every byte" in capsys.readouterr().err
    assert data("verify", tmp_path) == 1
    (tmp_path / name).unlink()
    assert prepare("digits", "--out", tmp_path) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_rank_that_is_not_the_last_says_so(source, tmp_path, monkeypatch, capsys):
    arguments = ("imagefolder", source, "--out", tmp_path, "--pixels", "--shard-mb", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepare(*arguments) == 0
    told = "1 of 2 shards are stored; the rank that stores the last one writes the manifest\n"
    assert capsys.readouterr().err.endswith(told)
    monkeypatch.setenv("RANK", "1")
    assert prepare(*arguments) == 0
    assert capsys.readouterr().out.startswith("train: 64 samples in 2 shards\n")


@pytest.fixture(scope="module")
def undisturbed(source, vae_path, tmp_path_factory):
    """The command's arguments, and every file that it writes when nothing happens to it."""
    arguments = ["imagefolder", source, "--vae", vae_path, "--size", 128, "--shard-mb", 0.07]
    out = tmp_path_factory.mktemp("undisturbed")
    assert prepare(*arguments, "--out", out) == 0
    return arguments, {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_goes_on(number, undisturbed, tmp_path):
    """Killed in the middle or told to leave: no finished shard is written again."""
    arguments, expected = undisturbed
    process = subprocess.Popen(
        command(*arguments, "--out", tmp_path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((tmp_path / "train-000000.record.json").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (75 if number != signal.SIGKILL else -signal.SIGKILL)
    assert not (tmp_path / "manifest.json").exists()
    if number != signal.SIGKILL:
        assert f"told to leave ({number.name}): start the command again to go on" in err
        assert "Traceback" not in err
    records = tmp_path.glob("*.record.json")
    finished = [path.with_name(path.name.replace(".record.json", ".tar")) for path in records]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
    assert 1 <= len(before) < 16

    assert prepare(*arguments, "--out", tmp_path) == 0
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
