# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""EAT: ensemble adversarial training for deep metric learning (Ke, arXiv 2501.01025).

    python eat.py                                     # the built-in glyphs, 2 CPU cores: 2 minutes
    python eat.py --dataset cub --arch mobilenetv2    # the paper's setting

N models see different images, defend against one attack on all of them, and vote. (Tramer et al.,
ICLR 2018, use the same name for training on examples of other, static networks.)

Algorithm 1, line by line, for one mini-batch (the paper's "ep"):

    l. 2     D split at random into D^1 ... D^N; member i never     common.split_by_image
             trains on D^i                                          (--no-split: all train on D)
    l. 4     member i draws a mini-batch from D \\ D^i              common.epoch_batches, `sees`
    l. 5-7   x_adv: T steps from x, against all members as they     attack, pgd: once per image,
             were after the previous step, Eq. (10)                 whoever trains on it
    l. 6, 8  beta L(F_i(x), y) + (1 - beta) L(F_i(x_adv), y)        member_loss
    l. 9     a step of member i's own optimiser                     optimizers[i].step()
    output   the label that most members' neighbours carry          common.vote_labels

Symbols: N --members, beta --beta, epsilon --eps, T --attack-steps, alpha --step-size; L is Proxy
Anchor with proxies of each member's own. Departures from the paper: docs/eat.md.
Logged: clean and adversarial, the two Proxy Anchor terms, mean over members; lr; seconds; images
per second; collapse, the mean cosine of different images of the last batch, first member (1:
collapsed).
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, frozen, load_batches, pgd, proxy_anchor_loss, seed_torch

# ---- method

def attack(members, proxies, images, labels, loss, eps, step_size, steps):
    """x_adv (B, 3, S, S): what hurts the members together most, Eq. (10); uniform start.

    loss, the reading of L(F(x_adv), F(x)): "shift" is the distance of the embeddings. The others
    are Proxy Anchor: "pal-label" with the true label, "pal-pseudo" with the proxy nearest to F(x)
    as label, "pal-batch" with the batch's F(x) as proxies, each image the positive of its own.
    """
    with frozen(*members):
        with torch.no_grad():
            clean = [member(images) for member in members]
        if loss == "shift":
            objective = common.shift_objective(members, clean)
        elif loss == "pal-label":
            objective = pal_objective(members, [labels] * len(members), proxies)
        elif loss == "pal-pseudo":
            nearest = [(embeddings @ F.normalize(own, dim=1).T).argmax(1)
                       for embeddings, own in zip(clean, proxies)]
            objective = pal_objective(members, nearest, proxies)
        else:
            itself = torch.arange(len(images), device=images.device)
            objective = pal_objective(members, [itself] * len(members), clean)
        return pgd(objective, images, eps, step_size, steps)


def pal_objective(members, targets, proxies):
    """sum_i of member i's Proxy Anchor; one value a batch, because its images are coupled."""
    return lambda images: sum(proxy_anchor_loss(member(images), target, own.detach())
                              for member, target, own in zip(members, targets, proxies)).view(1)


def member_loss(member, proxies, images, adversarial, labels, beta):
    """beta L(F(x), y) + (1 - beta) L(F(x_adv), y), l. 6 and 8 -> (loss, clean term, adversarial).

    Two forward passes: BatchNorm, where it is live, sees clean and adversarial images apart.
    """
    clean = proxy_anchor_loss(member(images), labels, proxies)
    robust = proxy_anchor_loss(member(adversarial), labels, proxies)
    return beta * clean + (1 - beta) * robust, clean.detach(), robust.detach()


# ---- command line

# For generated data, on a CPU.
SMALL = dict(arch="convnet", pool="avgmax", image_size=32, embedding_dim=64, epochs=12,
             batch_size=30, lr=2e-3, eps=8 / 255, step_size=2 / 255, attack_steps=4,
             eps_ramp_epochs=4, plain_epochs=12)


def parse_args(argv=None):
    parser = common.base_parser(__doc__)
    method = parser.add_argument_group("method")
    method.add_argument("--members", type=common.number(int, 1), default=3, help="N, networks")
    method.add_argument("--split", action=argparse.BooleanOptionalAction, default=True,
                        help="member i never trains on part i of the images")
    method.add_argument("--beta", type=common.number(float, 0, 1), default=0.5,
                        help="weight of the clean term; the adversarial one has 1 - beta")
    method.add_argument("--attack-loss", choices=("shift", "pal-pseudo", "pal-label", "pal-batch"),
                        default="shift", help="what the inner maximisation maximises")
    method.add_argument("--eps-ramp-epochs", type=common.number(int, 0), default=0,
                        help="let --eps and --step-size grow from 0 over the first epochs (not in "
                             "the paper; short runs and small networks need it)")
    method.add_argument("--own-batches", action="store_true",
                        help="Algorithm 1 to the letter: every member draws and attacks a batch of "
                             "its own (N times the attacks)")
    method.add_argument("--plain-epochs", type=common.number(int, 0), default=0,
                        help="closing table: train an undefended member for so long (0: show the "
                             "starting weights)")
    args = common.parse_run(parser, argv, run_name, SMALL, ("eat",))
    if args.split and args.members == 1:
        parser.error("--members 1 has nothing to split: add --no-split")
    if args.images_per_class > args.batch_size:
        parser.error(f"--images-per-class {args.images_per_class} is more than --batch-size "
                     f"{args.batch_size}: lower it")
    return args


def run_name(args):
    """The method with its variant, where that is not the default."""
    return ("eat" + ("" if args.split else "-nosplit")
            + ("" if args.beta == 0.5 else f"-beta{args.beta:g}")
            + ("" if args.attack_loss == "shift" else f"-{args.attack_loss}")
            + ("-ownbatches" if args.own_batches else ""))


# ---- training

def main(args):
    train, test = common.load_run_data(args)
    if args.split and args.members > len(train):
        raise UserError(f"--members {args.members} is more than the {len(train)} training images: "
                        f"lower it")
    checkpoint = common.claim_folder(args)
    common.check_same_classes(checkpoint, train)
    out = Path(args.out)
    if checkpoint and checkpoint["epoch"] == args.epochs and (out / "results.json").exists():
        print(f"{out} is complete:")
        return common.report(common.read_json(out / "results.json"), run_name(args), test, args)

    count = args.members
    # One shared batch a step, drawn so large that a member sees batch_size of it; with
    # --own-batches one batch per member, out of the images it trains on.
    part = common.split_by_image(train.labels, count if args.split else 1, args.seed)     # l. 2
    sees = [(part != i) if args.split else torch.ones(len(train), dtype=torch.bool)
            for i in range(count)]
    drawn = args.batch_size
    if args.split and not args.own_batches:
        drawn = min(round(args.batch_size * count / (count - 1)), len(train))
    pools = [torch.arange(len(train))]
    if args.own_batches:
        pools = [rows.nonzero()[:, 0] for rows in sees]

    def draw(epoch):
        return [common.epoch_batches(args, train.labels, epoch, batch_size=drawn, pool=pool,
                                     member=i) for i, pool in enumerate(pools)]

    draw(0)                                                     # an impossible batch fails here

    device = common.pick_device(args.device, args.deterministic)
    members = [common.new_member(args, device, i, "none" if checkpoint else args.weights)
               for i in range(count)]
    proxies = [common.new_proxies(args, len(train.classes), device, i) for i in range(count)]
    optimizers = [common.proxy_optimizer(args, *pair) for pair in zip(members, proxies)]
    schedulers = [common.drop_schedule(args.epochs, optimizer) for optimizer in optimizers]
    plain = common.new_member(args, device)    # the closing table's first row; begins as member 1
    epoch = common.restore(checkpoint, members, proxies, optimizers, schedulers)
    if args.dry_run:
        args.warmup_epochs = args.eps_ramp_epochs = args.plain_epochs = 0   # measure a full step
    else:
        common.cache_images([train, test, test.gallery], args.cache_gb, args.workers)
        common.begin_run(args, "eat", device, checkpoint)
    if args.compile:
        for member in members:
            member.compile()
    print(f"{args.dataset}: {len(train)} training images of {len(train.classes)} classes, "
          f"{len(test)} of {len(test.classes)} to report on; {count} x {args.arch} on {device}; "
          f"weights {args.weights}, BatchNorm statistics "
          f"{'frozen' if args.freeze_bn else 'live'}, {args.warmup_epochs} warm-up epochs")

    while epoch < args.epochs:
        seed_torch(args.seed, epoch, common.TRAIN)
        ramp = min(epoch / args.eps_ramp_epochs, 1) if args.eps_ramp_epochs else 1
        epoch_started, seen = time.perf_counter(), 0
        totals, updates = torch.zeros(2, device=device), 0
        for member in members:
            common.train_mode(member, args.freeze_bn)
            member.amp = args.amp
            member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        drawn_batches = draw(epoch)
        steps = 1 if args.dry_run else min(len(batches) for batches in drawn_batches)
        streams = [load_batches(train, batches[:steps], args.seed, epoch, workers=args.workers,
                                device=device) for batches in drawn_batches]
        for step in common.progress(zip(*streams), f"epoch {epoch + 1}", steps):
            # l. 5-7
            crafted = [attack(members, proxies, images, labels, args.attack_loss, ramp * args.eps,
                              ramp * args.step_size, args.attack_steps if ramp else 0)
                       for images, labels, _ in step]
            for i in range(count):
                stream = i if args.own_batches else 0
                (images, labels, rows), adversarial = step[stream], crafted[stream]
                kept = sees[i][rows].nonzero()[:, 0]      # l. 4; on the CPU: no GPU sync
                if len(kept) == 0:
                    continue                                    # the batch lies wholly in part i
                loss, clean, robust = member_loss(members[i], proxies[i], images[kept],   # l. 6, 8
                                                  adversarial[kept], labels[kept], args.beta)
                optimizers[i].zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_value_([*members[i].parameters(), proxies[i]], 10)
                optimizers[i].step()                                # l. 9
                totals, updates = totals + torch.stack([clean, robust]), updates + 1
            seen += sum(len(images) for images, _, _ in step)
        lr = optimizers[0].param_groups[0]["lr"]
        for scheduler in schedulers:
            scheduler.step()
        epoch += 1
        clean_loss, robust_loss = (totals / max(updates, 1)).tolist()
        collapse = common.mean_cosine(common.embed(members[:1], [step[0]])[0])
        common.check_finite(clean_loss + robust_loss + collapse, epoch, out)
        seconds = time.perf_counter() - epoch_started
        record = {"epoch": epoch, "clean": clean_loss, "adversarial": robust_loss, "lr": lr,
                  "seconds": round(seconds, 3),
                  "images_per_second": round(seen / seconds, 1), "collapse": collapse}
        if args.dry_run:
            print(f"one batch of {tuple(step[0][0].shape)}: clean {clean_loss:.3f}, "
                  f"adversarial {robust_loss:.3f}, {seconds:.2f} s, "
                  f"{common.peak_gb(device) or float('nan'):.2f} GB")
            break
        if args.eval_every and epoch % args.eval_every == 0:
            record |= common.quick_scores(
                common.closing_evaluation(args, members, test, device))
        common.log_epoch(args, record)
        common.save_checkpoint(args, method="eat", epoch=epoch, members=members, proxies=proxies,
                               optimizers=optimizers, schedulers=schedulers, classes=train.classes)

    started = time.perf_counter()
    if args.dry_run:
        test = common.balanced_subset(test, max(args.batch_size, 2))
    train_plain(args, plain, train, device)
    undefended = common.closing_evaluation(args, [plain], test, device)
    clean, robust, alerts = common.closing_evaluation(args, members, test, device)
    seconds = sum(line["seconds"] for line in common.read_log(out)) + time.perf_counter() - started
    variant = run_name(args).removeprefix("eat").removeprefix("-")
    results = common.run_results(args, "eat", variant, epoch, clean, robust, alerts, seconds,
                                 device)
    results["undefended"] = {"epochs": args.plain_epochs, "clean": undefended[0],
                             "robust": undefended[1]}
    if not args.dry_run:
        common.write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    common.report(results, run_name(args), test, args)


def train_plain(args, member, train, device):
    """The closing table's undefended member: Proxy Anchor alone, the same recipe otherwise."""
    proxies = common.new_proxies(args, len(train.classes), device)
    optimizer = common.proxy_optimizer(args, member, proxies)
    scheduler = common.drop_schedule(args.plain_epochs, optimizer)
    for epoch in range(args.plain_epochs):
        common.train_mode(member, args.freeze_bn)
        member.amp = args.amp
        member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        batches = common.epoch_batches(args, train.labels, epoch, batch_size=args.batch_size,
                                       pool=torch.arange(len(train)))
        for images, labels, _ in load_batches(train, batches, args.seed, epoch,
                                              workers=args.workers, device=device):
            loss = proxy_anchor_loss(member(images), labels, proxies)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_value_([*member.parameters(), proxies], 10)
            optimizer.step()
        scheduler.step()


if __name__ == "__main__":
    common.run_script(parse_args, main)
