"""Micro-batches are functions of (seed, position): however split, wherever started, by whomever."""

import hashlib
import io
import itertools
import multiprocessing
import signal
import subprocess
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.data.batch import BatchAssembler, MicroBatch
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import SampleReader
from dtr_scale.data.synthetic import SyntheticSource
from dtr_scale.diffusion.timesteps import TimestepSampler
from dtr_scale.errors import DataError
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.randomness import KeyedStream, keyed_generator
from dtr_scale.storage.folder import open_folder
from tests.support.processes import PATIENCE_SECONDS
from tests.support.shards import write_data

SEED, BATCH = 11, 24
DRAWS = ("class_dropout_prob", "horizontal_flip", "conditioning")


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = open_folder(tmp_path_factory.mktemp("digits"))
    prepare_digits(folder)
    return folder


@pytest.fixture
def reader(digits_folder):
    reader = SampleReader(digits_folder, read_manifest(digits_folder))
    yield reader
    reader.close()


@pytest.fixture(autouse=True)
def _no_worker_is_left():
    """On a busy machine one may still be starting 5 s after `close`, which waits no longer."""
    yield
    for worker in multiprocessing.active_children():
        worker.join(PATIENCE_SECONDS)
        assert not worker.is_alive()


def _loader(samples, *, seed=SEED, batch=BATCH, num_lanes=1, **options):
    boundaries = np.linspace(0, 1000, 9).astype(np.int64)
    what: dict[str, Any] = {"class_dropout_prob": 0.2} | {
        k: options.pop(k) for k in DRAWS if k in options
    }
    assembler = BatchAssembler(
        samples,
        GlobalOrder(samples.shard_samples, seed, window_shards=2, num_lanes=num_lanes),
        seed=seed,
        global_batch_size=batch,
        draw_timesteps=TimestepSampler(seed, boundaries, batch),
        **what,
    )
    reading: dict[str, Any] = {"micro_batch_size": batch} | options
    return BatchLoader(assembler, **reading)


def _steps(loader, num_steps):
    """Return the micro-batches of some steps, joined to one."""
    taken = list(itertools.islice(loader, num_steps * loader.grad_accum_steps))
    return MicroBatch(*(torch.cat(tensors) for tensors in zip(*taken, strict=True)))


def _assert_equal(found, expected):
    for name, one, other in zip(MicroBatch._fields, found, expected, strict=True):
        assert torch.equal(one, other), name


def test_fields_have_their_shapes_and_types(reader):
    batch = next(_loader(reader, horizontal_flip=True))
    assert batch.x_start.shape == batch.noise.shape == (BATCH, 1, 8, 8)
    assert batch.t.shape == batch.cluster.shape == batch.y.shape == (BATCH,)
    assert [tensor.dtype for tensor in batch] == [torch.float32] * 2 + [torch.int64] * 3
    assert torch.equal(batch.t // 125, batch.cluster)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (2, 12), (3, 4), (4, 1)])
@pytest.mark.parametrize(("salt", "num_lanes"), [(0, 1), (3, 1), (3, 4), (0, 12)])
def test_the_split_changes_nothing(reader, world_size, micro_batch_size, salt, num_lanes):
    options = {"horizontal_flip": True, "num_lanes": num_lanes}
    whole = _loader(reader, **options)
    whole.seek(1488, salt)  # two steps before the end of the epoch: this batch spans two epochs
    expected = _in_place(whole, next(whole))
    parts, places = [], []
    for rank in range(world_size):
        part = _loader(
            reader,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            **options,
        )
        part.seek(1488, salt)
        parts.append(_steps(part, 1))
        places.append(part.places.ravel())
    found = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    order = np.argsort(np.concatenate(places))
    _assert_equal([tensor[order] for tensor in found], expected)


def _in_place(loader, batch):
    """Return a whole batch in the order of its places."""
    return [tensor[np.argsort(loader.places.ravel())] for tensor in batch]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("num_lanes", "micro"), [(1, 256), (32, 32), (64, 8)])
def test_a_batch_may_need_more_shards_than_stay_open(tmp_path, num_lanes, micro, num_workers):
    samples = [StoredSample(np.full((1, 2, 2), i % 251, np.uint8), i % 10) for i in range(1000)]
    told = {"encoding": "pixels", "shape": (1, 2, 2), "dtype": "uint8", "num_classes": 10}
    manifest = write_data(open_folder(tmp_path), samples, 10, **told)
    reader = SampleReader(open_folder(tmp_path), manifest, window_shards=2)
    options = {"batch": 256, "num_lanes": num_lanes, "class_dropout_prob": 0.0}
    with _loader(reader, micro_batch_size=micro, num_workers=num_workers, **options) as loader:
        located, _ = loader.peek(0, 64)
        assert len(located) == 64
        epoch = list(itertools.islice(loader, 3 * 256 // micro))
    values = torch.cat([batch.x_start[:, 0, 0, 0] for batch in epoch])
    labels = torch.cat([batch.y for batch in epoch])
    numbers = {(value % 251, value % 10) for value in range(1000)}
    assert set(zip(values.int().tolist(), labels.tolist(), strict=True)) <= numbers


def test_seeking_equals_running_there(reader):
    loader = _loader(reader, micro_batch_size=12, horizontal_flip=True)
    run = _steps(loader, 5)
    loader.seek(3 * BATCH)
    _assert_equal(_steps(loader, 2), [tensor[3 * BATCH :] for tensor in run])


def test_a_salt_redraws_all_but_the_order(reader):
    loader = _loader(reader, class_dropout_prob=0.0)
    first = next(loader)
    loader.seek(0, salt=1)
    second = next(loader)
    assert torch.equal(first.x_start, second.x_start)
    assert torch.equal(first.y, second.y)
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.t, second.t)


def test_workers_change_nothing_and_leave_signals_to_the_parent(reader):
    expected = _steps(_loader(reader, micro_batch_size=8, horizontal_flip=True), 4)
    on_child_exit = signal.getsignal(signal.SIGCHLD)
    with _loader(reader, micro_batch_size=8, horizontal_flip=True, num_workers=2) as loader:
        first = _steps(loader, 2)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:  # as a launcher would: not from their parent
            for name in ("TERM", "INT", "USR1", "HUP"):
                subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        second = _steps(loader, 2)
        assert all(worker.is_alive() for worker in workers)
        assert signal.getsignal(signal.SIGCHLD) == on_child_exit
    _assert_equal([torch.cat(pair) for pair in zip(first, second, strict=True)], expected)


def test_a_worker_reports_bad_data_in_one_line(tmp_path):
    folder = open_folder(tmp_path)
    manifest = prepare_digits(folder)
    folder.remove("train-000002.tar")
    with (
        _loader(SampleReader(folder, manifest), num_workers=1) as loader,
        pytest.raises(DataError, match=r"^shard train-000002\.tar .* is missing") as caught,
    ):
        _steps(loader, 70)
    assert "\n" not in str(caught.value)


def test_a_killed_worker_is_an_error_not_a_hang(reader):
    with _loader(reader, num_workers=1, prefetch=2) as loader:
        next(loader)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(DataError, match=r"a data worker was killed .*data\.num_workers"):
            _steps(loader, 10)


def test_labels_are_dropped_at_their_rate(reader):
    y = _steps(_loader(reader, batch=500, class_dropout_prob=0.1), 6).y
    share = (y == 10).float().mean()
    assert abs(share - 0.1) < 0.02
    kept = _steps(_loader(reader, batch=500, class_dropout_prob=0.0), 3).y
    assert torch.equal(kept.bincount(), torch.tensor(_label_counts(reader)))


def _label_counts(reader):
    labels = [reader.read(s, i)[1] for s, n in enumerate(reader.shard_samples) for i in range(n)]
    return np.bincount(labels).tolist()


def test_pixels_are_flipped_along_their_last_axis(reader):
    plain = next(_loader(reader, batch=300)).x_start
    mixed = next(_loader(reader, batch=300, horizontal_flip=True)).x_start
    kept = (mixed == plain).flatten(1).all(1)
    flipped = (mixed == plain.flip(-1)).flatten(1).all(1)
    assert bool((kept | flipped).all())
    assert 0.4 < flipped.float().mean() < 0.6


def test_noise_is_standard_normal_and_differs_by_sample():
    samples = SyntheticSource((1, 8, 8), num_classes=3, num_samples=50)
    noise = _steps(_loader(samples, batch=200), 2).noise
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert len({tuple(sample.flatten().tolist()) for sample in noise}) == 400


@pytest.fixture
def posterior(tmp_path):
    """40 samples whose mean is their label, negated in the mirror; std 0.25, scale 0.5."""
    views = np.array([1.0, -1.0]).reshape(2, 1, 1, 1)
    samples = []
    for label in range(40):
        mean = views * label * np.ones((1, 4, 4))
        array = np.stack([mean, np.full_like(mean, 0.25)], 1).astype(np.float16)
        samples.append(StoredSample(array, label))
    told = {"encoding": "posterior", "shape": (1, 4, 4), "dtype": "float16", "num_classes": 40}
    folder = open_folder(tmp_path)
    manifest = write_data(folder, samples, 16, **told, scale_factor=0.5)
    reader = SampleReader(folder, manifest)
    yield reader
    reader.close()


def test_a_posterior_is_sampled_afresh_from_the_view_that_was_drawn(posterior):
    batch = _steps(_loader(posterior, batch=40, horizontal_flip=True, class_dropout_prob=0.0), 20)
    means = batch.x_start.flatten(1).mean(1)
    mirrored = means < 0
    large = batch.y > 2
    assert 0.4 < mirrored[large].float().mean() < 0.6
    sign = torch.where(mirrored, -1.0, 1.0)
    eps = (batch.x_start / 0.5 - (sign * batch.y)[:, None, None, None])[large] / 0.25
    assert abs(eps.mean()) < 0.03
    assert abs(eps.std() - 1) < 0.03
    one = batch.x_start[(batch.y == 30) & ~mirrored]
    assert len(torch.unique(one[:, 0, 0, 0])) == len(one) > 3


@pytest.fixture(params=[True, False], ids=["null text", "no null text"])
def texts(request, tmp_path):
    """30 samples of 1 to 3 captions, whose tokens tell sample and caption."""
    samples = []
    for i in range(30):
        context = np.array([[[i, k + 1]] * 3 for k in range(i % 3 + 1)], np.float16)
        captions = tuple(f"caption {k}" for k in range(len(context)))
        samples.append(StoredSample(np.full((1, 2, 2), i, np.uint8), 0, captions, context))
    folder = open_folder(tmp_path)
    null_hash = None
    if request.param:
        content = io.BytesIO()
        np.save(content, np.full((3, 2), -7, np.float16))
        folder.write_bytes("null_context.npy", content.getvalue())
        null_hash = hashlib.sha256(content.getvalue()).hexdigest()
    told = {"encoding": "pixels", "shape": (1, 2, 2), "dtype": "uint8", "context_shape": (3, 2)}
    manifest = write_data(folder, samples, 10, **told, null_context_sha256=null_hash)
    reader = SampleReader(folder, manifest)
    yield reader
    reader.close()


def test_a_caption_is_drawn_for_each_position(texts):
    options = {"batch": 30, "conditioning": "text"}
    batch = _steps(_loader(texts, class_dropout_prob=0.0, **options), 40)
    sample, caption = batch.x_start[:, 0, 0, 0], batch.y[:, 0, 1]
    assert batch.y.dtype == torch.float32
    assert torch.equal(batch.y[:, :, 0], sample[:, None].expand(-1, 3))
    for captions in (1, 2, 3):
        drawn = caption[sample % 3 == captions - 1].long().bincount(minlength=4)[1:]
        assert (drawn > 0).sum() == captions
        assert (drawn[:captions] / drawn.sum() - 1 / captions).abs().max() < 0.1
    dropped = _steps(_loader(texts, class_dropout_prob=0.5, **options), 20).y
    null = torch.from_numpy(texts.null_condition())
    assert torch.equal(null, torch.full((3, 2), -7.0 if texts.manifest.null_context_sha256 else 0))
    assert 0.4 < (dropped == null).flatten(1).all(1).float().mean() < 0.6


def test_an_altered_null_text_is_refused(texts, tmp_path):
    if texts.manifest.null_context_sha256:
        open_folder(tmp_path).write_bytes("null_context.npy", b"something else")
        with pytest.raises(DataError, match=r"null_context\.npy .* the manifest says sha256"):
            texts.null_condition()


def test_decoding_a_batch_is_decoding_its_samples(posterior):
    loader = _loader(posterior, batch=40, horizontal_flip=True)
    batch, positions = next(loader), np.arange(40)
    mirrored = KeyedStream(SEED, "flip").uniform(positions) < 0.5
    located = GlobalOrder(posterior.shard_samples, SEED, window_shards=2).samples(positions)
    for x_start, (shard, index), position in zip(batch.x_start, located, positions, strict=True):
        stored, _ = posterior.read(shard, index)
        generator = keyed_generator(SEED, "posterior", int(position))
        mean, std = stored[int(mirrored[position])].astype(np.float32)
        mean += std * generator.standard_normal(mean.shape, dtype=np.float32)
        expected = mean * np.float32(0.5)  # the scale; the shift is 0
        np.testing.assert_array_equal(x_start.numpy(), expected)
