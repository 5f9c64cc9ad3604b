"""What data hold: fingerprints, classes and their labels in a network, samples that are held out and trained on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import pictures
from support.shards import png, write

from datamodules.images import Images, image_folder
from datamodules.inventory import find_duplicates, fingerprint_source, match_labels
from datamodules.readers.arrays import Arrays
from datamodules.readers.folder import Folder
from datamodules.readers.shards import Shards

KNOWN = {"cat": 2, "dog": 0, "Great Eel": 1}


def folder_of_classes(root: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 6) -> Path:
    """Return a folder of different pictures in a folder for each class."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number, picture in enumerate(pictures(count, 8, seed=place)):
            Image.fromarray(picture).save(root / name / f"{number}.png")
    return root


# Labels


def test_labels_are_matched_by_the_names_of_the_classes():
    assert match_labels("train", ["cat", "dog", "great_eel"], KNOWN, 3).tolist() == [2, 0, 1]
    assert match_labels("train", ["dog", "Great Eel", "Cat"], KNOWN, 3) is None
    assert match_labels("train", ["dog", "cat"], KNOWN, 3).tolist() == [0, 2]


@pytest.mark.parametrize("known", [{}, {"n01": 0, "n02": 1, "n03": 2}])
def test_classes_without_known_names_are_taken_in_their_order(known):
    assert match_labels("train", None, known, 3) is match_labels("train", ["cat", "dog"], known, 3) is None
    with pytest.raises(
        ValueError, match=r"data\.train has 4 classes \(a, b, c, d\), the teacher has 3; remove folders"
    ):
        match_labels("train", ["a", "b", "c", "d"], known, 3)


def test_a_class_that_the_network_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"classes that the teacher does not have: fox; it has cat, dog, Great Eel\."):
        match_labels("holdout", ["cat", "dog", "fox"], KNOWN, 4)


def test_samples_have_the_labels_of_the_network(tmp_path):
    data = image_folder(str(folder_of_classes(tmp_path)), 8, holdout_images=4, batch_size=2)
    data.match_classes(KNOWN, 3)
    for split in ("train", "holdout"):
        source, samples = data.source(split), data.dataset(split)
        assert samples.__getitems__(list(range(len(source))))["label"].tolist() == [
            KNOWN[source.file(index).parent.name] for index in range(len(source))
        ]


def test_splits_of_different_classes_are_refused(tmp_path):
    roots = [
        folder_of_classes(tmp_path / name, names) for name, names in (("a", ("cat", "dog")), ("b", ("dog", "eel")))
    ]
    data = Images(*(lambda root=root: Folder(str(root), 8) for root in roots), batch_size=2)
    with pytest.raises(ValueError, match=r"data\.train has the classes cat, dog, data\.holdout dog, eel"):
        data.match_classes({}, 3)


def test_a_label_beyond_the_classes_of_the_network_is_refused():
    data = Images(lambda: Arrays(pictures(4), np.arange(4)), lambda: Arrays(pictures(2), np.arange(2)), batch_size=2)
    data.match_classes({}, 4)
    with pytest.raises(ValueError, match=r"data\.train has the label 3, and the teacher has 3 classes"):
        data.match_classes({}, 3)


# The log


def test_the_log_has_classes_passed_over_files_and_duplicates(tmp_path):
    root = folder_of_classes(tmp_path)
    for number in range(6):
        shutil.copy(root / "cat" / "0.png", root / "dog" / f"copy {number}.png")
    (root / "dog" / "a.heic").touch()
    (root / "moth").symlink_to("missing")
    (root / "owl.txt").symlink_to("missing")
    data = image_folder(str(root), 8, holdout_images=6, batch_size=2)
    held_out = sum(data.source("holdout").raw(index) == (root / "cat" / "0.png").read_bytes() for index in range(6))
    classes, passed_over, duplicates = data.describe()
    assert classes == "data has 2 classes: 0 cat, 1 dog"
    assert (
        passed_over == "data has other files: .heic (1); links that lead nowhere: 2, such as moth; none of them is read"
    )
    assert 0 < held_out < 7 and f"are too good: {held_out} of 6; the first: " in duplicates


def test_sets_without_common_samples_have_no_duplicates(tmp_path):
    train, holdout = Arrays(pictures(8)), Arrays(pictures(3, seed=1))
    assert find_duplicates(train, holdout) == []
    assert find_duplicates(train, Arrays(train.images[5:])) == [(f"image {n}", f"image {n + 5}") for n in range(3)]


# Fingerprints


def shards(root: Path) -> Shards:
    write(root / "0.tar", [{"__key__": str(n), "png": png(n), "txt": str(n)} for n in range(4)])
    return Shards(str(root), 6)


SOURCES: dict[str, Callable[[Path], object]] = {
    "folder": lambda root: Folder(str(folder_of_classes(root)), 8),
    "shards": shards,
    "arrays": lambda root: Arrays(pictures(8)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_fingerprint_does_not_depend_on_where_data_lie(tmp_path, kind, data_folder_of_its_own):
    assert fingerprint_source(SOURCES[kind](tmp_path / "a")) == fingerprint_source(SOURCES[kind](tmp_path / "b"))


def test_a_fingerprint_changes_with_names_sizes_and_contents(tmp_path):
    root = folder_of_classes(tmp_path, count=3)
    found = [fingerprint_source(Folder(str(root), 8))]
    for change in (
        lambda: Image.fromarray(pictures(1, 8, seed=9)[0]).save(root / "cat" / "1.png"),
        lambda: (root / "cat" / "1.png").rename(root / "cat" / "9.png"),
        lambda: (root / "cat" / "9.png").unlink(),
    ):
        change()
        found.append(fingerprint_source(Folder(str(root), 8)))
    assert len(set(found)) == 4
