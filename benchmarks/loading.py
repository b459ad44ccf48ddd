# SPDX-License-Identifier: MIT
"""From a folder of JPEGs to batches on the device, and whether training ever waits for them.

    python benchmarks/loading.py
    python benchmarks/loading.py --arch mobilenetv2 --image-size 224 --defenses eat
    python benchmarks/loading.py --defenses natural                # the cheapest step there is

Images per second without training, then the steps of train_step.py in epochs of real data and of
one batch that is on the device already. ratio = real / fixed. Further flags go to the script.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import bench
import torch
import torch.nn.functional as F
import train_step
from torchvision.transforms.functional import to_pil_image

import common

PHOTO = (375, 500)                                           # height and width of a JPEG


def draw_photos(folder, number, height, width):
    """JPEGs of 20 classes (blurred colours and grain: CUB's size in bytes), 4 more in test/."""
    torch.manual_seed(0)
    for i in range(number + 4):
        place = Path(folder, f"train/{i % 20:02d}" if i < number else f"test/{i % 2}")
        place.mkdir(parents=True, exist_ok=True)
        image = F.interpolate(torch.rand(1, 3, 12, 16), (height, width), mode="bicubic")[0]
        image = (image + 0.03 * torch.randn(height, width)).clamp(0, 1)
        to_pil_image(image).save(place / f"{i:05d}.jpg", quality=90)


def load(defense, args, photos, device):
    """An epoch's batches; every epoch has the same, because they cost the same."""
    batches = train_step.batches_of(defense, args, photos.labels)
    return common.load_batches(photos, batches, args.seed, workers=args.workers, device=device)


def rates(args, device, rounds):
    """Images per second of uncached, first and later epochs."""
    def epoch(cache=False):
        if cache:
            common.cache_images([photos], 64, args.workers)
        return sum(len(rows) for _, _, rows in load("natural", args, photos, device))

    photos, speeds = common.load_run_data(args)[0], {"uncached": [], "first": [], "later": []}
    epoch()                                                  # the files are in the system's cache
    for _ in range(rounds):
        photos.store = None
        for name, values in speeds.items():
            seconds, images = bench.timed(device, epoch, name == "first")
            values.append(images / seconds)
    return {f"{name}_images_per_second": median(values) for name, values in speeds.items()}


def waiting(defense, args, device, rounds):
    """One row: steps on a fixed batch and on real ones, and the share spent waiting."""
    photos, waits = common.load_run_data(args)[0], []
    common.cache_images([photos], 64, args.workers)
    step = train_step.start(defense, args, photos.labels, device)[1]
    batches = list(load(defense, args, photos, device))

    def fixed():
        for _ in batches:
            step(*batches[-1])

    def real():
        stream, waited = load(defense, args, photos, device), 0
        for _ in batches:
            started = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - started
            step(*batch)
        waits.append(1000 * waited)

    fixed_ms, real_ms, ratio = bench.turns(device, rounds, fixed, real)
    return {"defense": defense, "batch_size": args.batch_size, "attack_steps": args.attack_steps,
            "real_ms": real_ms / len(batches), "fixed_ms": fixed_ms / len(batches), "ratio": ratio,
            "blocked": median(waits[1:]) / real_ms}


def main(argv=None):
    parser = bench.base_parser(__doc__, arch="convnet", image_size=32, batch_size=30, workers=2,
                               images=480, rounds=5)
    parser.add_argument("--defenses", nargs="+", choices=train_step.DEFENSES, metavar="NAME",
                        default=["eat", "at", "natural"])
    args, flags = parser.parse_known_args(argv)
    if args.quick:
        args.images, args.rounds, args.batch_size = 48, 1, 12
    device = common.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        draw_photos(folder, args.images, *PHOTO)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.jpg")) / (args.images + 4)
        words = ["--dataset=folder", f"--data-root={folder}", f"--batch-size={args.batch_size}",
                 f"--workers={args.workers}", *flags]
        given = {name: train_step.script_args(name, args, *words)
                 for name in ("natural", *args.defenses)}
        speeds = rates(given["natural"], device, args.rounds)
        rows = (waiting(name, given[name], device, args.rounds) for name in args.defenses)
        names = "images", "arch", "image_size", "workers", "rounds"
        return bench.finish(args, argv, "loading", names, rows, flags=flags, photo=PHOTO,
                            jpeg_kb=size / 1000, **speeds)


if __name__ == "__main__":
    main()
