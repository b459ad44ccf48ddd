# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""HM: Hardness Manipulation (Zhou & Patel, CVPR 2022, arXiv 2203.01439), e.g. HM[S,g_LGA]&ICS.

    python hardness_manipulation.py                                      # glyphs, 2 CPU cores
    python hardness_manipulation.py --ics --dataset cub                  # the paper's setting
    python hardness_manipulation.py --source random --destination semihard

The hardness of a triplet is H = d(a, p) - d(a, n), d Euclidean between unit embeddings; its loss is
max(0, H + 0.2). A step on 56 pairs of one class:

    1  triplets by --source among the clean embeddings, hardness H_S    common.mine_pairs
    2  how hard they shall become, H_D: as hard as triplets of the      wanted_hardness
       same anchors by another sampler, or a pseudo-hardness
    3  a, p and n move together until H >= H_D, Eq. (3), or the eps     manipulate
       ball or the steps end it; a harder triplet stays as it is
    4  the triplet loss of the moved triplets alone                     hm_loss
    5  --ics: the moved a may not be farther from a than p is           ics_loss

Pseudo-hardness (Sec. 3.2), with l = min(0.2, loss of the previous step) / 0.2, 1 in the first step:

    lga -0.2 l        g-sqrt -0.2 sqrt(l)        g-square -0.2 l^2        a number: itself
    g-b H_D of semihard triplets + 0.1 (1 - l)

The paper writes HM[source,destination] with R, M, S, D, H for random, semihard, softhard,
distance-weighted and hardest sampling, and eta for --attack-steps. Equal source and destination
are plain training. Departures from the paper: docs/hardness_manipulation.md.
"""

import argparse

import torch
import torch.nn.functional as F

import common
from common import UserError, euclidean, frozen, mine_pairs, pair_batches, pgd, triplet_loss

MARGIN = 0.2                                                  # gamma: of the loss, and of g_LGA

# ---- method

def hardness(anchor, positive, negative):
    """H (T,) of embeddings (T, D), in [-2, 2]; Sec. 3."""
    return euclidean(anchor, positive) - euclidean(anchor, negative)


def wanted_hardness(destination, clean, labels, previous):
    """H_D, one per pair (T,) or one for all; Sec. 3.1 and 3.2.

    destination: a sampler, lga, g-b, g-sqrt, g-square, or a number. clean (2 T, D), labels (2 T,):
    a batch of pairs. previous: the loss of the step before.
    """
    level = previous.clamp(0, MARGIN) / MARGIN                # l
    if isinstance(destination, float):
        return torch.full_like(level, destination)
    if destination == "lga":
        return -MARGIN * level
    if destination == "g-sqrt":
        return -MARGIN * level.sqrt()
    if destination == "g-square":
        return -MARGIN * level.square()
    sampler = "semihard" if destination == "g-b" else destination
    drawn = hardness(*(clean[rows] for rows in mine_pairs(clean, labels, sampler)))
    return drawn + 0.1 * (1 - level) if destination == "g-b" else drawn


def manipulate(model, images, wanted, eps, step_size, steps):
    """The stacked images [a; p; n] (3 T, 3, S, S), moved together so that H reaches H_D; Eq. (3).

    Minimises max(0, H_D - H)^2 of every triplet from zero. Where H >= H_D its gradient is zero:
    that triplet stays as it is, to the bit.
    """
    def objective(x):
        return -F.relu(wanted - hardness(*model(x).chunk(3))).square()

    with frozen(model):
        return pgd(objective, images, eps, step_size, steps, random_start=False)


def ics_loss(anchor, moved, positive):
    """Intra-class structure: mean max(0, d(a, a_moved) - d(a, p)); Sec. 3.3. a and p are clean."""
    return F.relu(euclidean(anchor, moved) - euclidean(anchor, positive)).mean()


def hm_loss(model, images, labels, source, destination, previous, ball, ics=0.0):
    """One step on a batch of pairs -> (loss, {term: value}, what is `previous` in the next step).

    ball: eps, step_size, steps. Mining and attack see the evaluation mode. Equal source and
    destination: no attack, the triplet loss of the source's triplets.
    Numbers in the code are the steps at the top of this file.
    """
    with frozen(model), torch.no_grad():
        clean = model(images)
    triplet = mine_pairs(clean, labels, source)               # 1
    if len(triplet[0]) == 0:                                  # one class alone in the batch
        loss = 0 * model(images).sum()
        return loss, {"loss": loss}, previous
    before = hardness(*(clean[rows] for rows in triplet))
    stacked = images[torch.cat(triplet)]                      # [a; p; n], three copies
    wanted = before
    if destination != source:
        wanted = wanted_hardness(destination, clean, labels, previous)      # 2
        stacked = manipulate(model, stacked, wanted, *ball)                 # 3
    embeddings = model(stacked).chunk(3)
    loss = triplet_loss(*embeddings, margin=MARGIN)           # 4
    terms = {"loss": loss, "H_source": before.mean(), "H_wanted": wanted.mean(),
             "H_moved": hardness(*embeddings).mean()}
    if not ics or destination == source:                      # ICS belongs to the attack
        return loss, terms, loss.detach()
    benign = model(images)                                    # clean, with a gradient
    structure = ics * ics_loss(benign[triplet[0]], embeddings[0], benign[triplet[1]])       # 5
    return loss + structure, {**terms, "ics": structure}, loss.detach()


# ---- command line

SAMPLERS = ("random", "semihard", "softhard", "distance", "hardest")
PSEUDO = ("lga", "g-b", "g-sqrt", "g-square")
RECIPE = dict(arch="resnet18", embedding_dim=512, crop="square", epochs=75, batch_size=112,
              warmup_epochs=0, lr=1e-5, weight_decay=4e-4, eps=8 / 255, step_size=1 / 255,
              attack_steps=8)
# For generated data, on a CPU.
SMALL = dict(arch="convnet", image_size=32, embedding_dim=64, epochs=16, batch_size=30, lr=1e-3,
             step_size=2 / 255, attack_steps=4, eps_ramp=[8, 4])


def destination(text):
    """An argparse type: a sampler, a pseudo-hardness or a number in [-2, 2]."""
    if text in (*SAMPLERS, *PSEUDO):
        return text
    try:
        return common.number(float, -2, 2)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join((*SAMPLERS, *PSEUDO))}, "
                                         f"nor a number from -2 to 2") from None


def parse_args(argv=None):
    chosen = common.Parser(add_help=False)                    # the data decides a default
    chosen.add_argument("--dataset", default="glyphs")
    dataset = chosen.parse_known_args(argv)[0].dataset
    parser = common.base_parser(__doc__)
    parser.set_defaults(**RECIPE)
    method = parser.add_argument_group("method")
    method.add_argument("--source", choices=SAMPLERS, default="softhard",
                        help="how the triplets are mined")
    method.add_argument("--destination", type=destination, default="lga", metavar="NAME",
                        help="how hard they shall become: as hard as those of this sampler, "
                             f"{', '.join(PSEUDO)}, or a number")
    method.add_argument("--ics", type=common.number(float, 0), nargs="?", default=0.0,
                        const=0.05 if dataset == "sop" else 0.5, metavar="WEIGHT",
                        help="add the intra-class structure loss (no number: 0.5; sop: 0.05)")
    args = common.parse_run(parser, argv, SMALL)
    if args.ics and args.source == args.destination:
        parser.error("--ics needs moved anchors, and equal --source and --destination move none: "
                     "drop it")
    if args.images_per_class or args.batch_size % 2 or args.batch_size < 4:
        parser.error(f"batches are pairs of one class: give an even --batch-size of at least 4 "
                     f"(found {args.batch_size}), and drop --images-per-class")
    return args


def run_name(args):
    """hm, source and destination, and what else is not the default."""
    steps = (SMALL if args.dataset in common.GENERATED else RECIPE)["attack_steps"]
    goal = f"{args.destination:g}" if isinstance(args.destination, float) else args.destination
    words = [(args.ics, "ics"),
             (args.ics and args.ics != (0.05 if args.dataset == "sop" else 0.5), f"{args.ics:g}"),
             (args.attack_steps != steps, f"eta{args.attack_steps}")]
    return "-".join(["hm", args.source, goal, *(word for changed, word in words if changed)])


# ---- training

def main(args):
    if args.destination != args.source:
        common.warn_reach(args, 1)
    else:
        print("note: equal --source and --destination: no attack, --eps changes nothing")
    run = common.Run(args, "hm", run_name(args))
    if (run.train.labels.bincount() > 1).sum() < 2:
        raise UserError(f"{args.dataset} has fewer than 2 training classes with two images, and "
                        f"triplets need them: give other data, or lower --val-classes")
    model = run.network()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                 foreach=True)
    run.restore([model], [optimizer])
    previous = torch.tensor(run.state.get("previous", MARGIN), device=run.device)

    for epoch in run.epochs():
        ball = (*run.ball(epoch), args.attack_steps)
        goal = args.destination if ball[0] else args.source   # no radius yet: plain triplets
        batches = pair_batches(run.train.labels, args.batch_size, args.seed, epoch)
        for images, _, rows in run.batches(batches):
            loss, terms, previous = hm_loss(model, images, run.train.labels[rows], args.source,
                                            goal, previous, ball, args.ics)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.note(**terms)
        run.state["previous"] = float(previous)
    run.finish("clustering", "template")


if __name__ == "__main__":
    common.run_script(parse_args, main)
