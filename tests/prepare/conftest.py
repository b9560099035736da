"""Pictures to prepare, and an autoencoder."""

import pytest

from tests.support.pictures import class_folders, small_autoencoder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three classes of 23, 9 and 14 pictures."""
    root = tmp_path_factory.mktemp("source")
    return class_folders(root / "train", {"n03": 14, "n01": 23, "n02": 9})


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return small_autoencoder(tmp_path_factory.mktemp("vae") / "vae")
