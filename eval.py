# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""How robust is an embedding model? Attacks the runs of these scripts, or any model of your own.

    python eval.py runs/eat-cub-mobilenetv2-s0              # all it needs is in the checkpoint
    python eval.py runs/* --protocol template --eps 0.05    # one table over all runs
    python eval.py runs/eat-glyphs-convnet-s0 --objective worst    # the worst of many attacks
    python eval.py runs/eat-glyphs-convnet-s0 --checks      # do its scores mean anything?
    from eval import evaluate_robustness                    # your own model: README

Protocols: "clustering" attacks every image and compares attacked images (Ke, arXiv 2501.01025);
"template" attacks queries against a clean gallery (Algorithm 1 of Panum et al., arXiv 2102.07265);
"ers" is the Empirical Robustness Score, ten figures of nine attacks (Zhou & Patel, CVPR 2022).
Several values of a flag are a product, one attack and one record for each combination. A record
goes into the run's results.json as soon as its attack is finished; one that is there is read back.
"""

import argparse
import contextlib
import copy
import glob
import io
import itertools
import json
import math
import os
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import Attack, UserError, pgd


# ---- any model -------------------------------------------------------------------------------
def evaluate_robustness(embed, images_or_loader, labels=None, *, protocol="clustering",
                        attack="pgd", objective=None, eps=None, step_size=None, steps=None,
                        restarts=1, ks=(1, 2, 4, 8), batch_size=128, seed=0, device=None):
    """Clean and attacked retrieval of an embedding model: {"clean", "robust", "warnings"}.

    embed: a module or callable from images (B, 3, H, W) in [0, 1] to embeddings (B, D), or a list
    of them (an ensemble). The normalisation of pixels belongs inside; embeddings are normalised
    here. images_or_loader: (n, 3, H, W) with labels (n,), or a loader of (images, labels), read
    once. protocol, attack, objective: see PROTOCOLS, METHODS, OBJECTIVES. eps and step_size in
    pixel values. None: the protocol's own. restarts keep the highest objective per image.
    Returns scores in [0, 1] as they stand in results.json: clean["R@1"] and robust[0]["R@1"] are
    the headline rule's (the vote of an ensemble), "scores" has every rule's. objective "worst":
    robust[0] is the worst of many attacks; of clustering their records follow. ValueError: images
    outside [0, 1], arguments that do not fit. Modes, gradients and random states stay as before.
    """
    attack = attack_of(protocol, attack, objective=objective, eps=eps, step_size=step_size,
                       steps=steps, restarts=restarts, seed=seed)
    with opened(embed, images_or_loader, labels, sorted({1, *ks}), batch_size, device,
                attack.attack) as (retrieval, models, warnings):
        warnings += [text for _, passed, text in cheap_checks(retrieval, models) if not passed]
        return {"clean": common.clean_scores(retrieval, seed),
                "robust": measured(retrieval, attack), "warnings": warnings}


def check_robustness(embed, images_or_loader, labels=None, *, protocol="clustering",
                     objective=None, eps=None, step_size=None, steps=None, restarts=1,
                     batch_size=128, seed=0, device=None, transfer_from=None):
    """Do the numbers of evaluate_robustness with these arguments mean anything?

    transfer_from: another model (or list), on which images are crafted, too.
    Returns [{"name", "passed": bool, "text"}], the checks of `eval.py --checks`.
    """
    attack = attack_of(protocol, objective=objective, eps=eps, step_size=step_size, steps=steps,
                       restarts=restarts, seed=seed)
    with opened(embed, images_or_loader, labels, (1,), batch_size, device,
                attack.attack) as (retrieval, models, _):
        others = [] if transfer_from is None else listed(transfer_from)
        return [{"name": name, "passed": passed, "text": text}
                for name, passed, text in checks(retrieval, attack, models, others)]


def listed(embed):
    return list(embed) if isinstance(embed, (list, tuple, nn.ModuleList)) else [embed]


def unit(model):
    """The model with unit embeddings (B, D), float32; it gets a copy of its input."""
    return lambda images: F.normalize(model(images.clone()).view(len(images), -1).float(), dim=1)


@contextlib.contextmanager
def opened(embed, images_or_loader, labels, ks, batch_size, device, attack):
    """(Retrieval, the models as they are, warnings); afterwards all else is as before."""
    models, strays = listed(embed), []
    modules = [model for model in models if isinstance(model, nn.Module)]

    def calm(module, _):                       # a module that a function hides, about to be called
        if getattr(module, "training", False):
            module.training = False
            strays.append(module)

    with contextlib.ExitStack() as stack:
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(common.frozen(*modules))
        stack.callback(lambda: [setattr(module, "training", True) for module in strays])
        stack.callback(nn.modules.module.register_module_forward_pre_hook(calm).remove)
        images, labels = images_and_labels(images_or_loader, labels)
        parameters = itertools.chain(*(module.parameters() for module in modules))
        device = next(parameters, images).device if device is None else device
        for model in models:
            e = model(images[:2].to(device).requires_grad_().clone())
            if getattr(e, "ndim", 0) != 2 or len(e) != 2:
                found = tuple(getattr(e, "shape", ()))
                raise ValueError(f"embed must return embeddings (B, D): found {found} for B = 2")
            if attack != "square" and not e.requires_grad:
                raise ValueError("the embeddings have no gradient: drop no_grad, inference_mode "
                                 "and detach inside embed, or attack with square")
        yield common.Retrieval(
            [unit(model) for model in models],
            lambda: ((images[rows].to(device), None, rows)
                     for rows in torch.arange(len(images)).split(batch_size)),
            labels.to(device), ks=ks), models, ["a network inside embed was in training mode: it "
                                                "is in evaluation mode here"] * bool(strays)


def images_and_labels(images, labels):
    """(images (n, 3, H, W) float32 in [0, 1], labels (n,) int64) out of either form; checked."""
    form = "give images (n, 3, H, W), n >= 2, with whole labels (n,), or a loader of both"
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(images, torch.Tensor):
        batches = list(images) if labels is None else []
        if batches and isinstance(batches[0], dict):
            batches = [[next((batch[key] for key in (name, f"{name}s") if key in batch), None)
                        for name in ("image", "label")] for batch in batches]
        if not batches or getattr(batches[0][0], "ndim", 0) != 4 or batches[0][1] is None:
            raise ValueError(f"{form}: found an empty loader, other keys, or labels beside it")
        images, labels = (torch.cat([torch.as_tensor(own[i]) for own in batches]) for i in (0, 1))
    labels = torch.as_tensor([0.5] if labels is None else labels)
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(labels) < 2 \
            or labels.is_floating_point():
        raise ValueError(f"{form}: found {tuple(images.shape)}, {tuple(labels.shape)}, "
                         f"{labels.dtype}")
    if len(labels.unique()) < 2 or labels.unique(return_counts=True)[1].max() < 2:
        raise ValueError("nothing to retrieve: give images of two classes, and two of one of them")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-5 and high <= 1 + 1e-5):
        cure = "divide by 255" if high > 50 else ("eps counts pixel values, so normalise inside "
                                                  "the model, as lambda x: net((x - mean) / std)")
        raise ValueError(f"images must be in [0, 1], found {low:.3g} to {high:.3g}: {cure}")
    return images.float().clamp(0, 1), labels.to(torch.int64)


# ---- which attack ----------------------------------------------------------------------------
PROTOCOLS = {**common.PROTOCOLS,            # step in units of eps
             "ers": {"objective": "ers", "eps": 8 / 255, "step": 3 / 8, "steps": 32}}
METHODS = {"pgd": {}, "fgsm": {"step": 1, "steps": 1}, "cw": {"steps": 50},     # what they change
           "square": {"objective": "impostor", "step": 2, "steps": 200},
           "strong": {"objective": "worst", "step": 1 / 4, "steps": 20}}
BOTH = ("push-mean", "target", "target-nearest", "impostor", "soft-impostor", "worst")
OBJECTIVES = {"clustering": ("shift", "joint", "joint-pseudo", *BOTH),
              "template": ("neighbour", "self", "shift", "impostor-pseudo", *BOTH),
              "ers": ("ers", "ers-authors")}
LABEL_FREE = ("shift", "impostor-pseudo", "joint-pseudo")


def attack_of(protocol, attack="pgd", *, objective=None, against="sum", eps=None, step_size=None,
              steps=None, restarts=1, seed=0) -> Attack:
    """An Attack: the protocol's own numbers, changed by the attack's, changed by what is given.

    None: not given. With other steps, PGD of the template protocol has a step of 2 eps / steps.
    fgsm is one step of eps. strong: the frozen recipe strong-1, of every objective the best iterate
    of two starts (joint: the last of one), the step halved twice, and Square beside them.
    """
    if protocol not in PROTOCOLS or attack not in METHODS:
        raise UserError(f"unknown {protocol} or {attack}: give one of {[*PROTOCOLS, *METHODS]}")
    numbers = PROTOCOLS[protocol] | METHODS[attack]
    objective = objective or numbers["objective"]
    eps = numbers["eps"] if eps is None else eps
    joint, ers = objective.startswith("joint"), protocol == "ers"
    for refused, reason in (
            (ers and attack != "pgd", f"--protocol ers has its own attacks: drop {attack}"),
            (objective not in OBJECTIVES[protocol],
             f"--objective {objective}: {protocol} has {', '.join(OBJECTIVES[protocol])}"),
            ((joint or objective == "worst") and attack not in ("pgd", "strong"),
             f"--objective {objective} is attacked with pgd or strong: drop --attack {attack}"),
            (attack == "cw" and protocol != "template",
             "--attack cw searches for a query that fails: add --protocol template"),
            (not re.fullmatch(r"sum|concat|mean|vote|members?_[1-9]\d*(\+[1-9]\d*)*", against),
             f"--against {against}: give sum, concat, mean, vote, member_1 ..., members_1+2 ..."),
            (against == "vote" and objective not in ("impostor", "joint"),
             f"--against vote needs --objective impostor or joint: found {objective}"),
            (against != "sum" and (ers or objective == "worst"),
             f"--objective {objective} reads every embedding: drop --against {against}"),
            (attack == "strong" and (restarts > 1 or step_size is not None or steps is not None),
             "--attack strong is a frozen recipe: drop --step-size, --attack-steps and --restarts"),
            (restarts > 1 and (joint or ers or attack in ("square", "cw") or
                               attack == "fgsm" and objective not in ("shift", "self")),
             f"{objective} with {attack} has one start: drop --restarts {restarts}"),
            (restarts < 1 or min(steps or 0, step_size or 0) < 0, "restarts or steps are too low"),
            (not 0 <= eps <= 1, f"eps {eps:g} is not in [0, 1]: did you mean {eps:g}/255?")):
        if refused:
            raise UserError(reason)
    if step_size is None or attack in ("fgsm", "square"):
        step_size = eps / 10 if attack == "cw" else numbers["step"] * eps
        if attack == "pgd" and protocol == "template" and steps is not None:
            step_size = 2 * eps / max(steps, 1)
    steps = numbers["steps"] if steps is None or attack == "fgsm" else steps
    if attack == "strong":
        attack, restarts = "strong-1", 1 if joint else 2
    return Attack(protocol, objective, attack, against, eps, step_size, steps, restarts, seed)


def worst_parts(attack, count):
    """The attacks of `worst`, for `count` networks: every objective on the sum of the members; for
    clustering joint by the exact condition of a miss (vote); for several networks that objective
    (template: impostor) on every rule, member and majority; for strong Square on the margin, too.
    Label-free ones come first, then the strongest, because template attacks what is still right."""
    miss, last = ("impostor", "neighbour") if attack.protocol == "template" else ("joint", "joint")
    rules = ["concat", "mean", "vote"] if count > 1 else ["vote"] * (miss == "joint")
    for size in {1, count // 2 + 1} - {count}:
        rules += [f"member{'s' * (size > 1)}_{'+'.join(map(str, numbers))}"
                  for numbers in itertools.combinations(range(1, count + 1), size)]
    aims = [(name, "sum") for name in ("shift", f"{miss}-pseudo", "impostor")]
    aims += [(miss, rule) for rule in rules]
    aims += [(name, "sum") for name in ("soft-impostor", "push-mean", "target", last)]
    parts = [attack._replace(objective=name, against=rule, restarts=1 if name.startswith("joint")
                             else attack.restarts) for name, rule in aims]
    strong = attack.attack == "strong-1"
    return parts + [attack_of(attack.protocol, "square", eps=attack.eps, seed=attack.seed)] * strong


# ---- objectives ------------------------------------------------------------------------------
class Space:
    """One space of unit embeddings: queries, their candidates, and who is of whose class.

    clean (n, D): the queries before the attack (for joint: as they are now), labels (n,) int64.
    candidates (N, D) and names (N,), their labels; None: the queries look each other up. Without
    names, row i is no candidate of query i. target (n,): the candidate that it is moved to.
    """

    def __init__(self, clean, labels, candidates=None, names=None, target=None):
        self.clean, self.labels, self.target, self.itself = clean, labels, target, names is None
        self.candidates = clean if candidates is None else candidates
        self.names = labels if names is None else names
        self.half_norms = self.candidates.square().sum(1) / 2
        self.alone = common.candidate_counts(labels, names) == 0              # no candidate of its
        classes, index = self.names.unique(return_inverse=True)
        means = clean.new_zeros(len(classes), clean.shape[1]).index_add_(0, index, self.candidates)
        place = torch.searchsorted(classes, labels.contiguous()).clamp(max=len(classes) - 1)
        self.class_mean = torch.where((classes[place] == labels)[:, None],    # itself included
                                      F.normalize(means, dim=1)[place], clean)

    def masks(self, rows):
        """bool (B, N) each: the candidates of a query's class; those of another."""
        same = self.labels[rows, None] == self.names
        other = ~same
        if self.itself:
            same[torch.arange(len(rows)), rows] = False
        return same, other

    def closeness(self, e):
        """(B, N), in the order of the negative distances to e (B, D)."""
        return e @ self.candidates.T - self.half_norms


# An objective is a function (e, rows, space) -> (B,) that an attack maximises; e (B, D): the
# embeddings of the attacked queries `rows` (B,).

def impostor(e, rows, space):
    """d to the nearest of the query's class minus d to the nearest of another, both nearest to e.

    Recall@1 misses exactly where this is 0 or above. A query alone in its class has itself.
    """
    same, other = space.masks(rows)
    with torch.no_grad():
        near = space.closeness(e)
        friend = near.masked_fill(~same, -torch.inf).argmax(1)
        foe = near.masked_fill(~other, -torch.inf).argmax(1)
    friends = torch.where(space.alone[rows, None], space.clean[rows], space.candidates[friend])
    return common.euclidean(e, friends) - common.euclidean(e, space.candidates[foe])


def soft_impostor(e, rows, space):
    """impostor over cosines, with log-sum-exp at scale 16 in place of the extremes."""
    same, other = space.masks(rows)
    cosine = 16 * e @ space.candidates.T
    friend = torch.where(space.alone[rows], 16 * (e * space.clean[rows]).sum(1),
                         cosine.masked_fill(~same, -torch.inf).logsumexp(1))
    return (cosine.masked_fill(~other, -torch.inf).logsumexp(1) - friend) / 16


VALUES = {  # 1 - cos to the query's own clean embedding (EAT, Eq. (10)); to the mean of its class;
    # cos to one image of another class (Panum et al., Eq. (6))
    "shift": lambda e, rows, space: 1 - (e * space.clean[rows]).sum(1),
    "push-mean": lambda e, rows, space: 1 - (e * space.class_mean[rows]).sum(1),
    "target": lambda e, rows, space: (e * space.candidates[space.target[rows]]).sum(1),
    "impostor": impostor, "soft-impostor": soft_impostor, "joint": soft_impostor}
VOTE_MARGIN = 0.1       # of impostor: a member beyond it is clearly wrong, and counts no more


def members_of(against, count):
    """The numbers, from 0, of the networks that `against` reads, out of `count`."""
    members = [int(i) - 1 for i in re.findall(r"\d+", against)] or [*range(count)]
    if max(members) >= count or against in ("concat", "mean") and count == 1:
        raise UserError(f"--against {against}: the run's networks are {count} in number; drop it")
    return members


def read(against, embeddings):
    """[(B, D)]: the spaces that `against` reads, out of one embedding per network."""
    if against in ("concat", "mean"):
        return [common.rule_spaces(embeddings)[against][0]]
    return [embeddings[i] for i in members_of(against, len(embeddings))]


def spaces_of(retrieval, attack):
    """[Space] that attack.against reads; of -pseudo objectives with k-means ids for labels."""
    names, spaces = retrieval.names, []
    if attack.objective != "shift" and (names == names[0]).all():
        raise UserError(f"{attack.objective} needs candidates of two classes: give more data")
    goal = targets(retrieval, attack) if attack.objective.startswith("target") else None
    queries = read(attack.against, retrieval.clean)
    galleries = retrieval.gallery and read(attack.against, retrieval.gallery)
    for clean, candidates in zip(queries, galleries or [None] * len(queries)):
        labels, names = retrieval.labels, retrieval.gallery_labels
        if attack.objective.endswith("-pseudo"):
            points = clean if names is None else torch.cat([clean, candidates])
            ids = common.kmeans(points, len(retrieval.names.unique()), attack.seed)
            if (ids == ids[0]).all():                  # collapsed to a point: every image by itself
                ids = torch.arange(len(points), device=points.device)
            labels, names = ids[:len(clean)], None if names is None else ids[len(clean):]
        spaces.append(Space(clean, labels, candidates, names, goal))
    return spaces


def aim(retrieval, attack, spaces=None):
    """(value, only): what the attack maximises, value(embeddings, rows) -> (B,), of one (B, D) per
    network. only: bool (n,), the queries that are attacked; None: all."""
    only, vote = None, attack.against == "vote"     # won or lost by the exact condition of a miss
    if attack.objective in ("neighbour", "self"):
        part = copy.copy(retrieval)
        part.clean = read(attack.against, retrieval.clean)
        part.gallery = retrieval.gallery and read(attack.against, retrieval.gallery)
        away, only = common.neighbour(part, itself=attack.objective == "self")
    else:
        spaces = spaces or spaces_of(retrieval, attack)
        objective = impostor if vote else VALUES[re.sub("-nearest|-pseudo", "", attack.objective)]

        def away(parts, rows):
            terms = [objective(e, rows, space) for e, space in zip(parts, spaces)]
            return sum(term.clamp(max=VOTE_MARGIN) if vote else term for term in terms)

    return lambda embeddings, rows: away(read(attack.against, embeddings), rows), only


def targets(retrieval, attack):
    """int64 (n,): the candidate that every query is moved to, a random one of another class, or
    the nearest (in an ensemble: of the concatenated embeddings)."""
    labels, names = retrieval.labels.contiguous(), retrieval.names
    if attack.objective == "target-nearest":
        spaces = common.rule_spaces(retrieval.clean, retrieval.gallery)
        queries, candidates = spaces.get("concat", spaces["member_1"])
        space = Space(queries, labels, candidates, retrieval.gallery_labels)
        return torch.cat([space.closeness(queries[rows]).masked_fill(
            ~space.masks(rows)[1], -torch.inf).argmax(1)
            for rows in torch.arange(len(labels)).split(1024)])
    ranked, order = names.sort(stable=True)                   # a class is one block of the order
    first = torch.searchsorted(ranked, labels)
    size = torch.searchsorted(ranked, labels, right=True) - first
    draw = common.random_stream(attack.seed, 0, common.TARGETS).random(len(labels))
    place = (torch.from_numpy(draw).to(labels.device) * (len(names) - size)).long()
    return order[place + size * (place >= first)]


def success_rates(retrieval, attack, embeddings, gallery):
    """{rule: the share of the queries whose nearest candidate is of the target's class}."""
    goal = retrieval.names[targets(retrieval, attack)]
    first = {rule: common.neighbour_labels(own, retrieval.labels, 1, met, retrieval.gallery_labels)
             for rule, (own, met) in common.rule_spaces(embeddings, gallery).items()}
    members = [rule for rule in first if rule.startswith("member_")]
    first["vote"] = common.vote_labels(torch.stack([first[rule] for rule in members]))
    rates = {rule: float((label[:, 0] == goal).double().mean()) for rule, label in first.items()}
    return {**rates, "member_mean": statistics.mean(rates[rule] for rule in members)}

# ---- attacks ---------------------------------------------------------------------------------
def halved(step_size, steps):
    """Half of the steps at step_size, a quarter at its half, the rest at its quarter."""
    return [step_size / (1 if step < steps // 2 else 2 if step < 3 * steps // 4 else 4)
            for step in range(steps)]


def ascend(objective, images, eps, step_size, steps, start=None):
    """PGD from a uniform start that keeps the best iterate of every image; its step is halved
    twice, and every stage begins at the best so far (strong-1)."""
    best = pgd(None, images, eps, 0, 0, start=start)
    highest = torch.full((len(images),), -torch.inf, device=images.device)

    def watched(x):
        nonlocal best, highest
        value = objective(x)
        better = value.detach() > highest
        best = torch.where(better.view(-1, 1, 1, 1), x.detach(), best)
        highest = torch.maximum(value.detach(), highest)
        return value

    for size, stage in itertools.groupby(halved(step_size, steps)):
        last = pgd(watched, images, eps, size, len(list(stage)), start=best)
        with torch.no_grad():
            watched(last)
    return best


def square(objective, images, eps, queries, streams):
    """Square Attack (Andriushchenko et al., ECCV 2020, Alg. 1 and 2), l_inf: random search without
    gradients. From vertical stripes of +-eps on, a square window of ever smaller side goes to
    +-eps, one sign a channel, and stays where the objective rises; sides as in the authors' code.
    streams: a numpy generator for every image, whose result then depends on no other."""
    count, channels, height, width = images.shape
    stripes, draws = (
        torch.from_numpy(np.stack([stream.random(size, "f") for stream in streams])).to(images)
        for size in ((channels, 1, width), (queries, channels + 2)))

    def signs(uniform, last):
        return 2.0 * (uniform < 0.5).view(count, channels, 1, last) - 1

    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    with torch.no_grad():
        best = (images + eps * signs(stripes, width)).clamp(0, 1)
        value = objective(best)
        for query in range(queries):
            marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)      # of 10,000 queries
            area = 0.8 / 2 ** sum(10_000 * query >= mark * queries for mark in marks)
            side = max(1, min(round((area * height * width) ** 0.5), height, width))
            top, left = ((draws[:, query, axis] * (length - side + 1)).long().view(count, 1, 1, 1)
                         for axis, length in ((-2, height), (-1, width)))
            window = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
            tried = (images + eps * signs(draws[:, query, :channels], 1)).clamp(0, 1)
            tried = torch.where(window, tried, best)
            risen = objective(tried)
            best = torch.where((risen > value).view(-1, 1, 1, 1), tried, best)
            value = torch.maximum(risen, value)
    return best


def carlini_wagner(objective, succeeded, images, eps, step_size, steps):
    """Carlini & Wagner's l_inf attack (S&P 2017, Sec. VI-C), projected to |x' - x|_inf <= eps.

    A round minimises  sum max(|x' - x| - tau, 0) - c * objective(x') [not yet succeeded]  with
    `steps` of Adam at learning rate step_size. tau begins at 1; a success within tau makes it 0.9
    times the largest change, a failure doubles c, which begins at 0.1. An image ends with a change
    of at most eps (a smaller one changes no score), tau below 1/256, c above 20, or after 30
    rounds. objective(x, i) -> (B,) and succeeded(x, i) -> bool (B,) see some of the images, i.
    Returns each image's success with the smallest |x' - x|_inf, or else its last iterate."""
    shape = (-1, 1, 1, 1)
    best = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    last = best.clone()                              # best: the nearest success, or the start
    size = torch.full((len(images),), torch.inf, device=images.device)
    tau, const = torch.ones_like(size), torch.full_like(size, 0.1)
    for _ in range(30):
        i = ((size > eps) & (tau > 1 / 256) & (const <= 20)).nonzero()[:, 0]
        if len(i) == 0:
            break
        x, clean, nearest = best[i].requires_grad_(), images[i], best[i]
        change_found = torch.full_like(size[i], torch.inf)               # in this round
        adam = torch.optim.Adam([x], lr=step_size)
        for step in range(steps + 1):
            with torch.no_grad():
                hit = succeeded(x, i)
                change = (x - clean).abs().amax((1, 2, 3))
                better = hit & (change < change_found)
                nearest = torch.where(better.view(shape), x, nearest)
                change_found = torch.where(better, change, change_found)
            if step == steps or bool((change_found <= tau[i]).all()):
                break
            with torch.enable_grad():
                penalty = ((x - clean).abs() - tau[i].view(shape)).clamp(min=0).sum()
                loss = penalty - (const[i] * ~hit * objective(x, i)).sum()
            x.grad = torch.autograd.grad(loss, x)[0]
            adam.step()
            x.data.clamp_(0, 1)
        last[i] = x.detach()
        best[i] = torch.where((change_found < size[i]).view(shape), nearest, best[i])
        size[i] = torch.minimum(size[i], change_found)
        won = change_found <= tau[i]
        tau[i] = torch.where(won, 0.9 * change_found, tau[i])
        const[i] = torch.where(won, const[i], 2 * const[i])
    return pgd(None, images, eps, 0, 0, start=torch.where(size.isinf().view(shape), last, best))


def missed(spaces, embeddings, rows):
    """bool (B,): the queries whose nearest candidate, by vote of members, is of another class."""
    first = []
    for e, space in zip(embeddings, spaces):
        same, other = space.masks(rows)
        near = space.closeness(e)
        right = near.masked_fill(~same, -torch.inf).amax(1)
        wrong, place = near.masked_fill(~other, -torch.inf).max(1)
        first.append(torch.where(right > wrong, space.labels[rows], space.names[place]))
    return common.vote_labels(torch.stack(first)[..., None])[:, 0] != spaces[0].labels[rows]


def joint(retrieval, attack, watch=None):
    """[(n, D)] of all images, attacked together (EAT's own Eq. (3)): each step raises soft-impostor
    against where the others are now, so that, unlike shift, it gets stronger with eps."""
    spaces, now = spaces_of(retrieval, attack), {}   # now: images on the CPU, because together they
    sizes = halved(attack.step, attack.steps) if attack.attack == "strong-1" else \
        [attack.step] * attack.steps                 # may be larger than a GPU
    value, reads = None, members_of(attack.against, len(retrieval.models))
    for size in [0, *sizes]:                         # the first turn is the uniform start
        def craft(objective, images, rows, _):
            batch, first = int(rows[0]), int(rows[0]) not in now
            start = images + attack.eps * torch.empty_like(images).uniform_(-1, 1) if first else \
                now[batch].to(images)
            x = pgd(objective, images, attack.eps, size, int(not first), start=start)
            now[batch] = x.cpu()
            if watch:
                watch(x, rows)
            return x

        embeddings = retrieval.attacked(attack, value, reads=reads, craft=craft)
        present = [Space(e, own.labels) for e, own in zip(read(attack.against, embeddings), spaces)]
        value, _ = aim(retrieval, attack, present)
    return embeddings


def attacked(retrieval, attack, craft=None, watch=None, left=None):
    """(embeddings of the attacked queries, of the candidates that they meet), as Retrieval.score
    takes them. craft(objective, images, rows, start) -> images: how, if not as attack.attack says.
    watch(images, rows) sees every result. left: bool (n,), template: the queries to attack."""
    if retrieval.gallery is not None and attack.protocol == "clustering" and (
            attack.objective, attack.against) != ("shift", "sum"):
        raise UserError(f"{attack}: with a gallery of its own, clustering moves that too, and away "
                        f"from itself alone: use shift, or --protocol template")
    if attack.objective.startswith("joint"):
        return joint(retrieval, attack, watch), None
    value, only = aim(retrieval, attack)
    only = left if only is None else only if left is None else only & left
    eps, step, steps, how = attack.eps, attack.step, attack.steps, attack.attack

    def crafted(objective, images, rows, start):
        if how == "strong-1":
            return ascend(objective, images, eps, step, steps, start)
        if how == "square":
            return square(objective, images, eps, steps, [common.random_stream(
                attack.seed, 0, common.EVALUATE, 1 + row) for row in rows.tolist()])
        if how == "cw":
            def embed(x):
                return [model(x) for model in retrieval.models]

            spaces = spaces_of(retrieval, attack._replace(objective="impostor", against="sum"))
            return carlini_wagner(lambda x, i: value(embed(x), rows[i.cpu()]), lambda x, i: missed(
                spaces, embed(x), rows[i.cpu()]), images, eps, step, steps)
        # FGSM begins at the image, unless the gradient of its objective is zero there
        anywhere = how == "pgd" or attack.objective in ("shift", "self")
        return pgd(objective, images, eps, step, steps, anywhere, start if anywhere else None)

    def watched(objective, images, rows, start):
        x = craft(objective, images, rows, start)
        if watch:
            watch(x, rows)
        return x

    craft, reads = craft or crafted, members_of(attack.against, len(retrieval.models))
    embeddings = retrieval.attacked(attack, value, reads=reads, only=only, craft=watched)
    return embeddings, retrieval.gallery_met(attack, craft)


def measured(retrieval, attack, limited=False, find=lambda attack: None, done=lambda *_: None):
    """[record] of an attack, scored by every inference rule; of clustering's `worst` the derived
    record, then those of its parts. find(attack): a record that is there already, or None.
    done(attack, record): told of every new record as soon as it is finished."""
    started, record, parts = time.perf_counter(), find(attack), []
    if record is not None:
        return [record]
    if attack.objective == "worst" and attack.protocol == "template":
        scores = survivors(retrieval, attack)
    elif attack.objective == "worst":
        parts = [measured(retrieval, part, limited, find, done)[0]
                 for part in worst_parts(attack, len(retrieval.models))]
        scores = worst_case(parts)
    elif attack.protocol == "ers":
        figures, recall = ers_figures(retrieval, attack), recall_of(retrieval, retrieval.clean)
        scores = {"distance": {**figures, "ERS": ers(figures), "R@1": recall}}
    else:
        embeddings, gallery = attacked(retrieval, attack)
        scores = retrieval.score(embeddings, gallery, seed=attack.seed,
                                 clustering=attack.protocol == "clustering")
        if attack.objective.startswith("target"):
            rates = success_rates(retrieval, attack, embeddings, gallery)
            scores = {rule: {**row, "success": rates[rule]} for rule, row in scores.items()}
    seconds = sum(part["seconds"] for part in parts) or time.perf_counter() - started
    record = common.attack_record(retrieval, attack, scores, seconds, limited)
    record |= {"all_fail": max(p["all_fail"] for p in parts)} if parts and "vote" in scores else {}
    done(attack, record)
    return [record, *parts]


def survivors(retrieval, attack):
    """{rule: {"R@1" ..., "mAP@R", "R@1_label_free", "hits", "parts"}}: what survives every part of
    the template protocol's `worst`, at a fraction of the time of all parts on all queries.

    Every part attacks the queries that some rule still has right: Recall@1 is that of worst_case.
    Other scores are those of every query after the attack that first made it wrong, or else the
    last. parts: {attack in words: {"attacked": how many queries, "R@1": share right after it}}."""
    left, merged, extra = torch.ones(len(retrieval.labels), dtype=torch.bool), {}, {}
    for part in worst_parts(attack, len(retrieval.models)):
        if not left.any():
            break
        ranked = retrieval.ranked(*attacked(retrieval, part, left=left.to(retrieval.labels.device)))
        for rule, now in ranked.items():
            before = merged.get(rule, now)
            tried = left & before[0][:, 0]
            hits = now[0].where(tried[:, None], before[0])
            merged[rule] = hits, now[1].where(tried.to(now[1].device), before[1])
            row, share = extra.setdefault(rule, {"parts": {}}), float(hits[:, 0].double().mean())
            row["parts"][named(part._asdict())] = {"attacked": int(left.sum()), "R@1": share}
            if part.objective in LABEL_FREE:
                row["R@1_label_free"] = share
        left = torch.stack([hits[:, 0] for hits, _ in merged.values()]).any(0)
    scores = retrieval.rated(merged)
    return common.with_member_mean({rule: scores[rule] | row for rule, row in extra.items()})


def named(record):
    """A part of `worst` in words."""
    return record["objective"] + f" against {record['against']}" * (record["against"] != "sum") \
        + " (Square)" * (record["attack"] == "square")


def worst_case(records):
    """{rule: {"R@1", "R@1_label_free", "hits", "parts"}}: what the worst of some attacks leaves.

    template: a query counts as right when it survives them all. clustering: the lowest Recall@1
    that one attack on the whole set reaches, because images that are compared with each other must
    come from one attack. R@1_label_free: of the attacks that read no labels (None: there is none).
    hits: the queries that stay right. parts: {attack in words: its Recall@1}.
    """
    if len({(own["protocol"], own.get("eps"), own["n_queries"]) for own in records}) != 1:
        raise ValueError("worst_case compares attacks of one protocol and eps on the same images")
    free = [record for record in records if record["objective"] in LABEL_FREE]

    def left(rule, some):
        right = np.stack([common.unpack(record["scores"][rule]["hits"], record["n_queries"])
                          for record in some])                           # bool (attacks, n)
        return right.all(0) if some[0]["protocol"] == "template" else right[right.mean(1).argmin()]

    scores, rules = {}, list(records[0]["scores"])
    for rule in rules:
        own = [rule] if rule != "member_mean" else [r for r in rules if re.match(r"member_\d", r)]
        scores[rule] = {
            name: statistics.mean(float(left(one, some).mean()) for one in own) if some else None
            for name, some in (("R@1", records), ("R@1_label_free", free))}
        if rule != "member_mean":
            scores[rule]["hits"] = np.packbits(left(rule, records)).tobytes().hex()
        scores[rule]["parts"] = {named(one): one["scores"][rule]["R@1"] for one in records}
    return scores


def eps50(records, clean=None, rule=None):
    """The eps in 1/255 at which Recall@1 is half its clean value, on straight lines between the
    radii of `records`, one attack's; None: it never falls so far (Panum et al.'s Eq. (5) as a
    median). clean: "clean" beside them (None: records of other images hold it). rule: headline."""
    rule = rule or records[0]["rule"]
    first = (clean or records[0]["clean"])["scores"][rule]["R@1"]
    curve = {0.0: first} | {record["eps_255"]: record["scores"][rule]["R@1"] for record in records}
    for (low, above), (high, below) in itertools.pairwise(sorted(curve.items())):
        if below <= first / 2:
            return float(low + (high - low) * (above - first / 2) / max(above - below, 1e-12))
    return None


# ---- empirical robustness score --------------------------------------------------------------
# Zhou & Patel, CVPR 2022; attacks of Zhou et al., arXiv 2106.03614. Candidates are clean images, d
# is the mean over networks, a rank is the percentage of the others that are strictly closer.

def ers(figures):
    """The mean of the ten figures on a scale of 0 to 100, the more the better (Zhou & Patel)."""
    return statistics.mean([
        2 * figures["CA+"], 100 - figures["CA-"], 2 * figures["QA+"], 100 - figures["QA-"],
        100 * (1 - figures["TMA"]), 50 * (2 - figures["ES:D"]),
        *(figures[name] for name in ("ES:R", "LTM", "GTM", "GTT"))])


def ers_figures(retrieval, attack):
    """{figure: value}; every attack is one PGD from the image itself (ES: from a uniform start).

    CA+, QA+ (rank)        a random query (candidate): up to the top
    CA-, QA- (rank)        one of the nearest 1 %: down
    TMA (cosine)           towards a random image
    ES:D (d), ES:R (R@1)   away from its own clean embedding
    LTM (R@1)              the farthest of another class nearer than the nearest of its own
    GTM (R@1)              towards the nearest of another class
    GTT (percent)          its nearest neighbour out of its top 4: the share that stays in

    "ers-authors" repeats the slips of the authors' code: the image's own clean copy is a candidate
    (of CA, QA, LTM); GTM's target is the wrong image; ES starts at the image, its target is off by
    -9e-7 at first and by -1e-6 afterwards, and ES:D is measured before the last step.
    """
    clean, labels, count = retrieval.clean, retrieval.labels, len(retrieval.labels)
    if retrieval.gallery is not None or count < 100:
        raise UserError(f"--protocol ers needs 100 images or more that look each other up (CA- and "
                        f"QA- choose among the nearest 1 %): found {count}, or a gallery")
    authors = attack.objective == "ers-authors"
    everything = torch.arange(count, device=labels.device)
    chosen = ers_targets(retrieval, attack.seed)

    def moved(value, start=False, steps=attack.steps, first=None):
        """The attacked embeddings; first: what the first step maximises, where it is not value."""
        def craft(_, images, rows, __):
            def of(value):
                return lambda x: value([own(x) for own in retrieval.models], rows.to(labels.device))

            x = pgd(of(first or value), images, attack.eps, attack.step, min(steps, 1), start)
            return pgd(of(value), images, attack.eps, attack.step, steps - 1, start=x)

        return retrieval.attacked(attack, value, craft=craft)

    def to(embeddings, picked, offset=0.0):
        """d (b,) of every row to one clean candidate."""
        return sum(common.euclidean(e, member[picked] - offset)
                   for e, member in zip(embeddings, clean)) / len(clean)

    def nearer(name, asks, sign, ties=False):
        """How many candidates are nearer to the query (n,) than the one whose rank is attacked, so
        that they become fewer (sign 1) or more (-1). asks: the attacked image is the query and
        chosen[name] the candidate, or the other way round. ties: as near counts, too."""
        def gaps(embeddings, rows, hidden, exact=False):
            """(b, N) each: positive where nearer; counted. hidden: not the image's clean copy."""
            picked = chosen[name][rows]
            queries = embeddings if asks else [member[picked] for member in clean]
            gap = to(embeddings, picked)[:, None] - distances(queries, clean, exact)
            counted = torch.ones_like(gap, dtype=torch.bool)
            for left_out in ([picked] if asks or hidden else []) + ([rows] if hidden else []):
                counted &= everything != left_out[:, None]
            return gap, counted

        def value(embeddings, rows):
            gap, counted = gaps(embeddings, rows, not authors)
            return -(F.relu(sign * gap) * counted).mean(1)

        embeddings, numbers = moved(value), []
        for rows in everything.split(128):
            gap, counted = gaps([e[rows] for e in embeddings], rows, ties or not authors, True)
            numbers.append(((gap >= 0 if ties else gap > 0) & counted).sum(1))
        return torch.cat(numbers)

    def rank(*arguments):
        return 100 * float(nearer(*arguments).double().mean()) / (count if authors else count - 1)

    def cosine(embeddings, rows):
        return sum((e * member[chosen["random"][rows]]).sum(1)
                   for e, member in zip(embeddings, clean)) / len(clean)

    def farthest_other(embeddings, rows):
        distance = distances(embeddings, clean)
        same = labels[rows, None] == labels
        friends = same if authors else same & (everything != rows[:, None])
        return -F.relu(distance.masked_fill(same, -torch.inf).amax(1)
                       - distance.masked_fill(~friends, torch.inf).amin(1))

    if authors:
        shifted, before = (moved(lambda e, rows: to(e, rows, 1e-6), steps=steps,
                                 first=lambda e, rows: to(e, rows, 9e-7))
                           for steps in (attack.steps, attack.steps - 1))
    else:
        shifted = before = moved(to, start=True)
    wrong, stays = chosen["wrong" if authors else "rival"], nearer("top", True, -1, ties=True) < 4
    return {"CA+": rank("random query", False, 1), "CA-": rank("near query", False, -1),
            "QA+": rank("random candidate", True, 1), "QA-": rank("near candidate", True, -1),
            "TMA": float(cosine(moved(cosine), everything).double().mean()),
            "ES:D": float(to(before, everything).double().mean()),
            "ES:R": 100 * recall_of(retrieval, shifted),
            "LTM": 100 * recall_of(retrieval, moved(farthest_other)),
            "GTM": 100 * recall_of(retrieval, moved(lambda e, rows: -to(e, wrong[rows]))),
            "GTT": 100 * float(stays.double().mean())}


def distances(embeddings, others, exact=False):
    """d (b, N) of all pairs, averaged over the networks. exact: differences instead of a matrix
    product, which is off by 1e-3 for near-identical rows."""
    mode = f"{'donot_' if exact else ''}use_mm_for_euclid_dist"
    return sum(torch.cdist(e, member, compute_mode=mode)
               for e, member in zip(embeddings, others)) / len(others)


def recall_of(retrieval, embeddings):
    """Recall@1 of (attacked) queries among the clean images; ties count against the query."""
    space, hits = Space(retrieval.clean[0], retrieval.labels), []
    for rows in torch.arange(len(retrieval.labels)).split(128):
        distance = distances([e[rows] for e in embeddings], retrieval.clean, exact=True)
        same, other = space.masks(rows)
        hits.append(distance.masked_fill(~same, torch.inf).amin(1)
                    < distance.masked_fill(~other, torch.inf).amin(1))
    return float(torch.cat(hits).double().mean())


def ers_targets(retrieval, seed):
    """{name: candidate (n,)}: what each attack moves every image towards or away from."""
    labels, count = retrieval.labels, len(retrieval.labels)
    everything = torch.arange(count, device=labels.device)
    near, rival, wrong = [], [], []
    for rows in everything.split(128):
        distance = distances([e[rows] for e in retrieval.clean], retrieval.clean, exact=True)
        distance.scatter_(1, rows[:, None], torch.inf)
        near.append(distance.topk(count // 100, largest=False).indices)
        rival.append(distance.masked_fill(labels[rows, None] == labels, torch.inf).argmin(1))
        # the authors': of a class other than the top's; its place among those alone, as a number
        differs = labels[near[-1][:, :1]] != labels
        first = distance.masked_fill(~differs, torch.inf).argmin(1, keepdim=True)
        wrong.append((differs.cumsum(1) - 1).gather(1, first)[:, 0])
    near, chosen = torch.cat(near), {}
    for number, name in enumerate(("near query", "near candidate", "random query",
                                   "random candidate", "random"), 2):
        high = near.shape[1] if name.startswith("near") else count - 1
        stream = common.random_stream(seed, 0, common.EVALUATE, number)
        draw = torch.from_numpy(stream.integers(high, size=count)).to(labels.device)
        chosen[name] = near.gather(1, draw[:, None])[:, 0] if name.startswith("near") else \
            (everything + 1 + draw) % count
    return {**chosen, "top": near[:, 0], "rival": torch.cat(rival), "wrong": torch.cat(wrong)}


# ---- checks ----------------------------------------------------------------------------------
# Signs that scores say nothing, after Carlini et al. (arXiv 1902.06705) and AutoAttack's flags
# (Croce & Hein, ICML 2020). Recall@1 is that of the headline rule.

NOISE_DRAWS, SWEEP = 20, (2, 4, 8, 16, 32, 64, 128)          # the sweep in 1/255
MASKED = "gradients mislead (gradient masking) and scores under gradient attacks say nothing"


def verdict(name, passed, fact, meaning):
    return name, bool(passed), fact if passed else f"{fact}: {meaning}"


def cheap_checks(retrieval, models):
    """[(name, passed, text)]: what every evaluation takes for granted. models: the networks as they
    are, where those of `retrieval` normalise their embeddings."""
    few = next(iter(retrieval.batches()))[0][:8]
    changed, lengths, random, mixed = False, [], 0.0, 0.0
    for model in models:
        given = few.clone()
        with torch.no_grad():
            first, again, two = (model(x).float() for x in (given, few.clone(), few[:2].clone()))
        changed |= not torch.equal(given, few)
        lengths += first.norm(dim=1).tolist()
        random = max(random, float((first - again).abs().max()))
        mixed = max(mixed, float((first[:2] - two).abs().max() / first.abs().max()))
    alone = int((common.candidate_counts(retrieval.labels, retrieval.gallery_labels) == 0).sum())
    finite = all(bool(e.isfinite().all()) for e in retrieval.clean)
    return [
        verdict("input unchanged", not changed, f"images changed in place: {changed}",
                "the network gets copies here; copy them inside"),
        verdict("finite", finite, f"all embeddings finite: {finite}", "NaN counts as a miss"),
        verdict("deterministic", random == 0,
                f"the same images twice, embeddings differ by {random:.2g}",
                "the network draws random numbers (dropout left on?); switch that off"),
        verdict("batch dependence", random > 0 or mixed <= 1e-3,
                f"two images alone and in a batch, embeddings differ by {mixed:.2g}",
                "scores depend on the other images (BatchNorm in training mode?); call eval()"),
        verdict("unit norm", all(abs(length - 1) <= 1e-3 for length in lengths),
                f"embeddings have lengths from {min(lengths):.4g} to {max(lengths):.4g}",
                "they are not unit vectors and were normalised"),
        *([("collapse", False, text) for text in common.collapse_warnings(retrieval)] or
          [("collapse", True, "images differ in their embeddings")]),
        verdict("singletons", alone == 0,
                f"{alone} of {len(retrieval.labels)} queries have no candidate of their class",
                "each is a miss, whatever the network does")]


def checkable(attack):
    if attack.attack != "pgd" or re.match("worst|joint|ers", attack.objective):
        raise UserError(f"the checks are of PGD, not of joint, worst or ers: found {attack}")


def checks(retrieval, attack, models, others=()):
    """Yield (name, passed, text): whether the scores of this PGD attack mean anything. models: as
    in cheap_checks. others: networks on which images are crafted, too."""
    checkable(attack)
    if retrieval.gallery_batches is not None and attack.protocol == "clustering":
        raise UserError("checks of queries that have a gallery need --protocol template")
    yield from cheap_checks(retrieval, models)
    eps, count, excess, blind = attack.eps, len(retrieval.labels), [0.0], []
    seen = attack._replace(against="sum") if attack.against == "vote" else attack
    value, only = aim(retrieval, seen)                        # members already won are not masked

    def watched(objective, images, rows, start):              # the attack itself
        start = pgd(None, images, eps, 0, 0, start=start).requires_grad_()
        with torch.enable_grad():
            moved = value([model(start) for model in retrieval.models], rows)
            (gradient,) = torch.autograd.grad(moved.sum(), start)
        flat = ~gradient.flatten(1).any(1)
        blind.append(flat if only is None else flat[only[rows]])
        return pgd(objective, images, eps, attack.step, attack.steps, start=start)

    def rounded(objective, images, rows, start):              # to the 8-bit points of the ball
        x = pgd(objective, images, eps, attack.step, attack.steps, start=start)
        low, high = (255 * (images - eps) - 1e-3).ceil(), (255 * (images + eps) + 1e-3).floor()
        x = (255 * x).round().clamp(low, high).clamp(0, 255) / 255
        excess.extend([float((x - images).abs().max()) - eps, float((x - 0.5).abs().max()) - 0.5])
        return x

    def signs(objective, images, rows, _):
        return (images + eps * (2 * torch.randint_like(images, 2) - 1)).clamp(0, 1)

    def transferred(objective, images, rows, start):          # made on other networks
        with common.frozen(*others):
            return pgd(lambda x: foreign([model(x) for model in source.models], rows), images, eps,
                       attack.step, attack.steps, start=start)

    if others:
        with common.frozen(*others):
            source = common.Retrieval(
                [unit(model) for model in others], retrieval.batches, retrieval.labels,
                gallery_batches=retrieval.gallery_batches, gallery_labels=retrieval.gallery_labels)
            foreign, _ = aim(source, attack._replace(against="sum"))
    recall, eight_bit = (recall_under(retrieval, attack, craft) for craft in (watched, rounded))
    noise = recall_under(retrieval, attack._replace(restarts=NOISE_DRAWS), signs)
    share, equal = float(torch.cat(blind).double().mean()), tolerance(recall, count)
    yield verdict("zero gradients", not share > 0.01,         # NaN: no query is attacked
                  f"{100 * share:.3g} % of the images have no gradient at the first step", MASKED)
    yield verdict("8 bit", eight_bit <= recall + equal and max(excess) <= 1e-5,
                  f"{arrow(recall, eight_bit)} as 8-bit pictures, {max(excess):.1g} outside",
                  "the attack holds for floating-point input alone")
    yield verdict("random noise",
                  noise > recall + equal or recall <= chance_level(retrieval, False) + equal,
                  f"{arrow(recall, noise)} with random signs, the best of {NOISE_DRAWS} draws",
                  "noise does nearly as much; the attack is too weak or eps too small")
    margin = attack._replace(protocol="template", objective="impostor", against="sum")
    for name, before, variant, meaning in (
            *((f"steps x {factor}", recall, attack._replace(steps=factor * attack.steps),
               "the attack has not converged; quote the lower number") for factor in (2, 5)),
            ("10 restarts", recall, attack._replace(restarts=10),
             "the score hangs on the start; quote the lower number"),
            ("FGSM", recall, attack._replace(attack="fgsm", steps=1, step=eps),
             f"one step does more than many, so {MASKED}"),
            ("Square", recall_under(retrieval, margin),
             attack_of("template", "square", eps=eps, seed=attack.seed),
             f"without gradients the margin of queries falls further, so {MASKED}"),
            *[("transfer", recall, attack,
               f"images made for another network do more, so {MASKED}")] * bool(others)):
        now = recall_under(retrieval, variant, transferred if variant is attack else None)
        yield verdict(name, now >= before - tolerance(before, count), arrow(before, now), meaning)
    curve = [recall_under(retrieval, attack_of(
        attack.protocol, objective="target", eps=radius / 255, steps=2 * attack.steps,
        seed=attack.seed)) for radius in (0, *SWEEP)]
    chance = chance_level(retrieval, attack.protocol == "clustering")
    lowest = [max(low, chance) for low in [*itertools.accumulate(curve, min)][:-1]] + [chance]
    yield verdict("eps sweep",
                  all(now <= low + tolerance(low, count) for now, low in zip(curve, lowest)),
                  f"{arrow(*curve)} with target at eps 0, {', '.join(map(str, SWEEP))} / 255, "
                  f"{100 * chance:.1f} by chance",
                  "it should fall, in the end to chance (gradient masking, or too few steps)")


def recall_under(retrieval, attack, craft=None):
    """Recall@1 under an attack; craft: made otherwise than it says."""
    scores = retrieval.score(*attacked(retrieval, attack, craft), clustering=False)
    return next(iter(scores.values()))["R@1"]


def tolerance(share, count):
    """How far apart two Recall@1 of `count` images count as equal: 2 standard errors or points."""
    return max(0.02, 2 * (share * (1 - share) / count) ** 0.5)


def arrow(*scores):
    return "Recall@1 " + " -> ".join(f"{100 * score:.1f}" for score in scores)


def chance_level(retrieval, moved):
    """Recall@1 of a lookup that knows nothing: the share of a query's candidates in its class;
    moved: among those that, like the query, went to an image of another class."""
    _, index, size = retrieval.labels.unique(return_inverse=True, return_counts=True)
    count = common.candidate_counts(retrieval.labels, retrieval.gallery_labels).double()
    total = len(retrieval.names) - (retrieval.gallery_labels is None)
    if moved:                            # less that class, of this size on average, for it has left
        total = total - ((size.square().sum() - size.square()) / (len(index) - size))[index]
    return float((count / total).mean())


# ---- command line ----------------------------------------------------------------------------
def parse_args(argv=None):
    parser, number, fraction = common.Parser(__doc__), common.number, common.fraction
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder, checkpoint or pattern")
    add = parser.add_argument_group("attack").add_argument
    add("--protocol", choices=tuple(PROTOCOLS), default="clustering")
    add("--attack", nargs="+", choices=tuple(METHODS), default=["pgd"],
        help="cw: Carlini & Wagner, template only; square: without gradients; strong: the worst of "
             "many, recipe strong-1 (default: pgd)")
    add("--objective", nargs="+", default=[None], metavar="NAME",
        help="what is maximised (default: each first; impostor for square; worst, of many, for "
             "strong): " + "; ".join(f"{key} {', '.join(own)}" for key, own in OBJECTIVES.items()))
    add("--against", nargs="+", default=["sum"], metavar="WHAT",
        help="what is attacked: sum (default), concat, mean, vote, member_1 ..., members_1+2 ...")
    add("--eps", type=fraction, nargs="+", default=[None], metavar="8/255",
        help="radius, pixel values (default: 8/255; 0.01 for template)")
    add("--step-size", type=fraction, metavar="2/255",
        help="not fgsm, square (default: eps / 4; template 2 eps / steps; cw eps / 10; ers 3/8)")
    add("--attack-steps", type=number(int, 0), nargs="+", default=[None], metavar="N",
        help="(default: 10; template 5; cw 50; square 200; ers 32)")
    add("--restarts", type=number(int, 1), default=1, metavar="N", help="the best of N starts")
    add("--seed", type=number(int, 0, 2**32 - 1), nargs="+", metavar="N",
        help="of the attack (default: the run's)")
    add("--checks", action="store_true", help="do the scores mean anything? (50 attacks' time)")
    add("--transfer-from", metavar="RUN", help="--checks: also images made on this run's networks")
    add = parser.add_argument_group("data, machine and output").add_argument
    add("--gallery-from", metavar="RUN", help="template: its networks embed the gallery")
    add("--limit-queries", type=number(int, 0), default=0, metavar="N",
        help="a fixed class-balanced subset of N images (0: all)")
    add("--data-root", metavar="DIR", help="(default: the run's)")
    add("--batch-size", type=number(int, 1), default=128, metavar="B", help="images at once")
    add("--workers", type=number(int, 0, 256), default=2, metavar="N", help="loading threads")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--save-embeddings", metavar="FILE.npz", help="before and after, and up to 500 images")
    add("--overwrite", action="store_true", help="attack again what results.json has")
    args = parser.parse_args(argv)
    attacks = attacks_of(args, 0)
    if args.transfer_from and not args.checks or args.gallery_from and args.protocol != "template":
        parser.error("--transfer-from needs --checks, --gallery-from needs --protocol template")
    if args.save_embeddings and (len(attacks) > 1 or attacks[0].restarts > 1 or
                                 attacks[0].objective in ("worst", *OBJECTIVES["ers"])):
        parser.error("--save-embeddings is of one attack with one start, not of worst or ers")
    for attack in attacks if args.checks else ():
        checkable(attack)
    return args


def attacks_of(args, seed):
    return list(dict.fromkeys(
        attack_of(args.protocol, attack, objective=objective, against=against, eps=eps,
                  step_size=args.step_size, steps=steps, restarts=args.restarts, seed=number)
        for attack, objective, against, eps, steps, number in itertools.product(
            args.attack, args.objective, args.against, args.eps, args.attack_steps,
            args.seed or [seed])))


# ---- runs ------------------------------------------------------------------------------------
def main(args):
    """Attack runs, print one table, and return the report: [{"run", "flags", "clean", "records",
    "warnings"}], records in the order of the attacks asked for."""
    target, runs = Path(args.save_embeddings or "file.npz").absolute(), []
    if not target.parent.is_dir() or target.exists() and not target.is_file():
        raise UserError(f"--save-embeddings {target}: not a file in a folder that exists")
    named = (run for pattern in args.runs for run in sorted(glob.glob(pattern)) or [pattern])
    for run in dict.fromkeys(map(os.path.normpath, named)):
        if run.endswith(".npz") or Path(run).is_dir() and not (Path(run) / "last.pt").exists():
            print(f"{run}: no checkpoint, left out")
        else:
            runs.append(run)
    if not runs or args.save_embeddings and len(runs) > 1:
        raise UserError(f"found {len(runs)} runs with a checkpoint: give one (or more, to a table)")
    checkpoints = [common.load_checkpoint(run) for run in runs]           # all, before any work
    for checkpoint, attack in itertools.product(checkpoints, attacks_of(args, 0)):
        members_of(attack.against, len(checkpoint["members"]))
    others = [other_run(flag, path, runs, checkpoints) for flag, path in (
        ("--transfer-from", args.transfer_from), ("--gallery-from", args.gallery_from))]
    device = common.pick_device(args.device)
    for attack in attacks_of(args, 0):
        if attack.attack == "pgd" and attack.steps * attack.step < 2 * attack.eps * (1 - 1e-9):
            print(f"note: {attack} cannot cross the ball: raise --step-size or --attack-steps")
    report = [evaluate_run(run, checkpoint, *others, args, device)
              for run, checkpoint in zip(runs, checkpoints)]
    print_table(report, args)
    return report


def print_table(report, args):
    """Per run and inference rule a clean row and one per record; the title says what all share."""
    attacks, rows = attacks_of(args, 0), []
    names = [name for name in Attack._fields if name != "step"]           # it follows from eps
    differ = [name for name in names if len({getattr(attack, name) for attack in attacks}) > 1]

    def words(attack, names):
        texts = {**attack._asdict(), "eps": f"{255 * attack.eps:.3g}/255"}
        return ", ".join(f"{name} {texts[name]}" for name in names)

    for entry in report:
        texts = ["clean", *(words(attack, differ) or "attacked" for attack in attacks)]
        shown_records = list(zip(texts, [entry["clean"], *entry["records"]]))
        for what, record in shown_records[args.protocol == "ers":]:
            for rule, scores in record["scores"].items():
                name = [entry["run"], *[rule] * (len(record["scores"]) > 1), what]
                shown = common.percent(scores)
                if rule == "distance":                        # ERS has scales of its own
                    shown |= {key: f"{scores[key]:.2f}" for key in shown if key != "R@1"}
                rows.append((" ".join(name), shown))
    title = words(attacks[0], [name for name in names if name not in (*differ, "seed")])
    title += f", NMI by chance {100 * report[0]['clean'].get('NMI_chance', 0):.1f}"
    title += f", gallery from {name_of(args.gallery_from)}" if args.gallery_from else ""
    title += f", {args.limit_queries} images" if args.limit_queries else ""
    print(f"{title}; in %\n{common.format_table(rows)}")
    for entry in report:
        for warning in entry["warnings"]:
            print(f"warning: {entry['run']}: {warning}")


def name_of(run):
    return (Path(run).resolve().parent if Path(run).is_file() else Path(run).resolve()).name


def other_run(flag, path, runs, checkpoints):
    """The checkpoint of --transfer-from or --gallery-from, whose images must be those of every run;
    None without the flag."""
    def kind(content):
        flags = content["args"]
        return ([flags[name] for name in ("dataset", "image_size", "crop", "val_classes")],
                content["classes"], flags["dataset"] in common.GENERATED and flags["seed"],
                "gallery" in flag and (flags["embedding_dim"], len(content["members"])))

    source = common.load_checkpoint(path) if path else None
    for run, checkpoint in zip(runs, checkpoints if path else ()):
        if kind(source) != kind(checkpoint):
            raise UserError(f"{flag} {path} is of another kind than {run}: give one with the same "
                            f"data and image size (a gallery: as many networks and dimensions)")
    return source


def evaluate_run(run, checkpoint, transfer, gallery, args, device):
    """A run's entry of the report: what its results.json has, and what is measured and stored now.
    transfer, gallery: checkpoints of other runs, or None."""
    flags, label, path = argparse.Namespace(**checkpoint["args"]), name_of(run), \
        Path(run) / "results.json"
    stores = checkpoint["epoch"] >= flags.epochs and path.exists()
    if not stores:
        print(f"{run}: a bare checkpoint or an unfinished run; nothing is stored")
    results = read_results(path) if stores else {"clean": {}, "robust": [], "warnings": []}
    source, limit = name_of(args.gallery_from) if gallery else None, args.limit_queries
    attacks, warnings = attacks_of(args, flags.seed), results["warnings"]
    known = [own for own in results["robust"]
             if not args.overwrite and own.get("gallery_from") == source and (
                 own["n_queries"] == limit if own["limited"]
                 else not limit or own["n_queries"] <= limit)]

    def find(attack):
        return next((record for record in known if agrees(record, attack._asdict())), None)

    def store(attack, record):
        record |= {"gallery_from": source} if source else {}
        if source or results["clean"].get("n_queries") != record["n_queries"]:
            record["clean"] = clean                           # what this record compares with
        known.append(record)
        if stores:
            with rewritten(path) as content:
                robust = content["robust"]
                own = {**attack._asdict(), "n_queries": record["n_queries"], "gallery_from": source}
                place = next((i for i, old in enumerate(robust) if agrees(old, own)), len(robust))
                robust[place:place + 1] = [record]
        print(f"{label}: {attack}: {record['seconds']:.0f} s", flush=True)

    records = [find(attack) for attack in attacks]
    if all(records) and not (args.checks or args.save_embeddings):
        clean = records[0].get("clean", results["clean"])
    else:
        retrieval, members, test = open_run(checkpoint, gallery, flags, args, device)
        clean = common.clean_scores(retrieval, flags.seed)
        warnings += [text for _, passed, text in cheap_checks(retrieval, members)
                     if not passed and text not in warnings]
        records = [measured(retrieval, attack, test.limited, find, store)[0] for attack in attacks]
        if args.save_embeddings:
            save_embeddings(args.save_embeddings, retrieval, attacks[0], test, flags.data_root)
        others = common.load_model(transfer, device) if transfer else []
        for attack in attacks if args.checks else ():
            failed, mark = [], f"({attack}): "
            for name, passed, text in checks(retrieval, attack, members, others):
                print(f"{'pass' if passed else 'WARNING'}  {name}: {text}", flush=True)
                failed += [] if passed or text in warnings else [f"check {name} {mark}{text}"]
            with rewritten(path) if stores else contextlib.nullcontext({}) as content:
                for held in (warnings, content.get("warnings", [])):
                    held[:] = [text for text in held if mark not in text] + failed
    return {"run": label, "flags": checkpoint["args"], "clean": clean, "records": records,
            "warnings": warnings}


def open_run(checkpoint, gallery, flags, args, device):
    """(Retrieval, the networks, the images that the run reports on)."""
    flags.data_root, flags.limit_queries = args.data_root or flags.data_root, args.limit_queries
    _, test = common.load_run_data(flags, checkpoint)
    common.cache_images([test, test.gallery], 4.0, args.workers)
    members = common.load_model(checkpoint, device)
    retrieval = common.retrieval_of(
        members, test, ks=common.KS.get(flags.dataset, (1, 2, 4, 8)), batch_size=args.batch_size,
        workers=args.workers, device=device)
    if gallery:                       # by other networks; row i is still no candidate of query i
        retrieval.gallery = common.embed(common.load_model(gallery, device), (
            retrieval.gallery_batches or retrieval.batches)())
    return retrieval, members, test


def agrees(record, wanted):
    """Whether a stored record has what is wanted; floats may differ by rounding."""
    return all(math.isclose(record[name], value, rel_tol=1e-9) if isinstance(value, float)
               else record.get(name) == value for name, value in wanted.items())


def read_results(path):
    """results.json, whose records must have the numbers and scores of an attack."""
    content, fields = common.read_json(path), {*Attack._fields, "n_queries", "limited", "scores"}
    if not (isinstance(content.get("clean"), dict) and isinstance(content.get("warnings"), list)
            and isinstance(content.get("robust"), list)
            and all(isinstance(own, dict) and fields <= own.keys() for own in content["robust"])):
        raise UserError(f"{path} is damaged: restore it, or delete it and train on (same command)")
    return content


@contextlib.contextmanager
def rewritten(path):
    """The content of results.json as it is now, changed inside the `with` and written after it."""
    with common.locked(path.parent, wait=True):
        content = read_results(path)
        yield content
        common.write_atomic(path, json.dumps(content, indent=1).encode())


def save_embeddings(path, retrieval, attack, test, root):
    """Attack once more, and write NumPy arrays: clean, attacked (networks, n, D); labels (n,),
    paths, classes; attack: its numbers as JSON. rows: up to 500 queries; images_clean,
    images_attacked: these. With a gallery also gallery, gallery_labels, _paths, _attacked."""
    rows = torch.linspace(0, len(test) - 1, min(500, len(test))).round().long().tolist()
    clean = [test[row][0] for row in rows]
    made = dict(zip(rows, clean))

    def watch(batch, numbers):
        made.update({row: x.cpu() for row, x in zip(numbers.tolist(), batch) if row in made})

    def names(dataset):
        return [name if dataset.generated else Path(os.path.relpath(name, root)).as_posix()
                for name in dataset.paths]

    moved, met = attacked(retrieval, attack, watch=watch)
    embeddings = {"clean": retrieval.clean, "attacked": moved, "gallery": retrieval.gallery,
                  "gallery_attacked": met if attack.protocol == "clustering" else None}
    arrays = {"labels": test.labels, "paths": names(test), "classes": test.classes, "rows": rows,
              "attack": json.dumps({**attack._asdict(), "eps_255": 255 * attack.eps}),
              "images_clean": torch.stack(clean), "images_attacked": torch.stack([*made.values()])}
    arrays |= {name: torch.stack(e).cpu().numpy() for name, e in embeddings.items() if e}
    if test.gallery is not None:
        arrays |= {"gallery_labels": test.gallery.labels, "gallery_paths": names(test.gallery)}
    content = io.BytesIO()
    np.savez(content, **arrays)
    common.write_atomic(path, content.getvalue())
    print(f"wrote {path}")


if __name__ == "__main__":
    common.run_script(parse_args, main)
