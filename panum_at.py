# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""Robust contrastive and triplet training for deep metric learning (Panum et al.).

    python panum_at.py                                   # built-in glyphs, 2 CPU cores
    python panum_at.py --loss triplet --dataset cub      # the paper's setting
    python panum_at.py --dataset gaussian                # its Appendix E

P. below is "Adversarial Deep Metric Learning", ICLR 2021 submission, later arXiv 2102.07265. F(x)
is the unit embedding, d the Euclidean distance, z an image with |z - x|_inf <= eps. A step on a
batch of 56 classes x 2 images:

    1  every image is an anchor a and gets, among the clean        common.mine_triplets
       embeddings, a positive p and a negative n
    2  a tuple is attacked with probability --attack-rate          gamma, P. Sec. 3.5
    3  one image of it moves away from its clean partner of        attack
       the same class, or towards that of another class
    4  the moved images join the batch and take their place in     robust_loss
       the tuples: one forward pass, one loss

Which image moves (--perturb, P. Appendix F). The contrastive loss reads a triplet as two pairs:

    --perturb       positive            negative            anchor
    triplet         p away from a       n towards a         a away from p and towards n
    contrastive     p of (a, p)         n of (a, n)         a of every pair for itself,
                    away from a         towards a           away from p or towards n

--formulation 3.5 is that, P. Sec. 3.5. 2 moves the x_i of P.'s second formulation, the anchor. 3
regularises: the clean loss + lambda max d(z, a). Departures from the paper: docs/panum_at.md.
Logged: loss; clean, that of the same tuples before the attack, in evaluation mode; attacked, the
share of the tuples that could be and were; lr; seconds; images per second; collapse, the mean
cosine of two rows of the last batch (1: collapsed).
"""

import json
import time
from pathlib import Path

import torch

import common
from common import (
    UserError,
    contrastive_loss,
    euclidean,
    frozen,
    load_batches,
    mine_triplets,
    pgd,
    seed_torch,
    triplet_loss,
)

# ---- method

def attack(model, images, terms, eps, step_size, steps, random_start=True):
    """x + rho (T, 3, S, S): images moved so that sum_k sign_k d(F(x'), y_k) grows; Eq. (14)-(16).

    terms: [(sign (T,), y (T, D))]; 1 moves away from the fixed embedding y, -1 towards it.
    FGSM is one step of size eps without the random start.
    """
    def objective(x):
        embeddings = model(x)
        return sum(sign * euclidean(embeddings, y) for sign, y in terms)

    with frozen(model):
        return pgd(objective, images, eps, step_size, steps, random_start)


def tuple_loss(embeddings, tuples, same, reduction="nonzero", squared=False):
    """Triplet loss of the rows (a, p, n), or contrastive loss of the rows (x, y) with same (T,)."""
    rows = [embeddings[index] for index in tuples]
    if same is None:
        return triplet_loss(*rows, squared=squared, reduction=reduction)
    return contrastive_loss(*rows, same, reduction=reduction)


def who_moves(a, p, n, loss, perturb):
    """P. Appendix F, the table above -> (tuples, same, moved, terms, possible).

    tuples: the columns of the loss, rows (T,) of the batch; same: which pairs are positive, None
    for triplets; moved: the column that is attacked; terms: [(sign, rows)] for `attack`; possible:
    bool (T,) on the CPU, False where a tuple is never attacked.
    """
    one = torch.ones_like(a)
    # The column that moves, and (1: away from, -1: towards; the rows of the fixed embeddings).
    if loss == "triplet":
        moved, terms = {"anchor": (0, [(one, p), (-one, n)]), "positive": (1, [(one, a)]),
                        "negative": (2, [(-one, a)])}[perturb]
        return [a, p, n], None, moved, terms, torch.ones(len(a), dtype=torch.bool)
    first, second = a.repeat(2), torch.cat([p, n])            # T positive pairs, T negative ones
    positive = torch.arange(2 * len(a)) < len(a)
    possible = {"anchor": torch.ones_like(positive), "positive": positive, "negative": ~positive}
    moved, partner = (0, second) if perturb == "anchor" else (1, first)
    terms = [(torch.cat([one, -one]), partner)]
    return [first, second], positive.to(a.device), moved, terms, possible[perturb]


def robust_loss(model, images, labels, gamma, ball, *, loss="contrastive", perturb="positive",
                reg_weight=None, reduction="nonzero", squared=False, cutoffs=(0.5, 1.4)):
    """One step on images (B, 3, S, S) and labels (B,) -> (loss, {logged term: value}).

    gamma(T): which of T tuples are attacked, bool, on the CPU. ball: eps, step_size, steps and
    random_start of `attack`. reg_weight: lambda of formulation 3; then the anchors are attacked,
    away from themselves, and the tuples stay clean. Mining and attack see the evaluation mode.
    Numbers in the code are the steps at the top of this file.
    """
    with frozen(model), torch.no_grad():
        clean = model(images)
    a, p, n = mine_triplets(clean, labels, "distance", cutoffs=cutoffs)             # 1
    tuples, same, moved, terms, possible = who_moves(a, p, n, loss, perturb)
    before = tuple_loss(clean, tuples, same, reduction, squared)
    attacked = tuples[moved]
    if reg_weight is not None:
        attacked, terms = a, [(torch.ones_like(a), a)]
        possible = torch.ones(len(a), dtype=torch.bool)

    hit = (gamma(len(possible)) & possible).nonzero()[:, 0].to(images.device)       # 2
    added = torch.arange(len(images), len(images) + len(hit), device=images.device)
    if len(hit):
        fixed = [(sign[hit], clean[rows[hit]]) for sign, rows in terms]
        images = torch.cat([images, attack(model, images[attacked[hit]], fixed, *ball)])        # 3
    embeddings = model(images)                                                      # 4
    if reg_weight is None:
        tuples[moved] = attacked.index_copy(0, hit, added)
    value = tuple_loss(embeddings, tuples, same, reduction, squared)
    if reg_weight is not None:
        shift = euclidean(embeddings[added], embeddings[attacked[hit]])
        value = value + reg_weight * shift.sum() / max(len(a), 1)
    share = len(hit) / max(int(possible.sum()), 1)
    return value, {"loss": value, "clean": before, "attacked": share}


# ---- command line

RECIPE = dict(arch="resnet50", epochs=150, warmup_epochs=0, batch_size=112, images_per_class=2,
              lr=1e-5, weight_decay=4e-4, eps=0.01, step_size=None, attack_steps=5, eval_eps=0.01,
              eval_step_size=0.004, eval_steps=5)
CROP_SCALE = (0.6, 1.0)                                       # of RandomResizedCrop
PROTOCOLS = ("template",)                                     # of the closing evaluation
# For generated data, on a CPU. From a random start the contrastive loss is slow to leave 1.
SMALL = dict(arch="convnet", pool="avgmax", image_size=32, embedding_dim=64, epochs=26,
             batch_size=28, images_per_class=4, lr=5e-4, eps=8 / 255, benign_epochs=14,
             eps_ramp_epochs=4, plain_epochs=26, eval_eps=8 / 255, eval_step_size=2 / 255,
             eval_steps=10)
SMALL_TRIPLET = SMALL | dict(epochs=20, images_per_class=2, lr=1e-3, benign_epochs=8,
                             plain_epochs=20)
GAUSSIAN = dict(arch="convnet", image_size=32, embedding_dim=2, epochs=25, batch_size=32,
                images_per_class=16, lr=1e-3, plain_epochs=25)


def cutoff(text):
    """A distance on the unit sphere; "none": no cutoff."""
    return None if text == "none" else common.number(float, 0, 2)(text)


def parse_args(argv=None):
    chosen = common.Parser(add_help=False)                    # these two decide the defaults
    chosen.add_argument("--dataset", default="glyphs")
    chosen.add_argument("--loss", default="contrastive")
    dataset, loss = vars(chosen.parse_known_args(argv)[0]).values()
    small = SMALL_TRIPLET if loss == "triplet" else SMALL
    parser = common.base_parser(__doc__)
    parser.set_defaults(**RECIPE)
    if dataset == "sop":
        parser.set_defaults(epochs=100)
    method = parser.add_argument_group("method")
    method.add_argument("--loss", choices=("contrastive", "triplet"), default="contrastive")
    method.add_argument("--attack-rate", type=common.number(float, 0, 1), default=0.5,
                        help="probability that a tuple is attacked; 0: natural training")
    method.add_argument("--perturb", choices=("positive", "negative", "anchor"), default=None,
                        help="which image of a tuple moves (default: positive)")
    method.add_argument("--formulation", choices=("3.5", "2", "3"), default="3.5",
                        help="of the paper: its Sec. 3.5; the second (= --perturb anchor); the "
                             "third, a regulariser")
    method.add_argument("--reg-weight", type=common.number(float, 0), default=1.0,
                        help="formulation 3: weight lambda of d(z, x), for the share "
                             "--attack-rate of the anchors")
    method.add_argument("--attack", choices=("pgd", "fgsm"), default="pgd",
                        help="of the training; fgsm: one step of size eps, from the image itself "
                             "(--formulation 3: from the random start)")
    method.add_argument("--reduction", choices=("nonzero", "mean"), default="nonzero",
                        help="mean over strictly positive terms, or over all (Roth et al.)")
    method.add_argument("--squared", action="store_true",
                        help="triplet: squared distances in the loss (Roth et al.)")
    method.add_argument("--cutoff-low", type=cutoff, default=0.5,
                        help="sampling of negatives: smaller distances count as this one, or none")
    method.add_argument("--cutoff-high", type=cutoff, default=1.4,
                        help="no negative beyond this distance if there is a nearer one, or none")
    method.add_argument("--benign-epochs", type=common.number(int, 0), default=0,
                        help="train without an attack first (not in the paper, which starts from "
                             "ImageNet weights)")
    method.add_argument("--eps-ramp-epochs", type=common.number(int, 0), default=0,
                        help="then let --eps and --step-size grow over so many epochs, 0 in the "
                             "first (not in the paper)")
    method.add_argument("--plain-epochs", type=common.number(int, 0), default=0,
                        help="closing table: train an undefended network for so long (0: show the "
                             "starting weights); --attack-rate 0 has no such row")
    args = common.parse_run(parser, argv, run_name, GAUSSIAN if dataset == "gaussian" else small,
                            ("panum",))
    moved = "positive" if args.formulation == "3.5" else "anchor"
    if args.formulation != "3.5" and args.perturb not in (None, moved):
        parser.error(f"--formulation {args.formulation} moves the anchor: drop --perturb "
                     f"{args.perturb}")
    if args.formulation != "3" and args.reg_weight != parser.get_default("reg_weight"):
        parser.error("--reg-weight belongs to --formulation 3: drop it")
    if args.loss == "contrastive" and args.squared:
        parser.error("--squared belongs to --loss triplet: drop it")
    if None not in (args.cutoff_low, args.cutoff_high) and args.cutoff_low > args.cutoff_high:
        parser.error(f"--cutoff-low {args.cutoff_low} is above --cutoff-high {args.cutoff_high}: "
                     f"change one of them")
    if args.images_per_class == 1:
        parser.error("--images-per-class 1 has no positives: give at least 2, or 0 to shuffle")
    fgsm = args.attack == "fgsm"
    if fgsm and not (args.attack_steps in (parser.get_default("attack_steps"), 1)
                     and args.step_size in (None, args.eps)):
        parser.error("--attack fgsm is one step of size --eps: drop --attack-steps and --step-size")
    args.perturb = args.perturb or moved
    args.attack_steps = 1 if fgsm else args.attack_steps
    if args.step_size is None:
        args.step_size = args.eps if fgsm else 2 * args.eps / max(args.attack_steps, 1)
    return args


def run_name(args):
    """The method with its variant, where that is not the default."""
    words = [(args.loss != "contrastive", args.loss),
             (args.attack_rate != 0.5, f"rate{args.attack_rate:g}"),
             (args.formulation != "3.5", f"formulation{args.formulation}"),
             (args.formulation == "3.5" and args.perturb not in (None, "positive"), args.perturb),
             (args.reg_weight != 1, f"lambda{args.reg_weight:g}"),
             (args.attack != "pgd", args.attack),
             (args.reduction != "nonzero", args.reduction), (args.squared, "squared"),
             ((args.cutoff_low, args.cutoff_high) != (0.5, 1.4),
              f"cutoffs-{args.cutoff_low}-{args.cutoff_high}".lower())]
    return "-".join(["panum", *(word for changed, word in words if changed)])


# ---- training

def main(args):
    train, test = common.load_run_data(args)
    if len(train.classes) < 2 or train.labels.bincount().max() < 2:
        raise UserError(f"{args.dataset} leaves {len(train.classes)} classes to train on, or none "
                        f"with two images: give data with at least 2, or lower --val-classes")
    checkpoint = common.claim_folder(args)
    common.check_same_classes(checkpoint, train)
    out = Path(args.out)
    if checkpoint and checkpoint["epoch"] == args.epochs and (out / "results.json").exists():
        print(f"{out} is complete:")
        return common.report(common.read_json(out / "results.json"), run_name(args), test, args,
                             PROTOCOLS)

    def draw(epoch):
        return common.epoch_batches(args, train.labels, epoch, batch_size=args.batch_size,
                                    pool=torch.arange(len(train)))

    draw(0)                                                     # an impossible batch fails here
    device = common.pick_device(args.device, args.deterministic)
    member = common.new_member(args, device, weights="none" if checkpoint else args.weights)
    optimizer, scheduler = recipe(args, member)
    plain = common.new_member(args, device)                     # the closing table's first row
    epoch = common.restore(checkpoint, [member], [], [optimizer], [scheduler])
    if args.dry_run:
        args.warmup_epochs = args.benign_epochs = args.eps_ramp_epochs = args.plain_epochs = 0
    else:
        common.cache_images([train, test, test.gallery], args.cache_gb, args.workers)
        common.begin_run(args, "panum", device, checkpoint)
    if args.compile:
        member.compile()
    print(f"{args.dataset}: {len(train)} training images of {len(train.classes)} classes, "
          f"{len(test)} of {len(test.classes)} to report on; {run_name(args)}, {args.arch} on "
          f"{device}; weights {args.weights}, BatchNorm statistics "
          f"{'frozen' if args.freeze_bn else 'live'}")

    while epoch < args.epochs:
        epoch_started, seen, totals = time.perf_counter(), 0, {}
        seed_torch(args.seed, epoch, common.TRAIN)
        coins = common.random_stream(args.seed, epoch, common.TRAIN, 1)
        ramp = float(epoch >= args.benign_epochs)
        if args.eps_ramp_epochs:
            ramp = min(max(epoch - args.benign_epochs, 0) / args.eps_ramp_epochs, 1)
        rate = args.attack_rate if ramp else 0
        ball = (ramp * args.eps, ramp * args.step_size, args.attack_steps,
                args.attack == "pgd" or args.formulation == "3")
        common.train_mode(member, args.freeze_bn)
        member.amp = args.amp
        member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        batches = draw(epoch)[:1 if args.dry_run else None]
        stream = load_batches(train, batches, args.seed, epoch, scale=CROP_SCALE,
                              workers=args.workers, device=device)
        for images, labels, rows in common.progress(stream, f"epoch {epoch + 1}", len(batches)):
            loss, terms = step_loss(args, member, images, labels, ball,
                                    lambda count: torch.from_numpy(coins.random(count) < rate))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + torch.as_tensor(value).detach()
            seen += len(rows)
        lr = optimizer.param_groups[0]["lr"]
        scheduler.step()
        epoch += 1
        means = {name: float(total) / len(batches) for name, total in totals.items()}
        collapse = common.mean_cosine(common.embed([member], [(images, labels, rows)])[0])
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
            record |= common.quick_scores(
                common.closing_evaluation(args, [member], test, device, PROTOCOLS))
        common.log_epoch(args, record)
        common.save_checkpoint(args, method="panum", epoch=epoch, members=[member], proxies=[],
                               optimizers=[optimizer], schedulers=[scheduler],
                               classes=train.classes)

    started = time.perf_counter()
    if args.dry_run:
        test = common.balanced_subset(test, max(args.batch_size, 2))
    undefended = None
    if args.attack_rate:                                        # else that row is the run itself
        train_plain(args, plain, train, device, draw)
        undefended = common.closing_evaluation(args, [plain], test, device, PROTOCOLS)
    clean, robust, alerts = common.closing_evaluation(args, [member], test, device, PROTOCOLS)
    seconds = sum(line["seconds"] for line in common.read_log(out)) + time.perf_counter() - started
    variant = run_name(args).removeprefix("panum").removeprefix("-")
    results = common.run_results(args, "panum", variant, epoch, clean, robust, alerts, seconds,
                                 device)
    if undefended:
        results["undefended"] = {"epochs": args.plain_epochs, "clean": undefended[0],
                                 "robust": undefended[1]}
    if not args.dry_run:
        common.write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    common.report(results, run_name(args), test, args, PROTOCOLS)


def recipe(args, member):
    """Optimiser and schedule: Adam, constant."""
    optimizer = torch.optim.Adam(member.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                 foreach=True)               # all parameters in a few calls
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)


def step_loss(args, member, images, labels, ball, gamma):
    """robust_loss as the flags say."""
    return robust_loss(member, images, labels, gamma, ball, loss=args.loss, perturb=args.perturb,
                       reg_weight=args.reg_weight if args.formulation == "3" else None,
                       reduction=args.reduction, squared=args.squared,
                       cutoffs=(args.cutoff_low, args.cutoff_high))


def train_plain(args, member, train, device, draw):
    """The closing table's undefended network: the same recipe at attack rate 0."""
    optimizer, scheduler = recipe(args, member)
    for epoch in range(args.plain_epochs):
        seed_torch(args.seed, epoch, common.TRAIN)
        common.train_mode(member, args.freeze_bn)
        member.amp = args.amp
        member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        for images, labels, _ in load_batches(train, draw(epoch), args.seed, epoch,
                                              scale=CROP_SCALE, workers=args.workers,
                                              device=device):
            loss, _ = step_loss(args, member, images, labels, None,
                                lambda count: torch.zeros(count, dtype=torch.bool))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        scheduler.step()


if __name__ == "__main__":
    common.run_script(parse_args, main)
