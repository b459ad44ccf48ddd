# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""EAT: ensemble adversarial training for deep metric learning (Ke, arXiv 2501.01025).

    python eat.py                                     # built-in glyphs, 2 CPU cores: 2 minutes
    python eat.py --dataset cub --arch mobilenetv2    # the paper's setting

N networks ("members") are attacked together, each trains on the images that it may see, and they
vote. (Tramer et al., ICLR 2018, use the same name for something else.) Algorithm 1:

    l. 2     split D at random into D^1 ... D^N              common.split_by_image
    l. 5     member i's batch of D without D^i               main: `sees`
    l. 6     its loss                                        member_loss
    l. 7     x_adv: T steps against all members, Eq. (10)    attack
    l. 8, 9  the adversarial loss, mixed with the clean one  member_loss
    l. 10    a step of member i's own optimiser              main
    output   the label that most members' neighbours carry   common.vote_labels

L is Proxy Anchor, every member with proxies of its own. What the paper leaves open: docs/eat.md.
"""

import argparse

import torch
from torch import nn

import common
from common import epoch_batches, frozen, pgd, proxy_anchor_loss, shift_objective, split_by_image

# ---- method

def attack(members, proxies, images, labels, loss, eps, step_size, steps):
    """x_adv (B, 3, S, S): what hurts all members together most, Eq. (10); uniform start.

    loss, the reading of L(F(x_adv), F(x)): "shift" is the distance of the embeddings. The others
    are Proxy Anchor: "label" with the true labels, "batch" with the batch's F(x) as proxies, each
    image the positive of its own.
    """
    with frozen(*members):
        if loss == "label":
            objective = proxy_objective(members, labels, proxies)
        else:
            with torch.no_grad():
                clean = [member(images) for member in members]
            itself = torch.arange(len(images), device=images.device)
            objective = shift_objective(members, clean) if loss == "shift" else \
                proxy_objective(members, itself, clean)
        return pgd(objective, images, eps, step_size, steps)


def proxy_objective(members, targets, proxies):
    """sum_i of member i's Proxy Anchor; one value a batch, because its images are coupled."""
    return lambda images: sum(proxy_anchor_loss(member(images), targets, points.detach())
                              for member, points in zip(members, proxies)).view(1)


def member_loss(member, proxies, images, adversarial, labels, beta):
    """beta L(F(x), y) + (1 - beta) L(F(x_adv), y) of one member -> (loss, {term: value})."""
    clean = proxy_anchor_loss(member(images), labels, proxies)                            # l. 6
    robust = proxy_anchor_loss(member(adversarial), labels, proxies)                      # l. 8
    return beta * clean + (1 - beta) * robust, {"clean": clean, "adversarial": robust}    # l. 9


# ---- command line

# On generated data: a small network, a CPU, a radius that grows over the first epochs.
SMALL = dict(arch="convnet", image_size=32, embedding_dim=64, epochs=12, batch_size=30, lr=2e-3,
             eps=8 / 255, step_size=4 / 255, attack_steps=4, eps_ramp=[0, 4])


def parse_args(argv=None):
    parser = common.base_parser(__doc__)
    method = parser.add_argument_group("method")
    method.add_argument("--members", type=common.number(int, 1), default=3, metavar="N",
                        help="networks")
    method.add_argument("--split", action=argparse.BooleanOptionalAction, default=True,
                        help="member i never trains on part i of the images")
    method.add_argument("--beta", type=common.number(float, 0, 1), default=0.5,
                        help="weight of the clean term; the adversarial one has 1 - beta")
    method.add_argument("--attack-loss", choices=("shift", "label", "batch"), default="shift",
                        help="what the attack maximises")
    args = common.parse_run(parser, argv, SMALL)
    if args.split and args.members == 1:
        parser.error("--members 1 has nothing to split: add --no-split")
    return args


def run_name(args):
    """The method with its variant, where that is not the default."""
    words = [(args.members != 3, f"x{args.members}"), (not args.split, "nosplit"),
             (args.beta != 0.5, f"beta{args.beta:g}"),
             (args.attack_loss != "shift", args.attack_loss)]
    return "-".join(["eat", *(word for changed, word in words if changed)])


# ---- training

def main(args):
    common.warn_reach(args, 2)
    run = common.Run(args, "eat", run_name(args))
    labels, count = run.train.labels, args.members
    part = split_by_image(labels, count, args.seed)                                       # l. 2
    members = [run.network(i) for i in range(count)]
    proxies = [run.proxies(i) for i in range(count)]
    optimizers = [run.adamw(*pair) for pair in zip(members, proxies)]
    run.restore(members, optimizers, proxies)
    # One batch for all, so large that a member, which skips its own part, sees --batch-size images.
    size = round(args.batch_size * count / (count - 1)) if args.split else args.batch_size

    for epoch in run.epochs():
        eps, step_size = run.ball(epoch)
        run.set_lr(common.two_drops(epoch, args.epochs))
        batches = epoch_batches(args, labels, epoch, batch_size=min(size, len(labels)))
        for images, y, rows in run.batches(batches):
            adversarial = attack(members, proxies, images, y, args.attack_loss, eps, step_size,
                                 args.attack_steps if eps else 0)                         # l. 7
            for i, (member, points, optimizer) in enumerate(zip(members, proxies, optimizers)):
                sees = (part[rows] != i) if args.split else torch.ones(len(rows)).bool()
                sees = sees.nonzero()[:, 0].to(run.device, non_blocking=True)             # l. 5
                if len(sees) == 0:
                    continue                                    # the batch lies wholly in part i
                loss, terms = member_loss(member, points, images[sees], adversarial[sees], y[sees],
                                          args.beta)                                 # l. 6, 8, 9
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_value_([*member.parameters(), points], 10)
                optimizer.step()                                                          # l. 10
                run.note(**terms)
    run.finish("clustering")


if __name__ == "__main__":
    common.run_script(parse_args, main)
