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
    3  a, p and n move together until H >= H_D, Eq. (3), or the eps      manipulate
       ball or the steps end it; a harder triplet stays as it is
    4  the triplet loss of the moved triplets alone                     hm_loss
    5  --ics: the moved a may not be farther from a than p is           ics_loss

Pseudo-hardness (Sec. 3.2), with l = min(0.2, loss of the previous step) / 0.2, 1 in the first step:

    lga -0.2 l        g-sqrt -0.2 sqrt(l)        g-square -0.2 l^2        constant
    g-b H_D of --destination-sampler + 0.1 (1 - l)

The paper writes HM[source,destination] with R, M, S, D, H for random, semihard, softhard,
distance-weighted and hardest sampling, and eta for --attack-steps. Equal source and destination
are plain training. Departures from the paper: docs/hardness_manipulation.md.
Logged: loss, the triplet loss of step 4; ics, with its weight; H_source, H_wanted and H_moved, mean
hardness before the attack, asked for (both in evaluation mode) and after it (in training mode: not
equal even without an attack); lr; seconds; images per second; collapse, the mean cosine of two rows
of the last batch (1: collapsed).
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import (
    UserError,
    euclidean,
    frozen,
    load_batches,
    mine_pairs,
    pgd,
    seed_torch,
    triplet_loss,
)

MARGIN = 0.2                                                  # gamma: of the loss, and of g_LGA

# ---- method

def hardness(anchor, positive, negative):
    """H (T,) of embeddings (T, D), in [-2, 2]; Sec. 3."""
    return euclidean(anchor, positive) - euclidean(anchor, negative)


def wanted_hardness(destination, clean, labels, previous, constant=-MARGIN / 2, sampler="semihard",
                    self_positive=False):
    """H_D, one per pair (T,) or one for all; Sec. 3.1 and 3.2.

    clean (2 T, D), labels (2 T,): a batch of pairs. previous: the loss of the step before.
    """
    level = previous.clamp(0, MARGIN) / MARGIN                # l
    if destination == "lga":
        return -MARGIN * level
    if destination == "g-sqrt":
        return -MARGIN * level.sqrt()
    if destination == "g-square":
        return -MARGIN * level.square()
    if destination == "constant":
        return torch.full_like(level, constant)
    drawn_by = sampler if destination == "g-b" else destination
    drawn = hardness(*(clean[rows] for rows in mine(clean, labels, drawn_by, self_positive)))
    return drawn + 0.1 * (1 - level) if destination == "g-b" else drawn


def mine(clean, labels, sampler, self_positive=False):
    """One triplet per pair. self_positive: softhard as in the authors' code, whose positive is any
    image of the class, the anchor included, where none is farther than the nearest negative."""
    a, p, n = mine_pairs(clean, labels, sampler)
    if sampler == "softhard" and self_positive:
        distance = torch.cdist(clean[a], clean, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[a, None] == labels
        nearest_negative = distance.masked_fill(same, torch.inf).amin(1, keepdim=True)
        has_harder = (same & (distance > nearest_negative)).any(1)
        p = torch.where(has_harder, p, torch.multinomial(same.float(), 1)[:, 0])
    return a, p, n


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


def hm_loss(model, images, labels, source, destination, previous, ball, *, ics=0.0,
            constant=-MARGIN / 2, sampler="semihard", self_positive=False):
    """One step on a batch of pairs -> (loss, {term: value}, what is `previous` in the next step).

    ball: eps, step_size, steps. Mining and attack see the evaluation mode. Equal source and
    destination: no attack, the triplet loss of the source's triplets.
    Numbers in the code are the steps at the top of this file.
    """
    with frozen(model), torch.no_grad():
        clean = model(images)
    triplet = mine(clean, labels, source, self_positive)      # 1
    if len(triplet[0]) == 0:                                  # one class alone in the batch
        loss = 0 * model(images).sum()
        return loss, {"loss": loss}, previous
    before = hardness(*(clean[rows] for rows in triplet))
    stacked = images[torch.cat(triplet)]                      # [a; p; n], three copies
    wanted = before
    if destination != source:
        wanted = wanted_hardness(destination, clean, labels, previous, constant, sampler,
                                 self_positive)               # 2
        stacked = manipulate(model, stacked, wanted, *ball)   # 3
    embeddings = model(stacked).chunk(3)
    loss = triplet_loss(*embeddings, margin=MARGIN)           # 4
    terms = {"loss": loss, "H_source": before.mean(), "H_wanted": wanted.mean(),
             "H_moved": hardness(*embeddings).mean()}
    if not ics:
        return loss, terms, loss.detach()
    benign = model(images)                                    # clean, with a gradient
    structure = ics * ics_loss(benign[triplet[0]], embeddings[0], benign[triplet[1]])       # 5
    return loss + structure, {**terms, "ics": structure}, loss.detach()


# ---- command line

SAMPLERS = {"random": "R", "semihard": "M", "softhard": "S", "distance": "D", "hardest": "H"}
PSEUDO = {"lga": "g_LGA", "constant": None, "g-b": "g_B", "g-sqrt": "g_1/2", "g-square": "g_2"}
RECIPE = dict(arch="resnet18", embedding_dim=512, crop="square", epochs=75, batch_size=112,
              warmup_epochs=0, lr=1e-5, weight_decay=4e-4, eps=8 / 255, step_size=1 / 255,
              attack_steps=8)
# For generated data, on a CPU.
SMALL = dict(arch="convnet", pool="avgmax", image_size=32, embedding_dim=64, epochs=16,
             batch_size=30, lr=1e-3, step_size=2 / 255, attack_steps=4, benign_epochs=8,
             eps_ramp_epochs=4, plain_epochs=10)


def parse_args(argv=None):
    chosen = common.Parser(add_help=False)                    # the data decides a default
    chosen.add_argument("--dataset", default="glyphs")
    dataset = chosen.parse_known_args(argv)[0].dataset
    parser = common.base_parser(__doc__)
    parser.set_defaults(**RECIPE)
    method = parser.add_argument_group("method")
    method.add_argument("--source", choices=tuple(SAMPLERS), default="softhard",
                        help="how the triplets are mined")
    method.add_argument("--destination", choices=(*SAMPLERS, *PSEUDO), default="lga",
                        help="how hard they shall become: as hard as those of this sampler, or a "
                             "pseudo-hardness")
    method.add_argument("--destination-hardness", type=common.number(float, -2, 2),
                        default=-MARGIN / 2, metavar="H", help="constant: H_D")
    method.add_argument("--destination-sampler", choices=tuple(SAMPLERS), default="semihard",
                        help="g-b: the sampler of its H_D")
    method.add_argument("--ics", type=common.number(float, 0), nargs="?", default=0.0,
                        const=0.05 if dataset == "sop" else 0.5, metavar="WEIGHT",
                        help="add the intra-class structure loss (no number: 0.5; sop: 0.05)")
    method.add_argument("--softhard-self", action="store_true",
                        help="softhard may make an anchor its own positive (authors' code)")
    method.add_argument("--benign-epochs", type=common.number(int, 0), default=0,
                        help="train without an attack first (not in the paper, which starts from "
                             "ImageNet weights)")
    method.add_argument("--eps-ramp-epochs", type=common.number(int, 0), default=0,
                        help="then let --eps and --step-size grow over so many epochs, 0 in the "
                             "first (not in the paper)")
    method.add_argument("--plain-epochs", type=common.number(int, 0), default=0,
                        help="closing table: train an undefended network for so long (0: show the "
                             "starting weights)")
    args = common.parse_run(parser, argv, run_name, SMALL, ("hm",))
    for name, owner in (("destination_hardness", "constant"), ("destination_sampler", "g-b")):
        if args.destination != owner and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} belongs to --destination {owner}: drop it")
    if args.softhard_self and "softhard" not in (args.source, args.destination,
                                                 args.destination_sampler):
        parser.error("--softhard-self changes softhard, which is neither source nor destination: "
                     "drop it")
    if args.ics and args.source == args.destination:
        parser.error("--ics needs moved anchors, and equal --source and --destination move none: "
                     "drop it")
    if args.batch_size < 4 or args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size}: batches are pairs of one class; give an "
                     f"even number, at least 4")
    if args.images_per_class:
        parser.error("--images-per-class: batches are pairs of one class; drop it")
    return args


def run_name(args):
    """hm, source and destination, and what else is not the default."""
    recipe = SMALL if args.dataset in common.GENERATED else RECIPE
    goal = args.destination
    goal += f"{args.destination_hardness:g}" if goal == "constant" else ""
    words = [(args.destination == "g-b", args.destination_sampler), (args.ics, "ics"),
             (args.ics and args.ics != (0.05 if args.dataset == "sop" else 0.5), f"{args.ics:g}"),
             (args.softhard_self, "self"),
             (args.attack_steps != recipe["attack_steps"], f"eta{args.attack_steps}")]
    return "-".join(["hm", args.source, goal,
                     *(word for changed, word in words if changed)])


def notation(args):
    """The paper's name of the defense."""
    goal = SAMPLERS.get(args.destination) or PSEUDO[args.destination]
    if args.destination == "constant":
        goal = f"{args.destination_hardness:g}"
    if args.destination == "g-b":
        goal = f"g_B({SAMPLERS[args.destination_sampler]})"
    return f"HM[{SAMPLERS[args.source]},{goal}]{'&ICS' if args.ics else ''}"


# ---- training

def main(args):
    train, test = common.load_run_data(args)
    usable = int((train.labels.bincount() > 1).sum())
    if usable < 2:
        raise UserError(f"{args.dataset} leaves {usable} class to train on that has two images: "
                        f"give data with at least 2, or lower --val-classes")
    checkpoint = common.claim_folder(args)
    common.check_same_classes(checkpoint, train)
    out, protocols = Path(args.out), ("clustering", "template")
    if checkpoint and checkpoint["epoch"] == args.epochs and (out / "results.json").exists():
        print(f"{out} is complete:")
        return common.report(common.read_json(out / "results.json"), notation(args), test, args,
                             protocols)

    def draw(epoch):
        return common.pair_batches(train.labels, args.batch_size, args.seed, epoch)

    device = common.pick_device(args.device, args.deterministic)
    member = common.new_member(args, device, weights="none" if checkpoint else args.weights)
    optimizer, scheduler = recipe(args, member)
    plain = common.new_member(args, device)                     # the closing table's first row
    epoch = common.restore(checkpoint, [member], [], [optimizer], [scheduler])
    previous = torch.tensor(checkpoint["state"]["previous_loss"] if checkpoint else MARGIN,
                            device=device)
    if args.dry_run:
        args.warmup_epochs = args.benign_epochs = args.eps_ramp_epochs = args.plain_epochs = 0
    else:
        common.cache_images([train, test, test.gallery], args.cache_gb, args.workers)
        common.begin_run(args, "hm", device, checkpoint)
    if args.compile:
        member.compile()
    print(f"{args.dataset}: {len(train)} training images of {len(train.classes)} classes, "
          f"{len(test)} of {len(test.classes)} to report on; {notation(args)}, eta "
          f"{args.attack_steps}, {args.arch} on {device}; weights {args.weights}, BatchNorm "
          f"statistics {'frozen' if args.freeze_bn else 'live'}")

    while epoch < args.epochs:
        epoch_started, seen, totals = time.perf_counter(), 0, {}
        seed_torch(args.seed, epoch, common.TRAIN)
        ramp = float(epoch >= args.benign_epochs)
        if args.eps_ramp_epochs:
            ramp = min(max(epoch - args.benign_epochs, 0) / args.eps_ramp_epochs, 1)
        ball = ramp * args.eps, ramp * args.step_size, args.attack_steps
        destination = args.destination if ramp else args.source
        common.train_mode(member, args.freeze_bn)
        member.amp = args.amp
        member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        batches = draw(epoch)[:1 if args.dry_run else None]
        stream = load_batches(train, batches, args.seed, epoch, workers=args.workers, device=device)
        for images, labels, rows in common.progress(stream, f"epoch {epoch + 1}", len(batches)):
            loss, terms, previous = step_loss(args, member, images, labels, destination, previous,
                                              ball)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach()
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
            record |= common.quick_scores(common.closing_evaluation(args, [member], test, device))
        common.log_epoch(args, record)
        common.save_checkpoint(args, method="hm", epoch=epoch, members=[member], proxies=[],
                               optimizers=[optimizer], schedulers=[scheduler],
                               classes=train.classes, state={"previous_loss": float(previous)})

    started = time.perf_counter()
    if args.dry_run:
        test = common.balanced_subset(test, max(args.batch_size, 2))
    undefended = None
    if args.destination != args.source:                         # else that row is the run itself
        train_plain(args, plain, train, device, draw)
        undefended = common.closing_evaluation(args, [plain], test, device, protocols)
    clean, robust, alerts = common.closing_evaluation(args, [member], test, device, protocols)
    seconds = sum(line["seconds"] for line in common.read_log(out)) + time.perf_counter() - started
    results = common.run_results(args, "hm", run_name(args).removeprefix("hm-"), epoch, clean,
                                 robust, alerts, seconds, device)
    results |= {"notation": notation(args), "eta": args.attack_steps}
    if undefended:
        results["undefended"] = {"epochs": args.plain_epochs, "clean": undefended[0],
                                 "robust": undefended[1]}
    if not args.dry_run:
        common.write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    common.report(results, notation(args), test, args, protocols)


def recipe(args, member):
    """Optimiser and schedule: Adam, constant."""
    optimizer = torch.optim.Adam(member.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                 foreach=True)               # all parameters in a few calls
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)


def step_loss(args, member, images, labels, destination, previous, ball):
    """hm_loss as the flags say; ICS belongs to the attack."""
    return hm_loss(member, images, labels, args.source, destination, previous, ball,
                   ics=args.ics if destination != args.source else 0.0,
                   constant=args.destination_hardness, sampler=args.destination_sampler,
                   self_positive=args.softhard_self)


def train_plain(args, member, train, device, draw):
    """The closing table's undefended network: plain triplets of the same source and flags."""
    optimizer, scheduler = recipe(args, member)
    previous = torch.tensor(MARGIN, device=device)
    for epoch in range(args.plain_epochs):
        seed_torch(args.seed, epoch, common.TRAIN)
        common.train_mode(member, args.freeze_bn)
        member.amp = args.amp
        member.backbone.requires_grad_(epoch >= args.warmup_epochs)
        for images, labels, _ in load_batches(train, draw(epoch), args.seed, epoch,
                                              workers=args.workers, device=device):
            loss, *_ = step_loss(args, member, images, labels, args.source, previous, None)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        scheduler.step()


if __name__ == "__main__":
    common.run_script(parse_args, main)
