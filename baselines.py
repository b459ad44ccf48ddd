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
    mixup      w L(F(m), y) + (1 - w) L(F(m), y'), m = w x + (1 - w) x', w ~ Beta(1, 1)
    iat        half mixup of the images, half mixup of their x_adv, same pairs, same w
    trades     L(F(x), y) + lambda ||F(x_adv) - F(x)||^2
    fast       L(F(x_adv), y), x_adv one step up L
    fare       ||F(x_adv) - F_0(x)||^2, F_0 the network of --teacher, at which F starts
    est        triplet loss on x_adv, triplets mined among the F(x_adv)
    act        triplet loss of a clean anchor, p_adv and n_adv, which were pushed together

--members N trains N networks, each as if alone, and they vote: the naive ensemble of Ke (arXiv
2501.01025, "EAT paper" below) is at with three. The first five are his comparison, adapted from
Madry et al. 2018 (at), Zhang et al. 2018 (mixup), Lamb et al. 2019 (iat) and Zhang et al. 2019
(trades). fast (Wong et al., ICLR 2020) and fare (Schlarmann et al., ICML 2024) are carried over by
us. The last two are the comparison of Zhou & Patel (CVPR 2022): Zhou et al., ECCV 2020 (est) and
arXiv 2106.03614 (act). Departures from the papers: docs/baselines.md.
"""

import argparse
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

import common
from common import (
    UserError,
    epoch_batches,
    euclidean,
    frozen,
    mine_pairs,
    pair_batches,
    pgd,
    proxy_anchor_loss,
    shift_objective,
    triplet_loss,
)

# ---- method
#
# Every method: (model, images (B, 3, S, S) in [0, 1], labels (B,), proxies (C, D), ball = (eps,
# step size, steps), ...) -> (loss, {term of the log: value}). Triplet methods have no proxies.


def natural(model, images, labels, proxies, ball):
    """L(F(x), y): no defense."""
    loss = proxy_anchor_loss(model(images), labels, proxies)
    return loss, {"clean": loss}


def shift_attack(model, images, ball, start=None):
    """x_adv: as far from F(x) as possible, 1 - cos; starts at `start` or uniformly in the ball."""
    with frozen(model):
        with torch.no_grad():
            clean = model(images)
        return pgd(shift_objective([model], [clean]), images, *ball, start=start)


def label_attack(model, images, labels, proxies, ball):
    """x_adv: raises Proxy Anchor with the true labels; starts uniformly in the ball."""
    with frozen(model):
        points = proxies.detach()
        return pgd(lambda x: proxy_anchor_loss(model(x), labels, points), images, *ball)


def at(model, images, labels, proxies, ball, beta=0.5, attack_loss="shift"):
    """beta L(F(x), y) + (1 - beta) L(F(x_adv), y); EAT paper, Eq. (4), which prints beta = 0.

    attack_loss: "shift" moves F(x_adv) away from F(x), "label" raises L(F(x_adv), y).
    """
    if attack_loss == "label":
        adversarial = label_attack(model, images, labels, proxies, ball)
    else:
        adversarial = shift_attack(model, images, ball)
    clean = proxy_anchor_loss(model(images), labels, proxies)
    robust = proxy_anchor_loss(model(adversarial), labels, proxies)
    return beta * clean + (1 - beta) * robust, {"clean": clean, "adversarial": robust}


def draw_mixture(images):
    """w ~ Beta(1, 1), one a batch, and every image's partner (B,)."""
    weight = float(torch.distributions.Beta(1.0, 1.0).sample())
    return weight, torch.randperm(len(images)).to(images.device, non_blocking=True)


def mixed_loss(model, images, labels, proxies, weight, order, target):
    """w L(F(m), y) + (1 - w) L(F(m), y'), m = w x + (1 - w) x', x' = x[order]; EAT paper, Eq. (6).

    target "label": a class's label vector is its proxy, so L mixes. "embedding", the paper's text:
    L with the rows w F(x) + (1 - w) F(x') as proxies, each image the positive of its own.
    """
    embeddings = model(weight * images + (1 - weight) * images[order])
    if target == "label":
        return (weight * proxy_anchor_loss(embeddings, labels, proxies)
                + (1 - weight) * proxy_anchor_loss(embeddings, labels[order], proxies))
    clean, itself = model(images), torch.arange(len(images), device=images.device)
    return proxy_anchor_loss(embeddings, itself, weight * clean + (1 - weight) * clean[order])


def mixup(model, images, labels, proxies, ball, mixup_target="label"):
    """mixed_loss of the images; EAT paper, Eq. (6)."""
    loss = mixed_loss(model, images, labels, proxies, *draw_mixture(images), mixup_target)
    return loss, {"mixed": loss}


def iat(model, images, labels, proxies, ball, mixup_target="label"):
    """Half mixup of the images, half mixup of their x_adv, same pairs and w; EAT paper, Eq. (7)."""
    mixture = draw_mixture(images)
    adversarial = shift_attack(model, images, ball)
    clean = mixed_loss(model, images, labels, proxies, *mixture, mixup_target)
    robust = mixed_loss(model, adversarial, labels, proxies, *mixture, mixup_target)
    return (clean + robust) / 2, {"mixed": clean, "mixed_adversarial": robust}


def trades(model, images, labels, proxies, ball, trades_lambda=6.0):
    """L(F(x), y) + lambda mean ||F(x_adv) - F(x)||^2; EAT paper, Eq. (8).

    The gradient goes through both embeddings. The attack starts at the image plus noise of standard
    deviation 0.001, as the authors of TRADES do.
    """
    noise = torch.randn(images.shape, device=images.device)      # faster than randn_like on CPUs
    adversarial = shift_attack(model, images, ball, images + 0.001 * noise)
    embeddings = model(images)
    clean = proxy_anchor_loss(embeddings, labels, proxies)
    shift = (model(adversarial) - embeddings).square().sum(1).mean()
    return clean + trades_lambda * shift, {"clean": clean, "shift": shift}


def fast(model, images, labels, proxies, ball):
    """L(F(x_adv), y), x_adv by label_attack with one step of 1.25 eps; Wong et al., ICLR 2020."""
    adversarial = label_attack(model, images, labels, proxies, ball)
    loss = proxy_anchor_loss(model(adversarial), labels, proxies)
    return loss, {"adversarial": loss}


def fare(model, images, labels, proxies, ball, teacher):
    """mean ||F(x_adv) - F_0(x)||^2, F_0 the teacher, no labels; Schlarmann et al., ICML 2024."""
    with frozen(model, teacher):
        goal = teacher(images)
        adversarial = pgd(lambda x: (model(x) - goal).square().sum(1), images, *ball)
    loss = (model(adversarial) - goal).square().sum(1).mean()
    return loss, {"distance": loss}


# est and act see pairs: rows 2i and 2i + 1 are of one class; anchors are the even rows.

def est(model, images, labels, proxies, ball, source="random"):
    """max(0, d(a_adv, p_adv) - d(a_adv, n_adv) + 0.2); Zhou et al., ECCV 2020.

    Every image moves away from its own F(x); triplets are mined among the moved embeddings. The
    start is noise of 1e-3 eps, because at x there is no gradient and a uniform start costs reach.
    """
    noise = 1e-3 * ball[0] * (2 * torch.rand_like(images) - 1)
    embeddings = model(shift_attack(model, images, ball, images + noise))
    a, p, n = mine_pairs(embeddings, labels, source)
    loss = triplet_loss(embeddings[a], embeddings[p], embeddings[n])
    return loss, {"adversarial": loss}


def act(model, images, labels, proxies, ball, source="random"):
    """max(0, d(a, p_adv) - d(a, n_adv) + 0.2); Zhou et al., arXiv 2106.03614.

    Triplets are mined among the clean embeddings, then p and n are moved together to minimise
    d(p_adv, n_adv), from zero. The anchor stays clean.
    """
    with frozen(model):
        with torch.no_grad():
            a, p, n = mine_pairs(model(images), labels, source)
        adversarial = pgd(lambda x: -euclidean(*model(x).chunk(2)), images[torch.cat([p, n])],
                          *ball, random_start=False)
    positive, negative = model(adversarial).chunk(2)
    loss = triplet_loss(model(images[a]), positive, negative)
    return loss, {"adversarial": loss}


# ---- command line

METHODS = {step.__name__: step for step in (natural, at, mixup, iat, trades, fast, fare, est, act)}
PAIRS = ("est", "act")                                        # the others but fare: Proxy Anchor
# The flags of a method: passed to it, refused elsewhere.
OPTIONS = {"at": ("beta", "attack_loss"), "mixup": ("mixup_target",), "iat": ("mixup_target",),
           "trades": ("trades_lambda",), "fare": ("teacher",), "est": ("source",),
           "act": ("source",)}
# In eps; see common.warn_reach. fast begins anywhere in the ball, and yet has one step.
REACH = {"at": 2, "iat": 2, "trades": 1, "fast": 1, "fare": 2, "est": 1, "act": 1}
# base_parser's defaults are the recipe of the first five; this is Zhou & Patel's.
TRIPLET_RECIPE = dict(arch="resnet18", embedding_dim=512, crop="square", epochs=75, batch_size=112,
                      warmup_epochs=0, lr=1e-5, weight_decay=4e-4, eps=8 / 255, step_size=1 / 255,
                      attack_steps=8)
# For generated data, on a CPU: eat.py's, and more epochs for triplets, which start slowly.
SMALL = dict(arch="convnet", image_size=32, embedding_dim=64, epochs=12, batch_size=30, lr=2e-3,
             eps=8 / 255, step_size=4 / 255, attack_steps=4, eps_ramp=[0, 4])
SMALL_TRIPLET = SMALL | dict(epochs=20, lr=1e-3, eps_ramp=[10, 4])
ONE_STEP = dict(attack_steps=1, step_size=None, eps_ramp=None)    # they follow --eps, --epochs
SMALL_FAST = SMALL | dict(epochs=54, lr=4e-3) | ONE_STEP
# fare starts at a trained network: no warm-up, no ramp, a lower rate, frozen BatchNorm statistics.
TRAINED = dict(weights="teacher", warmup_epochs=0, lr=1e-5)
RECIPES = {"fast": (ONE_STEP, SMALL_FAST), "fare": (TRAINED, SMALL | dict(eps_ramp=[0, 0])),
           "est": (TRIPLET_RECIPE, SMALL_TRIPLET), "act": (TRIPLET_RECIPE, SMALL_TRIPLET)}


def parse_args(argv=None):
    chosen = common.Parser(add_help=False)                    # --method decides the defaults
    chosen.add_argument("--method", default="natural")
    recipe, small = RECIPES.get(chosen.parse_known_args(argv)[0].method, ({}, SMALL))
    parser = common.base_parser(__doc__)
    parser.set_defaults(**recipe)
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=tuple(METHODS), default="natural")
    method.add_argument("--beta", type=common.number(float, 0, 1), default=0.5,
                        help="at: weight of the clean term; 0 is Eq. (4) as printed")
    method.add_argument("--attack-loss", choices=("shift", "label"), default="shift",
                        help="at: what the attack maximises")
    method.add_argument("--mixup-target", choices=("label", "embedding"), default="label",
                        help="mixup, iat: embedding is the paper's own, without labels")
    method.add_argument("--trades-lambda", type=common.number(float, 0), default=6.0, metavar="L",
                        help="trades: weight of the shift; 1 is closer to the EAT paper's table")
    method.add_argument("--source", default="random", help="est, act: how triplets are mined",
                        choices=("random", "semihard", "softhard", "distance", "hardest"))
    method.add_argument("--teacher", metavar="RUN",
                        help="fare: a run's folder or last.pt; training starts at its networks")
    method.add_argument("--members", type=common.number(int, 1), default=1, metavar="N",
                        help="networks, trained one by one; they vote")
    method.add_argument("--split", action=argparse.BooleanOptionalAction, default=False,
                        help="network i never trains on part i of the images")
    args = common.parse_run(parser, argv, small)
    args.step_size = 1.25 * args.eps if args.step_size is None else args.step_size
    args.eps_ramp = args.eps_ramp or [0, 3 * args.epochs // 4]
    for name in {option for options in OPTIONS.values() for option in options}:
        owners = [owner for owner, options in OPTIONS.items() if name in options]
        if args.method not in owners and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} belongs to --method {', '.join(owners)}, "
                         f"not to {args.method}: drop it")
    if args.method == "fare" and args.weights != "teacher":
        parser.error("--method fare starts at the networks of --teacher: drop --weights")
    if args.split and args.members == 1:
        parser.error("--members 1 has nothing to split: drop --split")
    if args.method in PAIRS and (args.members > 1 or args.images_per_class or args.batch_size % 2):
        parser.error(f"{args.method} trains one network on pairs of one class: give an even "
                     f"--batch-size, and drop --members and --images-per-class")
    return args


def run_name(args):
    """The method with its variant, where that is not the default."""
    words = [(args.members != 1, f"x{args.members}"), (args.split, "split"),
             (args.beta != 0.5, f"beta{args.beta:g}"),
             (args.attack_loss != "shift", args.attack_loss),
             (args.mixup_target != "label", args.mixup_target),
             (args.trades_lambda != 6, f"lambda{args.trades_lambda:g}"),
             (args.source != "random", args.source)]
    return "-".join([args.method, *(word for changed, word in words if changed)])


# ---- training

def load_teacher(args):
    """(checkpoint of --teacher, which must fit the run, hash of its file); makes no folder."""
    if not args.teacher:
        raise UserError("--method fare starts at trained networks: give their run, --teacher RUN")
    content, path = common.load_checkpoint(args.teacher), Path(args.teacher)
    if args.out and Path(args.out).resolve() in (path.resolve(), path.resolve().parent):
        raise UserError(f"--out {args.out} is the teacher's own folder: give another")
    flags = {**content["args"], "members": len(content["members"])}
    for name in ("arch", "embedding_dim", "image_size", "crop", "dataset", "val_classes", "members",
                 *["seed"] * (args.dataset in common.GENERATED)):
        if flags.get(name) != getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} does not fit the "
                            f"teacher {path}, which has {flags.get(name)}: give that, or another")
    if common.load_run_data(args)[0].census != content["classes"]:
        raise UserError(f"the teacher {path} was trained on other classes or images: restore them")
    path = path / "last.pt" if path.is_dir() else path
    return content, sha256(path.read_bytes()).hexdigest()


def main(args):
    if args.method in REACH:
        common.warn_reach(args, REACH[args.method])
    else:
        print(f"note: {args.method} has no attack in training: --eps and its like change nothing")
    teacher, digest = load_teacher(args) if args.method == "fare" else (None, None)
    run = common.Run(args, args.method, run_name(args))
    labels, triplets = run.train.labels, args.method in PAIRS
    if triplets and (labels.bincount() > 1).sum() < 2:
        raise UserError(f"{args.dataset} has fewer than 2 training classes with two images, and "
                        f"triplets need them: give other data, or lower --val-classes")
    options = [{"teacher": network} for network in common.load_model(teacher, run.device)] \
        if teacher else [{name: getattr(args, name) for name in OPTIONS.get(args.method, ())}] \
        * args.members
    part = common.split_by_image(labels, args.members, args.seed)
    members = common.load_model(teacher, run.device) if teacher else \
        [run.network(i) for i in range(args.members)]
    proxies = [None if triplets or teacher else run.proxies(i) for i in range(args.members)]
    adam = torch.optim.Adam if triplets else torch.optim.AdamW
    optimizers = [run.adamw(member, points) if points is not None else adam(
        member.parameters(), args.lr, weight_decay=args.weight_decay, foreach=True)
        for member, points in zip(members, proxies)]
    run.restore(members, optimizers, [points for points in proxies if points is not None])
    if teacher and run.state.setdefault("teacher", digest) != digest:
        raise UserError(f"the teacher {args.teacher} has changed since this run began: restore it")

    networks = [*zip(members, proxies, optimizers, options)]
    for epoch in run.epochs():
        eps, step_size = run.ball(epoch)
        ball = eps, step_size, args.attack_steps if eps else 0
        run.set_lr(1 if triplets else common.two_drops(epoch, args.epochs))
        for i, (member, points, optimizer, more) in enumerate(networks):
            common.seed_torch(args.seed, epoch, common.TRAIN + common.MEMBER * i)   # as if alone
            pool = (part != i).nonzero()[:, 0] if args.split else None
            batches = pair_batches(labels, args.batch_size, args.seed, epoch) if triplets else \
                epoch_batches(args, labels, epoch, pool=pool, member=i)
            for images, y, rows in run.batches(batches):
                y = labels[rows] if triplets else y          # mining reads them: on the CPU
                loss, terms = METHODS[args.method](member, images, y, points, ball, **more)
                optimizer.zero_grad()
                loss.backward()
                if points is not None:
                    nn.utils.clip_grad_value_([*member.parameters(), points], 10)
                optimizer.step()
                run.note(**terms)
    run.finish("clustering", *["template"] * triplets)


if __name__ == "__main__":
    common.run_script(parse_args, main)
