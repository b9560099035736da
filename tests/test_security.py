"""What others write, to bucket, checkpoint, cache or MLflow, runs nothing here and leads nowhere.

launch/SECURITY.md is the threat model: a line for each that might, with the test that holds it.
"""

import ast
import hashlib
import io
import os
import pickle
import re
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.layout import COMPLETE, INDEX, complete_mark
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.checkpoint.start import read_start
from dtr_scale.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from dtr_scale.data.reader import SampleReader
from dtr_scale.engines.wrap import make_cache_private
from dtr_scale.errors import CheckpointError, DamagedCheckpointError, DataError, EngineError
from dtr_scale.evaluation import kept
from dtr_scale.evaluation.comparison.page import comparison_files
from dtr_scale.jobs.bench.data import _webdataset
from dtr_scale.jobs.recorded import read_run_dir
from dtr_scale.jobs.tracking import _training_id
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.prepare.listing import coco
from dtr_scale.storage.folder import open_folder
from tests.support.runs import ROOT, tiny

MODULES = sorted((ROOT / "dtr_scale").rglob("*.py"))
UNPICKLING = {"_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLERS = {"pickle.load", "pickle.loads", "pickle.Unpickler"}
OTHER_USER = 12345


class Bomb:
    """Makes a file when something unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle; that it was not loaded is checked at the end, and that it would have worked."""
    marker = tmp_path / "exploded"
    yield Bomb(marker)
    assert not marker.exists(), "a pickle was loaded"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


# What is called, wherever in the code.


def calls(path):
    """Yield (dotted name, keywords, line) of every call of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords}, node.lineno


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def oddity(name, keywords):
    """Return what is wrong with a call, None if nothing is."""
    last = name.rpartition(".")[2]
    if name in UNPICKLERS:
        return "a pickle is loaded"
    if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
        return "torch.load without weights_only=True"
    if "allow_pickle" in keywords and not is_constant(keywords["allow_pickle"], False):
        return "allow_pickle"
    if "trust_remote_code" in keywords or name.endswith("hub.load"):
        return "code of a hub"
    if last in ("extractall", "extract", "unpack_archive"):
        return "an archive is unpacked"
    if "shell" in keywords or name in ("os.system", "os.popen"):
        return "a shell"
    if name in ("eval", "exec", "compile", "__import__") or name.startswith("yaml."):
        return "text is run"
    return None


def imports(path):
    """Yield (name, line) of every module that a module imports, or imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # Of `pickle`, which may tell a size by `dumps`, nothing by another name.
            name = "_pickle" if node.module == "pickle" else node.module
            yield name, node.lineno


def test_no_code_unpickles_unpacks_or_runs_text():
    for path in MODULES:
        found = [f"{line}: {name}" for name, line in imports(path) if name in UNPICKLING]
        found += [f"{line}: {told}" for name, k, line in calls(path) if (told := oddity(name, k))]
        assert not found, path


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)", "torch.load(p, weights_only=flag)", "np.load(p, allow_pickle=True)",
        "tar.extractall(p)", "subprocess.run(c, shell=True)", "eval(text)", "torch.hub.load(x)",
        "pickle.loads(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert [what for name, k, _ in calls(tmp_path / "a.py") if (what := oddity(name, k))]


# The bucket of the data.


@pytest.fixture
def digits_folder(tmp_path):
    folder = open_folder(tmp_path / "digits")
    return folder, prepare_digits(folder)


@pytest.mark.parametrize(
    "name", ["../a.tar", "/etc/a.tar", "a/b.tar", ".a.tar", "pipe:id.tar", "a"]
)
def test_a_manifest_names_no_file_outside_its_folder(digits_folder, name):
    folder, _ = digits_folder
    content = folder.read_bytes(MANIFEST_NAME).replace(b"train-000000.tar", name.encode())
    folder.write_bytes(MANIFEST_NAME, content)
    with pytest.raises(DataError, match=r"shards\.0\.name"):
        read_manifest(folder)


def pickled_array(bomb):
    content = io.BytesIO()
    np.save(content, np.array([bomb], object), allow_pickle=True)
    return content.getvalue()


def floats():
    content = io.BytesIO()
    np.save(content, np.zeros((500, 4)))
    return content.getvalue()


def below_zero():
    content = io.BytesIO()
    np.save(content, np.full((500, 4), -8))
    return content.getvalue()


@pytest.mark.parametrize("make", [pickled_array, lambda b: floats(), lambda b: below_zero()])
def test_an_index_of_a_shard_holds_places_and_no_pickle(digits_folder, bomb, make):
    """With the right hash: who writes to the bucket writes the manifest, too."""
    folder, manifest = digits_folder
    content = make(bomb)
    folder.write_bytes(manifest.shards[0].index_name, content)
    digest = hashlib.sha256(content).hexdigest()
    first = replace(manifest.shards[0], index_sha256=digest)
    write_manifest(folder, manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}))
    with pytest.raises(DataError, match=r"train-000000\.index\.npy .* fix"):
        SampleReader(folder, read_manifest(folder)).read(0, 0)


def test_a_shard_of_other_bytes_is_an_error_of_one_line(digits_folder):
    folder, manifest = digits_folder
    content = bytes(manifest.shards[0].bytes)
    folder.write_bytes(manifest.shards[0].name, content)
    digest = hashlib.sha256(content).hexdigest()
    first = replace(manifest.shards[0], sha256=digest)
    write_manifest(folder, manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}))
    with pytest.raises(DataError, match=r"train-000000\.tar .* an array at byte"):
        SampleReader(folder, read_manifest(folder)).read(0, 0)


def test_the_benchmark_beside_webdataset_unpickles_no_member(tmp_path, bomb):
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    members = {"a.npy": array.getvalue(), "a.cls": b"1", "a.pickle": pickle.dumps(bomb)}
    members |= {"a.pyd": pickle.dumps(bomb), "a.pth": pickle.dumps(bomb)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    numbers, labels = next(_webdataset([tmp_path / "a.tar"], 1))
    assert np.asarray(numbers).shape == (1, 3) and list(labels) == [1]


@pytest.mark.parametrize("name", ["../private.png", "/home/private.png", "a/../../private.png"])
def test_a_listing_names_no_picture_outside_its_folder(tmp_path, name):
    (tmp_path / "images").mkdir()
    told = {"annotations": [], "images": [{"id": 1, "file_name": name}]}
    (tmp_path / "told.json").write_text(str(told).replace("'", '"'))
    with pytest.raises(DataError, match="is not below"):
        coco(tmp_path / "images", tmp_path / "told.json")


# A checkpoint.


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained")
    assert tiny(digits, run_dir) == 0
    return run_dir


def test_a_checkpoint_that_is_a_pickle_is_damaged(trained, tmp_path, bomb):
    place = shutil.copytree(trained / "checkpoints" / "step_00000004", tmp_path / "step_00000004")
    for name in ("rank_00000.safetensors", INDEX):
        content = (place / name).read_bytes()
        payload = pickle.dumps(bomb)
        (place / name).write_bytes(payload.ljust(len(content), b"\0"))
        with pytest.raises(DamagedCheckpointError):
            reader = Catalog(open_folder(tmp_path)).reader(4)
            reader.read(reader.shapes)
        (place / name).write_bytes(content)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "rank_00000.safetensors/../x"])
@pytest.mark.parametrize("where", ["files", "pieces"])
def test_a_checkpoint_names_no_file_outside_its_folder(trained, tmp_path, name, where):
    """With a mark that fits: who writes a checkpoint writes its mark, too."""
    place = shutil.copytree(trained / "checkpoints" / "step_00000004", tmp_path / "a")
    own = b"rank_00000.safetensors"
    index = (place / INDEX).read_bytes()
    head, files, rest = index.partition(b'"files"')
    before, tensors, after = rest.partition(b'"tensors"')
    if where == "files":
        before = before.replace(own, name.encode())
    else:
        after = after.replace(own, name.encode())
    index = head + files + before + tensors + after
    (place / INDEX).write_bytes(index)
    (place / COMPLETE).write_bytes(complete_mark(index))
    with pytest.raises(DamagedCheckpointError, match="file '"):
        reader = CheckpointReader(open_folder(place))
        reader.read(reader.shapes)


def test_a_universal_checkpoint_runs_nothing(tmp_path, bomb):
    place = tmp_path / "zero" / "a.weight"
    place.mkdir(parents=True)
    torch.save({"param": bomb}, place / "fp32.pt")
    with pytest.raises(CheckpointError, match="is no part of weights"):
        read_start(tmp_path, "universal")


# Caches.


def test_a_kept_array_that_is_a_pickle_is_computed_again(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr(kept, "_folder", lambda: tmp_path / "features")
    computed = {"a": np.arange(3)}
    kept.kept_arrays("what", lambda: computed)
    (path,) = (tmp_path / "features").glob("*.npz")
    np.savez(path, a=np.array([bomb], object))
    assert kept.kept_arrays("what", lambda: computed)["a"].tolist() == [0, 1, 2]


@pytest.fixture
def compile_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    return tmp_path / "torchinductor_me"


def test_compiled_code_is_kept_in_a_folder_of_this_user_alone(compile_cache):
    make_cache_private()
    assert compile_cache.stat().st_mode & 0o777 == 0o700
    compile_cache.chmod(0o777)
    make_cache_private()
    assert compile_cache.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can give a folder away")
@pytest.mark.parametrize("kind", ["folder", "link", "link to a folder"])
def test_compiled_code_of_another_user_is_not_loaded(compile_cache, tmp_path, monkeypatch, kind):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if kind == "folder":
        theirs.rename(compile_cache)
        os.chown(compile_cache, OTHER_USER, -1)
    else:
        compile_cache.symlink_to(theirs)
        os.lchown(compile_cache, OTHER_USER if kind == "link" else 0, -1)
        os.chown(theirs, OTHER_USER if kind == "link to a folder" else 0, -1)
    with pytest.raises(EngineError, match=r"belongs to another user.*TORCHINDUCTOR_CACHE_DIR"):
        make_cache_private()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    make_cache_private()


# MLflow, and the page of a comparison.


def test_an_id_beside_the_checkpoints_cannot_leave_mlflows_filter(tmp_path):
    folder = open_folder(tmp_path)
    folder.write_bytes("training.json", b'{"training": "x\' OR tags.a = \'b"}')
    made = _training_id(folder)
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert folder.read_json("training.json") == {"training": made} and _training_id(folder) == made


def test_a_name_of_a_run_is_no_markup_on_the_page(trained, tmp_path):
    runs = []
    for name in ("a", "b"):
        place = shutil.copytree(trained, tmp_path / name)
        config = (place / "config.json").read_text()
        hostile = re.sub(r'"name": "[^"]*"', '"name": "<script>alert(1)</script>"', config, count=1)
        (place / "config.json").write_text(hostile)
        runs.append(read_run_dir(place))
    assert runs[0].name.startswith("<script>")
    assert b"<script>alert" not in comparison_files(runs)["index.html"]


# The threat model.


def test_each_line_of_the_threat_model_has_its_test():
    text = (ROOT / "launch" / "SECURITY.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and "---" not in row]
    lines = [row for row in rows if not row.startswith("| who writes")]
    assert len(lines) >= 15
    for line in lines:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", line)
        assert named, f"no test: {line}"
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), line
