"""Data: each layout that users have on disk, each way in which it can be wrong, and batches.

The trees are a few tiny photos in the official layouts, so the official counts are replaced.
"""

import itertools
import os
import sys
import warnings
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, PILToTensor, RandomResizedCrop, Resize

import common
from common import UserError, epoch_batches, load_batches, load_dataset, load_run_data, pair_batches


def load(name, root, **options):
    """load_dataset; any warning is an error, but that a stray file is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*left out")
        return load_dataset(name, str(root), **options)


def load_error(name, root):
    """The one line of the UserError that load_dataset must raise."""
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("ignore")
        load_dataset(name, str(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_photos(root, names):
    for name in names:
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (200, 30, 40)).save(Path(root, name), "JPEG")
    return root


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# ---- layouts: a builder makes a tree and returns {side: {path: class}}
def birds(root, edition, lists=True, junk=False):
    """NNN.Bird_N/file.jpg; the photo's number in the file name is longer in the 2010 edition."""
    first = {"cub": 796000, "cub2010": 2950160000}[edition]
    names = {f"{k:03d}.Bird_{k}/Bird_{k}_{i + 1:04d}_{first + i}.jpg": k
             for k in (1, 7, 99, 100, 101, 150, 200) for i in range(2 + k % 2)}
    make_photos(root / "images", names)
    if lists and edition == "cub":
        write_lines(root / "images.txt", (f"{i} {name}" for i, name in enumerate(names, 1)))
    for name in ["._x.jpg", ".DS_Store", "Thumbs.db"] if junk else []:
        for folder in ("images", "images/007.Bird_7"):
            (root / folder / name).write_bytes(b"no image")
    return {"train": {f"images/{name}": k for name, k in names.items() if k <= 100},
            "test": {f"images/{name}": k for name, k in names.items() if k > 100}}


CAR_CLASSES = [1, 150, 98, 99, 2, 196, 98, 1, 99, 150, 2, 196]


def save_annotations(path, **columns):
    """The 1 x N struct array `annotations` of a .mat file, its fields in the order given."""
    rows = np.zeros((1, len(columns["bbox_x1"])), [(name, object) for name in columns])
    for name, values in columns.items():
        rows[name][0] = values
    path.parent.mkdir(exist_ok=True)
    pytest.importorskip("scipy.io").savemat(path, {"annotations": rows})


def cars_sides(names):
    return {"train": {name: k for name, k in names.items() if k < 99},
            "test": {name: k for name, k in names.items() if k >= 99}}


def cars_old(root):
    names = [f"car_ims/{i:06d}.jpg" for i in range(1, 13)]
    make_photos(root, names)
    save_annotations(root / "cars_annos.mat", relative_im_path=names, bbox_x1=[1] * 12,
                     **{"class": CAR_CLASSES, "test": [i % 2 for i in range(12)]})
    return cars_sides(dict(zip(names, CAR_CLASSES)))


def cars_new(root, labelled=""):
    """Both halves number their photos from 00001.jpg; the devkit's test list has no classes."""
    names = [f"{i:05d}.jpg" for i in range(1, 7)]
    columns = {"bbox_x1": [1] * 6, "fname": names}
    halves = [f"cars_{half}/{name}" for half in ("train", "test") for name in names]
    make_photos(root, halves)
    save_annotations(root / "devkit/cars_train_annos.mat", **columns, **{"class": CAR_CLASSES[:6]})
    save_annotations(root / "devkit/cars_test_annos.mat", **columns)
    save_annotations(root / labelled / "cars_test_annos_withlabels.mat", **columns,
                     **{"class": CAR_CLASSES[6:]})
    return cars_sides(dict(zip(halves, CAR_CLASSES)))


def cars_folders(root, *halves):
    """196 folders of classes; where there are two halves, both have photos of all of them."""
    names = {f"{half}/Maker Model {k:03d}/{i}.jpg": k for half in halves
             for k in range(1, 197) for i in range(2 // len(halves))}
    make_photos(root, names)
    return cars_sides(names)


def products(root, lists="", images=""):
    """Ebay_train.txt and Ebay_test.txt; kind{k % 2}_final/{k}_{i}.JPG."""
    sides = {}
    for side, classes in (("train", (1, 2, 5)), ("test", (11318, 22634))):
        names = {f"kind{k % 2}_final/{k}_{i}.JPG": k for k in classes for i in range(3)}
        make_photos(root / images, names)
        rows = [f"{i} {k} {k % 2 + 1} {name}" for i, (name, k) in enumerate(names.items(), 1)]
        rows.insert(0, "image_id class_id super_class_id path")
        write_lines(root / lists / f"Ebay_{side}.txt", rows)
        sides[side] = {str(Path(images, name)): k for name, k in names.items()}
    return sides


def garments(root, lists="", images=""):
    """The items of train and test are mixed; queries and gallery are photos of the same items."""
    sides, rows = {}, []
    for side, items in (("train", (1, 4, 6, 8)), ("query", (2, 3, 7)), ("gallery", (2, 3, 7))):
        names = {f"img/kind{k % 2}/id_{k:08d}/{i:02d}_{side}.jpg": k for k in items
                 for i in range(2)}
        make_photos(root / images, names)
        rows += [f"{name:<64}{f'id_{k:08d}':<16}{side}" for name, k in names.items()]
        sides[side] = {str(Path(images, name)): k for name, k in names.items()}
    write_lines(root / lists / "list_eval_partition.txt",
                [str(len(rows)), "image_name item_id evaluation_status", *rows[::-1]])
    return {"train": sides["train"], "test": sides["query"], "gallery": sides["gallery"]}


LAYOUTS = [
    ("cub", "", lambda root: birds(root, "cub")),
    ("cub", "CUB_200_2011", lambda root: birds(root, "cub", junk=True)),
    ("cub", "cub", lambda root: birds(root, "cub", lists=False, junk=True)),
    ("cub2010", "CUB_200_2010", lambda root: birds(root, "cub2010")),
    ("cub2010", "", lambda root: birds(root, "cub2010", lists=False, junk=True)),
    ("cars", "", cars_old),
    ("cars", "stanford_cars", cars_new),
    ("cars", "cars", lambda root: cars_new(root, "devkit")),
    ("cars", "", lambda root: cars_folders(root, "images")),
    ("cars", "cars196", lambda root: cars_folders(root, "images")),
    ("cars", "car_data", lambda root: cars_folders(root, "car_data/train", "car_data/test")),
    ("sop", "Stanford_Online_Products", products),
    ("sop", "", lambda root: products(root, "Info_Files", "images")),
    ("inshop", "Inshop_Clothes", lambda root: garments(root, "Eval", "Img")),
    ("inshop", "inshop", lambda root: garments(root)),
    ("inshop-gallery", "", lambda root: garments(root, "Anno", "Img")),
    ("inshop-gallery", "inshop", lambda root: garments(root, "Eval")),
]


def official_counts(name):
    return [part for part in common.OFFICIAL[name] if isinstance(part, int)]


@pytest.fixture
def official(monkeypatch):
    """official(name, sides): make the counts of this tree those that are expected of the set."""
    def replace(name, sides):
        counts = [len(side) for side, _ in zip(sides.values(), official_counts(name))]
        rest = common.OFFICIAL[name][:-len(counts)]
        monkeypatch.setitem(common.OFFICIAL, name, (*rest, *counts))
    return replace


def check_set(dataset, paths, root):
    """Exactly these images, and labels 0..C-1 that are the true classes, one for one."""
    relative, classes = [os.path.relpath(path, root) for path in dataset.paths], dataset.classes
    assert sorted(relative) == sorted(paths) and len(dataset) == len(dataset.labels) == len(paths)
    assert torch.equal(dataset.labels.unique(), torch.arange(len(classes)))     # int64, too
    pairs = set(zip((paths[path] for path in relative), dataset.labels.tolist()))
    assert len(pairs) == len({true for true, _ in pairs}) == len(classes)


def test_the_official_counts_are_the_published_ones():
    assert {name: official_counts(name) for name in common.OFFICIAL} == {
        "cub": [5864, 5924], "cub2010": [2990, 3043], "cars": [8054, 8131],
        "sop": [59551, 60502], "inshop": [25882, 14218], "inshop-gallery": [25882, 14218, 12612]}


@pytest.mark.parametrize("name, place, build", LAYOUTS)
def test_each_layout_is_split_by_class_id_wherever_it_lies(tmp_path, official, name, place, build):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    sides = build(folder)
    official(name, sides)
    train, test = load(name, tmp_path)
    check_set(train, sides["train"], folder)
    check_set(test, sides["test"], folder)
    assert (test.gallery is not None) == (name == "inshop-gallery")
    if test.gallery:                                       # it shares the label map of the queries
        check_set(test.gallery, sides["gallery"], folder)
        assert test.classes == test.gallery.classes


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "images only"])
@pytest.mark.parametrize("place", ["", "CUB_200_2011", "CUB_200_2010", "cub"])
@pytest.mark.parametrize("edition, other", [("cub", "cub2010"), ("cub2010", "cub")])
def test_the_other_edition_of_cub_is_an_error_that_names_its_flag(tmp_path, edition, other, place,
                                                                  lists):
    birds(tmp_path / place, edition, lists)
    assert load_error(other, tmp_path).partition("--dataset ")[2].split(".")[0] == edition


@pytest.mark.parametrize("in_root", ["", "cub", "cub2010"])
def test_with_both_editions_side_by_side_each_name_finds_its_own(tmp_path, official, in_root):
    trees = {"cub": tmp_path / "CUB_200_2011", "cub2010": tmp_path / "CUB_200_2010"}
    trees |= {in_root: tmp_path} if in_root else {}
    sides = {name: birds(folder, name) for name, folder in trees.items()}
    for name, folder in trees.items():
        official(name, sides[name])
        for dataset, side in zip(load(name, tmp_path), ("train", "test")):
            check_set(dataset, sides[name][side], folder)


def test_birds_are_no_cars(tmp_path, official):
    official("cars", birds(tmp_path / "CUB_200_2011", "cub"))
    assert "no cars data" in load_error("cars", tmp_path)
    sides = cars_folders(tmp_path / "cars196", "images")
    official("cars", sides)
    check_set(load("cars", tmp_path)[0], sides["train"], tmp_path / "cars196")


# ---- what can be wrong
@pytest.mark.parametrize("name", [*common.OFFICIAL, "folder"])
def test_nothing_found_is_an_error_that_says_what_was_found(tmp_path, name):
    write_lines(tmp_path / "holidays.txt", ["beach"])
    assert "holidays" in load_error(name, tmp_path)
    assert "nowhere" in load_error(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name, build", [("cub", LAYOUTS[0][2]), ("cars", cars_old),
                                         ("sop", products), ("inshop-gallery", garments)])
@pytest.mark.parametrize("side", ["train", "test", "gallery"])
def test_a_missing_listed_photo_is_an_error_that_names_it(tmp_path, official, name, build, side):
    sides = build(tmp_path)
    official(name, sides)
    lost = list(sides.get(side, sides["test"]))[-1]
    (tmp_path / lost).unlink()
    assert lost in load_error(name, tmp_path)


def test_another_count_is_a_warning_and_less_than_half_an_error(tmp_path, official):
    sides = birds(tmp_path, "cub", lists=False)
    train, test = len(sides["train"]), len(sides["test"])
    for expected in ([train + 1, test], [train, test - 1], [train, 2 * test]):
        official("cub", dict(zip(sides, map(range, expected))))
        with pytest.warns(UserWarning) as caught:
            assert [*map(len, load_dataset("cub", str(tmp_path)))] == [train, test]
        (warning,) = caught
        assert f"{[train, test]} images, expected {expected}" in str(warning.message)
    official("cub", {"train": range(train), "test": range(9 * test)})
    assert f"{train + test} images, expected {train + 9 * test}" in load_error("cub", tmp_path)


@pytest.mark.parametrize("name, file, lines", [
    ("cub", "images.txt", ["1 001.Bird_1/1.jpg", "2"]),
    ("sop", "Ebay_train.txt", ["image_id class_id super_class_id path", "2 two 2 a.jpg"]),
    ("inshop", "list_eval_partition.txt", ["000001.jpg 0", "000002.jpg 1"]),           # CelebA's
    ("inshop", "list_eval_partition.txt", ["2", "image_name  evaluation_status", "1.jpg  train"])])
def test_a_list_that_cannot_be_read_is_a_user_error(tmp_path, name, file, lines):
    write_lines(tmp_path / "Ebay_test.txt", ["image_id class_id super_class_id path"])
    write_lines(tmp_path / file, lines)
    assert f"a list of {name} under {tmp_path}" in load_error(name, tmp_path)


def test_cars_lists_without_classes_or_scipy_are_errors_that_say_so(tmp_path, monkeypatch):
    cars_new(tmp_path)
    labelled = tmp_path / "cars_test_annos_withlabels.mat"
    labelled.write_bytes((tmp_path / "devkit/cars_test_annos.mat").read_bytes())
    assert "class" in load_error("cars", tmp_path)
    labelled.unlink()
    assert labelled.name in load_error("cars", tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy" in load_error("cars", tmp_path)


# ---- folder
def make_folder(root, classes, each=2):
    return make_photos(root, [f"{c}/{i}.jpg" for c in classes for i in range(each)])


@pytest.mark.parametrize("classes", [
    "abcd", [f"class {k}" for k in range(11)],
    # at any depth, named by the path, sorted as text; a class may hold other classes
    ["Fruit/Apple/Gala", "Fruit/Apple", "Fruit/Apple-red", "Fruit/Pear", "fig", "Ä", "10", "9"]])
def test_folder_trains_on_the_first_half_of_the_sorted_classes(tmp_path, monkeypatch, classes):
    make_folder(tmp_path, list(classes)[::-1], each=3)
    make_photos(tmp_path, ["cover.jpg", ".cache/0.jpg"])               # of no class
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    with pytest.warns(UserWarning, match="left out: 1 files, such as .*cover.jpg"):
        train, test = load_dataset("folder")
    check_image(train[0][0], 224)
    half, names = (len(classes) + 1) // 2, sorted(classes)
    assert (train.classes, test.classes) == (names[:half], names[half:])
    for dataset in (train, test):
        check_set(dataset, {f"{c}/{i}.jpg": c for c in dataset.classes for i in range(3)}, tmp_path)
        assert all(Path(path).parent == tmp_path / dataset.classes[label]
                   for path, label in zip(dataset.paths, dataset.labels))


@pytest.mark.parametrize("sides", [("train", "test"), ("Train", "TEST")])
def test_folder_takes_train_and_test_as_they_are(tmp_path, sides):
    make_folder(tmp_path / sides[0], ["cat", "wild/cat", "zebra"], each=3)
    make_folder(tmp_path / sides[1], ["ant", "bee"], each=4)
    make_folder(tmp_path / "val", ["fly"])                 # what is neither is not read
    train, test = load("folder", tmp_path)
    assert (train.classes, test.classes) == (["cat", "wild/cat", "zebra"], ["ant", "bee"])
    assert (len(train), len(test)) == (9, 8)
    make_folder(tmp_path / sides[1], ["zebra"])
    assert "zebra" in load_error("folder", tmp_path)       # a classification split


def test_folder_reads_what_pillow_opens_in_any_case_and_nothing_else(tmp_path):
    make_folder(tmp_path, ["a", "b"])
    for name in ("notes.txt", "report.pdf", "._0.jpg", "Thumbs.db", "0.jpg.part"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    for name in ("2.PNG", "3.webp", "4.bmp", "5.TIF", "6.gif", "7.ppm"):
        Image.new("RGB", (12, 10)).save(tmp_path / "a" / name)
    (tmp_path / "a/0.jpg").rename(tmp_path / "a/0.JPEG")
    with pytest.warns(UserWarning, match="left out: 4 files, such as"):
        train, _ = load_dataset("folder", tmp_path, image_size=16)
    names = [Path(path).name for path in train.paths]
    assert names == ["0.JPEG", "1.jpg", "2.PNG", "3.webp", "4.bmp", "5.TIF", "6.gif", "7.ppm"]
    for image, _ in (train[i] for i in range(8)):
        check_image(image, 16)


@pytest.mark.parametrize("classes", [["a"], ["train/a", "train/b", "test/."], ["."]])
def test_a_folder_that_cannot_be_split_is_an_error(tmp_path, classes):
    assert "at least 2 folders" in load_error("folder", make_folder(tmp_path, classes))


# ---- one image
def check_image(image, size):
    assert image.shape == (3, size, size) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1


def make_set(root, images, image_size=16):
    """The training set of the pictures {file name: PIL image}, in this order; two classes."""
    make_folder(root, ["y", "z"])
    for k, (name, image) in enumerate(images.items()):
        folder = root / "ab"[k >= (len(images) + 1) // 2]
        folder.mkdir(exist_ok=True)
        image.save(folder / name)
    dataset = load("folder", root, image_size=image_size)[0]
    assert [Path(path).name for path in dataset.paths] == list(images)
    return dataset


def noise_image(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "LA", "RGBA", "P"])
def test_each_colour_mode_comes_out_as_three_channels(tmp_path, mode):
    colour = Image.new("RGB", (40, 30), (250, 250, 250) if mode == "1" else (200, 40, 90))
    picture = colour.quantize() if mode == "P" else colour.convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    image, label = make_set(tmp_path, {f"{k}.{suffix}": picture for k in range(2)})[1]
    check_image(image, 16)
    assert type(label) is int and label == 1
    expected = torch.from_numpy(np.array(picture.convert("RGB"))[0, 0] / 255)
    assert (image.mean((1, 2)) - expected).abs().max() < 0.02


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_to_8_bits_and_float_pixels_are_refused(tmp_path, suffix):
    values = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    pictures = {f"{k}.{suffix}": Image.fromarray(values) for k in range(2)}
    assert pictures[f"0.{suffix}"].mode == "I;16"
    train = make_set(tmp_path, pictures, image_size=28)    # read at 32 x 32: as they are
    expected = torch.from_numpy(values.astype(np.int64) // 257).expand(3, 32, 32)
    assert torch.equal(train.pixels(0).long(), expected)
    Image.new("F", (20, 20), 0.5).save(train.paths[1], "TIFF")
    with pytest.raises(UserError, match=rf"1\.{suffix}.*floating-point"):
        train[1]


def shapes_set(root, square):
    shapes = [(64, 64), (80, 40), (40, 80), (9, 7), (33, 260)]
    images = {f"{i}.png": noise_image(i, w, h) for i, (w, h) in enumerate(shapes)}
    images |= {"5.jpg": noise_image(8, 50, 60), "6.png": noise_image(9, 40, 30).convert("L")}
    dataset = make_set(root, images, image_size=28)
    dataset.square = square
    return dataset


def drawn_view(dataset, index, epoch):
    stream = common.random_stream(0, epoch, common.AUGMENT, index)
    return dataset.random_view(index, stream, (0.08, 1.0))


@pytest.mark.parametrize("square", [False, True])
def test_a_view_is_resize_to_256_224ths_and_centre_crop_cached_or_not(tmp_path, square):
    train = shapes_set(tmp_path, square)
    reference = Compose([PILToTensor(), Resize((32, 32) if square else 32), CenterCrop(28)])
    expected = []
    for path in train.paths:
        with Image.open(path) as picture:
            expected.append(reference(picture.convert("RGB")))
    drawn = [drawn_view(train, i, epoch) for i in range(7) for epoch in range(4)]
    for _ in ("read", "cached"):
        assert all(torch.equal(view, train.view(i)) for i, view in enumerate(expected))
        assert torch.equal(train[3][0], expected[3].float() / 255)
        common.cache_images([train, None], 1.0, workers=2)
        for path in train.paths:
            Path(path).unlink(missing_ok=True)
    if square:                # otherwise a crop of the photo is not a crop of the smaller copy
        again = [drawn_view(train, i, epoch) for i in range(7) for epoch in range(4)]
        assert all(map(torch.equal, drawn, again))


def test_the_cache_takes_the_sets_that_fit_one_after_the_other(tmp_path):
    photos = make_set(tmp_path, {f"{i}.png": noise_image(i, 40, 30) for i in range(10)}, 28)
    each = 10 * 3 * 32 * 32 * 4 / 3 / 1e9                  # a photo counts as 4:3
    for room, cached in ((0.3, [0, 0, 0]), (0.9, [0, 0, 1]), (1.1, [1, 0, 0]), (1.5, [1, 0, 1])):
        sets = [photos.subset(range(count)) for count in (10, 10, 4)]
        common.cache_images(sets, room * each, workers=0)
        assert [dataset.store is not None for dataset in sets] == cached, room


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_a_file_that_cannot_be_decoded_is_an_error_that_names_it(tmp_path, kind):
    train = make_set(tmp_path, {f"{i}.jpg": noise_image(i, 64, 64) for i in range(4)})
    whole = Path(train.paths[2]).read_bytes()
    spoiled = {"text": b"no image", "empty": b"", "cut": whole[:len(whole) // 2]}[kind]
    Path(train.paths[2]).write_bytes(spoiled)
    for read in (lambda: train[2], lambda: common.cache_images([train], 1.0, 1),
                 lambda: list(load_batches(train, [torch.arange(4)])),
                 lambda: list(load_batches(train, [torch.arange(4)], workers=2))):
        with pytest.raises(UserError, match=r"b/2\.jpg") as caught:
            read()
        assert "\n" not in str(caught.value)


# ---- random views
@pytest.mark.parametrize("width, height, scale", [
    (60, 40, (0.08, 1.0)), (40, 60, (0.6, 1.0)), (300, 20, (0.08, 1.0)), (20, 300, (0.9, 1.0))])
def test_random_crop_boxes_are_those_of_torchvision(width, height, scale):
    stats, blank = pytest.importorskip("scipy.stats"), torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3])
                       for _ in range(600)])
    ours = np.array([common.random_crop_box(common.random_stream(0, 0, common.AUGMENT, i), height,
                                            width, scale) for i in range(600)])
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column], method="asymp").pvalue > 1e-4


def test_a_square_random_view_is_any_window_of_that_image_either_way_round(tmp_path):
    train, windows = shapes_set(tmp_path, square=True), {}
    for top, left in itertools.product(range(5), repeat=2):
        window = train.pixels(1)[:, top:top + 28, left:left + 28]
        windows |= {window.numpy().tobytes(): 0, window.flip(2).numpy().tobytes(): 1}
    found = [drawn_view(train, 1, epoch).numpy().tobytes() for epoch in range(400)]
    assert set(found) == windows.keys() and 160 < sum(windows[view] for view in found) < 240


def test_flip_and_scale_say_how_views_are_drawn(tmp_path):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    train = make_set(tmp_path, {"0.png": ramp, "1.png": ramp})         # black left, white right
    assert train.flip

    def drawn(scale):
        return [view for epoch in range(30) for view in
                views(train, [torch.arange(2)], epoch=epoch, scale=(scale, scale)).values()]

    spread = [np.mean([float(view.max() - view.min()) for view in drawn(scale)])
              for scale in (0.1, 0.5, 1.0)]
    assert spread[0] < 0.5 < spread[1] < 0.85 < spread[2]
    for train.flip, low, high in ((True, 15, 45), (False, 0, 0)):
        assert low <= sum(view[..., 0].mean() > view[..., -1].mean() for view in drawn(1)) <= high


# ---- batches of indices
def labels_of(sizes):
    """sizes[k] images of class k, mixed."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def flags(**changes):
    return Namespace(**{"batch_size": 10, "images_per_class": 0, "seed": 0, **changes})


@pytest.mark.parametrize("count, size, sizes", [
    (10, 3, [3, 3, 3]), (9, 3, [3, 3, 3]), (2, 3, [2]), (3, 3, [3]), (7, 5, [5])])
@pytest.mark.parametrize("pool", [None, 100])
def test_plain_batches_are_full_parts_of_a_permutation(count, size, sizes, pool):
    labels = torch.zeros(300, dtype=torch.int64)[:count if pool is None else 300]
    pool = pool and torch.arange(pool, pool + 2 * count, 2)            # images to draw from
    batches = epoch_batches(flags(batch_size=size), labels, 0, pool=pool)
    assert [len(batch) for batch in batches] == sizes
    drawn = torch.cat(batches).tolist()
    allowed = range(count) if pool is None else pool.tolist()
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(allowed)
    own = epoch_batches(flags(batch_size=9), labels, 0, pool=pool, batch_size=size)
    assert all(map(torch.equal, own, batches))             # of one network, in place of the flag


TENS = labels_of([10] * 10)


@pytest.mark.parametrize("draw", [
    lambda seed, epoch, i: epoch_batches(flags(seed=seed), TENS, epoch, member=i),
    lambda seed, epoch, i: epoch_batches(flags(seed=seed, images_per_class=2), TENS, epoch,
                                         member=i),
    lambda seed, epoch, i: pair_batches(TENS, 10, seed, epoch + 7 * i)])
def test_batches_are_a_function_of_seed_epoch_and_member_alone(draw):
    def drawn(*numbers):
        np.random.seed(sum(numbers))
        torch.manual_seed(sum(numbers))
        return tuple(torch.cat(draw(*numbers)[:3]).tolist())

    once = [drawn(*numbers) for numbers in itertools.product((0, 1), repeat=3)]
    assert len(set(once)) == 8                             # never seed + epoch, nor + member
    np.random.seed(9)
    assert tuple(torch.cat(draw(0, 0, 0)[:3]).tolist()) == once[0]


@pytest.mark.parametrize("sizes, batch_size, each", [
    (sizes, batch_size, each)
    for sizes in ([10] * 10, [1, 2, 3, 4, 5, 30], [4] * 5, [1] * 50 + [8] * 5)
    for batch_size, each in ((4, 2), (10, 2), (11, 2), (12, 4))
    if sum(n >= each for n in sizes) >= batch_size // each])           # else: the error below
def test_balanced_batches_hold_p_classes_of_k_images(sizes, batch_size, each):
    labels = labels_of(sizes)
    batches = epoch_batches(flags(batch_size=batch_size, images_per_class=each), labels, 0)
    assert batches
    for batch in batches:
        assert batch.dtype == torch.int64
        classes, counts = labels[batch].unique(return_counts=True)
        assert len(classes) == batch_size // each and counts.tolist() == [each] * len(classes)
    indices = torch.cat(batches)
    assert len(indices.unique()) == len(indices)
    if len(set(sizes)) == 1:                               # an even set is used nearly whole
        assert len(indices) >= 0.6 * len(labels)


@pytest.mark.parametrize("sizes, batch_size, each", [
    ([9] * 4, 10, 2), ([1] * 50, 4, 2), ([3] * 9 + [8], 8, 4), ([9] * 9, 9, 2), ([9] * 9, 2, 4)])
def test_balanced_batches_that_cannot_be_made_are_an_error(sizes, batch_size, each):
    with pytest.raises(UserError, match="--batch-size"):
        common.class_balanced_batches(labels_of(sizes), batch_size, each, seed=0, epoch=0)


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


def test_partners_are_uniform_over_the_other_images_and_the_order_is_shuffled():
    stats = pytest.importorskip("scipy.stats")
    labels, partners, places = labels_of([5, 1, 3, 2]), torch.zeros(11, 11), torch.zeros(11, 10)
    for seed in range(400):
        first, second = torch.cat(pair_batches(labels, 6, seed, epoch=0)).view(-1, 2).T
        partners[first, second] += 1
        places[first, torch.arange(10)] += 1
    for row in (labels != 1).nonzero()[:, 0]:              # class 1 has one image
        others = (labels == labels[row]) & (torch.arange(11) != row)
        for counts in (partners[row][others], places[row]):
            assert counts.sum() == 400
            assert len(counts) == 1 or stats.chisquare(counts.tolist()).pvalue > 1e-4


@pytest.mark.parametrize("sizes, parts", [([10] * 10, 3), ([1] * 30, 3), ([7, 1, 12, 2, 5], 2),
                                          ([4] * 6, 5), ([59, 3], 1)])
def test_split_by_image_deals_every_class_out_evenly(sizes, parts):
    labels = labels_of(sizes)
    split = common.split_by_image(labels, parts, seed=0)
    assert split.dtype == torch.int64 and split.shape == labels.shape
    for rows in (labels >= 0, *(labels == k for k in range(len(sizes)))):   # all; class by class
        count = split[rows].bincount(minlength=parts)
        assert len(count) == parts and count.max() - count.min() <= 1
    assert torch.equal(split, common.split_by_image(labels, parts, seed=0))
    if sizes[0] == 10:                                     # shuffled within a class, by the seed
        firsts = {int(common.split_by_image(labels, parts, seed)[(labels == 4).nonzero()[0, 0]])
                  for seed in range(20)}
        assert firsts == set(range(parts))


# ---- batches of images
def views(dataset, batches, seed=0, epoch=0, **options):
    """{index: image} of one epoch, after a look at each batch."""
    found = {}
    loaded = list(load_batches(dataset, batches, seed, epoch, **options))
    assert len(loaded) == len(batches)
    for (images, labels, indices), batch in zip(loaded, batches):
        assert torch.equal(indices, batch) and torch.equal(labels, dataset.labels[batch])
        for i, image in zip(indices.tolist(), images):
            check_image(image, 16)
            found[i] = image
    return found


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "read"])
def test_views_depend_on_seed_epoch_and_image_alone(tmp_path, cached):
    train = make_set(tmp_path, {f"{i:02d}.png": noise_image(i // 6, 40, 50) for i in range(12)})
    common.cache_images([train], float(cached), 0)
    assert (train.store is not None) == cached
    batches = list(torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5))
    torch.manual_seed(1)
    once = views(train, batches)
    torch.manual_seed(2)
    for others in (views(train, batches, workers=1), views(train, batches, workers=2),
                   views(train, list(torch.arange(12).split(4)))):
        assert others.keys() == once.keys()
        assert all(torch.equal(others[i], view) for i, view in once.items())
    # Six copies of one picture: they differ from each other, and with seed and epoch.
    drawn = [*once.values(), *views(train, batches, 0, 1).values(),
             *views(train, batches, 1, 0).values(), *views(train, batches, 1, 1).values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    plain = views(train, batches, epoch=3, augment=False, workers=2)
    assert all(torch.equal(plain[i], train[i][0]) for i in range(12))


@pytest.mark.parametrize("batches", [1, 3])
def test_the_loaders_threads_compute_alone_and_the_caller_keeps_its_threads(glyphs, monkeypatch,
                                                                            batches):
    train, seen, before = glyphs[0].subset(range(12)), [], torch.get_num_threads()
    pixels = torch.zeros(3, 12, 12, dtype=torch.uint8)
    monkeypatch.setattr(train, "view", lambda _: seen.append(torch.get_num_threads()) or pixels)
    try:
        torch.set_num_threads(2)
        loaded = load_batches(train, torch.arange(12).split(4), augment=False, workers=2)
        for _ in itertools.islice(loaded, batches):
            assert torch.get_num_threads() == 2
        loaded.close()                                     # whether or not it has come to its end
        with ThreadPoolExecutor(1) as later:               # a thread that starts afterwards
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1} and len(seen) >= 4 * batches


# ---- the data of a run
def run_data(root, checkpoint=None, **changes):
    return load_run_data(Namespace(**{
        "dataset": "folder", "data_root": str(root), "image_size": 16, "seed": 0, "crop": "resized",
        "flip": True, "val_classes": 0, "limit_queries": 0, **changes}), checkpoint)


@pytest.mark.parametrize("crop, flip", [("resized", True), ("square", False)])
def test_a_runs_flags_reach_every_set_and_its_parts(tmp_path, official, crop, flip):
    official("inshop-gallery", garments(tmp_path))
    for changes in ({}, {"val_classes": 2}, {"limit_queries": 4}):
        train, test = run_data(tmp_path, dataset="inshop-gallery", crop=crop, flip=flip, **changes)
        for part in (train, test, *([] if "val_classes" in changes else [test.gallery])):
            assert (part.square, part.flip) == (crop == "square", flip)
        assert test.limited == ("limit_queries" in changes)


def test_validation_classes_are_the_last_of_training_and_test_images_are_not_seen(tmp_path):
    make_folder(tmp_path, "abcdefgh", each=3)
    for part, names in zip(run_data(tmp_path, val_classes=2), ("ab", "cd")):
        assert part.classes == list(names) and part.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert {Path(path).parent.name for path in part.paths} == set(names)
    with pytest.raises(UserError, match="1 classes to train on"):
        run_data(tmp_path, val_classes=3)


def test_a_subset_of_queries_is_fixed_and_takes_two_of_every_class_a_round(glyphs):
    part = common.balanced_subset(glyphs[1], 130)
    assert part.limited and not glyphs[1].limited
    assert sorted(Counter(part.labels.tolist()).values()) == [2] * 35 + [4] * 15
    assert part.paths == common.balanced_subset(glyphs[1], 130).paths
    whole = glyphs[1][glyphs[1].paths.index(part.paths[77])]
    assert torch.equal(part[77][0], whole[0]) and part[77][1] == whole[1]


@pytest.mark.parametrize("change, named", [
    ("a/9.jpg", "a"), ("b/0.jpg", "b"), ("d/0.jpg", "d"), ("bb/0.jpg", "bb"),
    ("e/0.jpg", "c")])                       # with a fifth class, c is no test class any more
def test_a_run_is_refused_on_data_that_have_changed_since(tmp_path, change, named):
    make_folder(tmp_path, "abcd", each=3)
    checkpoint = {"classes": run_data(tmp_path)[0].census}
    assert checkpoint["classes"] == {"train": [["a", 3], ["b", 3]], "test": [["c", 3], ["d", 3]]}
    run_data(tmp_path, checkpoint, limit_queries=4)        # the part reported on does not matter
    if (tmp_path / change).is_file():
        (tmp_path / change).unlink()
    else:
        make_photos(tmp_path, [change])
    with pytest.raises(UserError, match=f"first difference {named};"):
        run_data(tmp_path, checkpoint)


# ---- generated sets
@pytest.fixture(scope="module")
def glyphs():
    return load_dataset("glyphs", image_size=12)


def test_glyphs_are_50_classes_of_30_images_on_either_side(glyphs):
    for dataset in glyphs:
        assert Counter(dataset.labels.tolist()) == dict.fromkeys(range(50), 30)
        assert dataset.labels.dtype == torch.int64 and dataset.gallery is None
        images = [dataset[i][0] for i in range(30)]
        check_image(images[0], 12)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(images, 2))
        assert dataset.generated and not dataset.flip
    assert not set(glyphs[0].classes) & set(glyphs[1].classes)


@pytest.mark.parametrize("name", ["glyphs", "gaussian"])
def test_generated_sets_are_a_function_of_their_seed_alone(name):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again, other = (load_dataset(name, image_size=8, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), states[0])   # global random state is not touched
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(first.labels, again.labels) and first.classes == again.classes
    for i in (0, 7, 500):
        assert torch.equal(first[i][0], again[i][0]) and not torch.equal(first[i][0], other[i][0])


def test_gaussian_is_two_classes_around_a_quarter_and_three_quarters():
    for dataset, count in zip(load_dataset("gaussian"), (508, 516)):
        assert len(dataset) == count
        for label, mean in enumerate([0.25, 0.75]):
            rows = (dataset.labels == label).nonzero().flatten().tolist()
            images = torch.stack([dataset[i][0] for i in rows[:40]])
            check_image(images[0], 32)
            assert images.mean().item() == pytest.approx(mean, abs=0.005)
            assert images.std().item() == pytest.approx(0.025, abs=0.003)
