# SPDX-License-Identifier: MIT
"""What every script here shares, because a fair comparison needs it to be identical.

Copy this file next to one method script and the script runs. In order:

    data        load_dataset, ImageSet, shuffled_batches, class_balanced_batches, pair_batches,
                split_by_image, load_batches
    models      build_model, load_model, eval_mode, frozen, train_mode
    losses      proxy_anchor_loss, triplet_loss, contrastive_loss, mine_triplets, mine_pairs
    attack      pgd, shift_objective
    metrics     recall_at_k, map_at_r, kmeans, nmi, ami, pairwise_f1
    voting      vote_labels, vote_recall, vote_clusters
    evaluation  embed, attack_embeddings, metrics_by_rule, Attack, Retrieval, evaluate
    runs        base_parser, parse_run, checkpoints, logs, results, tables

Conventions: images are float (B, 3, S, S) in [0, 1]; the network normalises them itself, so an
attack radius eps is always a number of pixel values. Embeddings are unit vectors (B, D), distances
are Euclidean on the unit sphere unless a docstring says otherwise, labels are int64, scores are
floats in [0, 1]. Nothing happens at import.
"""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms import functional as TF


class UserError(ValueError):
    """Bad input: one line saying what was wrong, what was found and what to do. Exit code 2."""


class RunFailed(RuntimeError):
    """A run that cannot go on (loss not finite, disk full): one line, exit code 1."""


# ---- randomness: every stream is a function of (seed, epoch, purpose), so resuming needs no state
DATA, SPLIT, BATCHES, AUGMENT, TRAIN, EVALUATE, INITIAL, PROXIES, TARGETS, CLASSES = range(10)
MEMBER = 100                                        # a purpose for member i: + MEMBER * i


def random_stream(seed: int, epoch: int, purpose: int, index: int = 0) -> np.random.Generator:
    """An independent numpy generator for one purpose (and one image, for augmentation)."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, purpose, index]))


def seed_torch(seed: int, epoch: int, purpose: int, index: int = 0) -> None:
    """Seed torch's global generators from the stream (seed, epoch, purpose, index)."""
    torch.manual_seed(int(random_stream(seed, epoch, purpose, index).integers(2**62)))


CHANNELS_LAST = torch.channels_last              # memory layout: faster convolutions


# ---- data ------------------------------------------------------------------------------------

# Images of train and of test; In-Shop: train, query, gallery.
EXPECTED = {
    "cub": (5864, 5924),
    "cub2010": (2990, 3043),
    "cars": (8054, 8131),
    "sop": (59551, 60502),
    "inshop": (25882, 14218, 12612),
}
OFFICIAL_FOLDER = {
    "cub": "CUB_200_2011",
    "cub2010": "CUB_200_2010",
    "cars": "stanford_cars",
    "sop": "Stanford_Online_Products",
    "inshop": "Inshop_Clothes",
}
GENERATED = ("glyphs", "gaussian")
DATASETS = ("glyphs", "gaussian", "cub", "cub2010", "cars", "sop", "inshop", "folder")


class ImageSet:
    """The images of one split: `len()`, `.labels` (int64), `.paths`, `.classes`, `[i]`.

    `[i]` is the evaluation view of image i, (float (3, S, S) in [0, 1], int label): shorter side
    resized to R = round(256 * S / 224), centre S x S crop. `random_view` is the training view.
    `square`: the whole image is squashed to R x R instead, in either view.
    `gallery` is None or the set in which the images of this one are looked up (In-Shop).
    pixels: uint8 (n, 3, R, R) of a generated set, otherwise the images are read from `paths`.
    """

    def __init__(self, paths, names, image_size, classes=None, pixels=None):
        self.paths = [str(path) for path in paths]
        self.classes = sorted(set(names)) if classes is None else list(classes)
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([index[name] for name in names], dtype=torch.int64)
        self.image_size = image_size
        self.resized = round(256 * image_size / 224)
        self.generated = pixels is not None
        self.store = pixels                          # one uint8 (3, h, w) per image, or None
        self.gallery = None
        self.limited = False                         # a --limit-queries subset
        self.square = False

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.view(index).float() / 255, int(self.labels[index])

    def subset(self, rows):
        """The images in `rows`; without a gallery labels are renumbered to 0..C-1 again."""
        rows = [int(row) for row in rows]
        names = [self.classes[self.labels[row]] for row in rows]
        # a gallery shares the label map: with one, every class stays in it
        kept = set(names) if self.gallery is None else set(self.classes)
        part = ImageSet([self.paths[row] for row in rows], names, self.image_size,
                        classes=[name for name in self.classes if name in kept])
        part.generated = self.generated
        part.store = None if self.store is None else [self.store[row] for row in rows]
        part.gallery, part.square = self.gallery, self.square
        return part

    def view(self, index):
        """Evaluation view of image `index`: uint8 (3, S, S)."""
        image = self.store[index] if self.store is not None else self._resize(self._decode(index))
        return TF.center_crop(image, [self.image_size, self.image_size])

    def random_view(self, index, stream, scale):
        """Training view: RandomResizedCrop(S, scale) and a horizontal flip, uint8 (3, S, S).

        Taken from the R-px copy when the set is cached, else from the original image. Square sets
        get a random S x S crop of the R x R image instead, and so do generated ones, without the
        flip: their jitter is drawn in.
        """
        size = self.image_size
        image = self.store[index] if self.store is not None else self._decode(index)
        if self.square and self.store is None:
            image = self._resize(image)
        height, width = image.shape[1:]
        if self.square or self.generated:
            top, left = stream.integers(0, [height - size + 1, width - size + 1])
            image = image[:, top:top + size, left:left + size]
        else:
            box = random_crop_box(stream, height, width, scale)
            image = TF.resized_crop(image, *box, [size, size], antialias=True)
        return image.flip(2) if not self.generated and stream.random() < 0.5 else image

    def cache(self, limit_gb: float, workers: int = 4) -> bool:
        """Decode every image once into uint8 copies with shorter side R, if they fit.

        Returns whether they do (`limit_gb` = 0: never). Threads are enough: decoding and resizing
        release Python's lock. A file that cannot be decoded raises UserError with its name.
        """
        if self.store is not None or limit_gb <= 0:
            return self.store is not None
        store, size = [], 0
        pool = ThreadPoolExecutor(max(workers, 1))
        try:
            decoded = pool.map(lambda index: self._resize(self._decode(index)), range(len(self)))
            for image in progress(decoded, "decoding", len(self)):
                store.append(image)
                size += image.numel()
                expected = size if len(store) < 100 else 0.8 * size / len(store) * len(self)
                if max(size, expected) > limit_gb * 1e9:
                    return False
        finally:
            pool.shutdown(cancel_futures=True)
        self.store = store
        return True

    def stored_gb(self):
        return 0.0 if self.store is None else sum(image.numel() for image in self.store) / 1e9

    def _decode(self, index):
        """uint8 (3, h, w); whatever is wrong with the file becomes one line that names it."""
        try:
            return TF.pil_to_tensor(pil_loader(self.paths[index]))
        except Exception as error:                   # a damaged file raises nearly anything
            raise UserError(f"cannot read the image {self.paths[index]} ({error}): replace the "
                            f"file or remove it from the data set") from error

    def _resize(self, image):
        size = [self.resized, self.resized] if self.square else self.resized
        return TF.resize(image, size, antialias=True)


def random_crop_box(stream, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of torchvision's RandomResizedCrop, drawn from our own stream."""
    for _ in range(10):
        area = height * width * stream.uniform(*scale)
        aspect = math.exp(stream.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(stream.integers(height - h + 1)), int(stream.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])          # ten misses: the central crop
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def load_dataset(name: str, root=None, *, image_size: int | None = None, seed: int = 0,
                 inshop_protocol: str = "query") -> tuple[ImageSet, ImageSet]:
    """(train, test) of a data set, split by class: no test class is seen in training.

    name: one of DATASETS. root: where the data is (default: environment DATA_ROOT, then "data");
    ROOT, ROOT/<official folder> and ROOT/<name> are tried. image_size: side S of the views (224;
    32 for generated sets). seed: of the generated sets. inshop_protocol: "query" looks queries up
    among themselves (EAT), "gallery" in the gallery set (standard; `test.gallery`).
    Raises UserError when the data is missing, incomplete or another edition; other differences
    from the published counts are one warning.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if inshop_protocol not in ("query", "gallery"):
        raise UserError(f"unknown In-Shop protocol {inshop_protocol!r}: choose query or gallery")
    size = image_size or (32 if name in GENERATED else 224)
    if name == "glyphs":
        return _glyphs(seed, size)
    if name == "gaussian":
        return _gaussian(seed, size)
    root = Path(root or os.environ.get("DATA_ROOT") or "data")
    lists = {"folder": _list_folder, "cub": _list_cub, "cub2010": _list_cub2010,
             "cars": _list_cars, "sop": _list_sop, "inshop": _list_inshop}[name](root)
    if inshop_protocol == "query":
        lists = lists[:2]
    _check_counts(name, root, lists)
    for path in (path for listing in lists for path, _ in listing):
        if not os.path.isfile(path):
            raise UserError(f"{path} is listed but missing: unpack the archive of {name} again")
    train, *test = (([path for path, _ in listing], [label for _, label in listing])
                    for listing in lists)
    # Query and gallery share one label map.
    classes = sorted({label for _, labels in test for label in labels})
    train, test, *gallery = ImageSet(*train, size), *(ImageSet(*part, size, classes=classes)
                                                      for part in test)
    test.gallery = gallery[0] if gallery else None
    return train, test


def _candidates(name, root):
    """The folders in which an official archive may have been unpacked."""
    return [root, root / OFFICIAL_FOLDER[name], root / name]


def _not_found(name, root, expected):
    try:
        found = ", ".join(sorted(os.listdir(root))[:8]) or "nothing"
    except OSError as error:
        found = f"nothing, {error.strerror.lower()}"
    return UserError(f"no {name} data under {root}: expected {expected}; found {found}. "
                     f"Unpack the archive there or pass --data-root (README, 'Data')")


def _images_in(folder):
    """The image files of one folder, sorted, without the `._*` files of macOS archives."""
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries
                      if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.name[0] != ".")


def _class_folders(folder):
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir() and entry.name[0] != ".")


def _images_by_class(folder):
    """[(path, class folder name)] of a folder of class folders."""
    return [(path, os.path.basename(name)) for name in _class_folders(folder)
            for path in _images_in(name)]


def _split_by_class_id(listing, first_test):
    """Class folders are numbered, `001.Name`: ids up to first_test - 1 train, the rest test."""
    train = [item for item in listing if int(item[1].split(".")[0]) < first_test]
    return train, [item for item in listing if int(item[1].split(".")[0]) >= first_test]


def _cub_listing(folder):
    """The images of a CUB folder of either edition, or None. 2011 has a list, 2010 has none."""
    images = folder / "images"
    if (folder / "images.txt").is_file():
        with _listed(folder / "images.txt") as lines:
            names = [line.split()[1] for line in lines if line.strip()]
            return [(str(images / name), name.split("/")[0]) for name in names
                    if int(name.split(".")[0]) and not os.path.basename(name).startswith("._")]
    if images.is_dir():
        listing = _images_by_class(images)
        return [item for item in listing if item[1].split(".")[0].isdigit()] or None
    return None


def _cub_edition(folder, listing):
    """"cub2010" or "cub". 2010 file names end in a Flickr id of 7 to 10 digits, 2011 in up to 6."""
    if (folder / "images.txt").is_file():
        return "cub"
    ids = [os.path.splitext(path)[0].rsplit("_", 1)[-1] for path, _ in listing]
    return "cub2010" if sum(len(number) >= 7 for number in ids) > len(ids) / 2 else "cub"


def _list_either_cub(name, root):
    other = "cub" if name == "cub2010" else "cub2010"
    found = [(folder, _cub_listing(folder)) for folder in
             dict.fromkeys(_candidates(name, root) + _candidates(other, root))]
    found = [(folder, listing, _cub_edition(folder, listing))
             for folder, listing in found if listing]
    for _, listing, edition in found:
        if edition == name:
            return _split_by_class_id(listing, 101)
    for folder, listing, _ in found:
        raise UserError(
            f"{folder} holds {'CUB-200 (2010)' if other == 'cub2010' else 'CUB-200-2011'} "
            f"({len(listing)} images), not --dataset {name}: use --dataset {other}, or unpack "
            f"{OFFICIAL_FOLDER[name]} under {root}")
    raise _not_found(name, root, "images/001.Black_footed_Albatross/*.jpg, or the folder "
                     f"{OFFICIAL_FOLDER[name]} with it")


def _list_cub(root):
    return _list_either_cub("cub", root)


def _list_cub2010(root):
    return _list_either_cub("cub2010", root)


def _read_mat(path, field, folder):
    """[(image path, class number)] of a .mat list; `field` holds the file name."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"reading {path} needs scipy: pip install scipy, or use a layout with one "
                        f"folder per class") from None
    try:
        rows = loadmat(path, squeeze_me=True)["annotations"]
        return [(str(folder / str(row[field])), int(row["class"])) for row in rows]
    except Exception as error:                       # a damaged file raises nearly anything
        raise UserError(f"{path} is not a list of images and classes ({type(error).__name__}: "
                        f"{error}): unpack it again") from error


def _list_cars(root):
    """Train and test halves pooled, then split by class: ids (or names, sorted) 1-98 train."""
    for folder in _candidates("cars", root) + [root / "cars196", root / "car_data"]:
        if (folder / "cars_annos.mat").is_file():                              # old: one list
            listing = _read_mat(folder / "cars_annos.mat", "relative_im_path", folder)
        elif (folder / "cars_train").is_dir() and (folder / "cars_test").is_dir():   # new: two
            labelled = folder / "cars_test_annos_withlabels.mat"
            if not labelled.is_file():
                labelled = folder / "devkit" / labelled.name
            if not labelled.is_file():
                raise UserError(f"{labelled.name} is not in {folder} nor in its devkit/: the devkit"
                                f"'s cars_test_annos.mat has no classes; put the labelled file "
                                f"there")
            listing = _read_mat(folder / "devkit" / "cars_train_annos.mat", "fname",
                                folder / "cars_train")
            listing += _read_mat(labelled, "fname", folder / "cars_test")
        else:
            # One folder per class: alphabetical order differs from id order, the first 98 do not.
            inner = folder / "car_data" if (folder / "car_data").is_dir() else folder
            halves = [inner / "train", inner / "test"] if (inner / "test").is_dir() \
                else [folder / "images"]
            listing = [item for half in halves if half.is_dir() for item in _images_by_class(half)]
            order = {name: i + 1 for i, name in enumerate(sorted({name for _, name in listing}))}
            listing = [(path, order[name]) for path, name in listing]
        if listing:
            listing = [(path, f"{number:03d}") for path, number in listing]
            return _split_by_class_id(listing, 99)
    raise _not_found("cars", root, "cars_annos.mat + car_ims/, cars_train/ + cars_test/ + devkit/, "
                     "car_data/{train,test}/<class>/ or images/<class>/")


def _list_sop(root):
    for folder in _candidates("sop", root) + [root / "online_products"]:
        for lists, images in ((folder, folder), (folder / "Info_Files", folder / "images")):
            files = [lists / "Ebay_train.txt", lists / "Ebay_test.txt"]
            if files[0].is_file():
                return [_sop_lines(file, images) for file in files]
    raise _not_found("sop", root, "Ebay_train.txt, Ebay_test.txt and bicycle_final/ ...")


def _sop_lines(file, images):
    """Header `image_id class_id super_class_id path`, then one image a line."""
    with _listed(file) as lines:
        rows = [line.split() for line in lines[1:] if line.strip()]
        return [(str(images / path), f"{int(number):05d}") for _, number, _, path in rows]


@contextlib.contextmanager
def _listed(file):
    """The lines of a list file; a missing or differently built file is one clear line."""
    try:
        with open(file) as opened:
            yield opened.read().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): unpack it again") from None
    except UserError:
        raise
    except (ValueError, KeyError, IndexError):
        raise UserError(f"{file} is not the list it should be: unpack the archive again") from None


def _list_inshop(root):
    for folder in _candidates("inshop", root) + [root / "in-shop"]:
        for lists in (folder, folder / "Eval", folder / "Anno"):
            file = lists / "list_eval_partition.txt"
            if file.is_file():
                return _inshop_lines(file, folder)
    raise _not_found("inshop", root, "list_eval_partition.txt (there, in Eval/ or Anno/) and img/")


def _inshop_lines(file, folder):
    """Line 1 the count, line 2 `image_name item_id evaluation_status`, then padded columns."""
    splits = {"train": [], "query": [], "gallery": []}
    with _listed(file) as lines:
        if lines[1].split() != ["image_name", "item_id", "evaluation_status"]:
            raise UserError(f"{file} is the list of another data set (its columns: {lines[1]}): "
                            f"use the one of the In-Shop Clothes Retrieval benchmark")
        rows = [line.split() for line in lines[2:] if line.strip()]
        first = rows[0][0]
        prefixes = [folder, folder / "Img"]
        images = next((p for p in prefixes if (p / first).is_file()), prefixes[0])
        for path, item, status in rows:
            splits[status].append((str(images / path), f"{int(item[3:]):08d}"))
    return splits["train"], splits["query"], splits["gallery"]


def _list_folder(root):
    """ROOT/train and ROOT/test with a folder per class, or the first half of ROOT's classes."""
    if not root.is_dir():
        raise UserError(f"--data-root {root} is not a folder: give one with a folder per class")
    try:
        if (root / "train").is_dir() and (root / "test").is_dir():
            train, test = _images_by_class(root / "train"), _images_by_class(root / "test")
        else:
            listing = _images_by_class(root)
            names = sorted({name for _, name in listing})
            first = set(names[:math.ceil(len(names) / 2)])
            train = [item for item in listing if item[1] in first]
            test = [item for item in listing if item[1] not in first]
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): check its permissions") \
            from None
    shared = sorted({name for _, name in train} & {name for _, name in test})
    if shared:
        raise UserError(f"train/ and test/ share {len(shared)} classes ({shared[0]}, ...): this is "
                        f"a classification split; metric learning is tested on unseen classes")
    if not train or not test:
        found = len({name for _, name in train + test})
        raise _not_found("folder", root, f"at least 2 class folders ROOT/<class>/*.jpg with images "
                                         f"({found} there)")
    return train, test


def _check_counts(name, root, lists):
    """Too few images are an error, any other difference from the published counts a warning."""
    expected = EXPECTED.get(name, ())[:len(lists)]
    found = tuple(len(listing) for listing in lists[:len(expected)])
    if sum(found) < sum(expected) / 2:
        raise UserError(f"{name} under {root} has {sum(found)} images, expected {sum(expected)}: "
                        f"the archive is not fully unpacked; unpack it again")
    if found != expected:
        cause = ("a classification split or a half-unpacked archive" if sum(found) < sum(expected)
                 else "a classification split or files that are not part of the archive")
        warnings.warn(f"{name} has {' + '.join(map(str, found))} images, expected "
                      f"{' + '.join(map(str, expected))} (train + test): likely {cause}",
                      stacklevel=3)


def _glyphs(seed, size, classes=100, per_class=30):
    """Random drawings of three curved strokes; shape decides the class, colour never does.

    An image is its class's drawing with jittered strokes, a new pose, pen width, colours,
    shading and noise. The first half of the classes trains, the second half is unseen.
    """
    side, count = round(256 * size / 224), classes * per_class
    stream = random_stream(seed, 0, DATA)
    drawing = stream.uniform(-0.8, 0.8, (classes, 3, 3, 2))         # 3 strokes of 3 control points
    points = drawing.repeat(per_class, 0) + stream.normal(0, 0.07, (count, 3, 3, 2))
    angle, zoom = stream.normal(0, 0.15, count), stream.uniform(0.75, 1.05, (count, 2))
    rotation = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1),
                         np.stack([np.sin(angle), np.cos(angle)], -1)], 1)        # (n, 2, 2)
    points = np.einsum("nij,nskj->nski", rotation, points) * zoom[:, None, None]
    points += stream.uniform(-0.12, 0.12, (count, 1, 1, 2))
    # A stroke is a quadratic Bezier curve, drawn as 4 short segments: (n, 12, 2) ends.
    t = np.linspace(0, 1, 5)
    curve = np.einsum("nskj,kt->nstj", points, [(1 - t) ** 2, 2 * t * (1 - t), t**2])
    curve = curve.astype(np.float32)
    start, end = curve[:, :, :-1].reshape(count, -1, 2), curve[:, :, 1:].reshape(count, -1, 2)
    width = stream.uniform(0.05, 0.11, (count, 1)).astype(np.float32)

    axis = np.linspace(-1, 1, side, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)     # (side * side, 2), x then y
    along = end - start
    length = (along**2).sum(-1).clip(1e-6)[:, None]                 # squared, (n, 1, 12)
    ink = np.empty((count, side * side), np.float32)
    for rows in np.array_split(np.arange(count), count // 50):      # distance to nearest segment
        offset = ((grid**2).sum(-1)[:, None] - 2 * grid @ start[rows].transpose(0, 2, 1)
                  + (start[rows] ** 2).sum(-1)[:, None])            # squared, (50, pixels, 12)
        dot = grid @ along[rows].transpose(0, 2, 1) - (start * along)[rows].sum(-1)[:, None]
        t = (dot / length[rows]).clip(0, 1)
        distance = np.sqrt((offset - 2 * t * dot + t**2 * length[rows]).min(-1).clip(0))
        ink[rows] = ((width[rows] - distance) * side / 2 + 0.5).clip(0, 1)
    paper = stream.uniform(0.4, 0.8, (count, 3, 1))
    contrast = -stream.uniform(0.13, 0.28, (count, 1, 1))           # ink is darker than paper
    tint = stream.normal(0, 0.05, (count, 3, 1))
    shading = (stream.normal(0, 0.06, (count, 2)).astype(np.float32) @ grid.T)[:, None]
    pixels = 0.03 * stream.standard_normal((count, 3, side * side), np.float32)
    pixels += (contrast + tint).astype(np.float32) * ink[:, None] + shading
    pixels += paper.astype(np.float32)
    pixels = torch.from_numpy((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    pixels = pixels.view(count, 3, side, side)
    names = [f"drawing-{image // per_class:03d}" for image in range(count)]
    paths = [f"glyphs/{name}/{image % per_class:02d}" for image, name in enumerate(names)]
    half = count // 2
    return (ImageSet(paths[:half], names[:half], size, pixels=pixels[:half]),
            ImageSet(paths[half:], names[half:], size, pixels=pixels[half:]))


def _gaussian(seed, size):
    """Appendix E of Panum et al.: N(0.25, s^2) against N(0.75, s^2) per pixel, s = 0.025.

    512 images of each class, split at random into 508 and 516: both classes are in both halves.
    """
    side = round(256 * size / 224)
    stream = random_stream(seed, 0, DATA)
    mean = np.repeat([0.25, 0.75], 512)
    pixels = stream.normal(size=(1024, 3, side, side), scale=0.025).astype(np.float32)
    pixels = ((pixels + mean[:, None, None, None]).clip(0, 1) * 255).round().astype(np.uint8)
    order = stream.permutation(1024)
    halves = []
    for rows in (np.sort(order[:508]), np.sort(order[508:])):
        names = [f"mean-{mean[row]:.2f}" for row in rows]
        halves.append(ImageSet([f"gaussian/{name}/{row:04d}" for row, name in zip(rows, names)],
                               names, size, pixels=torch.from_numpy(pixels[rows])))
    return halves[0], halves[1]


def balanced_subset(dataset: ImageSet, count: int) -> ImageSet:
    """A fixed class-balanced subset of `count` images: two more of every class, round by round."""
    seen, turn = Counter(), []
    for label in dataset.labels.tolist():
        turn.append(seen[label] // 2)                # in pairs: a single image has nothing to find
        seen[label] += 1
    part = dataset.subset(sorted(np.argsort(turn, kind="stable")[:count].tolist()))
    part.limited = True
    return part


def split_validation(train: ImageSet, classes: int) -> tuple[ImageSet, ImageSet]:
    """The last `classes` training classes become validation; training keeps the others."""
    if not 0 < classes < len(train.classes):
        raise UserError(f"--val-classes {classes} must leave training classes: the data set has "
                        f"{len(train.classes)}; lower it")
    kept = train.labels < len(train.classes) - classes
    return train.subset(kept.nonzero()[:, 0]), train.subset((~kept).nonzero()[:, 0])


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int,
                     purpose: int = BATCHES) -> list[Tensor]:
    """A permutation of `count` images cut into batches: a function of (seed, epoch).

    The last partial batch is dropped, unless it is the only one.
    """
    order = torch.from_numpy(random_stream(seed, epoch, purpose).permutation(count))
    batches = list(order.split(batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


def class_balanced_batches(labels: Tensor, batch_size: int, images_per_class: int, seed: int,
                           epoch: int, purpose: int = BATCHES) -> list[Tensor]:
    """P x K batches: P = batch_size / images_per_class distinct classes, K images of each.

    An epoch: every class's images are shuffled and dealt into groups of K; batches draw P distinct
    classes, the probability of a class being the number of groups it has left, until fewer than P
    classes have any. An image is seen at most once. Raises UserError when P classes with K images
    do not exist.
    """
    per_batch, rest = divmod(batch_size, images_per_class)
    if rest or not per_batch:
        raise UserError(f"--batch-size {batch_size} is not a multiple of --images-per-class "
                        f"{images_per_class}: change one of them")
    stream = random_stream(seed, epoch, purpose)
    labels = labels.numpy()
    groups = []
    for label in np.unique(labels):
        rows = stream.permutation(np.flatnonzero(labels == label))
        groups.append([rows[i:i + images_per_class]
                       for i in range(0, len(rows) - images_per_class + 1, images_per_class)])
    left = np.array([len(group) for group in groups])
    if (left > 0).sum() < per_batch:
        raise UserError(f"a batch needs {per_batch} classes of {images_per_class} images but the "
                        f"training split has {(left > 0).sum()}: lower --batch-size (now "
                        f"{batch_size}) or raise --images-per-class")
    batches = []
    while (left > 0).sum() >= per_batch:
        drawn = stream.choice(len(left), per_batch, replace=False, p=left / left.sum())
        left[drawn] -= 1
        batches.append(torch.from_numpy(np.concatenate([groups[c][left[c]] for c in drawn])))
    return batches


def pair_batches(labels: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Batches of pairs, [a0, p0, a1, p1, ...]: every image once as a, with a random other image of
    its class (Zhou & Patel's batches: classes may repeat in one, the last may be smaller).

    batch_size counts images. Images that are alone in their class are left out; UserError when
    all are, or when batch_size is odd.
    """
    if batch_size % 2:
        raise UserError(f"--batch-size {batch_size} is odd: batches are made of pairs; change it "
                        f"by one")
    stream = random_stream(seed, epoch, BATCHES)
    labels = labels.numpy()
    order = np.argsort(labels, kind="stable")                    # class after class
    size, start = np.bincount(labels), np.searchsorted(labels[order], labels)
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - start[order]         # of an image within its class
    anchors = stream.permutation(len(labels))
    anchors = anchors[size[labels[anchors]] > 1]
    if len(anchors) == 0:
        raise UserError("no training class has two images, so there are no pairs: use data with "
                        "several images of each class")
    sizes = size[labels[anchors]]
    partners = order[start[anchors] + (place[anchors] + stream.integers(1, sizes)) % sizes]
    return list(torch.from_numpy(np.stack([anchors, partners], 1).reshape(-1)).split(batch_size))


def split_by_image(labels: Tensor, parts: int, seed: int) -> Tensor:
    """Part 0..parts-1 of every image (n,): random, class by class, equal within one image.

    Each class is shuffled and dealt out in turn, going on where the previous class stopped.
    """
    stream = random_stream(seed, 0, SPLIT)
    rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    order = torch.cat([own[torch.from_numpy(stream.permutation(len(own)))] for own in rows])
    part = torch.empty(len(labels), dtype=torch.int64)
    part[order] = torch.arange(len(labels)) % parts
    return part


def load_batches(dataset: ImageSet, batches, seed: int = 0, epoch: int = 0, *, augment: bool = True,
                 scale=(0.08, 1.0), workers: int = 0, device="cpu"):
    """Yield (images (B, 3, S, S) in [0, 1], labels (B,), indices (B,)) for each batch.

    Images and labels on the device, indices on the CPU: reading them never waits for a GPU.

    augment: random views whose parameters come from (seed, epoch, image index) alone, so the
    result does not depend on `workers` (threads that prepare the next two batches; 0: none) or on
    the order of the batches. Otherwise evaluation views.
    """
    def view(index):
        if augment:
            return dataset.random_view(index, random_stream(seed, epoch, AUGMENT, index), scale)
        return dataset.view(index)

    def collate(views):
        images = torch.stack(views).contiguous(memory_format=CHANNELS_LAST)
        return images.pin_memory() if torch.device(device).type == "cuda" else images

    def finish(images, batch):
        images = images.to(device, non_blocking=True)
        labels = dataset.labels[batch].to(device, non_blocking=True)
        return images.float().div_(255), labels, batch

    if workers == 0:
        for batch in batches:
            yield finish(collate([view(index) for index in batch.tolist()]), batch)
        return
    with ThreadPoolExecutor(workers) as pool:
        # Each of these threads would compute with as many of its own. With more of them than cores
        # the network took twice the time (results/benchmarks-loading-convnet-32-cpu-before.json).
        threads, started = torch.get_num_threads(), Barrier(workers + 1, timeout=60)

        def start():
            torch.get_num_threads()                        # the first call sets it, to `threads`
            torch.set_num_threads(1)
            started.wait()

        for _ in range(workers):
            pool.submit(start)
        started.wait()
        torch.set_num_threads(threads)                     # of this thread, and of any new one
        waiting = deque()
        for batch in batches:
            views = [pool.submit(view, index) for index in batch.tolist()]
            # Submitted after the views that it waits for, so that one worker is enough.
            ready = pool.submit(lambda views: collate([own.result() for own in views]), views)
            waiting.append((ready, batch))
            if len(waiting) > 2:
                ready, own = waiting.popleft()
                yield finish(ready.result(), own)
        for ready, own in waiting:
            yield finish(ready.result(), own)


# ---- models ----------------------------------------------------------------------------------

ARCHS = ("convnet", "mobilenetv2", "bninception", "resnet18", "resnet50")
TORCHVISION = {"mobilenetv2": "mobilenet_v2", "resnet18": "resnet18", "resnet50": "resnet50"}


class EmbeddingModel(nn.Module):
    """Images (B, 3, S, S) in [0, 1] -> unit embeddings (B, D): normalise, backbone, pool, linear.

    amp: run the backbone in bfloat16; pooling, head and everything after stay in float32.
    """

    def __init__(self, normalize, backbone, channels, embedding_dim, pool):
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone
        self.head = nn.Linear(channels, embedding_dim)
        self.pool = pool
        self.amp = False

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            maps = self.backbone(self.normalize(images))              # (B, channels, h, w)
        maps = maps.float() if self.amp else maps
        pooled = maps.mean((2, 3))
        if self.pool == "avgmax":
            pooled = pooled + maps.amax((2, 3))
        return F.normalize(self.head(pooled), dim=1)


class Normalize(nn.Module):
    """(x - mean) / std per channel, with RGB turned into BGR for networks that came from Caffe."""

    def __init__(self, mean, std, bgr=False):
        super().__init__()
        self.bgr = bgr
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def forward(self, images):
        return ((images.flip(1) if self.bgr else images) - self.mean) / self.std


def _convnet():
    """Four 3 x 3 convolutions, the first three with stride 2: small, and fast on a CPU."""
    layers, width = [], 3
    for channels, stride in ((16, 2), (32, 2), (64, 2), (128, 1)):
        layers += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels),
                   nn.ReLU(inplace=True)]
        width = channels
    return nn.Sequential(*layers), width


class BNInception(nn.Module):
    """Inception with batch normalisation (Ioffe & Szegedy, ICML 2015), the Caffe version.

    Every convolution has a bias and is followed by BatchNorm and ReLU. Names of the parameters are
    those of the public weight files (`bn_inception-52deb4733.pth`).
    """

    # block: input, 1x1, (3x3_reduce, 3x3), (double_3x3_reduce, double_3x3), pool, pool_proj.
    # Blocks without 1x1 have stride 2 and pass their pooled input through.
    BLOCKS = {
        "3a": (192, 64, (64, 64), (64, 96), "avg", 32),
        "3b": (256, 64, (64, 96), (64, 96), "avg", 64),
        "3c": (320, 0, (128, 160), (64, 96), "max", 0),
        "4a": (576, 224, (64, 96), (96, 128), "avg", 128),
        "4b": (576, 192, (96, 128), (96, 128), "avg", 128),
        "4c": (576, 160, (128, 160), (128, 160), "avg", 128),
        "4d": (608, 96, (128, 192), (160, 192), "avg", 128),
        "4e": (608, 0, (128, 192), (192, 256), "max", 0),
        "5a": (1056, 352, (192, 320), (160, 224), "avg", 128),
        "5b": (1024, 352, (192, 320), (192, 224), "max", 128),
    }

    def __init__(self):
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        for block, (width, one, three, double, _, proj) in self.BLOCKS.items():
            stride, name = (1 if one else 2), f"inception_{block}_"
            if one:
                self._add(name + "1x1", width, one, 1)
            self._add(name + "3x3_reduce", width, three[0], 1)
            self._add(name + "3x3", three[0], three[1], 3, stride)
            self._add(name + "double_3x3_reduce", width, double[0], 1)
            self._add(name + "double_3x3_1", double[0], double[1], 3)
            self._add(name + "double_3x3_2", double[1], double[1], 3, stride)
            if proj:
                self._add(name + "pool_proj", width, proj, 1)

    def _add(self, name, width, channels, kernel, stride=1):
        self.add_module(name, nn.Conv2d(width, channels, kernel, stride, kernel // 2))
        self.add_module(name + "_bn", nn.BatchNorm2d(channels))

    def _run(self, maps, *names):
        for name in names:
            maps = F.relu(getattr(self, name + "_bn")(getattr(self, name)(maps)))
        return maps

    def forward(self, maps):
        # ceil_mode in every pooling: Caffe rounds sizes up.
        maps = F.max_pool2d(self._run(maps, "conv1_7x7_s2"), 3, 2, ceil_mode=True)
        maps = self._run(maps, "conv2_3x3_reduce", "conv2_3x3")
        maps = F.max_pool2d(maps, 3, 2, ceil_mode=True)
        for block, (_, one, _, _, pool, _) in self.BLOCKS.items():
            name = f"inception_{block}_"
            out = [self._run(maps, name + "1x1")] if one else []
            out.append(self._run(maps, name + "3x3_reduce", name + "3x3"))
            out.append(self._run(maps, name + "double_3x3_reduce", name + "double_3x3_1",
                                 name + "double_3x3_2"))
            if not one:
                out.append(F.max_pool2d(maps, 3, 2, ceil_mode=True))
            else:
                pooling = F.avg_pool2d if pool == "avg" else F.max_pool2d
                out.append(self._run(pooling(maps, 3, 1, 1, ceil_mode=True), name + "pool_proj"))
            maps = torch.cat(out, 1)
        return maps


def build_model(arch: str, embedding_dim: int = 128, weights: str = "none",
                pool: str | None = None) -> EmbeddingModel:
    """A network from [0, 1] images (B, 3, S, S) to unit embeddings (B, embedding_dim).

    arch: one of ARCHS. weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none"
    (random) or a file of ImageNet weights, with or without its classifier. pool: "avg", or
    "avgmax" (average and maximum summed: Proxy Anchor's head, the default of bninception).
    """
    if arch not in ARCHS:
        raise UserError(f"unknown --arch {arch!r}: choose one of {', '.join(ARCHS)}")
    if pool not in (None, "avg", "avgmax"):
        raise UserError(f"unknown --pool {pool!r}: choose avg or avgmax")
    state = None if weights == "none" else pretrained(arch, weights)
    if arch in TORCHVISION:
        net = torchvision.models.get_model(TORCHVISION[arch])
        children = OrderedDict(net.named_children())
        channels = (children.popitem()[1][-1] if arch == "mobilenetv2" else net.fc).in_features
        if arch != "mobilenetv2":
            del children["avgpool"], children["fc"]
        backbone = nn.Sequential(children)                            # keeps torchvision's names
    else:
        backbone, channels = (BNInception(), 1024) if arch == "bninception" else _convnet()
    if state is not None:
        load_weights(backbone, state, arch, weights)
    normalize = (Normalize([104 / 255, 117 / 255, 128 / 255], [1 / 255] * 3, bgr=True)
                 if arch == "bninception" else Normalize([0.485, 0.456, 0.406],
                                                         [0.229, 0.224, 0.225]))
    pool = pool or ("avgmax" if arch == "bninception" else "avg")
    model = EmbeddingModel(normalize, backbone, channels, embedding_dim, pool)
    return model.to(memory_format=CHANNELS_LAST)


def pretrained(arch, weights):
    """The state dict of an ImageNet network: torchvision's, or the user's file."""
    if weights != "imagenet":
        state = _torch_load(weights, "a weights file")
        if "members" in state and "format" in state:
            raise UserError(f"{weights} is a checkpoint of a run, not ImageNet weights: continue "
                            f"the run with --resume or evaluate it with eval.py RUN")
        state = state.get("state_dict", state)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise UserError(f"{weights} holds no named tensors: give weights of {arch}")
        return state
    if arch == "bninception":
        raise UserError("torchvision has no bninception weights: get bn_inception-52deb4733.pth and"
                        " pass --weights FILE, or --weights none for a random start")
    if arch == "convnet":
        raise UserError("there are no ImageNet weights for convnet: use --weights none")
    entry = torchvision.models.get_model_weights(TORCHVISION[arch])["IMAGENET1K_V1"]
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except Exception as error:                 # no network, a damaged cache, a full disk ...
        raise UserError(f"cannot download {os.path.basename(entry.url)} ({error}): fetch it from "
                        f"{entry.url} and pass --weights FILE, or --weights none for a random "
                        f"start") from error


def load_weights(network, state, arch, weights):
    """Load a state dict into a backbone, a classifier's without its classifier, or into a whole
    EmbeddingModel; a file that does not fit is one line."""
    own = network.state_dict()
    heads = ("classifier.", "fc.", "last_linear.")
    state = {name: value[0] if name in own and value.shape == (1, *own[name].shape) else value
             for name, value in state.items()             # old bninception files: BatchNorm [1, C]
             if isinstance(value, Tensor) and not name.startswith(heads)}
    for name, value in own.items():                       # absent in files of old torch versions
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, value)
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unknown or other:
        example = (missing + unknown + other)[0]
        cure = "its --embedding-dim" if example == "head.weight" else f"weights of {arch}"
        raise UserError(f"{weights} does not fit --arch {arch}: {len(missing)} tensors missing, "
                        f"{len(unknown)} unknown, {len(other)} of another shape (first: {example});"
                        f" give {cure}")
    network.load_state_dict(state)


@contextlib.contextmanager
def eval_mode(*models):
    """Evaluation mode inside the `with`; afterwards every module is in the mode it was in."""
    training = [module for model in models if isinstance(model, nn.Module)
                for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def frozen(*models):
    """eval_mode, and parameters that need no gradient: the state in which attacks are crafted.

    Attacks only need input gradients; not preparing the others saves time.
    """
    parameters = [parameter for model in models if isinstance(model, nn.Module)
                  for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with eval_mode(*models):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Training mode; freeze_bn fixes the BatchNorm statistics (weight and bias still train)."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def load_model(path, device="cpu") -> list[nn.Module]:
    """The members of a run (its folder or its last.pt), in eval mode on `device`."""
    return build_members(load_checkpoint(path), device)


def build_members(checkpoint, device="cpu"):
    args, members = checkpoint["args"], []
    for state in checkpoint["members"]:
        model = build_model(args["arch"], args["embedding_dim"], "none", args["pool"])
        model.load_state_dict(state)
        members.append(model.to(device).eval())
    return members


# ---- losses ----------------------------------------------------------------------------------

def proxy_anchor_loss(embeddings: Tensor, labels: Tensor, proxies: Tensor, margin: float = 0.1,
                      scale: float = 32.0) -> Tensor:
    """Proxy Anchor, Eq. (4) of Kim et al., CVPR 2020 (https://arxiv.org/abs/2003.13911).

    embeddings (B, D) and proxies (C, D) of any norm: normalised here. labels (B,) int64 in [0, C).
    margin: the paper's delta, in cosine. scale: its alpha. Returns a scalar >= 0. A class that is
    absent from the batch adds nothing to the pull and counts in the push, as in the paper.
    """
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(proxies, dim=1).T           # (B, C)
    positive = F.one_hot(labels, len(proxies)).bool()                                  # (B, C)
    pull = (-scale * (cosine - margin)).masked_fill(~positive, -torch.inf).logsumexp(0)
    push = (scale * (cosine + margin)).masked_fill(positive, -torch.inf).logsumexp(0)
    # softplus(logsumexp(z)) = log(1 + sum exp z) without overflow
    return F.softplus(pull).sum() / positive.any(0).sum() + F.softplus(push).mean()


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2,
                 squared: bool = False, reduction: str = "mean") -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin) of embeddings (T, D); d Euclidean, or its square.

    reduction: "mean" over all triplets, or "nonzero": over the strictly positive terms.
    No triplets: 0, with a graph.
    """
    near, far = euclidean(anchor, positive), euclidean(anchor, negative)
    if squared:
        near, far = near.square(), far.square()
    return _reduce(F.relu(near - far + margin), reduction)


def contrastive_loss(first: Tensor, second: Tensor, same: Tensor, margin: float = 1.0,
                     reduction: str = "mean") -> Tensor:
    """d(x, y) of positive pairs plus max(0, margin - d(x, y)) of negative pairs, a mean of each.

    first, second (T, D); same: bool (T,), whether the pair is a positive one. reduction as in
    triplet_loss, over either kind of pair by itself. (Panum et al., Sec. 3.1; Hadsell et al. 2006)
    """
    distance = euclidean(first, second)
    return (_reduce(distance[same], reduction)
            + _reduce(F.relu(margin - distance[~same]), reduction))


def euclidean(first, second):
    """Euclidean distance of rows; its gradient at first == second is 0 (no epsilon is added)."""
    return torch.linalg.vector_norm(first - second, dim=1)


def _reduce(terms, reduction):
    if reduction not in ("mean", "nonzero"):
        raise ValueError(f"reduction must be 'mean' or 'nonzero', not {reduction!r}")
    count = (terms > 0).sum().clamp(min=1) if reduction == "nonzero" else max(len(terms), 1)
    return terms.sum() / count


@torch.no_grad()
def mine_triplets(embeddings: Tensor, labels: Tensor, how: str, generator=None, *, anchors=None,
                  margin: float = 0.2, cutoffs=(0.5, 1.4),
                  partners=None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one triplet per anchor: (a, p, n), row numbers int64 (T,).

    anchors: rows to use (None: every row). An anchor without another image of its class, or
    without an image of another class, is dropped, so T may be 0. The positive is uniform among the
    OTHER rows of the class (softhard excepted), the negative is

        random    uniform over rows of other classes
        semihard  uniform over negatives with d(a, p) < d(a, n) < d(a, p) + margin, else random
        softhard  uniform over negatives nearer than the farthest positive, else random; its
                  positive is uniform over positives farther than the nearest negative, else random
        distance  drawn with probability 1 / q(d), distance-weighted sampling (Wu et al., ICCV 2017)
        hardest   the nearest one

    cutoffs: distances below the first count as it; negatives beyond the second are left out unless
    none is nearer (then the nearest); None switches either off. partners: the row of the positive
    of every anchor, where it is not drawn (softhard draws its own all the same).
    """
    if how not in ("random", "semihard", "softhard", "distance", "hardest"):
        raise ValueError(f"unknown mining {how!r}: random, semihard, softhard, distance or hardest")
    rows = torch.arange(len(labels), device=labels.device)
    anchors = rows if anchors is None else anchors.to(labels.device)
    same = labels[anchors, None] == labels                                             # (A, B)
    other = same & (anchors[:, None] != rows)
    usable = other.any(1) & ~same.all(1)
    anchors, positive, negative = anchors[usable], other[usable], ~same[usable]
    if len(anchors) == 0:
        return anchors, anchors, anchors
    # exact differences: the matmul form of cdist is off by 1e-3 for near-identical rows. A network
    # that has diverged still gets triplets, and a loss that says so.
    finite = embeddings.float().nan_to_num(0, 0, 0)
    distance = torch.cdist(finite[anchors], finite,
                           compute_mode="donot_use_mm_for_euclid_dist")                # (T, B)
    nearest_negative = distance.masked_fill(~negative, torch.inf)
    farthest_positive = distance.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)

    def draw(wanted, fallback):
        chosen = torch.where(wanted.any(1, keepdim=True), wanted, fallback)
        return torch.multinomial(chosen.float(), 1, generator=generator)[:, 0]

    harder = positive & (distance > nearest_negative.amin(1, keepdim=True))
    if how == "softhard" or partners is None:
        p = draw(harder if how == "softhard" else positive, positive)
    else:
        p = partners.to(labels.device)[usable]
    to_positive = distance.gather(1, p[:, None])
    if how == "hardest":
        return anchors, p, nearest_negative.argmin(1)
    if how == "distance":
        return anchors, p, _distance_weighted(nearest_negative, embeddings.shape[1], cutoffs,
                                              generator)
    wanted = {"random": negative,
              "semihard": negative & (distance > to_positive) & (distance < to_positive + margin),
              "softhard": negative & (distance < farthest_positive)}[how]
    return anchors, p, draw(wanted, negative)


def mine_pairs(embeddings, labels, source):
    """One triplet per pair of a batch of pairs (pair_batches) that has a negative in it: (a, p, n).

    The positive is the partner, except that softhard draws its own.
    """
    even = torch.arange(0, len(labels), 2, device=labels.device)
    return mine_triplets(embeddings, labels, source, anchors=even, partners=even + 1,
                         cutoffs=(None, None))                 # Zhou & Patel's have no cutoffs


def _distance_weighted(distance, dim, cutoffs, generator):
    """One negative per row with weight 1 / q(d); distance (T, B) is inf where not a negative.

    q(d) ~ d^(dim - 2) (1 - d^2 / 4)^((dim - 3) / 2) is the density of distances on the sphere.
    Weights are normalised row by row: over the whole matrix they underflow at dim 512.
    """
    low, high = cutoffs
    allowed = distance < (torch.inf if high is None else high)
    allowed = torch.where(allowed.any(1, keepdim=True), allowed,
                          distance == distance.amin(1, keepdim=True))
    d = distance.double().clamp(max(low or 0, 1e-4), 1.99)
    log_weight = (2 - dim) * d.log() - (dim - 3) / 2 * torch.log1p(-d.square() / 4)
    weight = log_weight.masked_fill(~allowed, -torch.inf).softmax(1)
    return torch.multinomial(weight, 1, generator=generator)[:, 0]


# ---- attack ----------------------------------------------------------------------------------

def pgd(objective, images: Tensor, eps: float, step_size: float, steps: int,
        random_start: bool = True, start: Tensor | None = None, keep: str = "last") -> Tensor:
    """Maximise objective(x) over ||x - images||_inf <= eps and x in [0, 1], by sign steps.

    Projected gradient ascent (Madry et al., ICLR 2018, Sec. 2.1). images (B, C, H, W) in [0, 1];
    eps and step_size in pixel values, also (B, 1, 1, 1) where `start` is given. objective: images
    -> one value per image, or one per tuple of images when tuples are stacked ([a; p; n] gives
    (B / 3,)); its sum is ascended.
    start: begin here (projected) instead of uniformly at random in the ball (random_start) or at
    the images. keep: "last" iterate, or per image (tuple) the "best" one, the start included.
    Returns images in [0, 1], detached. Parameters receive no gradients. The mode of the model is
    the caller's choice: `with eval_mode(model):`.
    """
    if keep not in ("last", "best"):
        raise ValueError(f"keep must be 'last' or 'best', not {keep!r}")
    images = images.detach()
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    if start is not None:
        x = start.detach()
    elif random_start:
        x = images + torch.empty_like(images).uniform_(-eps, eps)
    else:
        x = images
    x = x.clamp(lower, upper).detach()
    best, best_value = images, None
    for step in range(steps + 1):                     # the last turn only values the last iterate
        if step == steps and keep == "last":
            return x
        x.requires_grad_()
        with torch.enable_grad():
            value = objective(x)
            if step < steps:
                (gradient,) = torch.autograd.grad(value.sum(), x)
        x, value = x.detach(), value.detach()
        if keep == "best":
            better = value > best_value if best_value is not None else torch.ones_like(value) > 0
            # The value of a tuple decides for all of its stacked images.
            tuples = better.repeat(len(x) // len(better)).view(-1, *[1] * (x.dim() - 1))
            best = torch.where(tuples, x, best)
            best_value = value if best_value is None else torch.maximum(value, best_value)
        if step < steps:
            x = (x + step_size * gradient.sign()).clamp(lower, upper)
    return best


def shift_objective(models, references):
    """sum_i 1 - cos(F_i(x'), F_i(x)): how far an attack moves every member's embedding.

    EAT, Eq. (10), with the distance of its Eq. (5); references: the clean embeddings F_i(x), one
    (B, D) per model. Label-free, hence the same in training and on unseen classes. Its gradient at
    x' = x is zero (rounding noise in floating point): start anywhere else.
    """
    references = [reference.detach() for reference in references]
    return lambda images: sum(1 - (model(images) * reference).sum(1)
                              for model, reference in zip(models, references))


# ---- metrics ---------------------------------------------------------------------------------

def similarities(embeddings, labels, gallery=None, gallery_labels=None):
    """Chunk by chunk: (rows (b,), similarity (b, N), best (b,)), for the three gallery forms.

    similarity orders candidates as the Euclidean distance does: x.y - |y|^2 / 2. Candidates of the
    query's own class are lowered by the last bit, so that they lose every tie; best is the highest
    of them (-inf: none). The query itself (leave-one-out, or row i of a gallery of the same images)
    is -inf. Where embeddings are not finite, what is NaN counts against the query too.
    """
    same_images = gallery_labels is None
    gallery = embeddings if gallery is None else gallery
    gallery_labels = labels if same_images else gallery_labels
    if same_images and len(gallery) != len(embeddings):
        raise ValueError(f"a gallery without labels holds the same images in the same order: "
                         f"{len(gallery)} rows for {len(embeddings)} queries")
    if len(embeddings) == 0:
        return
    # A matrix product rounds equal columns differently, and equal images must tie: multiply once.
    distinct, column = gallery.unique(dim=0, return_inverse=True)
    if len(distinct) == len(gallery):
        distinct, column = gallery, None
    half_norm = distinct.square().sum(1) / 2
    finite = bool(embeddings.isfinite().all() & gallery.isfinite().all())
    # The candidates of every class stand together in `order`, from `start` on.
    index = torch.cat([labels, gallery_labels]).unique(return_inverse=True)[1]
    own, index = index[:len(labels)], index[len(labels):]
    size = index.bincount(minlength=int(own.max()) + 1)
    order, start = index.argsort(stable=True), size.cumsum(0) - size
    place, chunk = torch.arange(int(size.max()), device=labels.device), 2**24 // len(gallery)
    for rows in torch.arange(len(labels), device=labels.device).split(max(1, chunk)):
        similarity = embeddings[rows] @ distinct.T
        similarity -= half_norm
        similarity = similarity if column is None else similarity[:, column]
        if not finite:
            similarity.nan_to_num_(nan=torch.inf)
        classes = own[rows, None]
        columns = order[(start[classes] + place).clamp(max=len(gallery) - 1)]
        relevant = index[columns] == classes                   # (b, largest class), not (b, N)
        value = similarity.gather(1, columns)
        lowered = torch.nextafter(value, value.new_tensor(-torch.inf))
        lowered = lowered.masked_fill(~value.isfinite(), -torch.inf)
        similarity.scatter_(1, columns, torch.where(relevant, lowered, value))
        if same_images:
            similarity[torch.arange(len(rows)), rows] = -torch.inf
            relevant &= columns != rows[:, None]
        yield rows, similarity, lowered.masked_fill(~relevant, -torch.inf).amax(1)


@torch.no_grad()
def ranking_scores(embeddings, labels, ks, gallery=None, gallery_labels=None, precision=True):
    """(Recall@K query by query, bool (n, len(ks)); mAP@R or 0) in one pass over the candidates."""
    count = candidate_counts(labels, gallery_labels)
    names = labels if gallery_labels is None else gallery_labels
    most = int(count.max()) if precision and len(count) else 0
    limits = torch.tensor(ks, device=labels.device)
    depth = min(max((*ks, most)), len(names))
    hits = torch.zeros(len(labels), len(ks), dtype=torch.bool, device=labels.device)
    average = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for rows, similarity, best in similarities(embeddings, labels, gallery, gallery_labels):
        value, nearest = top_candidates(similarity, depth)
        nearer = (value > best[:, None]).sum(1)               # as many as that, or K and more
        hits[rows] = best.isfinite()[:, None] & (nearer[:, None] < limits)
        hit = (names[nearest] == labels[rows, None]) & (value > -torch.inf)
        average[rows] = average_precision(hit, count[rows])
    return hits.cpu(), float(average.sum() / (count > 0).sum().clamp(min=1))


def top_candidates(similarity, depth):
    """similarity.topk(depth) of the rows (b, N), in less time where N is large.

    The `depth` largest are in no more than `depth` of the groups of 64: those of largest maximum.
    """
    count = similarity.shape[1]
    groups = count // 64
    if groups < 16 * depth:
        return similarity.topk(depth)
    highest = similarity[:, :64 * groups].unflatten(1, (64, groups)).amax(1)       # (b, groups)
    group = highest.topk(depth).indices[:, :, None]
    columns = torch.arange(count, device=similarity.device)
    columns = torch.cat([(group + columns[:64] * groups).flatten(1),
                         columns[64 * groups:].expand(len(similarity), -1)], 1)
    value, place = similarity.gather(1, columns).topk(depth)
    return value, columns.gather(1, place)


@torch.no_grad()
def recall_at_k(embeddings: Tensor, labels: Tensor, ks=(1, 2, 4, 8), gallery: Tensor | None = None,
                gallery_labels: Tensor | None = None) -> dict[int, float]:
    """Recall@K: the share of queries with a same-class item among their K nearest candidates.

    embeddings (n, D), labels (n,). gallery None: leave-one-out. gallery without gallery_labels: the
    same images in the same order (template matching), row i is not a candidate of query i. gallery
    with gallery_labels: another set, every row is a candidate. Ties count against the query: a hit
    needs fewer than K candidates of other classes at least as near as the nearest one of its own.
    A query whose class has no candidate is a miss. -> {K: share in [0, 1]}.
    """
    hit, _ = ranking_scores(embeddings, labels, ks, gallery, gallery_labels, precision=False)
    return {k: count / max(len(labels), 1) for k, count in zip(ks, hit.sum(0).tolist())}


def recall_interval(hit: Tensor, labels: Tensor, seed: int, draws: int = 1000) -> dict[str, float]:
    """The 95 % interval of Recall@1 over classes: {"R@1_low": share, "R@1_high": share}.

    hit (n,): the queries that are right at rank 1 (or their mean over members), labels (n,). As
    many classes as there are, drawn with replacement, all queries of each, 1,000 times: percentiles
    2.5 and 97.5. The candidates stay. The same seed draws the same classes for every network.
    """
    index = labels.unique(return_inverse=True)[1].cpu()
    right = index.bincount(weights=hit.cpu().double()).numpy()
    size = index.bincount().numpy()
    times = random_stream(seed, 0, CLASSES).multinomial(
        len(size), np.full(len(size), 1 / len(size)), size=draws)                   # (draws, C)
    low, high = np.quantile(times @ right / (times @ size), (0.025, 0.975))
    return {"R@1_low": float(low), "R@1_high": float(high)}


@torch.no_grad()
def map_at_r(embeddings: Tensor, labels: Tensor, gallery: Tensor | None = None,
             gallery_labels: Tensor | None = None) -> float:
    """mAP@R (Musgrave et al., ECCV 2020): average precision over the first R candidates.

    R is the number of candidates of the query's class; AP@R = 1/R sum_{k<=R} precision@k * rel_k.
    Arguments as in recall_at_k. Queries with R = 0 are left out of the mean. Ties count against
    the query.
    """
    return ranking_scores(embeddings, labels, (), gallery, gallery_labels)[1]


def average_precision(hit, count):
    """AP@R per query from hit (b, k >= R) in rank order and R = count (b,); 0 where R = 0."""
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    hit = hit & (rank <= count[:, None])
    return (hit.cumsum(1) / rank * hit).double().sum(1) / count.clamp(min=1)


@torch.no_grad()
def kmeans(embeddings: Tensor, clusters: int, seed: int) -> Tensor:
    """Lloyd's k-means: cluster ids int64 (N,). Deterministic in the seed.

    Starts at k-means++ centres (distinct random rows above 1,000 clusters), stops when no
    assignment changes, after 20 iterations at most. A cluster that loses all its rows keeps its
    centre, so fewer distinct rows than clusters is no error.
    """
    stream = random_stream(seed, 0, EVALUATE)
    points = embeddings.float()
    clusters = min(clusters, len(points))
    if clusters > 1000:
        rows = torch.from_numpy(stream.permutation(len(points))[:clusters])
        centres = points[rows.to(points.device)]
    else:
        chosen = [int(stream.integers(len(points)))]
        nearest = (points - points[chosen[0]]).square().sum(1)
        for _ in range(clusters - 1):                 # next centre with probability ~ distance^2
            cumulative = nearest.double().cpu().cumsum(0)      # on a GPU the sum's order varies
            draw = stream.random() * float(cumulative[-1])
            row = int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(points) - 1))
            chosen.append(row)
            nearest = torch.minimum(nearest, (points - points[row]).square().sum(1))
        centres = points[torch.tensor(chosen, device=points.device)]
    assigned = torch.full((len(points),), -1, device=points.device)
    for _ in range(20):
        half_norm = centres.square().sum(1) / 2
        chunks = points.split(max(1, 2**24 // clusters))
        nearest = torch.cat([(chunk @ centres.T - half_norm).argmax(1) for chunk in chunks])
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        count = torch.bincount(assigned, minlength=clusters)[:, None]
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return assigned


def _contingency(labels, clusters):
    """Sizes of classes, of clusters and of their non-empty intersections, float64."""
    labels, clusters = labels.cpu().unique(return_inverse=True)[1], \
        clusters.cpu().unique(return_inverse=True)[1]
    pairs, both = (labels * (int(clusters.max()) + 1) + clusters).unique(return_counts=True)
    return (labels.bincount().double(), clusters.bincount().double(), both.double(),
            pairs // (int(clusters.max()) + 1), pairs % (int(clusters.max()) + 1))


def _entropy(sizes):
    share = sizes / sizes.sum()
    return float(-(share * share.log()).sum())


def _mutual_information(rows, columns, both, i, j):
    total = both.sum()
    ratio = both.log() + total.log() - rows[i].log() - columns[j].log()
    return float((both / total * ratio).sum())


def nmi(labels: Tensor, clusters: Tensor) -> float:
    """Normalised mutual information 2 I(L; C) / (H(L) + H(C)), in [0, 1] (EAT, Eq. (13))."""
    rows, columns, both, i, j = _contingency(labels, clusters)
    if len(rows) == len(columns) == 1:
        return 1.0
    information = _mutual_information(rows, columns, both, i, j)
    return min(max(2 * information / (_entropy(rows) + _entropy(columns)), 0.0), 1.0)


def ami(labels: Tensor, clusters: Tensor) -> float:
    """Adjusted mutual information (Vinh et al., JMLR 2010): NMI with chance at 0, at most 1.

    (I - E[I]) / (mean(H(L), H(C)) - E[I]), E over random assignments with the same sizes.
    """
    rows, columns, both, i, j = _contingency(labels, clusters)
    if len(rows) == len(columns) == 1:
        return 1.0
    total = rows.sum()
    log_factorial = torch.lgamma(torch.arange(int(total) + 2, dtype=torch.float64) + 1)

    def log_factorials(sizes):
        return log_factorial[sizes.long()]

    # E[I] (their Eq. 24a) depends on the sizes a, b alone: sum over distinct sizes, with counts.
    row_size, row_count = rows.unique(return_counts=True)
    column_size, column_count = columns.unique(return_counts=True)
    expected = 0.0
    for a, times_a in zip(row_size, row_count):
        b, times = column_size[:, None], column_count[:, None] * times_a             # (sizes, 1)
        n = torch.arange(1, int(min(a, column_size.max())) + 1, dtype=torch.float64)   # (values,)
        possible = (n >= a + b - total) & (n <= b)
        n = torch.where(possible, n, torch.minimum(a, b))            # any legal one: it is left out
        log_probability = (log_factorials(a) + log_factorials(b) + log_factorials(total - a)
                           + log_factorials(total - b) - log_factorials(total)
                           - log_factorials(n) - log_factorials(a - n)
                           - log_factorials(b - n) - log_factorials(total - a - b + n))
        term = n / total * (n.log() + total.log() - a.log() - b.log()) * log_probability.exp()
        expected += float((term * possible * times).sum())
    information = _mutual_information(rows, columns, both, i, j)
    ceiling = (_entropy(rows) + _entropy(columns)) / 2 - expected
    tiny = float(np.finfo(np.float64).eps)
    return (information - expected) / (min(ceiling, -tiny) if ceiling < 0 else max(ceiling, tiny))


def pairwise_f1(labels: Tensor, clusters: Tensor) -> float:
    """F1 of "these two images are of one class" read off the clusters (EAT, Eq. (12))."""
    rows, columns, both, _, _ = _contingency(labels, clusters)
    pairs = [float((sizes * (sizes - 1) / 2).sum()) for sizes in (both, rows, columns)]
    return 2 * pairs[0] / (pairs[1] + pairs[2]) if pairs[1] + pairs[2] else 0.0


# ---- inference by voting ---------------------------------------------------------------------

def vote_labels(votes: Tensor) -> Tensor:
    """Plurality over the first dimension, the N members: (N, ...) labels -> (...) labels.

    Among tied labels the one whose first voter comes first: [A, B, B, C, C] -> B, [A, B, C] -> A.
    """
    agreeing = torch.stack([(votes == own).sum(0, dtype=torch.uint8) for own in votes])
    return votes.gather(0, agreeing.argmax(0, keepdim=True))[0]          # argmax: the first maximum


def vote_recall(neighbour_labels: Tensor, labels: Tensor, ks=(1, 2, 4, 8)) -> dict[int, float]:
    """Recall@K of a voting ensemble: position j of the list carries the plurality label of the
    members' j-th neighbours (`vote_labels`); a hit is the query's label among the first K.

    neighbour_labels (N, n, >= max K or all candidates), labels (n,). -> {K: share in [0, 1]}.
    """
    hit = vote_labels(neighbour_labels) == labels[:, None]
    return {k: float(hit[:, :k].any(1).double().mean()) for k in ks}


def cluster_vote_rule(images: int, clusters: int) -> str:
    """Which of its rules vote_clusters uses for so many images and clusters."""
    if images <= 5000:
        return "co-association"
    return "aligned-optimal" if clusters <= 1000 else "aligned-greedy"


@torch.no_grad()
def vote_clusters(assignments: Tensor, clusters: int) -> Tensor:
    """One clustering out of the N members': at most `clusters` ids (n,) from assignments (N, n).

    Up to 5,000 images, co-association: two images belong together when most members put them
    together; average linkage on that relation, down to `clusters`. Above, every member's ids are
    renamed after the member that agrees best with the others (highest mean NMI; an optimal
    assignment up to 1,000 clusters, greedy beyond), then the plurality decides.
    """
    assignments = assignments.cpu()
    rule = cluster_vote_rule(assignments.shape[1], clusters)
    if rule == "co-association":
        return _co_association(assignments, clusters)
    members = range(len(assignments))
    agreement = [np.mean([nmi(assignments[i], assignments[j]) for j in members if j != i] or [1.0])
                 for i in members]
    reference = assignments[int(np.argmax(agreement))]
    size = max(int(assignments.max()) + 1, clusters)
    renamed = []
    for own in assignments:
        cells, overlap = (own * size + reference).unique(return_counts=True)
        if rule == "aligned-optimal":
            matrix = torch.zeros(size * size, dtype=torch.int64).index_put_((cells,), overlap)
            match = _optimal_assignment(matrix.view(size, size).numpy())
        else:
            match = _greedy_assignment(cells[overlap.argsort(descending=True, stable=True)], size)
        renamed.append(torch.from_numpy(match)[own])
    return vote_labels(torch.stack(renamed))


def _co_association(assignments, clusters):
    # Images with the same ids everywhere are one point with a weight: far fewer than n remain.
    points, image_point, weight = assignments.T.unique(dim=0, return_inverse=True,
                                                       return_counts=True)
    agreeing = sum((ids[:, None] == ids).double() for ids in points.T)             # (m, m)
    # Most members agree: distance 0, else 1. The share of agreeing members only breaks ties.
    share = agreeing / len(assignments)
    distance = (1 - (share > 0.5).double() - 1e-7 * share).numpy()
    return torch.from_numpy(_average_linkage(distance, weight.numpy(), clusters))[image_point]


def _average_linkage(distance, weight, clusters):
    """Agglomerate weighted points to `clusters` groups, average linkage: ids (m,) int64.

    The nearest-neighbour chain algorithm (Murtagh 1983): O(m^2) for m points.
    """
    count = len(distance)
    distance, weight = distance.copy(), weight.astype(float)
    np.fill_diagonal(distance, np.inf)
    alive, chain, merges = np.ones(count, bool), [], []
    for _ in range(count - 1):
        if not chain:
            chain = [int(np.flatnonzero(alive)[0])]
        while True:
            last = chain[-1]
            nearest = int(distance[last].argmin())
            # a reciprocal pair; the previous link wins ties, or the chain would not end
            if len(chain) > 1 and distance[last, chain[-2]] <= distance[last, nearest]:
                break
            chain.append(nearest)
        first, second = sorted((chain.pop(), chain.pop()))
        merges.append((distance[first, second], first, second))
        share = weight[first] / (weight[first] + weight[second])
        merged = share * distance[first] + (1 - share) * distance[second]
        merged[~alive] = merged[first] = merged[second] = np.inf
        distance[first], distance[:, first] = merged, merged
        distance[second], distance[:, second] = np.inf, np.inf
        weight[first] += weight[second]
        alive[second] = False
    # Cut: the cheapest merges first (equal heights in the order in which they were made).
    parent = np.arange(count)

    def root(point):
        while parent[point] != point:
            point = parent[point]
        return point

    for _, first, second in sorted(merges, key=lambda merge: merge[0])[:max(count - clusters, 0)]:
        parent[root(second)] = root(first)
    return np.unique([root(point) for point in range(count)], return_inverse=True)[1]


def _optimal_assignment(overlap):
    """Column of each row that maximises the summed overlap (Hungarian algorithm, O(k^3))."""
    cost, size = -overlap.astype(float), len(overlap)
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    owner = np.zeros(size + 1, int)                        # row of each column, 1-based, 0: none
    for row in range(1, size + 1):                         # one shortest augmenting path per row
        owner[0], column = row, 0
        slack, way = np.full(size + 1, np.inf), np.zeros(size + 1, int)
        done = np.zeros(size + 1, bool)
        while owner[column]:
            done[column] = True
            reduced = cost[owner[column] - 1] - row_price[owner[column]] - column_price[1:]
            shorter = np.flatnonzero(~done[1:] & (reduced < slack[1:])) + 1
            slack[shorter], way[shorter] = reduced[shorter - 1], column
            following = int(np.where(done, np.inf, slack).argmin())
            step = slack[following]
            row_price[owner[done]] += step
            column_price[done] -= step
            slack[~done] -= step
            column = following
        while column:
            owner[column] = owner[way[column]]
            column = way[column]
    match = np.empty(size, np.int64)
    match[owner[1:] - 1] = np.arange(size)
    return match


def _greedy_assignment(cells, size):
    """Column of each row; cells: row * size + column of the overlaps, the largest first."""
    match, free = np.full(size, -1, np.int64), np.ones(size, bool)
    for row, column in zip((cells // size).tolist(), (cells % size).tolist()):
        if match[row] < 0 and free[column]:
            match[row], free[column] = column, False
    match[match < 0] = np.flatnonzero(free)                # rows without an overlap: what is left
    return match


# ---- evaluation ------------------------------------------------------------------------------

KS = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20)}            # other data sets: 1, 2, 4, 8
PROTOCOLS = ("clustering", "template", "ers")


@torch.no_grad()
def embed(models, batches) -> list[Tensor]:
    """The embeddings (n, D) of every model, in the order of the batches; evaluation mode."""
    outputs = [[] for _ in models]
    with eval_mode(*models):
        for images, _, _ in batches:
            for output, model in zip(outputs, models):
                output.append(model(images).float())
    return [torch.cat(output) for output in outputs]


def attack_embeddings(models, batches, make_objective, *, eps, step_size, steps, restarts=1,
                      random_start=True, seed=0, attacked=None, craft=None,
                      watch=None) -> list[Tensor]:
    """The embeddings (n, D) of every model after ONE attack on all of them.

    batches: (images, labels, rows) in order. make_objective(rows) gives the objective to maximise
    for those images. restarts: the one with the highest objective is kept, per image; restart r
    draws the same start whatever their number. attacked: bool (n,), the others stay clean.
    craft(objective, images, rows): another attack than pgd. watch(images, rows) sees the result.
    """
    outputs = [[] for _ in models]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda), frozen(*models):
        for number, (images, _, rows) in enumerate(batches):
            objective = make_objective(rows)
            best, best_value = None, None
            for restart in range(restarts):
                seed_torch(seed, restart, EVALUATE, number)
                adversarial = craft(objective, images, rows) if craft else \
                    pgd(objective, images, eps, step_size, steps, random_start)
                if restarts == 1:
                    best = adversarial
                    break
                with torch.no_grad():
                    value = objective(adversarial)
                if best is None:
                    best, best_value = adversarial, value
                better = value > best_value
                best = torch.where(better.view(-1, 1, 1, 1), adversarial, best)
                best_value = torch.maximum(value, best_value)
            if attacked is not None:
                best = torch.where(attacked[rows].view(-1, 1, 1, 1), best, images)
            if watch:
                watch(best, rows)
            with torch.no_grad():
                for output, model in zip(outputs, models):
                    output.append(model(best).float())
    return [torch.cat(output) for output in outputs]


def neighbour_labels(embeddings, labels, k, gallery=None, gallery_labels=None):
    """Labels (n, k) of the k nearest candidates; gallery forms and ties as in recall_at_k."""
    names = labels if gallery_labels is None else gallery_labels
    return torch.cat([names[similarity.topk(min(k, len(names))).indices] for _, similarity, _ in
                      similarities(embeddings, labels, gallery, gallery_labels)])


def metrics_by_rule(embeddings, labels, *, ks, clusters, seed, gallery=None, gallery_labels=None,
                    clustering=True) -> dict[str, dict]:
    """Every metric for every inference rule, from the members' embeddings [(n, D), ...].

    Rules: member_1 ...; for two members or more also vote, member_mean (the mean of the members'
    scores), concat (concatenated embeddings) and mean (their normalised average). gallery: one
    tensor per member. clusters: k of k-means. clustering False: NMI, AMI and F1 are None. R@1_low
    and R@1_high: `recall_interval`.
    """
    spaces = rule_spaces(embeddings, gallery)
    scores, assignments, hits = {}, {}, {}
    for name, (own, other) in spaces.items():
        hit, mean_ap = ranking_scores(own, labels, (1, *ks), other, gallery_labels)
        hits[name] = hit[:, 0].double()
        scores[name] = {f"R@{k}": count / max(len(labels), 1)
                        for k, count in zip(ks, hit[:, 1:].sum(0).tolist())}
        scores[name] |= recall_interval(hits[name], labels, seed)
        scores[name]["mAP@R"] = mean_ap
        assignments[name] = kmeans(own, clusters, seed).cpu() if clustering else None
        scores[name] |= _cluster_scores(labels, assignments[name])
    members = [name for name in spaces if name.startswith("member_")]
    if len(members) > 1:
        scores = {"vote": _vote_scores(embeddings, labels, ks, clusters, gallery, gallery_labels,
                                       [assignments[name] for name in members], seed),
                  "member_mean": {key: None if value is None else
                                  float(np.mean([scores[name][key] for name in members]))
                                  for key, value in scores[members[0]].items()}} | scores
        mean = sum(hits[name] for name in members) / len(members)
        scores["member_mean"] |= recall_interval(mean, labels, seed)
    singletons = int((candidate_counts(labels, gallery_labels) == 0).sum())
    chance = None
    if clustering:
        stream = random_stream(seed, 0, EVALUATE)
        draws = torch.from_numpy(stream.integers(clusters, size=(5, len(labels))))
        chance = float(np.mean([nmi(labels, draw) for draw in draws]))
    for score in scores.values():
        score |= {"NMI_chance": chance, "n_queries": len(labels), "n_singletons": singletons}
    return scores


def rule_spaces(embeddings, gallery=None) -> dict[str, tuple]:
    """{rule: (embeddings, gallery or None)} of the rules that look neighbours up in one space."""
    spaces = {f"member_{i + 1}": (own, None if gallery is None else gallery[i])
              for i, own in enumerate(embeddings)}
    if len(embeddings) > 1:
        for name, combine in (("concat", lambda parts: torch.cat(parts, 1) / len(parts) ** 0.5),
                              ("mean", lambda parts: F.normalize(sum(parts), dim=1))):
            spaces[name] = (combine(embeddings), None if gallery is None else combine(gallery))
    return spaces


def candidate_counts(labels, gallery_labels):
    """How many candidates of its own class every query has (n,), itself left out."""
    names = labels if gallery_labels is None else gallery_labels
    index = torch.cat([labels, names]).unique(return_inverse=True)[1]
    return index[len(labels):].bincount(minlength=int(index.max()) + 1)[index[:len(labels)]] \
        - int(gallery_labels is None)


def _cluster_scores(labels, assigned):
    if assigned is None:
        return {"NMI": None, "AMI": None, "F1": None}
    return {"NMI": nmi(labels, assigned), "AMI": ami(labels, assigned),
            "F1": pairwise_f1(labels, assigned)}


def _vote_scores(embeddings, labels, ks, clusters, gallery, gallery_labels, assignments, seed):
    """Scores of the vote, with the share of ties at rank 1 and Recall@1 with ties lost and won.

    mAP@R reads the voted list as a ranking. A tie: several labels share the highest count.
    """
    count = candidate_counts(labels, gallery_labels)
    candidates = len(labels) - 1 if gallery_labels is None else len(gallery_labels)
    depth = min(max(int(count.max()), *ks), candidates)
    galleries = gallery or [None] * len(embeddings)
    votes = torch.stack([neighbour_labels(own, labels, depth, other, gallery_labels)
                         for own, other in zip(embeddings, galleries)])
    recall = vote_recall(votes, labels, ks)
    hit = vote_labels(votes) == labels[:, None]
    precision = average_precision(hit, count)[count > 0]
    first = votes[:, :, 0]                                                            # (N, n)
    agreeing = (first[:, None] == first[None]).sum(1)
    top = agreeing == agreeing.amax(0)
    tie = (top & (first != vote_labels(first))).any(0)
    right = (top & (first == labels)).any(0)                        # among the labels that lead
    scores = {f"R@{k}": recall[k] for k in ks} | recall_interval(hit[:, 0], labels, seed)
    scores["mAP@R"] = float(precision.mean()) if len(precision) else 0.0
    scores |= _cluster_scores(labels, None if assignments[0] is None else
                              vote_clusters(torch.stack(assignments), clusters))
    return scores | {"tie_share": float(tie.double().mean()),
                     "R@1_ties_lost": float((right & ~tie).double().mean()),
                     "R@1_ties_won": float(right.double().mean()),
                     "cluster_vote": None if assignments[0] is None else
                     cluster_vote_rule(len(labels), clusters)}


ATTACKS = ("pgd", "fgsm", "cw", "min-eps", "square", "curve", "strong-1")
BOTH = ("push-mean", "target-other", "nearest", "impostor", "impostor@K", "soft-impostor", "decoy",
        "pal-pseudo", "worst")
# those of each protocol, its default first
OBJECTIVES = {"clustering": ("shift", *BOTH, "joint", "joint-pseudo"),
              "ers": ("ers", "ers-authors"),
              "template": ("neighbour", "shift", *BOTH, "impostor-pseudo", "self",
                           "targeted-random", "targeted-nearest")}
# Zhou & Patel's, on their own scales: percent, TMA a cosine, ES:D a distance.
ERS_FIGURES = ("CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT", "ERS")
# Beside Recall@K, mAP@R and the clusterings.
FURTHER_FIGURES = ("success", "min_eps_255", "eps50_255", "R@1_free", "bound", "R@1_attacked",
                   "R@1_untouched", "AMI_attacked", "AMI_untouched", *ERS_FIGURES)


class Attack:
    """What an evaluation attacks with, checked and resolved: the numbers of a `robust` entry.

    protocol "clustering": every image is attacked, and compared with attacked images (EAT).
    "template": queries are attacked, the gallery is clean (Panum et al., Algorithm 1).
    objective "shift": 1 - cos to the own clean embedding. "neighbour": distance to the clean
    nearest neighbour; then only queries whose nearest neighbour is right are attacked. "self": the
    same queries, away from their own clean embedding (the code of Panum et al.). "targeted-random",
    "targeted-nearest": every query, towards the image of that other class that is nearest to it.
    The others are eval.py's: `measure`, `joint` and `worst` there.
    against: which embeddings of an ensemble the objective reads: "sum" of the members', "concat",
    "mean", "vote" (members that are wrong already count no more), "member_1", "members_1+2" ...
    attacker_share: so many percent of the images are attacked, the others stay clean.
    eps None: 8/255 (0.01 for template). steps None: 10 (5). step_size None: eps / 4
    (2 * eps / steps). ers: 8/255, 32 steps of 3/8 eps. fgsm: one step of size eps; from the clean
    image, unless the objective measures the distance to that. cw: Carlini & Wagner; steps (50) of
    Adam at learning rate step_size (eps / 10), projected to eps. min-eps: the smallest radius up to
    eps (32 / 255).
    square: steps (200) forward passes, no gradient. curve: pgd at growing radii up to eps (64/255);
    where Recall@1 is half of its clean value. strong: the frozen recipe strong-1, 20 steps of
    eps / 4, halved twice, the best iterate of two starts (joint: the last of one); its numbers are
    eps and seed alone.
    alone: each member of an ensemble by itself, instead of the sum over all of them.
    """

    def __init__(self, protocol="clustering", attack="pgd", objective=None, eps=None,
                 step_size=None, steps=None, restarts=1, random_start=True, seed=0, against="sum",
                 attacker_share=100.0, alone=False):
        template, known = protocol == "template", OBJECTIVES.get(protocol, ())
        attack = "strong-1" if attack == "strong" else attack
        objective = objective or {
            "strong-1": "worst", "square": "impostor", "curve": "impostor" if template else "joint"
        }.get(attack, next(iter(known), None))
        for what, value, choice in (("protocol", protocol, PROTOCOLS), ("attack", attack, ATTACKS)):
            if value not in choice:
                raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(choice)}")
        listed = re.sub("@[1-9][0-9]*$", "@K", objective) if objective != "impostor@K" else None
        if listed not in known or attack in ("cw", "min-eps") and not template:
            raise UserError(f"{attack} with the objective {objective!r} is not part of --protocol "
                            f"{protocol}: it has {', '.join(known)}"
                            f"{'' if template else '; template has cw and min-eps'}")
        if protocol == "ers" and attack != "pgd":
            raise UserError(f"--protocol ers brings its own attacks: drop --attack {attack}")
        if attack not in ("pgd", "strong-1") and (
                objective == "worst" or objective.startswith("joint") and attack != "curve"):
            raise UserError(f"the objective {objective} is attacked with pgd or strong: found "
                            f"{attack}")
        if attack == "strong-1" and not (step_size is steps is None and restarts == 1
                                         and random_start):
            raise UserError("strong is a frozen recipe, strong-1, with its own steps, restarts and "
                            "random start: drop the flags that change them, or use pgd")
        if attack == "square" and not (step_size is None and random_start):
            raise UserError("square has no step size, and its own random start: drop the flags "
                            "that change them")
        if not re.fullmatch(r"sum|concat|mean|vote|member_[1-9]\d*|members_[1-9]\d*(\+[1-9]\d*)+",
                            against):
            raise UserError(f"--against {against!r}: choose sum, concat, mean, vote, member_1 ..., "
                            f"members_1+2 ...")
        if against == "vote" and objective not in ("impostor", "joint"):
            raise UserError(f"against the vote an objective must say who is wrong, as impostor and "
                            f"joint do: found {objective}")
        if (against != "sum" or attacker_share != 100) and (
                protocol == "ers" or objective in ("worst", "neighbour", "self")
                or objective.startswith("targeted")):
            raise UserError(f"--against and --attacker-share do not belong to {objective}: drop "
                            f"them")
        if alone and (protocol == "ers" or objective == "worst" or attack == "curve"
                      or against != "sum"):
            raise UserError(f"members are attacked alone by one attack at one radius: drop "
                            f"--per-member, or {objective} with {attack} against {against}")
        if not 0 < attacker_share <= 100 or attacker_share < 100 and template:
            raise UserError("--attacker-share is a percentage above 0 and belongs to --protocol "
                            "clustering: in template matching, queries do not see each other")
        if protocol == "ers":
            eps = 8 / 255 if eps is None else eps
            steps, random_start = 32 if steps is None else steps, False
            step_size = 3 / 8 * eps if step_size is None else step_size
        if eps is None:
            eps = {"min-eps": 32 / 255, "curve": 64 / 255}.get(attack,
                                                               0.01 if template else 8 / 255)
        if attack == "strong-1":
            steps, step_size = 20, eps / 4
        if steps is None:
            steps = {"cw": 50, "square": 200, "curve": 10}.get(attack, 5 if template else 10)
        if step_size is None:
            step_size = eps / 10 if attack == "cw" else \
                2 * eps / max(steps, 1) if template and attack != "curve" else eps / 4
        from_itself = objective in ("shift", "self")    # no gradient at the clean image
        if attack == "fgsm":
            steps, step_size, random_start = 1, eps, random_start and from_itself
        if attack == "square":
            step_size, random_start = 2 * eps, True
        if from_itself and not random_start:
            raise UserError(f"the {objective} objective has no gradient at the clean image: it "
                            f"needs its random start")
        if restarts > 1 and (attack in ("cw", "min-eps", "square") or protocol == "ers"
                             or objective.startswith("joint")):
            raise UserError(f"{objective if protocol == 'clustering' else protocol} with {attack} "
                            f"has no restarts: drop --restarts {restarts}")
        if attack == "min-eps" and eps == 0:
            raise UserError("min-eps searches up to eps, which is 0: give a larger one")
        if attack == "strong-1" and not objective.startswith("joint"):
            restarts = 2
        if not 0 <= eps <= 1 or not step_size >= 0 or steps < 0 or restarts < 1:
            raise UserError(f"an attack needs 0 <= eps <= 1, step size >= 0, steps >= 0 and "
                            f"restarts >= 1: found {eps}, {step_size}, {steps}, {restarts}")
        self.protocol, self.attack, self.objective = protocol, attack, objective
        self.eps, self.step_size, self.steps = eps, step_size, steps
        self.restarts, self.random_start, self.seed = restarts, random_start, seed
        self.against, self.attacker_share, self.alone = against, attacker_share, alone

    def entry(self):
        """The attack as it stands in results.json."""
        return {"protocol": self.protocol, "attack": self.attack, "objective": self.objective,
                "norm": "linf", "eps": self.eps, "eps_255": self.eps * 255,
                "step": self.step_size, "step_255": self.step_size * 255, "steps": self.steps,
                "restarts": self.restarts, "random_start": self.random_start, "seed": self.seed,
                "against": self.against, "attacker_share": self.attacker_share}

    def words(self):
        """Protocol, objective, attack and radius, to be read; and "alone"."""
        name = {"pgd": f"PGD-{self.steps}", "fgsm": "FGSM", "cw": f"C&W-{self.steps}",
                "min-eps": f"smallest eps, PGD-{self.steps}", "square": f"Square-{self.steps}",
                "curve": f"curve of PGD-{self.steps}", "strong-1": "strong-1"}[self.attack]
        if self.attacker_share < 100:
            name += f" on {self.attacker_share:g} % of the images"
        radius = "up to" if self.attack in ("min-eps", "curve") else "eps"
        radius += f" {self.eps * 255:.3g}/255"
        objective = {"ers": "ERS", "ers-authors": "ERS(authors)"}.get(self.objective,
                                                                      self.objective)
        objective += f" against {self.against}" if self.against != "sum" else ""
        return self.protocol, objective, name, radius, *["alone"] * self.alone

    def __str__(self):
        protocol, objective, *rest = self.words()
        return f"{protocol}: {objective} {', '.join(rest)}"


class Retrieval:
    """Models, queries, and where these are looked up, with their clean embeddings.

    models: list; all of them share every perturbation. batches: a function that returns a fresh
    iterator of (images, labels, rows) in order; labels (n,) of all of them. gallery_batches,
    gallery_labels: the set in which queries are looked up, when it is another. limited: this is a
    subset. clean, gallery: [(n, D)], one per model, gallery None where queries look each other up.
    names: the labels of the candidates. seconds: what embedding them took. by_rule: their scores,
    from `evaluate`. attacked: (embeddings, gallery) of the latest of `attack_entries`.
    """

    def __init__(self, models, batches, labels, *, ks=(1, 2, 4, 8), gallery_batches=None,
                 gallery_labels=None, limited=False):
        self.models, self.batches, self.labels, self.ks = models, batches, labels, ks
        self.gallery_batches, self.gallery_labels = gallery_batches, gallery_labels
        self.limited, self.by_rule, self.attacked = limited, None, None
        started = time.perf_counter()
        self.clean = embed(models, batches())
        self.gallery = None if gallery_batches is None else embed(models, gallery_batches())
        self.seconds = time.perf_counter() - started
        self.names = labels if gallery_labels is None else gallery_labels

    def scores(self, embeddings, gallery, seed, clustering=True):
        """metrics_by_rule of these embeddings of the queries."""
        return metrics_by_rule(embeddings, self.labels, ks=self.ks, seed=seed, gallery=gallery,
                               clusters=len(self.labels.unique()), clustering=clustering,
                               gallery_labels=self.gallery_labels)


def attacked_embeddings(retrieval, attack, aim=None, craft=None, watch=(None, None)):
    """The attacked embeddings of the queries and the gallery that they meet, per model.

    aim: (make_objective, attacked) where the objective is none of "shift", "neighbour"; craft: the
    attack where it is not pgd; watch: of the queries, of the gallery (attack_embeddings).
    """
    settings = dict(eps=attack.eps, step_size=attack.step_size, steps=attack.steps,
                    restarts=attack.restarts, random_start=attack.random_start, seed=attack.seed,
                    craft=craft)
    if aim is None and attack.objective == "neighbour":
        aim = neighbour_objectives(retrieval)
    make_objective, attacked = aim or (shift_objectives(retrieval), None)
    embeddings = attack_embeddings(retrieval.models, retrieval.batches(), make_objective,
                                   attacked=attacked, watch=watch[0], **settings)
    if attack.protocol == "template":
        own = retrieval.gallery is None                                  # row i is not a candidate
        return embeddings, retrieval.clean if own else retrieval.gallery
    if retrieval.gallery is None:
        return embeddings, None                                          # among themselves
    return embeddings, attack_embeddings(retrieval.models, retrieval.gallery_batches(),
                                         shift_objectives(retrieval, retrieval.gallery),
                                         watch=watch[1], **settings)


def attack_entries(retrieval, attack) -> list[dict]:
    """Attack a retrieval with "shift" or "neighbour": its entries of results.json, one per rule."""
    started = time.perf_counter()
    embeddings, gallery = attacked_embeddings(retrieval, attack)
    return scored_entries(retrieval, attack, embeddings, gallery, started)


def scored_entries(retrieval, attack, embeddings, gallery, started, more=None) -> list[dict]:
    """The entries of attacked embeddings, one per inference rule; more: {rule: further scores}."""
    retrieval.attacked = embeddings, gallery
    scores = retrieval.scores(embeddings, gallery, attack.seed,
                              clustering=attack.protocol != "template")
    amp = any(getattr(model, "amp", False) for model in retrieval.models)
    seconds = round(time.perf_counter() - started, 3)
    return [{"rule": rule, **attack.entry(), "amp": amp, "limited": retrieval.limited,
             "seconds": seconds, **score, **(more or {}).get(rule, {})}
            for rule, score in scores.items()]


def evaluate(models, batches, labels, attacks, *, ks=(1, 2, 4, 8), seed=0, gallery_batches=None,
             gallery_labels=None, limited=False,
             entries=attack_entries) -> tuple[dict, list[dict], list[str]]:
    """Clean and attacked scores of one model or an ensemble: (clean, robust, warnings).

    models ... limited: as in Retrieval. attacks: [Attack]. seed: of k-means on clean embeddings.
    entries(retrieval, attack): what makes the entries; eval.py has one that knows more attacks
    and stores them as they come.
    """
    retrieval = Retrieval(models, batches, labels, ks=ks, gallery_batches=gallery_batches,
                          gallery_labels=gallery_labels, limited=limited)
    rule = "vote" if len(models) > 1 else "member_1"                      # the headline
    scores = retrieval.by_rule = retrieval.scores(retrieval.clean, retrieval.gallery, seed)
    alerts = []
    for i, own in enumerate(retrieval.clean):
        cosine = mean_cosine(own)
        if not cosine <= 0.95:                                           # NaN included
            alerts.append(f"member_{i + 1} has collapsed: mean cosine of its test embeddings "
                          f"{cosine:.3f}")
    robust = [entry for attack in attacks for entry in entries(retrieval, attack)]
    return {"rule": rule, **scores[rule], "by_rule": scores}, robust, alerts


def shift_objectives(retrieval, references=None):
    """make_objective(rows): away from the own clean embeddings, those of the queries."""
    references = references or retrieval.clean
    return lambda rows: shift_objective(retrieval.models, [own[rows] for own in references])


def neighbour_objectives(retrieval, own=False):
    """Algorithm 1 of Panum et al.: move a query away from its clean nearest neighbour.

    Only queries whose neighbour has their label are attacked; in an ensemble, every member whose
    neighbour is right contributes its distance. own: away from the query's own clean embedding, as
    the authors' code does. -> (make_objective, attacked (n,) bool).
    """
    targets, right = [], []
    for i, clean in enumerate(retrieval.clean):
        other = clean if retrieval.gallery is None else retrieval.gallery[i]
        nearest = torch.cat([similarity.argmax(1) for _, similarity, _ in
                             similarities(clean, retrieval.labels, other,
                                          retrieval.gallery_labels)])
        targets.append(clean if own else other[nearest])
        right.append(retrieval.names[nearest] == retrieval.labels)

    def make_objective(rows):
        return lambda images: sum(hit[rows] * euclidean(model(images), target[rows]) for
                                  model, target, hit in zip(retrieval.models, targets, right))

    return make_objective, torch.stack(right).any(0)


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine of two different rows of unit embeddings (n, D): 1 when they have collapsed."""
    total = embeddings.double().sum(0).square().sum() - embeddings.double().square().sum()
    return float(total / max(len(embeddings) * (len(embeddings) - 1), 1))


def evaluate_set(models, test: ImageSet, attacks, *, batch_size=128, workers=0, device="cpu",
                 ks=(1, 2, 4, 8), seed=0, entries=attack_entries):
    """`evaluate` on an ImageSet (and its gallery). The starts of an attack follow the batches:
    one batch size everywhere keeps closing and later evaluations the same."""
    def batches_of(dataset):
        order = torch.arange(len(dataset)).split(batch_size)
        return lambda: progress(load_batches(dataset, order, augment=False, workers=workers,
                                             device=device), "evaluating", len(order))

    gallery = test.gallery
    return evaluate(models, batches_of(test), test.labels.to(device), attacks, ks=ks, seed=seed,
                    limited=test.limited, entries=entries,
                    gallery_batches=None if gallery is None else batches_of(gallery),
                    gallery_labels=None if gallery is None else gallery.labels.to(device))


# ---- runs: command line ----------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, exit code 2, and that guesses no prefixes."""

    def __init__(self, description=None, add_help=True):
        super().__init__(description=description, allow_abbrev=False, add_help=add_help,
                         formatter_class=HelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and every default that is not explained in words."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def fraction(text: str) -> float:
    """An l_inf radius in pixel values of [0, 1]: "8/255" or "0.01"."""
    try:
        numerator, _, denominator = text.partition("/")
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction such as 8/255") from None
    if not value >= 0 or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1, as pixel values are")
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1, and pixels are in [0, 1]: "
                                         f"did you mean {text.partition('/')[0]}/255?")
    return value


def number(kind, low, high=math.inf):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} "
                                             f"number {limit}")
        return value
    return parse


def network_flags(data, model) -> None:
    """Into two groups of flags: what a network is, and which images it sees."""
    data.add_argument("--dataset", choices=DATASETS, default="glyphs", help="glyphs is generated")
    data.add_argument("--inshop-protocol", choices=("query", "gallery"), default="query",
                      help="look In-Shop queries up among themselves (EAT) or in the gallery")
    data.add_argument("--image-size", type=number(int, 16, 4096), default=224,
                      help="side S of the network's input; test images: Resize(256 S / 224), crop")
    data.add_argument("--crop", choices=("resized", "square"), default="resized",
                      help="training view: RandomResizedCrop, or a random S x S crop of the whole "
                           "photo squashed to a square, which test images are then too (photos "
                           "only)")
    model.add_argument("--arch", choices=ARCHS, default="mobilenetv2")
    model.add_argument("--weights", default=None, metavar="{imagenet,none,FILE}",
                       help="start of the backbone (default: imagenet; none for convnet)")
    model.add_argument("--pool", choices=("avg", "avgmax"), default=None,
                       help="pooling (default: avg; avgmax for bninception)")
    model.add_argument("--embedding-dim", type=number(int, 1), default=128)


def network_defaults(args) -> None:
    """--weights and --pool where they are not given."""
    if args.weights is None:
        args.weights = "none" if args.arch == "convnet" else "imagenet"
    if args.pool is None:
        args.pool = "avgmax" if args.arch == "bninception" else "avg"


def base_parser(description=None) -> Parser:
    """The flags every training script shares, with EAT's defaults. A script changes them with
    `parser.set_defaults` and adds its method's flags in a group of their own."""
    switch = argparse.BooleanOptionalAction
    parser = Parser(description)
    data = parser.add_argument_group("data")
    model = parser.add_argument_group("model")
    network_flags(data, model)
    data.add_argument("--data-root", default=os.environ.get("DATA_ROOT", "data"),
                      help="folder of the data set; the variable DATA_ROOT changes the default")
    data.add_argument("--cache-gb", type=number(float, 0), default=4.0,
                      help="decode images once when they fit in this memory; 0: each time")
    data.add_argument("--workers", type=number(int, 0, 256), default=2,
                      help="threads that prepare batches; never changes a result")
    data.add_argument("--val-classes", type=number(int, 0), default=0, metavar="N",
                      help="report on the last N training classes, held out, instead of the test "
                           "classes: for tuning")
    data.add_argument("--limit-queries", type=number(int, 0), default=0, metavar="N",
                      help="evaluate on a fixed class-balanced subset of N test images (0: all)")
    model.add_argument("--freeze-bn", action=switch, default=None,
                       help="keep BatchNorm statistics (default: with pretrained weights)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=number(int, 1), default=200,
                          help="passes over the training set")
    training.add_argument("--warmup-epochs", type=number(int, 0), default=1,
                          help="the first epochs train head and proxies alone (0 without weights)")
    training.add_argument("--batch-size", type=number(int, 1), default=120,
                          help="images that one model sees per step")
    training.add_argument("--images-per-class", type=number(int, 0), default=0, metavar="K",
                          help="class-balanced batches with K images of each class (0: plain "
                               "shuffle); elsewhere called samples per class, m, IPC or SPC")
    training.add_argument("--lr", type=number(float, 0), default=1e-4, help="learning rate")
    training.add_argument("--weight-decay", type=number(float, 0), default=1e-4)
    attack = parser.add_argument_group("attack (l_inf, pixel values in [0, 1])")
    attack.add_argument("--eps", type=fraction, default=16 / 255, metavar="16/255",
                        help="training: radius of the ball")
    attack.add_argument("--step-size", type=fraction, default=4 / 255, metavar="4/255",
                        help="training: size of a step")
    attack.add_argument("--attack-steps", type=number(int, 0), default=10,
                        help="training: steps of the inner maximisation")
    attack.add_argument("--eval-eps", type=fraction, default=8 / 255, metavar="8/255",
                        help="closing evaluation, every protocol: radius of the ball")
    attack.add_argument("--eval-step-size", type=fraction, default=2 / 255, metavar="2/255",
                        help="closing evaluation: size of a step")
    attack.add_argument("--eval-steps", type=number(int, 0), default=10,
                        help="closing evaluation: steps")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    run.add_argument("--amp", action=switch, default=False,
                     help="bfloat16 for the backbone in training; evaluation stays in float32")
    run.add_argument("--compile", action=switch, default=False, help="torch.compile the networks")
    run.add_argument("--deterministic", action=switch, default=False,
                     help="deterministic kernels on a GPU too (slower)")
    run.add_argument("--out", default=None, metavar="DIR",
                     help="the run's folder (default: runs/METHOD-DATASET-ARCH-sSEED)")
    run.add_argument("--resume", action="store_true",
                     help="continue the run in --out; every flag comes from there")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument("--eval-every", type=number(int, 0), default=0, metavar="E",
                     help="clean and attacked Recall@1 and mAP@R into log.jsonl every E epochs")
    run.add_argument("--tensorboard", action="store_true", help="write scalars for TensorBoard too")
    run.add_argument("--dry-run", action="store_true",
                     help="one batch through training and evaluation; writes nothing")
    return parser


# Flags of one call, not of the run: not taken from a checkpoint.
CALL_FLAGS = ("resume", "overwrite", "dry_run")
MOVABLE_FLAGS = ("device", "workers", "out")


def parse_run(parser: Parser, argv, run_name, small: dict, methods) -> argparse.Namespace:
    """Parse a training script's flags into the complete flags of a run.

    run_name(args) -> the run's name for its method and variant. small: the method's defaults on
    generated data, in place of the paper's. methods: those of the script. With --resume every flag
    comes from the run's folder; a flag given with another value is an error that names both, and
    so is a run of another script.
    """
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(
        **{action.dest: unset for action in parser._actions})))
    given = {name: value for name, value in given.items() if value is not unset}
    given.pop("help", None)
    args = _complete(parser, given, small)
    args.out = args.out or f"runs/{run_name(args)}-{args.dataset}-{args.arch}-s{args.seed}"
    if args.resume and args.overwrite:
        parser.error("--resume continues a run and --overwrite replaces it: give one of them")
    if not args.resume:
        return args
    stored = stored_flags(Path(args.out))
    if stored and stored.get("method", methods[0]) not in methods:
        parser.error(f"{args.out} holds a run of {stored['method']}: resume it with the script "
                     f"that made it, or start another run with another --out")
    for name, value in given.items():
        if stored and name not in CALL_FLAGS + MOVABLE_FLAGS and stored.get(name) != value:
            parser.error(f"--{name.replace('_', '-')} is {value} here but {stored.get(name)} in "
                         f"{args.out}: --resume keeps a run's flags; drop it, or start another run "
                         f"with another --out")
    for name, value in (stored or {}).items():
        if hasattr(args, name) and name not in CALL_FLAGS + ("out",) and \
                not (name in MOVABLE_FLAGS and name in given):
            setattr(args, name, value)
    return args


def _complete(parser, given, small):
    """Flags that were not given: the method's defaults, its small ones on generated data."""
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    args = argparse.Namespace(**defaults | given)
    if args.dataset in GENERATED:
        args = argparse.Namespace(**defaults | small | given)
    network_defaults(args)
    if args.freeze_bn is None:
        args.freeze_bn = args.weights != "none"
    if args.weights == "none" and "warmup_epochs" not in given:
        args.warmup_epochs = 0
    return args


def run_script(parse_args, main) -> None:
    """Parse, run, and turn every expected failure into one line and an exit code.

    0 done, 1 the run failed, 2 user error, 130 interrupted.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main(parse_args())
    except (UserError, RunFailed) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:                       # an unreadable folder, a name that is too long
        print(f"{Path(sys.argv[0]).name}: error: cannot use {error.filename} ({error.strerror}): "
              f"check the path and its permissions", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, torch.OutOfMemoryError):
        print(f"{Path(sys.argv[0]).name}: error: out of memory: lower --batch-size or --image-size;"
              f" the run's last checkpoint is good", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def progress(iterable, label, total):
    """The iterable, with a bar when tqdm is installed and somebody is watching."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=label, total=total, leave=False, disable=None)


# ---- runs: folder, checkpoint, log -----------------------------------------------------------

SCHEMA = 1                                     # of results.json
FORMAT = 1                                     # of last.pt


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """The torch device of --device; "auto" is cuda where there is one, else cpu.

    On a CPU, memory that is freed stays with this process from here on.
    """
    if deterministic:                          # cuBLAS reads the variable when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--device {name} cannot be used ({reason}): this machine has "
                        f"{torch.cuda.device_count()} CUDA devices; try --device cpu") from error
    if device.type == "cpu" and sys.platform == "linux":
        # glibc gives the activations of every pass back to the system, which has to clear the
        # pages again for the next one.
        set_malloc = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        set_malloc(-4, 0)                      # M_MMAP_MAX: large blocks come from the heap too,
        set_malloc(-1, 2**31 - 1)              # M_TRIM_THRESHOLD: whose end is not given back
    return device


def load_run_data(args) -> tuple[ImageSet, ImageSet]:
    """(train, the set reported on) as a run's flags say; nothing is decoded yet."""
    train, test = load_dataset(args.dataset, args.data_root, image_size=args.image_size,
                               seed=args.seed, inshop_protocol=args.inshop_protocol)
    # runs of the first version have no --crop
    train.square = test.square = getattr(args, "crop", "resized") == "square"
    if test.gallery is not None:
        test.gallery.square = test.square
    if args.val_classes:
        train, test = split_validation(train, args.val_classes)
    if args.limit_queries == 1:
        raise UserError("--limit-queries 1 leaves nothing to retrieve: give at least 2")
    if args.limit_queries and args.limit_queries < len(test):
        test = balanced_subset(test, args.limit_queries)
    if args.batch_size > len(train):
        raise UserError(f"--batch-size {args.batch_size} is larger than the training set, "
                        f"{len(train)} images: lower it")
    return train, test


def cache_images(datasets, limit_gb: float, workers: int) -> None:
    """Decode what fits into limit_gb, in this order (None is passed over)."""
    for dataset in filter(None, datasets):
        if dataset.cache(limit_gb, max(workers, 1)) and not dataset.generated:
            limit_gb -= dataset.stored_gb()


def claim_folder(args) -> dict | None:
    """The checkpoint to continue from, or None for a new run.

    A folder with args.json or last.pt holds a run: refused without --resume or --overwrite.
    """
    out = Path(args.out)
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: {parent} is "
                        f"{'read-only' if parent.is_dir() else 'a file'}; give another --out")
    if args.tensorboard:
        _summary_writer()
    if args.resume:
        return resumable(out)
    if not args.overwrite and not args.dry_run and \
            ((out / "args.json").exists() or (out / "last.pt").exists()):
        raise UserError(f"{out} already holds a run: continue it with --resume, replace it with "
                        f"--overwrite, or give another --out")
    return None


def resumable(out: Path) -> dict | None:
    """The run's checkpoint; None before the first one.

    An epoch is logged before it is saved, and replacing a run empties its log first: a last.pt
    whose epoch is not in log.jsonl belongs to a run that has been replaced.
    """
    if not (out / "last.pt").exists():
        return None
    checkpoint = load_checkpoint(out)
    replaced = (out / "log.jsonl").exists() and \
        checkpoint["epoch"] not in [line["epoch"] for line in read_log(out)]
    return None if replaced else checkpoint


def stored_flags(out: Path) -> dict | None:
    """The flags of the run in a folder, None if there is none yet."""
    checkpoint = resumable(out)
    if checkpoint is not None:
        return {**checkpoint["args"], "method": checkpoint["method"]}
    return read_json(out / "args.json") if (out / "args.json").exists() else None


def check_same_classes(checkpoint, train) -> None:
    """A checkpoint continues only on the classes that it was trained on."""
    if checkpoint and checkpoint["classes"] != train.classes:
        raise UserError(f"the checkpoint is of {len(checkpoint['classes'])} classes, the data has "
                        f"{len(train.classes)} or others: resume with the same data, or start "
                        f"another run with another --out")


def begin_run(args, method, device, checkpoint) -> None:
    """Create the folder, write args.json, and drop log lines and results of a replaced run or of
    epochs after the checkpoint. An old last.pt stays until the first new one is complete."""
    out, epoch = Path(args.out), checkpoint["epoch"] if checkpoint else 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create --out {out} ({error.strerror}): give another") from error
    kept = [line for line in read_log(out) if line["epoch"] <= epoch]
    write_atomic(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
    if checkpoint is None:
        (out / "results.json").unlink(missing_ok=True)
        record = {**vars(args), "method": method, "device": str(device), **provenance(device)}
        write_atomic(out / "args.json", json.dumps(record, indent=1).encode())


def provenance(device) -> dict:
    """Versions, commit and machine of this process."""
    def git(*command):
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parent, text=True,
                                  capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else platform.processor() or platform.machine())
    return {"versions": versions(), "commit": git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes),
            "device_name": name, "threads": torch.get_num_threads()}


def versions() -> dict:
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "numpy": np.__version__}


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: readers see the old file or the new one whole."""
    temporary, last = path.with_name(path.name + ".tmp"), path.with_name("last.pt")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunFailed(f"cannot write {path} ({error.strerror}): the last good checkpoint is "
                        f"{last if last.exists() else 'none'}") from error
    finally:                                   # interrupted or failed: nothing half-written stays
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): remove it or restore it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict: restore it")
    return content


def save_checkpoint(args, *, method, epoch, members, proxies, optimizers, schedulers, classes,
                    state=None) -> None:
    """Write last.pt: tensors and plain types only, complete or not at all.

    members, optimizers, schedulers: lists of objects with a state_dict. proxies: list of tensors.
    epoch: how many are done. state: whatever else the method needs to go on exactly.
    """
    content = {
        "format": FORMAT, "method": method, "args": dict(vars(args)), "epoch": epoch,
        "members": [member.state_dict() for member in members],
        "proxies": [proxy.detach() for proxy in proxies],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "state": state or {}, "classes": list(classes), "versions": versions(),
    }
    buffer = io.BytesIO()                      # a full disk is then an OSError of one plain write
    torch.save(_on_cpu(content), buffer)
    write_atomic(Path(args.out) / "last.pt", buffer.getvalue())


def _on_cpu(content):
    """The same nested lists and dicts with their tensors on the CPU: any machine can load them."""
    if isinstance(content, dict):
        return {name: _on_cpu(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_on_cpu(value) for value in content]
    return content.cpu() if isinstance(content, Tensor) else content


def load_checkpoint(path) -> dict:
    """The content of a run's last.pt, given the file or its folder."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    checkpoint = _torch_load(path, "a checkpoint")
    flags = checkpoint.get("args") if isinstance(checkpoint.get("args"), dict) else {}
    if checkpoint.get("format") != FORMAT or "members" not in checkpoint or "arch" not in flags:
        raise UserError(f"{path} is not a checkpoint of these scripts (format "
                        f"{checkpoint.get('format')}, expected {FORMAT}): give a run's last.pt")
    return checkpoint


def _torch_load(path, what):
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give {what}") from error
    if head.startswith(b"<"):
        raise UserError(f"{path} is not {what}: it starts with '<', a web page was saved in its "
                        f"place; download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                 # a damaged file raises nearly anything
        raise UserError(f"{path} is not {what} that can be read ({type(error).__name__}): the file "
                        f"is damaged, cut off or of another kind; restore it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not {what}: it holds a {type(content).__name__}, not a dict")
    return content


def read_log(out) -> list[dict]:
    """The epochs in log.jsonl; a line that a killed process left incomplete is dropped."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (Path(out) / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def log_epoch(args, record: dict) -> None:
    """Append an epoch to log.jsonl and print it as one line."""
    try:
        with open(Path(args.out) / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        last = Path(args.out) / "last.pt"
        raise RunFailed(f"cannot write {args.out}/log.jsonl ({error.strerror}): the last good "
                        f"checkpoint is {last if last.exists() else 'none'}") from error
    shown = [f"{name} {value:.4g}" for name, value in record.items() if name != "epoch"]
    print(f"epoch {record['epoch']}/{args.epochs}  " + "  ".join(shown), flush=True)
    if args.tensorboard:
        with _summary_writer()(args.out) as writer:
            for name, value in record.items():
                writer.add_scalar(name, value, record["epoch"])


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter


def check_finite(loss: float, epoch: int, out) -> None:
    """Stop a run whose loss is not finite, naming the checkpoint that is still good."""
    if not math.isfinite(loss):
        last = Path(out) / "last.pt"
        raise RunFailed(f"the loss of epoch {epoch} is {loss}: lower --lr or --eps; the last good "
                        f"checkpoint is {last if last.exists() else 'none'}")


def peak_gb(device) -> float | None:
    """Peak memory so far in GB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                        # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- runs: what every method starts from and ends with ---------------------------------------

def new_member(args, device, member=0, weights=None) -> nn.Module:
    """Network `member` of a run; its random parts come from a stream of its own."""
    seed_torch(args.seed, 0, INITIAL + MEMBER * member)
    return build_model(args.arch, args.embedding_dim, weights or args.weights, args.pool).to(device)


def new_proxies(args, classes: int, device, member=0) -> nn.Parameter:
    """Proxy Anchor's proxies (classes, D) of network `member`."""
    seed_torch(args.seed, 0, PROXIES + MEMBER * member)
    proxies = torch.empty(classes, args.embedding_dim)
    return nn.Parameter(nn.init.kaiming_normal_(proxies, mode="fan_out").to(device))


def proxy_optimizer(args, model, proxies) -> torch.optim.AdamW:
    """AdamW for a network and its proxies, which learn 100 times faster (Proxy Anchor, Sec. 4)."""
    return torch.optim.AdamW([{"params": list(model.parameters())},
                              {"params": [proxies], "lr": 100 * args.lr}],
                             lr=args.lr, weight_decay=args.weight_decay, foreach=True)


def drop_schedule(epochs: int, optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """lr x 0.1 at half and at three quarters of the epochs."""
    drops = [drop for drop in (epochs // 2, 3 * epochs // 4) if drop > 0]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.1 ** sum(epoch >= drop for drop in drops))


def epoch_batches(args, labels: Tensor, epoch: int, *, batch_size: int, pool: Tensor,
                  member=0) -> list[Tensor]:
    """An epoch's batches of image numbers out of `pool`, by --images-per-class or a shuffle."""
    purpose = BATCHES + MEMBER * member
    if args.images_per_class:
        batch_size -= batch_size % args.images_per_class
        batches = class_balanced_batches(labels[pool], batch_size, args.images_per_class,
                                         args.seed, epoch, purpose)
    else:
        batches = shuffled_batches(len(pool), batch_size, args.seed, epoch, purpose)
    return [pool[batch] for batch in batches]


def restore(checkpoint, members, proxies, optimizers, schedulers) -> int:
    """Put a checkpoint's state into these objects; how many epochs it has done (None: 0)."""
    if checkpoint is None:
        return 0
    for name, objects in (("members", members), ("optimizers", optimizers),
                          ("schedulers", schedulers)):
        for own, state in zip(objects, checkpoint[name], strict=True):
            own.load_state_dict(state)
    for own, state in zip(proxies, checkpoint["proxies"]):
        own.data.copy_(state)
    return checkpoint["epoch"]


def describe(test: ImageSet, args) -> str:
    """The images that a table speaks of, in words."""
    what = "validation classes of the training split" if args.val_classes else "unseen classes"
    limited = ", a fixed subset" if test.limited else ""
    return f"{args.dataset}: {len(test)} images of {len(test.classes)} {what}{limited}"


def closing_attack(args, protocol="clustering") -> Attack:
    """The attack of a run's closing evaluation."""
    return Attack(protocol, eps=args.eval_eps, step_size=args.eval_step_size,
                  steps=args.eval_steps, seed=args.seed)


def closing_evaluation(args, members, test, device, protocols=("clustering",)):
    """Clean and attacked scores of a run's networks, every inference rule, in float32."""
    for member in members:
        member.amp = False
    return evaluate_set(members, test, [closing_attack(args, name) for name in protocols],
                        workers=args.workers, device=device,
                        ks=KS.get(args.dataset, (1, 2, 4, 8)), seed=args.seed)


def report(results, label, test, args, protocols=("clustering",)) -> None:
    """Print a run's closing tables, one per protocol, an undefended network first; and warnings."""
    shown, undefended = [(label, results)], results.get("undefended")
    if undefended:
        epochs = undefended["epochs"]
        shown = [(f"undefended, {epochs} epochs" if epochs else "not trained", undefended), *shown]
    for protocol in protocols:
        attack, rows = closing_attack(args, protocol), []
        for name, own in shown:
            robust = entries_of(own["robust"], attack, results["clean"]["n_queries"])
            rows += results_table({**own, "robust": robust}, name)
        print(f"\n{describe(test, args)}; {attack}; in %, NMI by chance "
              f"{100 * results['clean']['NMI_chance']:.1f}")
        print(format_table(rows))
    for alert in results["warnings"]:
        print(f"warning: {alert}")


def entries_of(robust: list[dict], attack: Attack, n_queries=None, amp=False) -> list[dict]:
    """The entries of results.json that this attack made, one per inference rule.

    Those of members that were attacked alone name the member in "against".
    """
    wanted = {**attack.entry(), "amp": amp}
    wanted |= {} if n_queries is None else {"n_queries": n_queries}
    wanted |= {"alone": attack.alone}
    if attack.alone:
        del wanted["against"]                        # names the member there
    earlier = {"against": "sum", "attacker_share": 100.0, "alone": False}     # unnamed before
    return [entry for entry in robust
            if all({**earlier, **entry}[name] == value for name, value in wanted.items())]


def results_table(results: dict, label: str, rules=None) -> list[dict]:
    """Rows {name, clean, attacked} for format_table: every rule, under the one attack of `robust`.

    rules: the inference rules of an ensemble to show (None: all).
    """
    attacked = {entry["rule"]: entry for entry in results["robust"]}
    single = len(results["clean"]["by_rule"]) == 1
    by_rule = results["clean"]["by_rule"]
    if "distance" in attacked:                   # ERS averages distances: no rule of the others
        by_rule = {"distance": {"R@1": attacked["distance"]["R@1_clean"]}}
    return [{"name": label if single else f"{label} {rule}",
             "clean": clean, "attacked": attacked.get(rule, {})}
            for rule, clean in by_rule.items()
            if single or rules is None or rule in rules]


def format_table(rows: list[dict]) -> str:
    """An aligned table in percent: every row's clean and attacked scores side by side."""
    columns = [(side, name) for side in ("clean", "attacked")
               for name in dict.fromkeys(
                   name for row in rows for name, value in row[side].items()
                   if value is not None and (
                       name in ("mAP@R", "NMI", "AMI", "F1", *FURTHER_FIGURES)
                       or name[:2] == "R@" and name[2:].isdigit()))]
    heads = [metric_name(name).rjust(5) for _, name in columns]
    width = max(len(row["name"]) for row in rows)
    lines = ["".ljust(width), "".ljust(width)]
    for position, (side, _) in enumerate(columns):
        first = position == 0 or columns[position - 1][0] != side
        lines[0] += ("  | " if first else " ") + (side if first else "").ljust(len(heads[position]))
        lines[1] += ("  | " if first else " ") + heads[position]
    for row in rows:
        line = row["name"].ljust(width)
        for position, (side, name) in enumerate(columns):
            first = position == 0 or columns[position - 1][0] != side
            value = row[side].get(name)
            shown = "-" if value is None else cell(name, value)
            line += ("  | " if first else " ") + shown.rjust(len(heads[position]))
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def metric_name(metric: str) -> str:
    """The head of its column."""
    metric, _, of = metric.partition("_")
    return {"min": "eps/255", "bound": "bound R@1"}.get(metric, metric) \
        if of in ("", "eps_255", "255") \
        else f"{metric} {'label-free' if of == 'free' else of}"


def cell(metric: str, value: float) -> str:
    """A score in percent; radii in 1/255, the figures of ERS as they are."""
    if metric in ("min_eps_255", "eps50_255", "TMA", "ES:D"):
        return f"{value:.2f}"
    return f"{value:.1f}" if metric in ERS_FIGURES else f"{100 * value:.1f}"


def run_results(args, method, variant, epoch, clean, robust, alerts, seconds, device) -> dict:
    """The content of results.json (README, "Start")."""
    return {"schema": SCHEMA, "method": method, "variant": variant, "dataset": args.dataset,
            "arch": args.arch, "embedding_dim": args.embedding_dim, "image_size": args.image_size,
            "amp": args.amp, "seed": args.seed, "epoch": epoch, "clean": clean, "robust": robust,
            "warnings": alerts, "seconds": round(seconds, 1), "peak_gb": peak_gb(device),
            "env": {"device": str(device), **provenance(device)}}


def quick_scores(evaluation) -> dict:
    """Clean and attacked Recall@1 and mAP@R of the headline rule, for log.jsonl."""
    clean, robust, _ = evaluation
    attacked = next(entry for entry in robust if entry["rule"] == clean["rule"])
    return {f"{side}_{name}": scores[name] for name in ("R@1", "mAP@R")
            for side, scores in (("clean", clean), ("robust", attacked))}
