# SPDX-License-Identifier: MIT
"""How much of a training step is spent on the passes that the defense cannot do without.

    python benchmarks/train_step.py                                          # convnet, 32 px
    python benchmarks/train_step.py --arch mobilenetv2 --image-size 64
    python benchmarks/train_step.py --arch mobilenetv2 --image-size 224 --device cuda --amp

The step is the body of the loop in the script's own `main`, which runs here on one batch that
stays the same. In turn with it, in the same process, on that batch, first one, then the other:

    bare    its passes alone: forward, forward and input gradient (parameters frozen), forward and
            full gradient, on as many images, in the same precision and memory layout
    field   the same step as it is usually written: `loss.backward()` in the attack, which fills
            the parameters' gradients too, NCHW, float32, and in eat.py an attack per network

efficiency = bare / step and speedup = field / step, medians over the rounds. COST says which passes
a defense needs; a step that makes others is an error. Every defense has a process of its own, whose
peak memory before the copies for bare and field exist is in the table. Flags that are not listed
below go to the scripts: --attack-steps 20, --batch-size 8 ...
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import baselines  # noqa: E402
import common  # noqa: E402
import eat  # noqa: E402
import hardness_manipulation  # noqa: E402
import panum_at  # noqa: E402

SCRIPTS = {"eat": eat, "panum": panum_at, "hm": hardness_manipulation}      # else: baselines.py
# Images through a network in a step on b images: forward, with input gradient, with full gradient.
# T attack steps, N networks, h images that panum_at.py attacks; pairs (hm, act) are b / 2 triplets.
COST = {
    "eat": lambda b, T, N, h: (N * b, N * T * b, 2 * (N - 1) * b),
    "at": lambda b, T, N, h: (b, T * b, 2 * b),
    "panum": lambda b, T, N, h: (b, T * h, b + h),
    "hm": lambda b, T, N, h: (b, T * (3 * b // 2), 3 * b // 2),
    "natural": lambda b, T, N, h: (0, 0, b),
    "mixup": lambda b, T, N, h: (0, 0, b),
    "iat": lambda b, T, N, h: (b, T * b, 2 * b),
    "trades": lambda b, T, N, h: (b, T * b, 2 * b),
    "est": lambda b, T, N, h: (b, T * b, b),
    "act": lambda b, T, N, h: (b, T * b, 3 * b // 2),
}
CLASSES, WARM_UP = 60, 3


class Enough(Exception):
    """Everything is measured: leave the script's main."""


def draw_photos(folder, size):
    """Blurred noise, 4 images of a class: enough for the batch of every recipe."""
    for name in [f"train/{i:02d}" for i in range(CLASSES)] + ["test/one", "test/two"]:
        Path(folder, name).mkdir(parents=True)
        for number in range(4):
            image = F.interpolate(torch.rand(1, 3, 8, 8), size, mode="bilinear")[0]
            to_pil_image(image).save(Path(folder, name, f"{number}.jpg"))


def command_line(defense, arch, image_size, device, recipe, folder):
    """The flags of the defense's script; recipe "small" is its own for generated data."""
    script = SCRIPTS.get(defense, baselines)
    given = {"dataset": "folder", "data_root": folder, "arch": arch, "image_size": image_size,
             "weights": "none", "device": device, "workers": 0}
    if recipe == "small":
        small = baselines.SMALL_TRIPLET if defense in baselines.TRIPLET else script.SMALL
        given |= {name: small[name] for name in ("pool", "embedding_dim", "batch_size", "eps",
                                                 "images_per_class", "step_size", "attack_steps")
                  if name in small}
    words = [] if defense in SCRIPTS else ["--method", defense]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return script, words + ["--dry-run"]                     # one batch, full steps, writes nothing


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- what a step is compared with

def bare_step(passes, networks, images):
    """Seconds of the passes [(kind, network, rows)] and of nothing else."""
    pool, device = torch.cat([images, images]), images.device        # hm, panum: rows > images
    inputs = {rows: pool[:rows].clone() for _, _, rows in passes}
    above = {rows: torch.randn(rows, networks[0].head.out_features, device=device) / rows
             for rows in inputs}
    for network in networks:
        network.zero_grad(set_to_none=True)
    with common.frozen(*networks):
        started = clock(device)
        for kind, i, rows in passes:
            if kind == "forward":
                with torch.no_grad():
                    networks[i](inputs[rows])
            elif kind == "input":
                x = inputs[rows].detach().requires_grad_()
                torch.autograd.grad(networks[i](x), x, above[rows])
        seconds = clock(device) - started
    started = clock(device)
    for kind, i, rows in passes:
        if kind == "full":
            networks[i](inputs[rows]).backward(above[rows])
    return seconds + clock(device) - started


def field_pgd(objective, images, eps, step_size, steps, random_start=True, start=None):
    """common.pgd with `loss.backward()`: the parameters get gradients that nobody wants."""
    x = images if start is None else start
    if start is None and random_start:
        x = images + torch.empty_like(images).uniform_(-eps, eps)
    x = x.clamp(0, 1)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        objective(x).sum().backward()
        shift = (x + step_size * x.grad.sign() - images).clamp(-eps, eps)
        x = (images + shift).clamp(0, 1)
    return x.detach()


def field_losses(defense, args, networks, proxies, images, labels, passes):
    """The loss of each network, by the script's own functions, one attack for each of them."""
    ball = args.eps, args.step_size, args.attack_steps
    if defense == "eat":
        seen = {i: rows for kind, i, rows in passes if kind == "full"}
        for i, (network, anchors) in enumerate(zip(networks, proxies)):
            own, names = images[:seen[i]], labels[:seen[i]]
            moved = eat.attack(networks, proxies, own, names, args.attack_loss, *ball)
            yield eat.member_loss(network, anchors, own, moved, names, args.beta)[0]
    elif defense == "panum":
        hits = max(rows for _, _, rows in passes) - len(images)
        yield panum_at.step_loss(args, networks[0], images, labels, (*ball, True),
                                 lambda count: torch.arange(count) < hits)[0]
    elif defense == "hm":
        margin = torch.tensor(hardness_manipulation.MARGIN, device=images.device)
        yield hardness_manipulation.step_loss(args, networks[0], images, labels, args.destination,
                                              margin, ball)[0]
    else:
        mixture = baselines.draw_mixture(images, args.mixup_alpha)
        target = args.source if defense in baselines.TRIPLET else proxies[0]
        further = {"natural": (), "mixup": (*mixture, args.mixup_target), "iat": (*mixture, *ball),
                   "at": (*ball, args.beta)}.get(defense, ball)
        yield getattr(baselines, defense)(networks[0], images, labels, target, *further)[0]


def field_step(script, optimizers, networks, proxies, images, losses):
    """Seconds of the step as the field writes it."""
    started = clock(images.device)
    with patch.object(script, "pgd", field_pgd), patch.object(script, "frozen", common.eval_mode):
        for network, anchors, optimizer, loss in zip(networks, proxies, optimizers, losses):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if anchors.grad is not None:                     # a Proxy Anchor method
                nn.utils.clip_grad_value_([*network.parameters(), anchors], 10)
            optimizer.step()
    return clock(images.device) - started


# ---- measurement

def measure(defense, arch, image_size, device, recipe, rounds, extra):
    """One row of the table."""
    made, numbers, row = [], {}, {"defense": defense, "arch": arch, "image_size": image_size}
    seconds = {"bare": [], "field": []}                      # [(of the step, of the other)]

    def counted(network, images):
        kind = "forward" if not torch.is_grad_enabled() else \
            "full" if network.head.weight.requires_grad else "input"
        made.append((kind, numbers.setdefault(network, len(numbers)), len(images)))
        return nn.Module.__call__(network, images)

    def check_passes(passes, networks, images):
        """Images per kind of pass, in the row; they must be those of COST."""
        done = Counter()
        for kind, _, rows in passes:
            done[kind] += rows
        row["passes"] = {kind: done[kind] for kind in ("forward", "input", "full")}
        needed = COST[defense](images, args.attack_steps, networks,
                               done["input"] // max(args.attack_steps, 1))
        if tuple(row["passes"].values()) != needed:
            raise RuntimeError(f"a step of {defense} sends {row['passes']} images through its "
                               f"networks and needs {needed}: does a flag change that?")

    def instead_of_progress(stream, *_):
        """The loop of `main` runs over this: the first batch of the epoch, over and over."""
        batch = next(iter(stream))
        images, labels, _ = batch[0] if defense == "eat" else batch
        for _ in range(min(WARM_UP, rounds)):
            yield batch
        row.update(peak_gb=common.peak_gb(images.device), networks=len(numbers), images=len(images))
        networks = [copy.deepcopy(network) for network in numbers]
        theirs = [copy.deepcopy(network).to(memory_format=torch.contiguous_format)
                  for network in numbers]
        for network in theirs:
            network.amp = False
        proxies = [common.new_proxies(args, CLASSES, images.device) for _ in theirs]
        optimizers = [common.proxy_optimizer(args, *pair) for pair in zip(theirs, proxies)]
        # One after the other: a step is slower right after field, whose memory has another shape.
        for other, taken in seconds.items():
            for _ in range(rounds + 1):
                made.clear()
                started = clock(images.device)
                yield batch
                step = clock(images.device) - started
                passes = list(made)
                check_passes(passes, len(networks), len(images))
                if other == "bare":
                    taken.append((step, bare_step(passes, networks, images)))
                    continue
                losses = field_losses(defense, args, theirs, proxies, images.contiguous(), labels,
                                      passes)
                taken.append((step, field_step(script, optimizers, theirs, proxies, images,
                                               losses)))
        raise Enough

    with tempfile.TemporaryDirectory() as folder:
        draw_photos(folder, round(256 * image_size / 224))
        script, words = command_line(defense, arch, image_size, device, recipe, folder)
        args = script.parse_args(words + extra)
        with patch.object(common, "progress", instead_of_progress), \
                patch.object(common.EmbeddingModel, "__call__", counted), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
            script.main(args)
    bare, field = (taken[1:] for taken in seconds.values())                  # the first: a warm-up
    step = median(own for own, _ in bare)
    return row | {"attack_steps": args.attack_steps, "embedding_dim": args.embedding_dim,
                  "amp": args.amp, "images_per_second": row["images"] / step,
                  "step_ms": 1000 * step, "bare_ms": 1000 * median(other for _, other in bare),
                  "field_ms": 1000 * median(other for _, other in field),
                  "efficiency": median(other / own for own, other in bare),
                  "speedup": median(other / own for own, other in field)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defenses", nargs="+", choices=tuple(COST), metavar="NAME",
                        default=list(COST)[:4], help=f"of {', '.join(COST)} (default: four)")
    parser.add_argument("--arch", default="convnet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--recipe", choices=("small", "paper"), default=None,
                        help="batch, attack and embedding: the script's for generated data "
                             "(default on a CPU) or the paper's (default on a GPU)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one round, all in this process")
    parser.add_argument("--json", default=None, metavar="FILE",
                        help="default: results/benchmarks-train-step-ARCH-SIZE-DEVICE[-amp].json")
    args, extra = parser.parse_known_args(argv)
    rounds, rows = 1 if args.quick else args.rounds, []
    device = common.pick_device(args.device)
    recipe = args.recipe or ("small" if device.type == "cpu" else "paper")
    print("defense    images/s   step ms   bare ms  efficiency  field ms  speedup  peak GB")
    for defense in args.defenses:
        job = measure, defense, args.arch, args.image_size, str(device), recipe, rounds, extra
        if args.quick:
            row = job[0](*job[1:])
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(*job).result()
        rows.append(row)
        print(f"{defense:9} {row['images_per_second']:9.1f} {row['step_ms']:9.2f} "
              f"{row['bare_ms']:9.2f} {row['efficiency']:11.3f} {row['field_ms']:9.2f} "
              f"{row['speedup']:8.2f} {row['peak_gb']:8.2f}", flush=True)
    cores = torch.get_num_threads()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{cores} CPU core{'s' * (cores > 1)}"
    words = sys.argv[1:] if argv is None else argv
    result = {"benchmark": "train_step",
              "command": shlex.join(["python", "benchmarks/train_step.py", *words]),
              "machine": machine, "recipe": recipe, "flags": extra,
              "rounds": rounds, **common.provenance(device), "rows": rows}
    file = Path(args.json or ROOT / "results" / f"benchmarks-train-step-{args.arch}-"
                f"{args.image_size}-{device.type}{'-amp' * ('--amp' in extra)}.json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine}; {args.arch}, {args.image_size} px, {recipe} recipe; {file}")
    return result


if __name__ == "__main__":
    main()
