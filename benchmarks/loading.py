# SPDX-License-Identifier: MIT
"""From a folder of JPEGs to batches on the device, and whether training ever waits for them.

    python benchmarks/loading.py
    python benchmarks/loading.py --arch mobilenetv2 --image-size 224 --device cuda --defenses eat
    python benchmarks/loading.py --defenses natural                # the cheapest step there is

Rates, in images per second: `first` epoch, which decodes every image once and keeps it; `later`
epochs, which augment the copies in memory; `uncached` epochs, with --cache-gb 0. Nothing is trained
meanwhile.

Waiting: the script's own `main` trains, and its epochs take turns: real data, then as many steps on
one batch that is on the device already. ratio = seconds of a step with real data / with the fixed
batch, median over pairs of epochs; `blocked` is the share of an epoch in which the loop waits for
its next batch, the first of an epoch (which nothing prepares in advance) included. Flags that are
not listed below go to the script.
"""

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import baselines  # noqa: E402
import common  # noqa: E402
import eat  # noqa: E402


class Enough(Exception):
    """Everything is measured: leave the script's main."""


def draw_photos(folder, count, height, width, classes=20):
    """`count` JPEGs in train/ (blurred colours and some grain: CUB's size in bytes), 4 in test/."""
    torch.manual_seed(0)
    for number in range(count + 4):
        name = f"class-{number % classes:02d}" if number < count else f"unseen-{number % 2}"
        place = Path(folder, "train" if number < count else "test", name)
        place.mkdir(parents=True, exist_ok=True)
        image = F.interpolate(torch.rand(1, 3, 12, 16), (height, width), mode="bicubic")[0]
        image = (image + 0.03 * torch.randn(height, width)).clamp(0, 1)
        to_pil_image(image).save(place / f"{number:05d}.jpg", quality=90)


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rates(folder, image_size, batch_size, workers, device, rounds):
    """Images per second of first, later and uncached epochs."""
    def epoch(number):
        batches = common.shuffled_batches(len(photos), batch_size, 0, number)
        for _ in common.load_batches(photos, batches, 0, number, workers=workers, device=device):
            pass
        return sum(map(len, batches))

    photos, _ = common.load_dataset("folder", folder, image_size=image_size)
    epoch(0)                                                 # the files are in the system's cache
    found = {"uncached": [], "first": [], "later": []}
    for number in range(rounds):
        photos.store = None
        for name in found:
            started = clock(device)
            if name == "first":
                photos.cache(64, max(workers, 1))
            found[name].append(epoch(number + 1) / (clock(device) - started))
    return {f"{name}_images_per_second": median(values) for name, values in found.items()}


def waiting(script, words, rounds):
    """Steps of real epochs and of epochs on one batch, in seconds, and the share spent waiting."""
    seconds, blocked, fixed = {"real": [], "fixed": []}, [], []
    args = script.parse_args(words)
    device = common.pick_device(args.device)
    args.epochs = 2 * rounds + 2

    def instead_of_progress(stream, label, total):
        """The loop of `main` runs over this, once an epoch; the first two are a warm-up."""
        if not label.startswith("epoch"):
            yield from stream
            return
        real, waited = len(seconds["real"]) == len(seconds["fixed"]), 0.0
        started = clock(device)
        stream = iter(stream)
        for _ in range(total):
            before = time.perf_counter()
            batch = next(stream) if real else fixed[0]
            waited += time.perf_counter() - before
            yield batch
        took = clock(device) - started
        seconds["real" if real else "fixed"].append(took / total)
        if real:
            blocked.append(waited / took)
            fixed[:] = [batch]
        elif len(seconds["fixed"]) > rounds:
            raise Enough

    with patch.object(common, "progress", instead_of_progress), \
            contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        script.main(args)
    pairs = list(zip(seconds["real"], seconds["fixed"]))[1:]
    return {"batch_size": args.batch_size, "attack_steps": args.attack_steps,
            "real_ms": 1000 * median(real for real, _ in pairs),
            "fixed_ms": 1000 * median(fixed for _, fixed in pairs),
            "ratio": median(real / fixed for real, fixed in pairs),
            "blocked": median(blocked[1:])}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defenses", nargs="+", default=["eat", "at", "natural"], metavar="NAME",
                        choices=("eat", *baselines.METHODS))
    parser.add_argument("--images", type=int, default=480, help="JPEGs to train on")
    parser.add_argument("--photo", type=int, nargs=2, default=[375, 500], metavar=("H", "W"))
    parser.add_argument("--arch", default="convnet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="48 small JPEGs, 1 round")
    parser.add_argument("--json", default=None, metavar="FILE",
                        help="default: results/benchmarks-loading-ARCH-SIZE-DEVICE.json")
    args, extra = parser.parse_known_args(argv)
    if args.quick:
        args.images, args.photo, args.rounds, args.batch_size = 48, [48, 64], 1, 12
    device = common.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        draw_photos(folder, args.images, *args.photo)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.jpg")) / (args.images + 4)
        speed = rates(folder, args.image_size, args.batch_size, args.workers, device, args.rounds)
        print(f"{args.images} JPEGs of {args.photo[1]} x {args.photo[0]} ({size / 1000:.0f} KB), "
              f"{args.workers} workers -> {args.image_size} px, images per second:")
        print("  ".join(f"{name.partition('_')[0]} {value:.0f}" for name, value in speed.items()))
        rows = []
        print("defense   step, real ms  fixed ms  ratio  blocked")
        for defense in args.defenses:
            words = ["--dataset", "folder", "--data-root", folder, "--weights", "none", "--out",
                     str(Path(folder, "runs", defense)), "--device", str(device)]
            for name in ("arch", "image_size", "batch_size", "workers"):
                words += ["--" + name.replace("_", "-"), str(getattr(args, name))]
            script, method = (eat, []) if defense == "eat" else (baselines, ["--method", defense])
            rows.append({"defense": defense, **waiting(script, method + words + extra,
                                                       args.rounds)})
            row = rows[-1]
            print(f"{defense:9}{row['real_ms']:14.2f}{row['fixed_ms']:10.2f}{row['ratio']:7.3f}"
                  f"{row['blocked']:9.4f}", flush=True)
    cores = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{cores} CPU core{'s' * (cores > 1)}"
    words = sys.argv[1:] if argv is None else argv
    result = {"benchmark": "loading",
              "command": shlex.join(["python", "benchmarks/loading.py", *words]),
              "machine": name, "images": args.images, "photo": args.photo,
              "jpeg_kb": size / 1000, "arch": args.arch, "image_size": args.image_size,
              "workers": args.workers, "rounds": args.rounds, "flags": extra, **speed,
              **common.provenance(device), "rows": rows}
    file = Path(args.json or ROOT / "results" / f"benchmarks-loading-{args.arch}-{args.image_size}-"
                f"{device.type}.json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}; {args.arch}, {args.image_size} px; {file}")
    return result


if __name__ == "__main__":
    main()
