"""List pictures in folders, JSON and tars, and read them by the list."""

import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from dtr_scale.errors import DataError
from dtr_scale.prepare.images import read_picture
from dtr_scale.prepare.listing import coco, image_folder, one_class, webdataset
from tests.support.pictures import as_bytes, captioned, class_folders, noise_picture, tar_of


def assert_shows(picture, image):
    """Assert that a listed picture is this one, at the size it has."""
    size = min(image.size)
    left = (image.width - size) // 2
    array = read_picture(picture.path, size, picture.offset, picture.length)
    expected = np.asarray(image)[:, left : left + size].transpose(2, 0, 1)
    np.testing.assert_array_equal(array, expected)


def test_class_folders_are_sorted_and_deep(tmp_path, warnings_of):
    root = class_folders(tmp_path / "src", {"n02": 2, "n01": 1, "n10": 1})
    (root / "n02" / "deeper").mkdir()
    (root / "n02" / "deeper" / "X.JPEG").write_bytes(as_bytes(noise_picture(9), "JPEG"))
    (root / "n02" / "notes.txt").write_text("no picture")
    listing = image_folder(root)
    assert listing.class_names == ("n01", "n02", "n10")
    found = [(picture.name, picture.label) for picture in listing.splits["train"]]
    expected = ["n01/000.png", "n02/000.png", "n02/001.png", "n02/deeper/X.JPEG", "n10/000.png"]
    assert found == list(zip(expected, [0, 1, 1, 1, 2], strict=True))
    assert_shows(listing.splits["train"][1], noise_picture(0))
    (warning,) = warnings_of("dtr_scale.prepare.listing")
    assert "1 files have no picture's ending: n02/notes.txt" in warning


def test_train_and_val_are_splits_with_the_same_classes(tmp_path):
    class_folders(tmp_path / "train", {"a": 2, "b": 1})
    class_folders(tmp_path / "val", {"b": 2})
    listing = image_folder(tmp_path)
    assert {split: len(pictures) for split, pictures in listing.splits.items()} == {
        "train": 3,
        "val": 2,
    }
    assert {picture.label for picture in listing.splits["val"]} == {1}
    assert list(image_folder(tmp_path, "train").splits) == ["train"]
    assert image_folder(tmp_path / "val", "val").class_names == ("b",)
    with pytest.raises(DataError, match="has no split 'test'; accepted: train, val"):
        image_folder(tmp_path, "test")
    class_folders(tmp_path / "val", {"c": 1})
    with pytest.raises(DataError, match=r"c/000.png is in none of the class folders; acc.*a, b"):
        image_folder(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, {"bus": 1, "train": 1})
    assert image_folder(tmp_path).class_names == ("bus", "train")


def test_imagenets_tar_of_tars_is_read_where_it_is(tmp_path):
    """As ILSVRC2012_img_train.tar: a tar per class, whose members name no folder."""
    inner = {
        wnid: tar_of(
            {f"{wnid}_{i}.JPEG": as_bytes(noise_picture(10 * k + i)) for i in (2, 1, 0)[: 3 - k]}
        )
        for k, wnid in enumerate(["n01443537", "n01440764"])
    }
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of({f"{wnid}.tar": content for wnid, content in inner.items()}))
    listing = image_folder(path)
    assert listing.class_names == ("n01440764", "n01443537")
    pictures = listing.splits["train"]
    assert [(p.label, p.name.rpartition("/")[2]) for p in pictures] == [
        (0, "n01440764_1.JPEG"),
        (0, "n01440764_2.JPEG"),
        (1, "n01443537_0.JPEG"),
        (1, "n01443537_1.JPEG"),
        (1, "n01443537_2.JPEG"),
    ]
    assert_shows(pictures[0], noise_picture(11))
    assert_shows(pictures[4], noise_picture(2))


def test_the_tar_and_its_folders_are_the_same_listing(tmp_path):
    root = class_folders(tmp_path / "src", {"n1": 2, "n2": 1})
    tars = {
        f"{folder.name}.tar": tar_of({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
        for folder in sorted(root.iterdir())
    }
    (tmp_path / "all.tar").write_bytes(tar_of(tars))
    assert image_folder(root).sha256("train") == image_folder(tmp_path / "all.tar").sha256("train")


def test_what_is_hidden_is_left_out(tmp_path, warnings_of):
    root = class_folders(tmp_path / ".hidden" / "src", {"a": 1, "b": 1})
    class_folders(root, {".cache": 1, "b/.thumbnails": 1})
    (root / "b" / "._000.png").write_bytes(b"resource fork")
    (root / ".DS_Store").write_bytes(b"")
    listing = image_folder(root)
    assert listing.class_names == ("a", "b")
    assert [(p.name, p.label) for p in listing.splits["train"]] == [
        ("a/000.png", 0),
        ("b/000.png", 1),
    ]
    assert [p.name for p in one_class(root).splits["train"]] == ["a/000.png", "b/000.png"]
    assert not warnings_of("dtr_scale.prepare.listing")


def test_of_tars_the_pictures_alone_are_listed(tmp_path):
    inner = {
        "./x.JPEG": b"",
        "notes.txt": b"",
        "._x.JPEG": b"",
        "x/.cache/y.png": b"",
        "x/y.png": b"",
    }
    tars = {
        "./b.tar": tar_of(inner),
        "./._b.tar": b"",
        ".cache/a.tar": b"",
        "./a.tar": tar_of(inner),
    }
    (tmp_path / "all.tar").write_bytes(tar_of(tars))
    listing = image_folder(tmp_path / "all.tar")
    assert listing.class_names == ("a", "b")
    names = [picture.name for picture in listing.splits["train"]]
    assert names == ["a/./x.JPEG", "a/x/y.png", "b/./x.JPEG", "b/x/y.png"]

    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(tar_of({"./x.jpg": b"", "._x.jpg": b""}))
    (tmp_path / "tars" / "._0.tar").write_bytes(b"resource fork")
    assert len(webdataset(tmp_path / "tars").splits["train"]) == 1


def test_one_class_takes_the_whole_tree(tmp_path):
    class_folders(tmp_path, {"00000": 2, "01000": 1})
    listing = one_class(tmp_path)
    assert [p.name for p in listing.splits["train"]] == [
        "00000/000.png",
        "00000/001.png",
        "01000/000.png",
    ]
    assert (listing.num_classes, listing.class_names) == (1, ())


def test_coco_has_the_first_five_captions(tmp_path):
    captions = {"b.jpg": [f"caption {i} " for i in range(7)], "a.jpg": ["one", "two"]}
    pictures = {name: as_bytes(noise_picture(i)) for i, name in enumerate(captions)}
    root = captioned(tmp_path / "coco", pictures, captions)
    a, b = coco(root / "images", root / "captions.json").splits["train"]
    assert (a.name, a.captions) == ("a.jpg", ("one", "two"))
    assert b.captions == tuple(f"caption {i}" for i in range(5))
    assert_shows(b, noise_picture(0))


def test_coco_without_captions_is_one_class(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "x.jpg"}],
        "annotations": [{"id": 5, "image_id": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    listing = coco(tmp_path, tmp_path / "instances.json", "val")
    assert listing.splits["val"][0].captions == ()
    assert not listing.has_captions


def test_webdataset_tars_are_read_by_offset(tmp_path):
    members = {}
    for i in range(4):
        members |= {
            f"dir.x/{i}.jpg": as_bytes(noise_picture(i)),
            f"dir.x/{i}.cls": b"%d" % (3 * i),
            f"dir.x/{i}.txt": f"caption {i}\n\nanother".encode(),
        }
    names = list(members)
    for number in range(2):
        some = names[6 * number : 6 * number + 6]
        tar = tar_of({name: members[name] for name in some})
        (tmp_path / f"{number}.tar").write_bytes(tar)
    listing = webdataset(tmp_path, with_captions=True)
    pictures = listing.splits["train"]
    assert [p.label for p in pictures] == [0, 3, 6, 9]
    assert listing.num_classes == 10
    assert pictures[2].captions == ("caption 2", "another")
    assert pictures[2].name == "1.tar/dir.x/2.jpg"
    for i, picture in enumerate(pictures):
        assert_shows(picture, noise_picture(i))
    (only,) = webdataset(tmp_path / "1.tar", "val", num_classes=12).splits.values()
    assert len(only) == 2 and only[0].captions == ()
    assert webdataset(tmp_path, num_classes=12).num_classes == 12


def test_a_map_beside_a_picture_is_not_the_picture(tmp_path):
    members = {"x.depth.png": as_bytes(noise_picture(1)), "x.jpg": as_bytes(noise_picture(2))}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    (picture,) = webdataset(tmp_path).splits["train"]
    assert picture.name == "a.tar/x.jpg"
    assert_shows(picture, noise_picture(2))


def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    root = class_folders(tmp_path / "src", {os.fsdecode(b"caf\xe9"): 1, "tea": 1})
    listing = image_folder(root)
    assert listing.class_names == ("caf\\xe9", "tea")
    assert [picture.label for picture in listing.splits["train"]] == [0, 1]
    content = {
        "images": [{"id": 1, "file_name": "x.jpg"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "half \ud83d"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    (picture,) = coco(tmp_path, tmp_path / "captions.json").splits["train"]
    assert picture.captions == ("half ?",)


def test_endings_may_be_in_capitals(tmp_path):
    members = {"x.JPG": as_bytes(noise_picture(1)), "x.CLS": b"3", "x.TXT": b"a caption"}
    (tmp_path / "A.TAR").write_bytes(tar_of(members))
    (picture,) = webdataset(tmp_path, with_captions=True).splits["train"]
    assert (picture.label, picture.captions) == (3, ("a caption",))
    assert_shows(picture, noise_picture(1))
    tar = tar_of({"N1.TAR": tar_of({"x.JPG": as_bytes(noise_picture(2))})})
    (tmp_path / "all").write_bytes(tar)
    listing = image_folder(tmp_path / "all")
    assert listing.class_names == ("N1",)
    assert_shows(listing.splits["train"][0], noise_picture(2))


def test_the_hash_of_a_listing_knows_names_classes_and_captions(tmp_path):
    root = class_folders(tmp_path / "src", {"a": 2, "b": 1})
    before = image_folder(root).sha256("train")
    assert image_folder(root).sha256("train") == before
    (root / "a" / "000.png").rename(root / "a" / "002.png")
    assert image_folder(root).sha256("train") != before


def _empty(path):
    path.mkdir()


def _flat(path):
    path.mkdir()
    noise_picture(0).save(path / "x.png")


def _beside(path):
    class_folders(path, {"a": 1})
    noise_picture(0).save(path / "x.png")


def _json(content):
    return lambda path: path.write_text(content)


def _tar(members):
    return lambda path: path.write_bytes(tar_of(members))


def _gz(path):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "x.jpg")


PICTURE = as_bytes(Image.new("RGB", (8, 8)))
ONE = '{"images": [{"id": 1, "file_name": "x.jpg"}, {"id": 2, "file_name": "y.jpg"}], '


@pytest.mark.parametrize(
    ("make", "listing", "message"),
    [
        (lambda path: None, image_folder, "source is no folder; fix: give the local folder"),
        (_empty, image_folder, "has no folders of classes; fix: .* source ffhq"),
        (_flat, image_folder, "has no folders of classes"),
        (_beside, image_folder, "x.png is in none of the class folders; accepted: 1 classes, a"),
        (_empty, one_class, "split train of the ffhq has no pictures"),
        (_json("{"), image_folder, r"cannot be listed \(ReadError.*accepted: a folder of classes"),
        (_tar({"x.jpg": PICTURE}), image_folder, "has no pictures"),
        (_json("{"), coco, r"cannot be listed \(JSONDecodeError: .*accepted: a COCO JSON"),
        (_json('{"info": 3}'), coco, r"cannot be listed \(KeyError: 'annotations'\)"),
        (_json("[1]"), coco, r"cannot be listed \(TypeError: "),
        (
            _json(ONE + '"annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}'),
            coco,
            "1 of 2 pictures have no caption, such as y.jpg; accepted: all or none",
        ),
        (_empty, webdataset, "has no .tar files; fix"),
        (_gz, webdataset, "accepted: an uncompressed webdataset tar"),
        (_tar({"x.json": b"{}"}), webdataset, "sample x has no picture, only .json; accepted"),
        (_tar({"x.jpg": PICTURE, "x.cls": b"cat"}), webdataset, "ValueError: invalid literal"),
        (
            _tar({"x.jpg": PICTURE, "x.cls": b"1", "y.jpg": PICTURE}),
            webdataset,
            r"1 of 2 pictures have no class \(.cls\), such as source/y.jpg; accepted",
        ),
        (
            _tar({"x.jpg": PICTURE, "x.cls": b"7"}),
            lambda path: webdataset(path, num_classes=5),
            "--num-classes=5 is too few: class 7 occurs",
        ),
        (
            _tar({"x.jpg": PICTURE, "x.cls": b"-1"}),
            webdataset,
            "source: sample x is of class -1; accepted: 0, 1",
        ),
        (
            _tar({"x.jpg": PICTURE, "x.cls": b"10000000000000000000"}),
            webdataset,
            "sample x is of class 10000000000000000000; accepted: 0, 1, 2, ..., 999999",
        ),
        (
            _tar({"x.jpg": PICTURE, "x.png": PICTURE}),
            webdataset,
            "source: x.jpg and x.png are pictures of one sample; accepted: one of them",
        ),
        (_tar({"x.depth.png": PICTURE}), webdataset, "sample x has no picture, only .depth.png"),
        (
            _tar({"x.jpg": PICTURE}),
            lambda path: webdataset(path, with_captions=True),
            "sample x has no caption; fix: add x.txt",
        ),
    ],
)
def test_what_cannot_be_listed_is_one_line(tmp_path, make, listing, message):
    path = tmp_path / "source"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        if listing is coco:
            coco(tmp_path, path)
        else:
            listing(path)
    assert "\n" not in str(caught.value)
