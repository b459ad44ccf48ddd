"""Data loading: each layout that users have on disk, and each way in which it can be wrong.

A tree is thousands of hard links to tiny JPEGs: it meets the official counts without real data.
Trees that several tests read are built once; a test that spoils a tree builds or links its own.

    DML_TEST_DATA=PATH pytest tests/test_data.py     # also counts the real PATH/CUB_200_2010
"""

import functools
import io
import math
import os
import random
import re
import shutil
import struct
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from common import (
    AUGMENT,
    UserError,
    balanced_subset,
    class_balanced_batches,
    load_batches,
    load_dataset,
    load_run_data,
    pair_batches,
    random_stream,
    shuffled_batches,
    split_validation,
)

# train classes, train images, test classes, test images (inshop: the queries)
COUNTS = {
    "cub": (100, 5864, 100, 5924),
    "cub2010": (100, 2990, 100, 3043),
    "cars": (98, 8054, 98, 8131),
    "sop": (11318, 59551, 11316, 60502),
    "inshop": (3997, 25882, 3985, 14218),
}
PHOTO_SETS = [*COUNTS, "folder"]


# ---- helpers: load and check


def load(name, root, **options):
    """load_dataset; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset(name, str(root), **options)


def load_error(name, root, **options):
    """The one line of the UserError that load_dataset must raise."""
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("ignore")
        load_dataset(name, str(root), **options)
    return one_line(caught.value)


def load_warning(name, root, **options):
    """The sets, and the one line of the single UserWarning that load_dataset must give."""
    with pytest.warns(UserWarning) as caught:
        sets = load_dataset(name, str(root), **options)
    assert len(caught) == 1
    return sets, one_line(caught[0].message)


def one_line(error):
    text = str(error)
    assert text.strip() and "\n" not in text
    return text


def check_set(dataset, classes, images):
    """The contract of any set: counts, and int64 labels that use each of 0..C-1."""
    assert len(dataset) == len(dataset.labels) == len(dataset.paths) == images
    assert len(dataset.classes) == classes
    assert dataset.labels.dtype == torch.int64
    assert torch.equal(dataset.labels.unique(), torch.arange(classes))


def check_counts(name, train, test):
    train_classes, train_images, test_classes, test_images = COUNTS[name]
    check_set(train, train_classes, train_images)
    check_set(test, test_classes, test_images)


def true_classes(dataset, class_of):
    """The true classes in a set, read off its paths by class_of; one label must be one class."""
    pairs = set(zip(dataset.labels.tolist(), map(class_of, dataset.paths)))
    found = {true for _, true in pairs}
    assert len(pairs) == len(found) == len(dataset.classes)
    return found


def folder_of(path):
    return os.path.basename(os.path.dirname(path))


def number_of(path):
    """12 for x/00012.jpg"""
    return int(os.path.splitext(os.path.basename(path))[0])


def bird_of(path):
    """12 for .../012.Yellow_headed_Blackbird/x.jpg"""
    return int(folder_of(path).split(".")[0])


def numbers_in(text):
    return {int(n) for n in re.findall(r"\d+", text.replace(",", ""))}


# ---- helpers: make files


@pytest.fixture
def root(tmp_path):
    """An empty folder that is removed after the test: pytest would keep the trees of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@functools.cache
def tiny_jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (200, 30, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_photos(root, names):
    """One tiny JPEG and hard links to it."""
    source, folders = None, set()
    for name in names:
        path = os.path.join(root, name)
        folder = os.path.dirname(path)
        if folder not in folders:
            os.makedirs(folder, exist_ok=True)
            folders.add(folder)
        if source is None:
            source = path
            Path(path).write_bytes(tiny_jpeg())
        else:
            os.link(source, path)


def spoil(path, content):
    """Give one file another content; its hard links keep theirs."""
    path = Path(path)
    path.unlink()
    path.write_bytes(content)


def write_lines(path, lines):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def shares(total, parts):
    """total as `parts` integers that differ by one at most."""
    return [total // parts + (k < total % parts) for k in range(parts)]


def bird_names(edition, train, test):
    """NNN.Bird_N/file.jpg; the photo's number in the file name is longer in the 2010 edition."""
    first_id = {2010: 2950160000, 2011: 796000}[edition]
    return [
        f"{k:03d}.Bird_{k}/Bird_{k}_{i + 1:04d}_{first_id + i}.jpg"
        for k, n in enumerate(shares(train, 100) + shares(test, 100), start=1)
        for i in range(n)
    ]


def make_cub2011(root):
    names = bird_names(2011, 5864, 5924)
    numbered = list(enumerate(names, start=1))
    make_photos(root / "images", names)
    write_lines(root / "images.txt", (f"{i} {name}" for i, name in numbered))
    write_lines(root / "image_class_labels.txt", (f"{i} {int(name[:3])}" for i, name in numbered))
    write_lines(root / "train_test_split.txt", (f"{i} {i % 2}" for i, _ in numbered))
    write_lines(root / "classes.txt", (f"{k} {k:03d}.Bird_{k}" for k in range(1, 201)))
    return root


def make_cub2010(root):
    names = bird_names(2010, 2990, 3043)
    make_photos(root / "images", names)
    write_lines(root / "lists/files.txt", names)
    write_lines(root / "lists/train.txt", names[:6000:2])  # the classification split, 3000 + 3033
    write_lines(root / "lists/test.txt", names[1:6000:2] + names[6000:])
    return root


def make_folder(root, classes, each=2):
    make_photos(root, [f"{c}/{i}.jpg" for c in classes for i in range(each)])
    return root


def car_classes():
    """The class, 1..196, of each of the 16185 photos of CARS196, in no order."""
    sizes = shares(8054, 98) + shares(8131, 98)
    classes = [k for k, n in enumerate(sizes, start=1) for _ in range(n)]
    random.Random(0).shuffle(classes)
    return classes


def car_name(k):
    return f"Maker Model {k:03d}"


def mat_part(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def mat_array(kind, columns, *parts, name=b""):
    shape = mat_part(6, struct.pack("<II", kind, 0)) + mat_part(5, struct.pack("<ii", 1, columns))
    return mat_part(14, shape + mat_part(1, name) + b"".join(parts))


@functools.cache
def mat_value(value):
    if isinstance(value, str):
        return mat_array(4, len(value), mat_part(16, value.encode()))
    return mat_array(9, 1, mat_part(2, bytes([value])))


def save_annotations(path, **columns):
    """A MATLAB 5 file with the 1 x N struct array `annotations`, its fields in the order given.

    By hand, because scipy.io.savemat takes seconds for the 16185 structs of CARS196.
    """
    rows = list(zip(*columns.values()))
    fields = b"".join(name.encode().ljust(32, b"\0") for name in columns)
    parts = [mat_part(5, struct.pack("<i", 32)), mat_part(1, fields)]
    parts += [mat_value(value) for row in rows for value in row]
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")
    path.write_bytes(header + mat_array(2, len(rows), *parts, name=b"annotations"))


def boxes(count):
    return dict.fromkeys(["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"], [1] * count)


def make_cars_folders(root):
    """Roth's layout: images/<class name>/*.jpg."""
    sizes = shares(8054, 98) + shares(8131, 98)
    classes = enumerate(sizes, start=1)
    make_photos(root / "images", (f"{car_name(k)}/{i}.jpg" for k, n in classes for i in range(n)))
    return root


def garment(item, photo):
    kind, number = divmod(item, 100)
    return f"img/kind{kind:02d}/id_{number:08d}/{photo + 1:02d}_1_front.jpg"


def garment_of(path):
    """The item number of a garment's path."""
    kind, number = path.split("/")[-3:-1]
    return 100 * int(kind.removeprefix("kind")) + int(number.removeprefix("id_"))


@functools.cache
def inshop_rows():
    """(path, item, status) of the 52712 photos; the items of the two halves are mixed."""
    items = random.Random(0).sample(range(7982), 7982)
    status = {item: ["train"] * n for item, n in zip(items, shares(25882, 3997))}
    for item, q, g in zip(items[3997:], shares(14218, 3985), shares(12612, 3985)):
        status[item] = ["query"] * q + ["gallery"] * g
    return [
        (garment(item, i), f"id_{item:08d}", each)
        for item in range(7982)
        for i, each in enumerate(status[item])
    ]


def write_partition(path, rows):
    padded = (f"{name:<64}{item:<16}{status}" for name, item, status in rows)
    write_lines(path, ["52712", "image_name item_id evaluation_status", *padded])


# ---- shared trees, read only


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """trees(name): the official tree of a data set, built when first asked for."""
    top = tmp_path_factory.mktemp("trees")
    build = {
        "cub": make_cub2011,
        "cub2010": make_cub2010,
        "cars": make_cars_folders,
        "sop": make_sop,
        "inshop": make_inshop,
    }

    @functools.cache
    def tree(name):
        (top / name).mkdir()
        return build[name](top / name)

    yield tree
    shutil.rmtree(top)


def make_sop(root):
    """Twelve folders; number n in folder f is class 12 n + f + 1. All but one folder are links."""
    header = "image_id class_id super_class_id path"
    lists = {"Ebay_train.txt": [header], "Ebay_test.txt": [header]}
    make_photos(root, (f"kind0_final/{n}_{i}.JPG" for n in range(1887) for i in range(6)))
    for folder in range(1, 12):
        (root / f"kind{folder}_final").symlink_to(root / "kind0_final")
    image = 0
    for k, count in enumerate(shares(59551, 11318) + shares(60502, 11316), start=1):
        number, folder = divmod(k - 1, 12)
        for i in range(count):
            image += 1
            line = f"{image} {k} {folder + 1} kind{folder}_final/{number}_{i}.JPG"
            lists["Ebay_train.txt" if k <= 11318 else "Ebay_test.txt"].append(line)
    for name, lines in lists.items():
        write_lines(root / name, lines)
    return root


def product_of(path):
    """The class of .../kind3_final/17_0.JPG, by make_sop's rule."""
    folder = int(folder_of(path).removeprefix("kind").removesuffix("_final"))
    return 12 * int(os.path.basename(path).split("_")[0]) + folder + 1


def make_inshop(root):
    """The paths of inshop_rows: 80 kinds of 100 items. All but one kind are links."""
    make_photos(root, (garment(item, i) for item in range(100) for i in range(8)))
    for kind in range(1, 80):
        (root / f"img/kind{kind:02d}").symlink_to("kind00")
    write_partition(root / "Eval/list_eval_partition.txt", inshop_rows())
    return root


def link_tree(tree, root, folders=None, own=None):
    """The tree again, its class folders as links: the first `folders`, and `own` as real files."""
    (root / "images").mkdir()
    for path in tree.iterdir():
        if path.name != "images":
            (root / path.name).symlink_to(path)
    for name in sorted(os.listdir(tree / "images"))[:folders]:
        photos = tree / "images" / name
        if name == own:
            make_photos(root / "images" / name, sorted(os.listdir(photos)))
        else:
            (root / "images" / name).symlink_to(photos)
    return root


# ---- where data is looked for


@pytest.mark.parametrize(
    "name, place",
    [
        ("cub", ""),
        ("cub", "CUB_200_2011"),
        ("cub", "cub"),
        ("cub2010", ""),
        ("cub2010", "CUB_200_2010"),
        ("cub2010", "cub2010"),
        ("cars", ""),
        ("cars", "stanford_cars"),
        ("cars", "cars"),
        ("inshop", "inshop"),  # sop, and inshop in ROOT itself: the tests of their layouts
    ],
)
def test_root_itself_and_the_two_named_folders_in_it_are_tried(trees, root, name, place):
    if place:
        (root / place).symlink_to(trees(name))
    train, test = load(name, root if place else trees(name))
    check_counts(name, train, test)
    assert test.gallery is None


@pytest.mark.parametrize("name", PHOTO_SETS)
def test_nothing_found_is_an_error_that_lists_what_was_found(root, name):
    write_lines(root / "holidays.txt", ["beach"])
    assert "holidays" in load_error(name, root)


@pytest.mark.parametrize("name", PHOTO_SETS)
def test_a_root_that_does_not_exist_is_an_error_that_names_it(root, name):
    assert "nowhere" in load_error(name, root / "nowhere")


@pytest.mark.parametrize("name", PHOTO_SETS)
def test_an_empty_root_is_an_error(root, name):
    load_error(name, root)


def test_without_a_root_the_environment_says_where_data_is(root, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(make_folder(root, "abcd")))
    train, _ = load_dataset("folder")
    assert train.classes == ["a", "b"]


def test_an_unknown_name_is_a_value_error(root):
    with pytest.raises(ValueError):
        load_dataset("birds", str(root))


# ---- CUB, both editions


@pytest.mark.parametrize("lists", [True, False], ids=["images.txt", "images only"])
def test_cub_splits_by_class_id_and_ignores_the_classification_split(trees, root, lists):
    (root / "images").symlink_to(trees("cub") / "images")
    train, test = load("cub", trees("cub") if lists else root)
    check_counts("cub", train, test)
    assert true_classes(train, bird_of) == set(range(1, 101))
    assert true_classes(test, bird_of) == set(range(101, 201))


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "images only"])
def test_cub2010_splits_by_class_id_and_ignores_the_classification_split(trees, root, lists):
    (root / "images").symlink_to(trees("cub2010") / "images")
    train, test = load("cub2010", trees("cub2010") if lists else root)
    check_counts("cub2010", train, test)
    assert true_classes(train, bird_of) == set(range(1, 101))
    assert true_classes(test, bird_of) == set(range(101, 201))


@pytest.mark.parametrize("lists", [True, False], ids=["images.txt", "images only"])
def test_files_that_macos_and_windows_leave_behind_are_ignored(trees, root, lists):
    folder = link_tree(trees("cub"), root, own="007.Bird_7") / "images/007.Bird_7"
    if not lists:
        (root / "images.txt").unlink()
    for name in ["._Bird_7_0001_796000.jpg", ".DS_Store", "Thumbs.db"]:
        (folder / name).write_bytes(b"no image")
        (folder.parent / name).write_bytes(b"no image")
    check_counts("cub", *load("cub", root))


@pytest.mark.parametrize("place", ["", "cub", "CUB_200_2011", "CUB_200_2010"])
def test_the_2010_edition_given_as_cub_is_an_error_that_names_cub2010(trees, root, place):
    (root / place).mkdir(exist_ok=True)
    (root / place / "images").symlink_to(trees("cub2010") / "images")
    assert "--dataset cub2010" in load_error("cub", root)


@pytest.mark.parametrize("place", ["", "cub2010", "CUB_200_2010", "CUB_200_2011"])
@pytest.mark.parametrize("lists", [True, False], ids=["images.txt", "images only"])
def test_the_2011_edition_given_as_cub2010_is_an_error_that_names_cub(trees, root, place, lists):
    (root / place).mkdir(exist_ok=True)
    for name in ["images", "images.txt"] if lists else ["images"]:
        (root / place / name).symlink_to(trees("cub") / name)
    assert re.search(r"--dataset cub\b(?!2010)", load_error("cub2010", root))


def test_with_both_editions_side_by_side_each_name_finds_its_own(trees, root):
    (root / "CUB_200_2010").symlink_to(trees("cub2010"))
    (root / "CUB_200_2011").symlink_to(trees("cub"))
    check_counts("cub2010", *load("cub2010", root))
    check_counts("cub", *load("cub", root))


def test_another_edition_in_the_root_does_not_hide_the_one_in_its_folder(trees, root):
    (root / "images").symlink_to(trees("cub2010") / "images")
    (root / "CUB_200_2011").symlink_to(trees("cub"))
    check_counts("cub2010", *load("cub2010", root))
    check_counts("cub", *load("cub", root))


def test_cub2010_counts_the_real_photos_without_a_warning():
    data = os.environ.get("DML_TEST_DATA", "")
    if not data or not os.path.isdir(os.path.join(data, "CUB_200_2010")):
        pytest.skip("DML_TEST_DATA does not name a folder with CUB_200_2010/")
    train, test = load("cub2010", data, image_size=32)
    check_counts("cub2010", train, test)
    check_image(train[0][0], 32)


# ---- counts that differ


def test_a_missing_listed_bird_is_an_error_that_names_it(trees, root):
    link_tree(trees("cub"), root, own="042.Bird_42")
    (root / "images/042.Bird_42/Bird_42_0003_796002.jpg").unlink()
    assert "Bird_42_0003_796002.jpg" in load_error("cub", root)


def test_a_missing_listed_product_is_an_error_that_names_it(trees, root):
    for path in trees("sop").iterdir():
        if path.name != "kind3_final":
            (root / path.name).symlink_to(path)
    assert "kind3_final" in load_error("sop", root)


@pytest.mark.parametrize("status, protocol", [("query", "query"), ("gallery", "gallery")])
def test_a_missing_listed_garment_is_an_error_that_names_it(trees, root, status, protocol):
    (root / "img").symlink_to(trees("inshop") / "img")
    rows = list(inshop_rows())
    last = max(i for i, row in enumerate(rows) if row[2] == status)
    rows[last] = ("img/lost.jpg", *rows[last][1:])
    write_partition(root / "list_eval_partition.txt", rows)
    assert "lost.jpg" in load_error("inshop", root, inshop_protocol=protocol)


def differing_counts(dataset_name, found_train, found_test):
    """Found and expected numbers that a line about counts may give: of a part, or of the whole."""
    _, train, _, test = COUNTS[dataset_name]
    pairs = [(found_train, train), (found_test, test), (found_train + found_test, train + test)]
    return [{found, expected} for found, expected in pairs if found != expected]


@pytest.mark.parametrize("name", ["cub", "cub2010", "cars"])
def test_fewer_than_half_the_images_is_an_error_with_both_numbers(trees, root, name):
    link_tree(trees(name), root, folders=80)
    (root / "images.txt").unlink(missing_ok=True)
    photos = len(list((root / "images").glob("*/*.jpg")))
    text = load_error(name, root)
    assert any(pair <= numbers_in(text) for pair in differing_counts(name, photos, 0))


@pytest.mark.parametrize("change", ["150 folders", "one less", "one more"])
@pytest.mark.parametrize("name", ["cub", "cub2010", "cars"])
def test_any_other_count_is_one_warning_with_both_numbers(trees, root, name, change):
    folders = sorted(os.listdir(trees(name) / "images"))
    last = folders[149] if change == "150 folders" else folders[-1]
    link_tree(trees(name), root, folders=folders.index(last) + 1, own=last)
    (root / "images.txt").unlink(missing_ok=True)
    photos = sorted((root / "images" / last).iterdir())
    if change == "one less":
        photos[0].unlink()
    if change == "one more":
        os.link(photos[0], photos[0].with_name("Bird_0099_1.jpg"))
    (train, test), text = load_warning(name, root)
    assert len(train) == COUNTS[name][1]
    assert len(test) != COUNTS[name][3]
    assert any(pair <= numbers_in(text) for pair in differing_counts(name, len(train), len(test)))


@pytest.mark.parametrize(
    "status, protocol, expected", [("train", "query", 25882), ("gallery", "gallery", 12612)]
)
def test_a_shorter_in_shop_list_is_one_warning(trees, root, status, protocol, expected):
    (root / "img").symlink_to(trees("inshop") / "img")
    rows = list(inshop_rows())
    rows.remove(next(row for row in rows if row[2] == status))
    write_partition(root / "list_eval_partition.txt", rows)
    (train, test), text = load_warning("inshop", root, inshop_protocol=protocol)
    assert len({"train": train, "query": test, "gallery": test.gallery}[status]) == expected - 1
    assert {expected - 1, expected} <= numbers_in(text) or {52711, 52712} <= numbers_in(text)


@pytest.mark.parametrize(
    "name, file, broken",
    [
        ("cub", "images.txt", "2"),
        ("cub", "images.txt", "2 Bird_2/no_class_number.jpg"),
        ("sop", "Ebay_train.txt", "2 2 2"),
        ("sop", "Ebay_train.txt", "2 two 2 a.jpg"),
        ("sop", "Ebay_test.txt", "2 2 2"),
        ("inshop", "list_eval_partition.txt", "img/2.jpg id_00000002"),
        ("inshop", "list_eval_partition.txt", "img/2.jpg two query"),
        ("inshop", "list_eval_partition.txt", "img/2.jpg id_00000002 val"),
    ],
)
def test_a_list_with_a_broken_line_is_an_error_that_names_the_list(root, name, file, broken):
    make_photos(root, ["images/001.Bird_1/1.jpg", "kind1_final/1.JPG", "img/1.jpg"])
    write_lines(root / "images.txt", ["1 001.Bird_1/1.jpg"])
    for ebay in ["Ebay_train.txt", "Ebay_test.txt"]:
        write_lines(
            root / ebay, ["image_id class_id super_class_id path", "1 1 1 kind1_final/1.JPG"]
        )
    write_partition(root / "list_eval_partition.txt", [("img/1.jpg", "id_00000001", "train")])
    with open(root / file, "a") as lines:
        lines.write(broken + "\n")
    assert file in load_error(name, root)


# ---- CARS196


def test_cars_in_the_old_layout_pools_both_halves_and_splits_by_class(root):
    pytest.importorskip("scipy.io")
    classes = car_classes()
    names = [f"car_ims/{i:06d}.jpg" for i in range(1, len(classes) + 1)]
    labelled = {"class": classes, "test": [i % 2 for i in range(len(classes))]}
    make_photos(root, names)
    save_annotations(
        root / "cars_annos.mat", relative_im_path=names, **boxes(len(classes)), **labelled
    )
    train, test = load("cars", root)
    check_counts("cars", train, test)
    assert true_classes(train, lambda p: classes[number_of(p) - 1]) == set(range(1, 99))
    assert true_classes(test, lambda p: classes[number_of(p) - 1]) == set(range(99, 197))


def make_cars_new(root, classes):
    """cars_train/ and cars_test/ both number their photos from 00001.jpg; `classes` of each."""
    for half in ["train", "test"]:
        count = len(classes[half])
        names = [f"{i:05d}.jpg" for i in range(1, count + 1)]
        make_photos(root / f"cars_{half}", names)
        labelled = boxes(count) | {"class": classes[half], "fname": names}
        if half == "train":
            save_annotations(root / "devkit/cars_train_annos.mat", **labelled)
        else:  # the devkit's own list of the test half has no classes
            save_annotations(root / "devkit/cars_test_annos.mat", **boxes(count), fname=names)
            save_annotations(root / "cars_test_annos_withlabels.mat", **labelled)


def test_cars_in_the_new_layout_pools_both_halves_and_splits_by_class(root):
    pytest.importorskip("scipy.io")
    classes = {"train": car_classes()[:8144], "test": car_classes()[8144:]}

    def true_class(path):
        return classes[folder_of(path).removeprefix("cars_")][number_of(path) - 1]

    make_cars_new(root, classes)
    train, test = load("cars", root)
    check_counts("cars", train, test)
    assert true_classes(train, true_class) == set(range(1, 99))
    assert true_classes(test, true_class) == set(range(99, 197))


@pytest.mark.parametrize("instead", ["nothing", "the devkit's list"])
def test_cars_without_the_classes_of_the_test_half_is_an_error_that_says_so(root, instead):
    pytest.importorskip("scipy.io")
    make_cars_new(root, {"train": [1, 2, 150], "test": [3, 151]})
    labelled = root / "cars_test_annos_withlabels.mat"
    labelled.unlink()
    if instead != "nothing":
        shutil.copy(root / "devkit/cars_test_annos.mat", labelled)
    assert labelled.name in load_error("cars", root)


@pytest.fixture
def no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)


def test_cars_mat_files_without_scipy_are_an_error_that_names_scipy(root, no_scipy):
    make_photos(root, ["car_ims/000001.jpg"])
    (root / "cars_annos.mat").write_bytes(b"read by scipy only")
    assert "scipy" in load_error("cars", root)


def test_cars_mat_file_that_cannot_be_read_is_an_error_that_names_it(root):
    pytest.importorskip("scipy.io")
    make_photos(root, ["car_ims/000001.jpg"])
    (root / "cars_annos.mat").write_bytes(b"no mat file")
    assert "cars_annos.mat" in load_error("cars", root)


def test_cars_in_folders_of_classes_needs_no_scipy(trees, no_scipy):
    train, test = load("cars", trees("cars"))
    check_counts("cars", train, test)
    names = [car_name(k) for k in range(1, 197)]
    assert true_classes(train, folder_of) == set(names[:98])
    assert true_classes(test, folder_of) == set(names[98:])


def test_cars_in_the_kaggle_layout_pools_both_halves_and_splits_by_class(root, no_scipy):
    classes = car_classes()
    annotations = {"train": [], "test": []}
    for i, k in enumerate(classes):
        annotations["test" if i % 2 else "train"].append((f"{i // 2 + 1:05d}.jpg", k))
    for half, rows in annotations.items():
        folder = root / "car_data/car_data" / half
        make_photos(folder, (f"{car_name(k)}/{file}" for file, k in rows))
        write_lines(root / f"anno_{half}.csv", (f"{file},1,1,9,9,{k}" for file, k in rows))
    write_lines(root / "names.csv", map(car_name, range(1, 197)))
    train, test = load("cars", root)
    check_counts("cars", train, test)
    names = [car_name(k) for k in range(1, 197)]
    assert true_classes(train, folder_of) == set(names[:98])
    assert true_classes(test, folder_of) == set(names[98:])


# ---- Stanford Online Products


@pytest.mark.parametrize("layout", ["official", "roth"])
def test_sop_follows_the_ebay_lists_in_both_layouts(trees, root, layout):
    if layout == "official":
        (root / "Stanford_Online_Products").symlink_to(trees("sop"))
    else:  # images/<kind>_final/*.JPG and Info_Files/Ebay_*.txt
        (root / "Info_Files").mkdir()
        (root / "images").mkdir()
        for path in trees("sop").iterdir():
            (root / ("images" if path.is_dir() else "Info_Files") / path.name).symlink_to(path)
    train, test = load("sop", root)
    check_counts("sop", train, test)
    assert true_classes(train, product_of) == set(range(1, 11319))
    assert true_classes(test, product_of) == set(range(11319, 22635))
    assert train.paths[0].endswith(".JPG")


# ---- In-Shop


@pytest.mark.parametrize("lists, images", [("Eval", "Img/img"), ("", "img"), ("Anno", "Img/img")])
def test_inshop_reads_padded_columns_in_each_layout(trees, root, lists, images):
    (root / lists).mkdir(exist_ok=True)
    (root / images).parent.mkdir(exist_ok=True)
    (root / images).symlink_to(trees("inshop") / "img")
    partition = trees("inshop") / "Eval/list_eval_partition.txt"
    (root / lists / partition.name).symlink_to(partition)
    check_counts("inshop", *load("inshop", root))


def test_inshop_query_protocol_is_the_query_part_alone(trees):
    train, test = load("inshop", trees("inshop"), inshop_protocol="query")
    assert test.gallery is None
    for dataset, part in [(train, "train"), (test, "query")]:
        expected = {garment_of(path) for path, _, status in inshop_rows() if status == part}
        assert true_classes(dataset, garment_of) == expected


def test_inshop_gallery_shares_the_label_map_of_the_queries(trees):
    _, test = load("inshop", trees("inshop"), inshop_protocol="gallery")
    check_set(test, 3985, 14218)
    check_set(test.gallery, 3985, 12612)
    both = list(zip(test.labels.tolist(), test.paths))
    both += zip(test.gallery.labels.tolist(), test.gallery.paths)
    assert len({(label, garment_of(path)) for label, path in both}) == 3985
    assert test.classes == test.gallery.classes
    assert not set(test.paths) & set(test.gallery.paths)


def test_an_unknown_inshop_protocol_is_a_value_error(trees):
    with pytest.raises(ValueError):
        load_dataset("inshop", str(trees("inshop")), inshop_protocol="both")


@pytest.mark.parametrize(
    "lines",
    [
        ["000001.jpg 0", "000002.jpg 1"],
        ["2", "image_name  evaluation_status", "img/1.jpg  train", "img/2.jpg  val"],
    ],
    ids=["CelebA", "DeepFashion attributes"],
)
def test_another_partition_file_of_the_same_name_is_an_error_that_says_so(root, lines):
    make_photos(root, ["img/1.jpg", "img/2.jpg", "img/000001.jpg", "img/000002.jpg"])
    write_lines(root / "list_eval_partition.txt", lines)
    text = load_error("inshop", root)
    assert "list_eval_partition.txt" in text and "In-Shop" in text


def test_an_empty_partition_file_is_an_error_that_names_it(root):
    (root / "list_eval_partition.txt").touch()
    assert "list_eval_partition.txt" in load_error("inshop", root)


# ---- folder


@pytest.mark.parametrize("count", [4, 5, 10, 11])
def test_folder_trains_on_the_first_half_of_the_sorted_classes(root, count):
    names = [f"class {chr(ord('a') + k)}" for k in range(count)]
    train, test = load("folder", make_folder(root, reversed(names)))
    half = math.ceil(count / 2)
    check_set(train, half, 2 * half)
    check_set(test, count - half, 2 * (count - half))
    assert train.classes == names[:half]
    assert test.classes == names[half:]
    for dataset in (train, test):
        for path, label in zip(dataset.paths, dataset.labels.tolist()):
            assert Path(path).parent.name == dataset.classes[label]
    assert test.gallery is None


def test_folder_takes_train_and_test_as_they_are(root):
    make_folder(root / "train", ["cat", "dog", "zebra"], each=3)
    make_folder(root / "test", ["ant", "bee"], each=4)
    train, test = load("folder", root)
    check_set(train, 3, 9)
    check_set(test, 2, 8)
    assert train.classes == ["cat", "dog", "zebra"]
    assert test.classes == ["ant", "bee"]


def test_folder_ignores_what_is_no_image_and_reads_any_case(root):
    make_folder(root, ["a", "b", "c", "d"])
    (root / "README.txt").write_text("notes")
    (root / "a/notes.txt").write_text("notes")
    (root / "a/._0.jpg").write_bytes(b"no image")
    (root / "a/0.jpg").rename(root / "a/0.JPEG")
    Image.new("RGB", (12, 10)).save(root / "a/2.PNG")
    train, _ = load("folder", root)
    names = sorted(Path(path).name for path in train.paths)
    assert names == ["0.JPEG", "0.jpg", "1.jpg", "1.jpg", "2.PNG"]


def test_a_class_name_in_both_train_and_test_is_an_error_that_names_it(root):
    make_folder(root / "train", ["cat", "dog", "zebra"])
    make_folder(root / "test", ["ant", "zebra"])
    assert "zebra" in load_error("folder", root)


@pytest.mark.parametrize(
    "classes", [["a"], ["train/a", "train/b"], ["."]], ids=["one class", "no test", "no classes"]
)
def test_a_folder_that_cannot_be_split_is_an_error(root, classes):
    load_error("folder", make_folder(root, classes))


def test_class_folders_without_images_are_an_error(root):
    for name in "abcd":
        (root / name).mkdir()
        (root / name / "notes.txt").write_text("notes")
    load_error("folder", root)


# ---- one image


def check_image(image, size):
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1


def make_set(root, images, image_size):
    """The training set of the pictures {file name: PIL image}, dealt out to two classes."""
    make_folder(root, ["y", "z"])
    for k, (name, image) in enumerate(images.items()):
        folder = root / "ab"[k % 2]
        folder.mkdir(exist_ok=True)
        image.save(folder / name)
    return load("folder", root, image_size=image_size)[0]


def pick(dataset, name):
    """The position of a file name in a set."""
    return [Path(p).name for p in dataset.paths].index(name)


def noise_image(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "mode, name",
    [
        ("RGB", "x.jpg"),
        ("L", "x.jpg"),
        ("CMYK", "x.jpg"),
        ("L", "x.png"),
        ("1", "x.png"),
        ("LA", "x.png"),
        ("RGBA", "x.png"),
        ("P", "x.png"),
    ],
)
def test_each_colour_mode_comes_out_as_three_channels(root, mode, name):
    colour = Image.new("RGB", (40, 30), (250, 250, 250) if mode == "1" else (200, 40, 90))
    picture = colour.quantize() if mode == "P" else colour.convert(mode)
    assert picture.mode == mode
    images = {name: picture, "other.png": colour}
    train = make_set(root, images, image_size=16)
    image, label = train[pick(train, name)]
    check_image(image, 16)
    assert isinstance(label, int)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))[0, 0] / 255)
    assert (image.mean((1, 2)) - expected).abs().max() < 0.02


def test_an_image_has_the_size_asked_for_or_224(root):
    make_folder(root, "abcd")
    check_image(load("folder", root, image_size=20)[0][0][0], 20)
    check_image(load("folder", root)[1][0][0], 224)


def test_a_wide_image_is_cropped_in_the_middle_and_not_squashed(root):
    pixels = np.zeros((30, 90, 3), dtype=np.uint8)
    for third in range(3):  # red, green, blue
        pixels[:, 30 * third : 30 * (third + 1), third] = 255
    picture = Image.fromarray(pixels)
    train = make_set(root, {"wide.png": picture, "tall.png": picture.rotate(90, expand=True)}, 14)
    for i in range(2):
        red, green, blue = train[i][0].mean((1, 2))
        assert green > 0.95 and red < 0.05 and blue < 0.05


# ---- the cache


SHAPES = [(64, 64), (80, 40), (40, 80), (9, 7), (33, 300)]


def shapes_set(root):
    images = {f"{i}.png": noise_image(i, w, h) for i, (w, h) in enumerate(SHAPES)}
    images |= {"a.jpg": noise_image(8, 50, 60), "b.png": noise_image(9, 40, 30).convert("L")}
    return make_set(root, images, image_size=28)


def test_an_image_is_bit_equal_cached_or_not(root):
    train = shapes_set(root)
    before = [train[i] for i in range(len(train))]
    assert train.cache(1.0) is True
    for i, (image, label) in enumerate(before):
        assert torch.equal(train[i][0], image) and train[i][1] == label


def test_a_cached_set_does_not_read_its_files_again(root):
    train = shapes_set(root)
    before = train[0][0]
    assert train.cache(1.0) is True
    Path(train.paths[0]).unlink()
    assert torch.equal(train[0][0], before)


def test_the_cache_holds_the_shorter_side_at_256_224ths_of_the_image_size(root):
    images = {f"{i}.png": noise_image(i, 70, 70) for i in range(10)}
    train = make_set(root, images, image_size=28)
    gigabytes = 10 * 3 * 32 * 32 / 1e9
    assert train.cache(0.9 * gigabytes) is False
    assert train.cache(1.2 * gigabytes) is True


def test_without_room_for_the_cache_images_are_read_at_each_access(root):
    train = shapes_set(root)
    before = [train[i][0] for i in range(len(train))]
    assert train.cache(1e-9) is False
    assert all(torch.equal(train[i][0], image) for i, image in enumerate(before))


def bad_bytes():
    buffer = io.BytesIO()
    noise_image(0, 64, 64).save(buffer, "JPEG")
    whole = buffer.getvalue()
    return {"text": b"no image", "empty": b"", "cut": whole[: len(whole) // 2]}


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_a_file_that_cannot_be_decoded_is_an_error_that_names_it(root, kind):
    make_folder(root, "abcd")
    spoil(root / "b/1.jpg", bad_bytes()[kind])
    train, _ = load("folder", root, image_size=16)
    bad = [str(Path(p).relative_to(root)) for p in train.paths].index("b/1.jpg")
    with pytest.raises(UserError, match=r"b/1\.jpg") as on_access:
        train[bad]
    with pytest.raises(UserError, match=r"b/1\.jpg") as in_cache:
        train.cache(1.0)
    one_line(on_access.value), one_line(in_cache.value)
    check_image(train[1 - bad % 2][0], 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_decoded_is_the_same_error_in_a_worker(root, workers):
    make_folder(root, "abcd")
    spoil(root / "b/1.jpg", b"no image")
    train, _ = load("folder", root, image_size=16)
    with pytest.raises(UserError, match=r"b/1\.jpg") as caught:
        list(load_batches(train, [torch.arange(4)], seed=0, epoch=0, workers=workers))
    one_line(caught.value)


# ---- batches of indices


@pytest.mark.parametrize("count, size, batches", [(10, 3, 3), (9, 3, 3), (2, 3, 1), (3, 3, 1)])
def test_shuffled_batches_are_full_parts_of_a_permutation(count, size, batches):
    found = shuffled_batches(count, size, seed=0, epoch=0)
    assert [len(b) for b in found] == [min(size, count)] * batches
    indices = torch.cat(found)
    assert indices.dtype == torch.int64
    assert len(indices.unique()) == len(indices)
    assert 0 <= indices.min() and indices.max() < count


def labels_of(sizes):
    """sizes[k] images of class k, mixed."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def shuffled(seed, epoch):
    return torch.stack(shuffled_batches(100, 10, seed, epoch))


def balanced(seed, epoch):
    return torch.stack(class_balanced_batches(labels_of([10] * 10), 10, 2, seed, epoch)[:3])


def paired(seed, epoch):
    return torch.cat(pair_batches(labels_of([10] * 10), 10, seed, epoch))


@pytest.mark.parametrize("batches", [shuffled, balanced, paired])
def test_batches_are_a_function_of_seed_and_epoch_alone(batches):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    once = batches(0, 0)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(batches(0, 0), once)
    others = [batches(0, 1), batches(1, 0), batches(1, 1)]
    assert not any(torch.equal(once, other) for other in others)
    assert not torch.equal(others[0], others[1])  # never seed + epoch


@pytest.mark.parametrize("sizes, batch_size, each", [
    (sizes, batch_size, each)
    for sizes in ([10] * 10, [1, 2, 3, 4, 5, 30], [4] * 5, [1] * 50 + [8] * 5)
    for batch_size, each in ((4, 2), (10, 2), (12, 4))
    if sum(n >= each for n in sizes) >= batch_size // each])       # else: the error below
def test_balanced_batches_hold_p_classes_of_k_images(sizes, batch_size, each):
    labels = labels_of(sizes)
    batches = class_balanced_batches(labels, batch_size, each, seed=0, epoch=0)
    assert batches
    for batch in batches:
        assert batch.dtype == torch.int64
        classes, counts = labels[batch].unique(return_counts=True)
        assert len(classes) == batch_size // each
        assert counts.tolist() == [each] * len(classes)
    indices = torch.cat(batches)
    assert len(indices.unique()) == len(indices)


def test_balanced_batches_use_most_of_an_even_set():
    batches = class_balanced_batches(labels_of([10] * 20), 20, 2, seed=0, epoch=0)
    assert sum(map(len, batches)) >= 0.7 * 200


@pytest.mark.parametrize(
    "sizes, batch_size, each",
    [([9] * 4, 10, 2), ([1] * 50, 4, 2), ([3] * 9 + [8], 8, 4), ([9] * 9, 9, 2), ([9] * 9, 2, 4)],
    ids=["few classes", "single images", "one large class", "no multiple", "below one class"],
)
def test_balanced_batches_that_cannot_be_made_are_an_error(sizes, batch_size, each):
    with pytest.raises(UserError) as caught:
        class_balanced_batches(labels_of(sizes), batch_size, each, seed=0, epoch=0)
    one_line(caught.value)


@pytest.mark.parametrize("sizes", [[10] * 10, [1, 2, 3, 4, 5, 30], [2] * 7, [1] * 50 + [8] * 5])
@pytest.mark.parametrize("batch_size", [2, 6, 112])
def test_pairs_are_two_images_of_a_class_and_every_image_leads_one(sizes, batch_size):
    labels = labels_of(sizes)
    batches = pair_batches(labels, batch_size, seed=0, epoch=0)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 0 < len(batches[-1]) <= batch_size and all(b.dtype == torch.int64 for b in batches)
    first, second = torch.cat(batches).view(-1, 2).T
    assert torch.equal(labels[first], labels[second]) and (first != second).all()
    assert sorted(first.tolist()) == [i for i, y in enumerate(labels.tolist()) if sizes[y] > 1]


def test_the_last_batch_of_pairs_may_be_smaller():
    sizes = [len(batch) for batch in pair_batches(labels_of([9]), 4, seed=0, epoch=0)]
    assert sizes == [4, 4, 4, 4, 2]


def test_partners_are_uniform_over_the_other_images_and_the_order_is_shuffled():
    stats = pytest.importorskip("scipy.stats")
    labels = labels_of([5, 1, 3, 2])
    partners, places = torch.zeros(11, 11), torch.zeros(11, 10)
    for seed in range(400):
        first, second = torch.cat(pair_batches(labels, 6, seed, epoch=0)).view(-1, 2).T
        partners[first, second] += 1
        places[first, torch.arange(10)] += 1
    for row in range(11):
        others = (labels == labels[row]) & (torch.arange(11) != row)
        assert partners[row][~others].sum() == 0
        if others.any():
            for counts in (partners[row][others], places[row]):
                assert counts.sum() == 400
                assert len(counts) == 1 or stats.chisquare(counts.tolist()).pvalue > 1e-4


@pytest.mark.parametrize("sizes, batch_size", [([1] * 9, 4), ([9] * 4, 5)], ids=["single", "odd"])
def test_pairs_that_cannot_be_made_are_an_error(sizes, batch_size):
    with pytest.raises(UserError) as caught:
        pair_batches(labels_of(sizes), batch_size, seed=0, epoch=0)
    one_line(caught.value)


# ---- batches of images


def noise_set(root, cached):
    images = {f"{i}.png": noise_image(i, 40 + i, 50 - i) for i in range(12)}
    train = make_set(root, images, image_size=16)
    assert train.cache(1.0 if cached else 1e-9) is cached
    return train


def views(dataset, batches, seed=0, epoch=0, **options):
    """{index: image} of one epoch, after a look at each batch."""
    found = {}
    loaded = list(load_batches(dataset, batches, seed, epoch, **options))
    assert len(loaded) == len(batches)
    for (images, labels, indices), batch in zip(loaded, batches):
        assert torch.equal(indices, batch)
        assert torch.equal(labels, dataset.labels[batch])
        for i, image in zip(indices.tolist(), images):
            check_image(image, 16)
            found[i] = image
    return found


def same_views(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "read"])
def test_views_are_bit_equal_for_any_number_of_workers(root, cached):
    train = noise_set(root, cached)
    batches = shuffled_batches(12, 4, seed=0, epoch=0)
    alone = views(train, batches)
    assert same_views(alone, views(train, batches, workers=1))
    assert same_views(alone, views(train, batches, workers=3))


def test_the_loaders_threads_compute_with_one_thread_and_the_caller_with_its_own(root, monkeypatch):
    train, seen = noise_set(root, cached=True), []
    monkeypatch.setattr(train, "view", lambda index: (seen.append(torch.get_num_threads()),
                                                      torch.zeros(3, 16, 16, dtype=torch.uint8))[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in load_batches(train, list(torch.arange(12).split(4)), augment=False, workers=2):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 12


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "read"])
def test_views_do_not_depend_on_batching_or_on_global_random_state(root, cached):
    train = noise_set(root, cached)
    torch.manual_seed(1)
    in_order = views(train, list(torch.arange(12).split(4)))
    torch.manual_seed(2)
    assert same_views(in_order, views(train, list(torch.arange(12).flip(0).split(5))))


def test_views_change_with_seed_and_epoch_and_from_image_to_image(root):
    make_folder(root, "abcd", each=3)
    picture = noise_image(0, 40, 40)
    for path in root.glob("[ab]/*.jpg"):
        path.unlink()
        picture.save(path.with_suffix(".png"))  # the same picture six times
    train, _ = load("folder", root, image_size=16)
    batches = [torch.arange(6)]
    epochs = [views(train, batches, s, e) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    drawn = [view for epoch in epochs for view in epoch.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_without_augmentation_a_batch_is_the_images_of_the_set(root):
    train = noise_set(root, cached=False)
    plain = views(train, list(torch.arange(12).split(4)), epoch=3, augment=False)
    assert all(torch.equal(plain[i], train[i][0]) for i in range(12))


def ramp_set(root):
    """Two pictures that go from black at the left to white at the right."""
    row = np.linspace(0, 255, 64).astype(np.uint8)
    picture = Image.fromarray(np.tile(row, (64, 1)))
    return make_set(root, {"0.png": picture, "1.png": picture}, image_size=16)


def test_augmentation_mirrors_about_half_of_the_views(root):
    train = ramp_set(root)
    drawn = [v for e in range(20) for v in views(train, [torch.arange(2)], epoch=e).values()]
    mirrored = sum(bool(v[..., 0].mean() > v[..., -1].mean()) for v in drawn)
    assert 8 <= mirrored <= 32


def test_scale_sets_how_much_of_an_image_a_view_shows(root):
    train = ramp_set(root)
    spread = {}
    for scale in [(0.1, 0.1), (0.5, 0.5), (1.0, 1.0)]:
        drawn = [views(train, [torch.arange(2)], epoch=e, scale=scale)[0] for e in range(10)]
        spread[scale] = np.mean([float(v.max() - v.min()) for v in drawn])
    assert spread[0.1, 0.1] < 0.5 < spread[0.5, 0.5] < 0.85 < spread[1.0, 1.0]


# ---- square views


def square_set(root):
    train = shapes_set(root)
    train.square = True
    return train


def drawn_view(dataset, index, epoch):
    return dataset.random_view(index, random_stream(0, epoch, AUGMENT, index), (0.08, 1.0))


def test_a_square_view_is_resize_to_a_square_and_centre_crop(root):
    train = square_set(root)
    reference = Compose([PILToTensor(), Resize((32, 32), antialias=True), CenterCrop(28)])
    for i, path in enumerate(train.paths):
        with Image.open(path) as picture:
            assert torch.equal(train.view(i), reference(picture.convert("RGB")))


def test_a_square_random_view_is_a_window_of_that_image_flipped_half_of_the_time(root):
    train, found, count = square_set(root), [], 60
    for i, path in enumerate(train.paths):
        with Image.open(path) as picture:
            whole = Resize((32, 32), antialias=True)(PILToTensor()(picture.convert("RGB")))
        windows = {(top, left, flipped): window.flip(2) if flipped else window
                   for top in range(5) for left in range(5) for flipped in (False, True)
                   for window in [whole[:, top:top + 28, left:left + 28]]}
        for epoch in range(count):
            view = drawn_view(train, i, epoch)
            (match,) = [place for place, window in windows.items() if torch.equal(view, window)]
            found.append(match)
    assert len(set(found)) == 50                     # every window, either way round
    assert 0.4 < sum(flipped for _, _, flipped in found) / len(found) < 0.6


def test_square_views_are_bit_equal_cached_or_not(root):
    train = square_set(root)
    places = [(i, epoch) for i in range(len(train)) for epoch in range(8)]
    before = [train.view(i) for i in range(len(train))], [drawn_view(train, *p) for p in places]
    assert train.cache(1.0) is True
    after = [train.view(i) for i in range(len(train))], [drawn_view(train, *p) for p in places]
    for one, other in zip(before, after):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_square_changes_nothing_for_generated_images(glyphs):
    plain, square = (glyphs[0].subset(range(4)) for _ in range(2))
    square.square = True
    for i in range(4):
        assert torch.equal(plain.view(i), square.view(i))
        assert all(torch.equal(drawn_view(plain, i, e), drawn_view(square, i, e)) for e in range(9))


@pytest.mark.parametrize("square", [False, True])
def test_parts_of_a_set_stay_square(root, square):
    train, _ = load("folder", make_folder(root, "abcd"), image_size=16)
    train.square = square
    parts = [train.subset([0, 3]), *split_validation(train, 1), balanced_subset(train, 2)]
    assert [part.square for part in parts] == [square] * 4


@pytest.mark.parametrize("crop", [None, "resized", "square"])
def test_a_run_is_square_by_its_crop_flag_and_older_runs_are_not(root, crop):
    flags = Namespace(dataset="folder", data_root=str(make_folder(root, "abcd")), image_size=16,
                      seed=0, inshop_protocol="query", val_classes=0, limit_queries=0, batch_size=2)
    if crop:
        flags.crop = crop
    for changes in ({}, {"val_classes": 1}, {"limit_queries": 2}):
        sets = load_run_data(Namespace(**{**vars(flags), **changes}))
        assert [dataset.square for dataset in sets] == [crop == "square"] * 2


@pytest.mark.parametrize("limit", [0, 100])
def test_the_gallery_of_a_square_run_is_square(trees, limit):
    _, test = load_run_data(Namespace(
        dataset="inshop", data_root=str(trees("inshop")), image_size=16, seed=0, crop="square",
        inshop_protocol="gallery", val_classes=0, limit_queries=limit, batch_size=2))
    assert test.square and test.gallery.square


# ---- generated sets


@pytest.fixture(scope="module")
def glyphs():
    return load_dataset("glyphs", image_size=12)


def test_glyphs_are_50_classes_of_1500_images_on_either_side(glyphs):
    train, test = glyphs
    for dataset in glyphs:
        assert len(dataset) == len(dataset.labels) == 1500
        assert len(dataset.classes) == 50
        assert dataset.labels.dtype == torch.int64
        assert torch.equal(dataset.labels.unique(), torch.arange(50))
    assert not set(train.classes) & set(test.classes)
    assert test.gallery is None


def test_glyphs_lie_in_the_unit_range_and_differ_within_a_class(glyphs):
    for dataset in glyphs:
        rows = (dataset.labels == 0).nonzero().flatten().tolist()
        images = [dataset[i][0] for i in rows]
        for image in images:
            check_image(image, 12)
        assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_glyphs_are_a_function_of_the_seed(glyphs):
    again, other = (load_dataset("glyphs", image_size=12, seed=seed) for seed in (0, 1))
    for a, b, c in zip(glyphs, again, other):
        assert torch.equal(a.labels, b.labels)
        assert a.classes == b.classes
        for i in (0, 700, 1499):
            check_image(a[i][0], 12)
            assert a[i][1] == b[i][1] == int(a.labels[i])
            assert torch.equal(a[i][0], b[i][0])
            assert not torch.equal(a[i][0], c[i][0])


def test_glyphs_and_gaussian_do_not_touch_global_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    for name in ["glyphs", "gaussian"]:
        load_dataset(name, image_size=8)[0][0]
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize("size", [None, 12])
def test_gaussian_is_two_classes_around_a_quarter_and_three_quarters(size):
    train, test = load_dataset("gaussian", image_size=size)
    assert (len(train), len(test)) == (508, 516)
    for dataset in (train, test):
        assert len(dataset.classes) == 2
        assert dataset.labels.dtype == torch.int64
        for label, mean in enumerate([0.25, 0.75]):
            rows = (dataset.labels == label).nonzero().flatten().tolist()
            images = torch.stack([dataset[i][0] for i in rows[:40]])
            check_image(images[0], size or 32)
            assert images.mean().item() == pytest.approx(mean, abs=0.005)
            assert images.std().item() == pytest.approx(0.025, abs=0.003)


def test_gaussian_is_a_function_of_the_seed():
    first, again, other = (load_dataset("gaussian", image_size=8, seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first[7][0], again[7][0])
    assert not torch.equal(first[7][0], other[7][0])
