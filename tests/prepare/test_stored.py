"""What is stored with a picture: latents of both views, captions, tokens, classes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from dtr_scale.data.manifest import NULL_CONTEXT_NAME, read_manifest, write_manifest
from dtr_scale.errors import DataError
from dtr_scale.prepare.encode import PosteriorEncoder, TextEncoder
from dtr_scale.prepare.images import read_picture
from dtr_scale.prepare.inspection import evenly_spread, read_samples, verify
from dtr_scale.prepare.listing import coco, image_folder
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import (
    as_bytes,
    captioned,
    noise_picture,
    small_clip,
)
from tests.support.preparations import SIZE, contents, preparation, stop_after

CPU = torch.device("cpu")


def test_latents_of_both_views_are_stored(source, vae_path, folder):
    encoder = PosteriorEncoder(str(vae_path), SIZE, CPU)
    manifest = preparation(source, folder, encoder).run().manifest
    assert manifest is not None and manifest == read_manifest(folder)
    assert manifest.encoder == encoder.record
    assert (manifest.stored_shape, manifest.dtype) == ((2, 2, 4, 4, 4), "float16")
    x_start, labels = read_samples(folder, manifest, "train", evenly_spread(manifest, "train", 46))
    assert np.bincount(labels).tolist() == [23, 9, 14]
    pictures = np.stack([read_picture(p.path, SIZE) for p in image_folder(source).splits["train"]])
    expected = encoder.means(encoder.encode(pictures)).astype(np.float64) * 0.18215
    np.testing.assert_allclose(manifest.channel_mean, expected.mean((0, 2, 3)), atol=2e-4)
    np.testing.assert_allclose(manifest.channel_std, expected.std((0, 2, 3)), atol=2e-4)
    order = np.lexsort(x_start.reshape(46, -1).T[:1])
    expected_order = np.lexsort(expected.reshape(46, -1).T[:1])
    np.testing.assert_allclose(x_start[order], expected[expected_order], atol=2e-3)


def test_moved_weights_are_the_same_weights(source, vae_path, tmp_path):
    folder = open_folder(tmp_path / "out")
    encoder = PosteriorEncoder(str(vae_path), SIZE, CPU)
    preparation(source, folder, encoder, leaving=stop_after(4)).run()
    (tmp_path / "moved").symlink_to(vae_path)
    moved = PosteriorEncoder(str(tmp_path / "moved"), SIZE, CPU)
    assert preparation(source, folder, moved).run().manifest is not None


def test_captions_are_stored_with_their_tokens(folder, tmp_path):
    captions = {
        f"{i}.png": [f"picture {i}, caption {j}" for j in range(5 - i % 2)] for i in range(9)
    }
    pictures = {name: as_bytes(noise_picture(i)) for i, name in enumerate(captions)}
    root = captioned(tmp_path / "coco", pictures, captions)
    listing = coco(root / "images", root / "captions.json")
    text_encoder = TextEncoder(str(small_clip(tmp_path / "clip")), "", CPU)
    manifest = (
        preparation(listing, folder, text_encoder=text_encoder, shard_bytes=10**5).run().manifest
    )
    assert manifest is not None
    assert (manifest.context_shape, manifest.text_encoder) == ((77, 32), text_encoder.record)
    assert not [problem for *_, problem in verify(folder, manifest) if problem]
    folder.get(NULL_CONTEXT_NAME, tmp_path / "null.npy")
    null = np.load(tmp_path / "null.npy")
    np.testing.assert_array_equal(null, text_encoder.encode([""])[0])

    found = {}
    for shard in manifest.shards:
        tar = folder.read_bytes(shard.name)
        folder.get(shard.index_name, tmp_path / "index.npy")
        for _, label, start, count in np.load(tmp_path / "index.npy"):
            tokens = np.frombuffer(tar, np.float16, count * 77 * 32, start).reshape(-1, 77, 32)
            text = _captions_before(tar, start)
            assert (label, len(text)) == (0, count)
            expected = text_encoder.encode(text)
            np.testing.assert_allclose(tokens, expected, rtol=2e-2, atol=2e-2)
            found[text[0]] = text
    assert sorted(found.values()) == sorted(captions.values())

    before = contents(folder)
    folder.remove(NULL_CONTEXT_NAME)
    again = preparation(listing, folder, text_encoder=text_encoder, shard_bytes=10**5)
    assert again.run().manifest == manifest
    assert contents(folder) == before
    folder.remove(NULL_CONTEXT_NAME)
    write_manifest(folder, manifest.model_copy(update={"null_context_sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"null_context.npy was lost, and made again it is not"):
        preparation(listing, folder, text_encoder=text_encoder, shard_bytes=10**5).run()
    assert not folder.exists(NULL_CONTEXT_NAME)


def _captions_before(tar, start):
    """Return the captions that lie in a tar before the tokens at `start`."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        members = [m for m in opened if m.name.endswith(".captions.json") and m.offset_data < start]
        file = opened.extractfile(members[-1])
        assert file
        return json.loads(file.read())
