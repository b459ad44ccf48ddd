# SPDX-License-Identifier: MIT
"""How much of a training step is spent on the passes that the defense cannot do without.

    python benchmarks/train_step.py                                          # convnet, 32 px
    python benchmarks/train_step.py --arch mobilenetv2 --image-size 64

The step is the body of the loop in the script's `main`, made of the same calls, on one batch of
random images that stays the same. Two others take turns with it:

    bare    its passes alone: forward, forward and input gradient (parameters frozen), forward and
            full gradient, on as many images, in the same precision and memory layout
    field   the same step as it is usually written: `loss.backward()` in the attack, which fills
            the parameters' gradients too, NCHW, float32, and in eat.py an attack per network

efficiency = bare / step, speedup = field / step. Further flags go to the script.
"""

import argparse
import contextlib
from unittest.mock import patch

import bench
import torch
from torch import nn

import baselines
import common
import eat
import hardness_manipulation
import panum_at

SCRIPTS = {"eat": eat, "panum": panum_at, "hm": hardness_manipulation}      # else: baselines.py
DEFENSES = ("eat", "at", "panum", "hm", *(name for name in baselines.METHODS
                                          if name not in ("at", "fare")))   # it needs a teacher
PAIRS = ("hm", *baselines.PAIRS)                                          # see pairs of a class
LABELS = torch.arange(6000) // 100                                          # 60 classes


def script_args(defense, args, *words):
    """The flags of the defense's script; the networks are not pretrained."""
    words = ["--weights=none", f"--arch={args.arch}", f"--image-size={args.image_size}", *words]
    method = [] if defense in SCRIPTS else ["--method", defense]
    return SCRIPTS.get(defense, baselines).parse_args([*method, *words])


def batches_of(defense, args, labels):
    """The image numbers of the first epoch's batches, as in `main`."""
    if defense in PAIRS:
        return common.pair_batches(labels, args.batch_size, args.seed, 0)
    more = args.members / (args.members - 1) if defense == "eat" and args.split else 1
    return common.epoch_batches(args, labels, 0, batch_size=round(args.batch_size * more))


def losses_of(defense, args, networks, proxies, images, labels, part, field):
    """Every network's loss, by the method's own functions; field: eat.py attacks for each."""
    network, ball = networks[0], (args.eps, args.step_size, args.attack_steps)
    if defense == "eat":
        flags = args.attack_loss, *ball
        moved = None if field else eat.attack(networks, proxies, images, labels, *flags)
        for i, (network, points) in enumerate(zip(networks, proxies)):
            sees = (part != i).nonzero()[:, 0].to(images.device, non_blocking=True)
            x, y = images[sees], labels[sees]
            adversarial = eat.attack(networks, proxies, x, y, *flags) if field else moved[sees]
            yield eat.member_loss(network, points, x, adversarial, y, args.beta)[0]
    elif defense == "panum":
        coins = common.random_stream(args.seed, 0, common.TRAIN, 1)         # every step the same
        yield panum_at.robust_loss(
            network, images, labels,
            lambda count: torch.from_numpy(coins.random(count) < args.attack_rate), ball,
            loss=args.loss, perturb=args.perturb, reg_weight=args.reg_weight)[0]
    elif defense == "hm":
        yield hardness_manipulation.hm_loss(
            network, images, labels, args.source, args.destination,
            torch.full((), hardness_manipulation.MARGIN, device=images.device), ball, args.ics)[0]
    else:
        flags = {name: getattr(args, name) for name in baselines.OPTIONS.get(defense, ())}
        yield baselines.METHODS[defense](network, images, labels, proxies[0], ball, **flags)[0]


def start(defense, args, labels, device, field=False):
    """What `main` makes: the networks, and the body of its loop, step(images, labels, rows)."""
    run = object.__new__(common.Run)                     # it makes networks, and opens no folder
    run.args, run.device, run.checkpoint = args, device, None
    run.train = argparse.Namespace(classes=labels.unique())
    count, triplets = args.members if defense == "eat" else 1, defense in ("panum", *PAIRS)
    split = count > 1 and args.split
    part = common.split_by_image(labels, count, args.seed) if split else torch.full_like(labels, -1)
    networks = [run.network(i) for i in range(count)]
    proxies = [None if triplets else run.proxies(i) for i in range(count)]
    optimizers = [run.adamw(*pair) if not triplets else torch.optim.Adam(
        pair[0].parameters(), args.lr, weight_decay=args.weight_decay, foreach=True)
        for pair in zip(networks, proxies)]
    for network in networks:
        common.train_mode(network, args.freeze_bn)
        network.amp = args.amp and not field
        network.to(memory_format=torch.contiguous_format if field else torch.channels_last)

    def step(images, y, rows):
        y = labels[rows] if triplets else y              # mining reads them on the CPU
        losses = losses_of(defense, args, networks, proxies, images, y, part[rows], field)
        for loss, network, points, optimizer in zip(losses, networks, proxies, optimizers):
            optimizer.zero_grad()
            loss.backward()
            if points is not None:
                nn.utils.clip_grad_value_([*network.parameters(), points], 10)
            optimizer.step()

    return networks, step


def repeat(passes, pool, *kinds):
    """The passes (kind, network, images) of these kinds, and nothing else."""
    for kind, network, number in passes:
        if kind in kinds:
            x = pool[:number].detach().requires_grad_(kind == "input")
            with torch.set_grad_enabled(kind != "forward"):
                value = network(x).sum()
            if kind != "forward":
                torch.autograd.grad(value, x if kind == "input" else list(network.parameters()))


def field_gradient(value, x):
    """In place of torch.autograd.grad in pgd: the parameters get gradients that nobody wants."""
    value.backward()
    return (x.grad,)


@contextlib.contextmanager
def field_frozen(*models):
    """common.frozen, but the parameters go on collecting gradients."""
    with common.frozen(*models):
        for model in models:
            model.requires_grad_()
        yield


def measure(defense, args, device, rounds):
    """One row of the table."""
    device = common.pick_device(str(device))             # as `main` does, in this process, too
    rows, passes = batches_of(defense, args, LABELS)[0], []
    images = torch.rand(len(rows), 3, args.image_size, args.image_size)
    batch = images.to(device, memory_format=torch.channels_last), LABELS[rows].to(device), rows
    networks, step = start(defense, args, LABELS, device)

    def note(network, inputs):
        kind = "full" if network.head.weight.requires_grad else "input"
        passes.append((kind if torch.is_grad_enabled() else "forward", network, len(inputs[0])))

    def bare():
        with common.frozen(*networks):
            repeat(passes, pool, "forward", "input")
        repeat(passes, pool, "full")

    def field():
        with (patch.object(torch.autograd, "grad", field_gradient),
              patch.object(SCRIPTS.get(defense, baselines), "frozen", field_frozen)):
            field_step(*field_batch)

    hooks = [network.register_forward_pre_hook(note) for network in networks]
    step(*batch)                                         # what it sends through the networks
    for hook in hooks:
        hook.remove()
    peak, pool = common.peak_gb(device), torch.cat([batch[0]] * 3)
    step_ms, bare_ms, efficiency = bench.turns(device, rounds, lambda: step(*batch), bare)
    # Later, because a step is slower right after field, which leaves memory of other shapes.
    field_step = start(defense, args, LABELS, device, field=True)[1]
    field_batch = images.to(device), *batch[1:]
    _, field_ms, speedup = bench.turns(device, rounds, lambda: step(*batch), field)
    return {"defense": defense, "arch": args.arch, "image_size": args.image_size, "peak_gb": peak,
            "networks": len(networks), "images": len(rows),
            "passes": {name: sum(number for kind, _, number in passes if kind == name)
                       for name in ("forward", "input", "full")},
            "attack_steps": args.attack_steps, "embedding_dim": args.embedding_dim,
            "amp": args.amp, "images_per_second": 1000 * len(rows) / step_ms, "step_ms": step_ms,
            "bare_ms": bare_ms, "field_ms": field_ms, "efficiency": efficiency, "speedup": speedup}


def main(argv=None):
    parser = bench.base_parser(__doc__, arch="convnet", image_size=32, rounds=20)
    parser.add_argument("--defenses", nargs="+", choices=DEFENSES, default=DEFENSES[:4],
                        metavar="NAME", help=f"of {', '.join(DEFENSES)} (default: four)")
    parser.add_argument("--recipe", choices=("small", "paper"), help="batch, attack and embedding: "
                        "of generated data (default on a CPU) or the paper's (default on a GPU)")
    args, flags = parser.parse_known_args(argv)
    device = common.pick_device(args.device)
    args.rounds = 1 if args.quick else args.rounds
    args.recipe = args.recipe or ("small" if device.type == "cpu" else "paper")
    words = ["--dataset", "glyphs" if args.recipe == "small" else "cub", *flags]
    rows = (bench.call(args.quick, measure, name, script_args(name, args, *words), device,
                       args.rounds) for name in args.defenses)
    return bench.finish(args, argv, "train_step", ("recipe", "rounds"), rows, flags=flags)


if __name__ == "__main__":
    main()
