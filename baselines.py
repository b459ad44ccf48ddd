# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""The defenses that the papers compare with, side by side: one function per method, one loop.

    python baselines.py --method at                              # built-in glyphs, 2 CPU cores
    python baselines.py --method trades --dataset cars           # the EAT paper's recipe
    python baselines.py --method act --dataset cub               # Zhou & Patel's recipe

F(x) is the unit embedding, x_adv = x + r with |r|_inf <= eps, L Proxy Anchor with the true labels,
d the Euclidean distance. What one step minimises:

    natural    L(F(x), y)
    at         beta L(F(x), y) + (1 - beta) L(F(x_adv), y), x_adv far from F(x)
    mixup      w L(F(m), y) + (1 - w) L(F(m), y'), m = w x + (1 - w) x', w ~ Beta
    iat        half mixup of the images, half mixup of their x_adv, same pairs, same w
    trades     L(F(x), y) + lambda ||F(x_adv) - F(x)||^2
    ensemble   at (or natural) for each of N networks by itself; they vote
    est        triplet loss on x_adv, triplets mined among the F(x_adv)
    act        triplet loss of a clean anchor, p_adv and n_adv, which were pushed together

The first six are the comparison of Ke (arXiv 2501.01025, "EAT paper" below), who adapts them from
classification: Madry et al. 2018 (at), Zhang et al. 2018 (mixup), Lamb et al. 2019 (iat), Zhang et
al. 2019 (trades). The last two are the comparison of Zhou & Patel (CVPR 2022): Zhou et al., ECCV
2020 (est) and arXiv 2106.03614 (act). Departures from the papers: docs/baselines.md.
natural and mixup attack nothing in training: the flags of that attack change nothing there.
Logged: the terms of the loss, mean over networks; lr; seconds; images per second; collapse, the
mean cosine of two rows of the last batch, last network (1: collapsed).
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import (
    UserError,
    euclidean,
    frozen,
    load_batches,
    mine_pairs,
    pgd,
    proxy_anchor_loss,
    seed_torch,
    shift_objective,
    triplet_loss,
)

# ---- method
#
# Every method: (model, images (B, 3, S, S) in [0, 1], labels (B,), ...) -> (loss, {term: value}).


def natural(model, images, labels, proxies):
    """L(F(x), y): no defense."""
    loss = proxy_anchor_loss(model(images), labels, proxies)
    return loss, {"clean": loss}


def shift_attack(model, images, eps, step_size, steps, start=None):
    """x_adv: as far from F(x) as possible, 1 - cos; starts at `start` or uniformly in the ball."""
    with frozen(model):
        with torch.no_grad():
            clean = model(images)
        return pgd(shift_objective([model], [clean]), images, eps, step_size, steps, start=start)


def at(model, images, labels, proxies, eps, step_size, steps, beta=0.5):
    """beta L(F(x), y) + (1 - beta) L(F(x_adv), y); EAT paper, Eq. (4), which prints beta = 0."""
    adversarial = shift_attack(model, images, eps, step_size, steps)
    clean = proxy_anchor_loss(model(images), labels, proxies)
    robust = proxy_anchor_loss(model(adversarial), labels, proxies)
    return beta * clean + (1 - beta) * robust, {"clean": clean, "adversarial": robust}


def draw_mixture(images, alpha):
    """w ~ Beta(alpha, alpha), one a batch (alpha 0: w = 1), and every image's partner (B,)."""
    weight = float(torch.distributions.Beta(alpha, alpha).sample()) if alpha else 1.0
    return weight, torch.randperm(len(images)).to(images.device)


def mixup(model, images, labels, proxies, weight, order, target="label"):
    """w L(F(m), y) + (1 - w) L(F(m), y'), m = w x + (1 - w) x'; EAT paper, Eq. (6).

    weight: w. order (B,): x' = x[order]. target "label": a class's label vector is its proxy, so L
    mixes. "embedding", the paper's own: 1 - cos of F(m) and w F(x) + (1 - w) F(x'); it collapses.
    """
    embeddings = model(weight * images + (1 - weight) * images[order])
    if target == "embedding":
        clean = model(images)
        mixed = weight * clean + (1 - weight) * clean[order]
        loss = (1 - F.cosine_similarity(embeddings, mixed)).mean()
    else:
        loss = (weight * proxy_anchor_loss(embeddings, labels, proxies)
                + (1 - weight) * proxy_anchor_loss(embeddings, labels[order], proxies))
    return loss, {"mixed": loss}


def iat(model, images, labels, proxies, weight, order, eps, step_size, steps):
    """Half mixup of the images, half mixup of their x_adv, same pairs and w; EAT paper, Eq. (7)."""
    adversarial = shift_attack(model, images, eps, step_size, steps)
    clean, _ = mixup(model, images, labels, proxies, weight, order)
    robust, _ = mixup(model, adversarial, labels, proxies, weight, order)
    return (clean + robust) / 2, {"mixed": clean, "mixed_adversarial": robust}


def trades(model, images, labels, proxies, eps, step_size, steps, strength=6.0, start="gauss"):
    """L(F(x), y) + lambda mean ||F(x_adv) - F(x)||^2; EAT paper, Eq. (8).

    strength: lambda; the gradient goes through both embeddings. start of the attack: "gauss", the
    image plus noise of standard deviation 0.001, or "uniform" in the ball.
    """
    noisy = images + 0.001 * torch.randn_like(images) if start == "gauss" else None
    adversarial = shift_attack(model, images, eps, step_size, steps, noisy)
    embeddings = model(images)
    clean = proxy_anchor_loss(embeddings, labels, proxies)
    shift = (model(adversarial) - embeddings).square().sum(1).mean()
    return clean + strength * shift, {"clean": clean, "shift": shift}


# est and act see pairs: rows 2i and 2i + 1 are of one class; anchors are the even rows.

def est(model, images, labels, source, eps, step_size, steps):
    """max(0, d(a_adv, p_adv) - d(a_adv, n_adv) + 0.2); Zhou et al., ECCV 2020.

    Every image moves away from its own F(x); triplets are mined among the moved embeddings.
    """
    embeddings = model(shift_attack(model, images, eps, step_size, steps))
    a, p, n = mine_pairs(embeddings, labels, source)
    loss = triplet_loss(embeddings[a], embeddings[p], embeddings[n])
    return loss, {"adversarial": loss}


def act(model, images, labels, source, eps, step_size, steps):
    """max(0, d(a, p_adv) - d(a, n_adv) + 0.2); Zhou et al., arXiv 2106.03614.

    Triplets are mined among the clean embeddings, then p and n are moved together to minimise
    d(p_adv, n_adv), from zero. The anchor stays clean.
    """
    with frozen(model):
        with torch.no_grad():
            a, p, n = mine_pairs(model(images), labels, source)
        adversarial = pgd(lambda x: -euclidean(*model(x).chunk(2)), images[torch.cat([p, n])],
                          eps, step_size, steps, random_start=False)
    positive, negative = model(adversarial).chunk(2)
    loss = triplet_loss(model(images[a]), positive, negative)
    return loss, {"adversarial": loss}


# ---- command line

METHODS = ("natural", "at", "mixup", "iat", "trades", "ensemble", "est", "act")
TRIPLET = ("est", "act")                                      # the others use Proxy Anchor
# base_parser's defaults are the recipe of the first six; this is Zhou & Patel's.
TRIPLET_RECIPE = dict(arch="resnet18", embedding_dim=512, crop="square", epochs=75, batch_size=112,
                      warmup_epochs=0, lr=1e-5, weight_decay=4e-4, eps=8 / 255, step_size=1 / 255,
                      attack_steps=8)
# For generated data, on a CPU: eat.py's, and more epochs for triplets, which start slowly.
SMALL = dict(arch="convnet", pool="avgmax", image_size=32, embedding_dim=64, epochs=12,
             batch_size=30, lr=2e-3, eps=8 / 255, step_size=2 / 255, attack_steps=4,
             eps_ramp_epochs=4, plain_epochs=12)
SMALL_TRIPLET = SMALL | dict(epochs=20, lr=1e-3, benign_epochs=10)
# Which methods a flag belongs to.
BELONGS = {"beta": ("at", "ensemble"), "mixup_alpha": ("mixup", "iat"), "mixup_target": ("mixup",),
           "trades_lambda": ("trades",), "trades_start": ("trades",), "members": ("ensemble",),
           "members_method": ("ensemble",), "split": ("ensemble",), "source": TRIPLET}


def parse_args(argv=None):
    chosen = common.Parser(add_help=False)                   # --method decides the defaults
    chosen.add_argument("--method", default="natural")
    parser = common.base_parser(__doc__)
    triplets = chosen.parse_known_args(argv)[0].method in TRIPLET
    if triplets:
        parser.set_defaults(**TRIPLET_RECIPE)
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=METHODS, default="natural")
    method.add_argument("--beta", type=common.number(float, 0, 1), default=0.5,
                        help="at, ensemble: weight of the clean term; 0 is Eq. (4) as printed")
    method.add_argument("--mixup-alpha", type=common.number(float, 0), default=1.0,
                        help="mixup, iat: w ~ Beta(alpha, alpha), one w a batch (0: w = 1)")
    method.add_argument("--mixup-target", choices=("label", "embedding"), default="label",
                        help="mixup: embedding is the paper's own, label-free target")
    method.add_argument("--trades-lambda", type=common.number(float, 0), default=6.0,
                        help="trades: weight of the shift (6: its authors' code; 1 is closer to "
                             "the EAT paper's table)")
    method.add_argument("--trades-start", "--init", choices=("gauss", "uniform"), default="gauss",
                        help="trades: where the attack starts")
    method.add_argument("--members", type=common.number(int, 1), default=3,
                        help="ensemble: N, networks")
    method.add_argument("--members-method", choices=("at", "natural"), default="at",
                        help="ensemble: how each network is trained")
    method.add_argument("--split", action=argparse.BooleanOptionalAction, default=False,
                        help="ensemble: network i never trains on part i of the images")
    method.add_argument("--source", default="random", help="est, act: how triplets are mined",
                        choices=("random", "semihard", "softhard", "distance", "hardest"))
    method.add_argument("--benign-epochs", type=common.number(int, 0), default=0,
                        help="train without an attack first (not in the papers, which start from "
                             "ImageNet weights; triplets need it from a random start)")
    method.add_argument("--eps-ramp-epochs", type=common.number(int, 0), default=0,
                        help="then let --eps and --step-size grow over so many epochs, 0 in the "
                             "first (not in the papers; short runs and small networks need it)")
    method.add_argument("--plain-epochs", type=common.number(int, 0), default=0,
                        help="closing table: train an undefended network for so long (0: show the "
                             "starting weights); natural has no such row")
    args = common.parse_run(parser, argv, run_name, SMALL_TRIPLET if triplets else SMALL, METHODS)
    for name, methods in BELONGS.items():
        if args.method not in methods and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} belongs to --method {', '.join(methods)}, "
                         f"not to {args.method}: drop it")
    if args.method == "ensemble" and args.members_method == "natural" and args.beta != 0.5:
        parser.error("--beta weighs the terms of at: drop it with --members-method natural")
    if args.split and args.members == 1:
        parser.error("--members 1 has nothing to split: drop --split")
    if args.method in TRIPLET and (args.batch_size < 4 or args.batch_size % 2):
        parser.error(f"--batch-size {args.batch_size}: {args.method} draws pairs of one class; "
                     f"give an even number, at least 4")
    if args.method in TRIPLET and args.images_per_class:
        parser.error(f"--images-per-class: {args.method} draws pairs of one class; drop it")
    if args.images_per_class > args.batch_size:
        parser.error(f"--images-per-class {args.images_per_class} is more than --batch-size "
                     f"{args.batch_size}: lower it")
    return args


def run_name(args):
    """The method with its variant, where that is not the default."""
    words = [(args.beta != 0.5, f"beta{args.beta:g}"),
             (args.mixup_alpha != 1, f"alpha{args.mixup_alpha:g}"),
             (args.mixup_target != "label", args.mixup_target),
             (args.trades_lambda != 6, f"lambda{args.trades_lambda:g}"),
             (args.trades_start != "gauss", args.trades_start),
             (args.members_method != "at", args.members_method), (args.split, "split"),
             (args.source != "random", args.source)]
    return "-".join([args.method, *(word for changed, word in words if changed)])


# ---- training

def main(args):
    train, test = common.load_run_data(args)
    triplets = args.method in TRIPLET
    usable = int((train.labels.bincount() >= (2 if triplets else 1)).sum())
    if usable < 2:
        raise UserError(f"{args.dataset} leaves {usable} class to train on"
                        f"{' that has two images' if triplets else ''}: give data with at least 2, "
                        f"or lower --val-classes")
    if args.split and args.members > len(train):
        raise UserError(f"--members {args.members} is more than the {len(train)} training images: "
                        f"lower it")
    checkpoint = common.claim_folder(args)
    common.check_same_classes(checkpoint, train)
    out = Path(args.out)
    protocols = ("clustering", "template") if triplets else ("clustering",)
    if checkpoint and checkpoint["epoch"] == args.epochs and (out / "results.json").exists():
        print(f"{out} is complete:")
        return common.report(common.read_json(out / "results.json"), run_name(args), test, args,
                             protocols)
    count = args.members if args.method == "ensemble" else 1
    everything = torch.arange(len(train))
    pools = [everything] * count                                # the images each network sees
    if args.split:
        part = common.split_by_image(train.labels, count, args.seed)
        pools = [(part != i).nonzero()[:, 0] for i in range(count)]

    def draw(epoch, i=0, pool=everything):
        if triplets:
            return common.pair_batches(train.labels, args.batch_size, args.seed, epoch)
        return common.epoch_batches(args, train.labels, epoch, batch_size=args.batch_size,
                                    pool=pool, member=i)

    for i in range(count):
        draw(0, i, pools[i])                                    # an impossible batch fails here
    device = common.pick_device(args.device, args.deterministic)
    members = [common.new_member(args, device, i, "none" if checkpoint else args.weights)
               for i in range(count)]
    proxies, optimizers, schedulers = zip(*(
        recipe(args, member, len(train.classes), device, args.epochs, i)
        for i, member in enumerate(members)))
    plain = common.new_member(args, device)                     # the closing table's first row
    epoch = common.restore(checkpoint, members, proxies, optimizers, schedulers)
    if args.dry_run:
        args.warmup_epochs = args.benign_epochs = args.eps_ramp_epochs = args.plain_epochs = 0
    else:
        common.cache_images([train, test, test.gallery], args.cache_gb, args.workers)
        common.begin_run(args, args.method, device, checkpoint)
    if args.compile:
        for member in members:
            member.compile()
    print(f"{args.dataset}: {len(train)} training images of {len(train.classes)} classes, "
          f"{len(test)} of {len(test.classes)} to report on; {run_name(args)}, {count} x "
          f"{args.arch} on {device}; weights {args.weights}, BatchNorm statistics "
          f"{'frozen' if args.freeze_bn else 'live'}, {args.warmup_epochs} warm-up epochs")

    while epoch < args.epochs:
        epoch_started, seen, steps, totals = time.perf_counter(), 0, 0, {}
        ramp = float(epoch >= args.benign_epochs)
        if args.eps_ramp_epochs:
            ramp = min(max(epoch - args.benign_epochs, 0) / args.eps_ramp_epochs, 1)
        ball = ramp * args.eps, ramp * args.step_size, args.attack_steps if ramp else 0
        for i, (member, own) in enumerate(zip(members, proxies)):         # each as if alone
            seed_torch(args.seed, epoch, common.TRAIN + common.MEMBER * i)
            common.train_mode(member, args.freeze_bn)
            member.amp = args.amp
            member.backbone.requires_grad_(epoch >= args.warmup_epochs)
            method = args.members_method if args.method == "ensemble" else args.method
            batches = draw(epoch, i, pools[i])[:1 if args.dry_run else None]
            stream = load_batches(train, batches, args.seed, epoch, workers=args.workers,
                                  device=device)
            for images, labels, rows in common.progress(stream, f"epoch {epoch + 1}", len(batches)):
                if method == "natural":
                    loss, terms = natural(member, images, labels, own)
                elif method == "at":
                    loss, terms = at(member, images, labels, own, *ball, args.beta)
                elif method == "mixup":
                    loss, terms = mixup(member, images, labels, own,
                                        *draw_mixture(images, args.mixup_alpha), args.mixup_target)
                elif method == "iat":
                    loss, terms = iat(member, images, labels, own,
                                      *draw_mixture(images, args.mixup_alpha), *ball)
                elif method == "trades":
                    loss, terms = trades(member, images, labels, own, *ball,
                                         args.trades_lambda, args.trades_start)
                elif method == "est":
                    loss, terms = est(member, images, labels, args.source, *ball)
                else:
                    loss, terms = act(member, images, labels, args.source, *ball)
                optimizers[i].zero_grad(set_to_none=True)
                loss.backward()
                if own is not None:
                    nn.utils.clip_grad_value_([*member.parameters(), own], 10)
                optimizers[i].step()
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0) + value.detach()
                steps, seen = steps + 1, seen + len(rows)
        lr = optimizers[0].param_groups[0]["lr"]
        for scheduler in schedulers:
            scheduler.step()
        epoch += 1
        means = {name: float(total) / steps for name, total in totals.items()}
        collapse = common.mean_cosine(common.embed(members[-1:], [(images, labels, rows)])[0])
        common.check_finite(sum(means.values()) + collapse, epoch, out)
        seconds = time.perf_counter() - epoch_started
        record = {"epoch": epoch, **means, "lr": lr, "seconds": round(seconds, 3),
                  "images_per_second": round(seen / seconds, 1), "collapse": collapse}
        if args.dry_run:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(f"one batch of {tuple(images.shape)}: {shown}, {seconds:.2f} s, "
                  f"{common.peak_gb(device) or float('nan'):.2f} GB")
            break
        if args.eval_every and epoch % args.eval_every == 0:
            record |= common.quick_scores(common.closing_evaluation(args, members, test, device))
        common.log_epoch(args, record)
        common.save_checkpoint(args, method=args.method, epoch=epoch, members=members,
                               proxies=[] if triplets else proxies, optimizers=optimizers,
                               schedulers=schedulers, classes=train.classes)

    started = time.perf_counter()
    if args.dry_run:
        test = common.balanced_subset(test, max(args.batch_size, 2))
    undefended = None
    if args.method != "natural":                                # which would be that row itself
        train_plain(args, plain, train, device, draw)
        undefended = common.closing_evaluation(args, [plain], test, device, protocols)
    clean, robust, alerts = common.closing_evaluation(args, members, test, device, protocols)
    seconds = sum(line["seconds"] for line in common.read_log(out)) + time.perf_counter() - started
    variant = run_name(args).removeprefix(args.method).removeprefix("-")
    results = common.run_results(args, args.method, variant, epoch, clean, robust, alerts, seconds,
                                 device)
    if undefended:
        results["undefended"] = {"epochs": args.plain_epochs, "clean": undefended[0],
                                 "robust": undefended[1]}
    if not args.dry_run:
        common.write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    common.report(results, run_name(args), test, args, protocols)


def recipe(args, member, classes, device, epochs, i=0):
    """Proxies (triplets: None), optimiser and schedule of network i."""
    if args.method in TRIPLET:                                  # Zhou & Patel: Adam, constant lr
        optimizer = torch.optim.Adam(member.parameters(), lr=args.lr, foreach=True,
                                     weight_decay=args.weight_decay)
        return None, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    proxies = common.new_proxies(args, classes, device, i)
    optimizer = common.proxy_optimizer(args, member, proxies)
    return proxies, optimizer, common.drop_schedule(epochs, optimizer)


def train_plain(args, member, train, device, draw):
    """The closing table's undefended network: the same recipe without an attack."""
    proxies, optimizer, scheduler = recipe(args, member, len(train.classes), device,
                                           args.plain_epochs)
    for epoch in range(args.plain_epochs):
        seed_torch(args.seed, epoch, common.TRAIN)
        common.train_mode(member, args.freeze_bn)
        member.amp = args.amp
        member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        for images, labels, _ in load_batches(train, draw(epoch), args.seed, epoch,
                                              workers=args.workers, device=device):
            if proxies is None:
                loss, _ = est(member, images, labels, args.source, 0, 0, 0)     # plain triplets
            else:
                loss, _ = natural(member, images, labels, proxies)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if proxies is not None:
                nn.utils.clip_grad_value_([*member.parameters(), proxies], 10)
            optimizer.step()
        scheduler.step()


if __name__ == "__main__":
    common.run_script(parse_args, main)
