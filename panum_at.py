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
batch of 56 classes x 2 images (P. Sec. 3.5):

    1  every image is an anchor a and gets, among the clean        common.mine_triplets
       embeddings, a positive p and a negative n
    2  a tuple is attacked with probability --attack-rate          attacked, P. gamma
    3  one image of it moves away from its clean partner of        attack
       the same class, or towards that of another class
    4  the moved images join the batch and take their place in     robust_loss
       the tuples: one forward pass, one loss

Which image moves (--perturb, P. Appendix F). The contrastive loss reads a triplet as two pairs:

    --perturb       positive            negative            anchor
    triplet         p away from a       n towards a         a away from p and towards n
    contrastive     p of (a, p)         n of (a, n)         a of every pair for itself,
                    away from a         towards a           away from p or towards n

--reg-weight LAMBDA > 0 is P.'s third formulation, a regulariser: the clean loss + LAMBDA times the
mean of max d(z, a) over all anchors. Departures from the paper: docs/panum_at.md.
"""

import torch

import common
from common import (
    UserError,
    contrastive_loss,
    epoch_batches,
    euclidean,
    frozen,
    mine_triplets,
    pgd,
    triplet_loss,
)

# ---- method

def attack(model, images, terms, eps, step_size, steps):
    """x + rho (T, 3, S, S): images moved so that sum_k sign_k d(F(x'), y_k) grows; Eq. (14)-(16).

    terms: [(sign (T,), y (T, D))]; 1 moves away from the fixed embedding y, -1 towards it.
    """
    def objective(x):
        embeddings = model(x)
        return sum(sign * euclidean(embeddings, y) for sign, y in terms)

    with frozen(model):
        return pgd(objective, images, eps, step_size, steps)


def tuple_loss(embeddings, tuples, same):
    """Triplet loss of the rows (a, p, n), or contrastive loss of the rows (x, y) with same (T,).

    The mean is over strictly positive terms.
    """
    rows = [embeddings[index] for index in tuples]
    if same is None:
        return triplet_loss(*rows, reduction="nonzero")
    return contrastive_loss(*rows, same, reduction="nonzero")


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
    same = positive.to(a.device, non_blocking=True)
    return [first, second], same, moved, terms, possible[perturb]


def robust_loss(model, images, labels, gamma, ball, *, loss="contrastive", perturb="positive",
                reg_weight=0.0):
    """One step on images (B, 3, S, S) and labels (B,) -> (loss, {term of the log: value}).

    gamma(T): which of T tuples are attacked, bool, on the CPU. ball: eps, step_size, steps.
    reg_weight: lambda of the third formulation; then the anchors are attacked, away from
    themselves, and the tuples stay clean. Mining and attack see the evaluation mode.
    Numbers in the code are the steps at the top of this file.
    """
    with frozen(model), torch.no_grad():
        clean = model(images)
    a, p, n = mine_triplets(clean, labels, "distance")                              # 1
    tuples, same, moved, terms, possible = who_moves(a, p, n, loss, perturb)
    before = tuple_loss(clean, tuples, same)
    targets = tuples[moved]
    if reg_weight:
        targets, terms = a, [(torch.ones_like(a), a)]
        possible = torch.ones(len(a), dtype=torch.bool)

    attacked = (gamma(len(possible)) & possible).nonzero()[:, 0]                    # 2
    attacked = attacked.to(images.device, non_blocking=True)
    added = torch.arange(len(images), len(images) + len(attacked), device=images.device)
    if len(attacked):
        fixed = [(sign[attacked], clean[rows[attacked]]) for sign, rows in terms]
        adversarial = attack(model, images[targets[attacked]], fixed, *ball)        # 3
        images = torch.cat([images, adversarial])
    embeddings = model(images)                                                      # 4
    if not reg_weight:
        tuples[moved] = targets.index_copy(0, attacked, added)
    value = tuple_loss(embeddings, tuples, same)
    if reg_weight:
        shift = euclidean(embeddings[added], embeddings[targets[attacked]])
        value = value + reg_weight * shift.sum() / max(len(a), 1)
    share = torch.tensor(len(attacked) / max(int(possible.sum()), 1))
    return value, {"loss": value, "clean": before, "attacked": share}


# ---- command line

RECIPE = dict(arch="resnet50", epochs=150, warmup_epochs=0, batch_size=112, images_per_class=2,
              lr=1e-5, weight_decay=4e-4, eps=0.01, step_size=None, attack_steps=5, eval_eps=0.01)
CROP_SCALE = (0.6, 1.0)                                       # of RandomResizedCrop
# For generated data, on a CPU. From a random start the contrastive loss is slow to leave 1.
SMALL = dict(arch="convnet", image_size=32, embedding_dim=64, epochs=26, batch_size=28,
             images_per_class=4, lr=5e-4, eps=8 / 255, eps_ramp=[14, 4], eval_eps=8 / 255)
SMALL_TRIPLET = SMALL | dict(epochs=20, images_per_class=2, lr=1e-3, eps_ramp=[8, 4])
GAUSSIAN = dict(arch="convnet", image_size=32, embedding_dim=2, epochs=25, batch_size=32,
                images_per_class=16, lr=1e-3)


def parse_args(argv=None):
    chosen = common.Parser(add_help=False)                    # these two decide the defaults
    chosen.add_argument("--dataset", default="glyphs")
    chosen.add_argument("--loss", default="contrastive")
    chosen = chosen.parse_known_args(argv)[0]
    small = SMALL_TRIPLET if chosen.loss == "triplet" else SMALL
    parser = common.base_parser(__doc__)
    parser.set_defaults(**RECIPE)
    if chosen.dataset == "sop":
        parser.set_defaults(epochs=100)
    method = parser.add_argument_group("method")
    method.add_argument("--loss", choices=("contrastive", "triplet"), default="contrastive")
    method.add_argument("--attack-rate", type=common.number(float, 0, 1), default=0.5,
                        metavar="P", help="probability that a tuple is attacked")
    method.add_argument("--perturb", choices=("positive", "negative", "anchor"),
                        default="positive", help="which image of a tuple moves")
    method.add_argument("--reg-weight", type=common.number(float, 0), default=0.0, metavar="LAMBDA",
                        help="above 0: the paper's third formulation, every anchor is attacked")
    args = common.parse_run(parser, argv, GAUSSIAN if chosen.dataset == "gaussian" else small)
    if args.reg_weight and (args.perturb != "positive" or args.attack_rate not in (0.5, 1)):
        parser.error("--reg-weight moves every anchor: drop --perturb and --attack-rate")
    if args.images_per_class == 1:
        parser.error("--images-per-class 1 has no positives: give at least 2, or 0 to shuffle")
    args.attack_rate = 1.0 if args.reg_weight else args.attack_rate
    if args.step_size is None:
        args.step_size = 2 * args.eps / max(args.attack_steps, 1)
    return args


def run_name(args):
    """The method with its variant, where that is not the default."""
    words = [(args.loss != "contrastive", args.loss),
             (args.attack_rate != (1 if args.reg_weight else 0.5), f"rate{args.attack_rate:g}"),
             (args.perturb != "positive", args.perturb),
             (args.reg_weight, f"lambda{args.reg_weight:g}")]
    return "-".join(["panum", *(word for changed, word in words if changed)])


# ---- training

def main(args):
    if args.attack_rate:
        common.warn_reach(args, 2)
    run = common.Run(args, "panum", run_name(args))
    if run.train.labels.bincount().max() < 2:
        raise UserError(f"no training class of {args.dataset} has two images, and tuples need a "
                        f"positive: give other data, or lower --val-classes")
    model = run.network()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                 foreach=True)
    run.restore([model], [optimizer])

    for epoch in run.epochs("template"):
        ball = (*run.ball(epoch), args.attack_steps)
        rate = args.attack_rate if ball[0] else 0
        coins = common.random_stream(args.seed, epoch, common.TRAIN, 1)
        batches = epoch_batches(args, run.train.labels, epoch)
        for images, _, rows in run.batches(batches, scale=CROP_SCALE):
            labels = run.train.labels[rows]      # mining reads them: on the CPU it never waits
            loss, terms = robust_loss(
                model, images, labels, lambda count: torch.from_numpy(coins.random(count) < rate),
                ball, loss=args.loss, perturb=args.perturb, reg_weight=args.reg_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.note(**terms)
    run.finish("template")


if __name__ == "__main__":
    common.run_script(parse_args, main)
