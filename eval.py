# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""How robust is an embedding model? Attacks runs of these scripts, or any model of your own.

    python eval.py runs/eat-cub-mobilenetv2-s0              # all it needs is in the checkpoint
    python eval.py runs/* --protocol template --eps 0.05    # one table over all runs
    python eval.py runs/* --protocol template --attack pgd fgsm cw --eps 0.01 0.05 --seed 0 1 2
    python eval.py runs/eat-glyphs-* --table results/eat-glyphs    # mean and std over seeds
    python eval.py --arch resnet18 --weights net.pt --dataset cub    # no run
    python eval.py runs/eat-glyphs-* --sweep-eps --figures figures    # Recall@1 over eps, and more
    python eval.py runs/eat-glyphs-convnet-s0 --checks      # do its scores mean anything?
    from eval import evaluate_robustness                    # your own model: README

Protocols: "clustering" attacks every image and compares attacked images (Ke, arXiv 2501.01025);
"template" attacks queries against a clean gallery (Algorithm 1 of Panum et al., arXiv 2102.07265);
"ers" is the Empirical Robustness Score, ten figures of nine attacks (Zhou & Patel, CVPR 2022).
A run's folder gets its new entries in results.json, each as soon as its attack is finished; one
that is there already is read back.
"""

import argparse
import copy
import csv
import glob
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, pgd

# ---- any model

def evaluate_robustness(embed, images_or_loader, labels=None, *, protocol="clustering",
                        attack="pgd", objective="shift", eps=8 / 255, step_size=None, steps=10,
                        restarts=1, random_start=True, ks=(1, 2, 4, 8), batch_size=128, seed=0,
                        device=None):
    """Clean and attacked retrieval of an embedding model: {"clean", "robust", "warnings"}.

    embed: a module or callable from images (B, 3, H, W) in [0, 1] to embeddings (B, D), or a list
    of them (an ensemble: attacked together, scored by every inference rule). Its own normalisation
    belongs inside. Rows that are not unit vectors are normalised, with a warning.
    images_or_loader: (n, 3, H, W) with labels (n,), or a loader of (images, labels), which is read
    once and kept in memory.
    attack: pgd, fgsm, square (no gradients), strong (the frozen recipe strong-1: the worst of many
    attacks, with its own steps and step_size); with the template protocol also cw (Carlini &
    Wagner) and min-eps (the smallest radius up to eps that makes a query fail); curve (growing
    radii up to eps, and eps50, which halves Recall@1).
    objective: "shift" moves an image away from its clean embedding; square, strong, curve and ers
    put their own in its place (impostor; worst; joint or impostor; the ten of ers). "neighbour"
    (template only): a rightly answered query away from its nearest neighbour, Algorithm 1 of Panum
    et al. (and "self", the same queries away from themselves). Under all others the template
    protocol attacks every query: "targeted-random", "targeted-nearest"; those of `measure`, most of
    which read labels; "worst" of all. For clustering also "joint". "ers-authors": ers with the
    slips of its authors' code.
    eps, step_size (None: eps / 4; cw: eps / 10) in pixel values. steps: 10 stands for the 200 of
    square and the 32 of ers. restarts keep the highest objective per image. Scores are in [0, 1].
    Modes, gradients and the state of the random generators are afterwards as before.
    Raises ValueError when images are outside [0, 1] or arguments do not fit together.
    """
    if protocol == "ers" or attack in ("square", "strong", "curve"):
        objective = None if objective == "shift" else objective
        steps = None if steps == 10 else steps
    elif step_size is None and attack != "cw":
        step_size = eps / 4
    settings = common.Attack(protocol, attack, objective, eps, step_size, steps, restarts,
                             random_start, seed)
    clean, robust, alerts = _evaluated(embed, images_or_loader, labels, settings, ks, batch_size,
                                       device, attack_entries)
    for entry in robust:
        entry["amp"] = any(getattr(model, "amp", False) for model in _listed(embed))
    return {"clean": clean, "robust": robust, "warnings": alerts}


def check_robustness(embed, images_or_loader, labels=None, *, protocol="clustering",
                     objective="shift", eps=8 / 255, step_size=None, steps=10, restarts=1,
                     random_start=True, batch_size=128, seed=0, device=None, transfer_from=None):
    """Do the numbers of evaluate_robustness with these arguments mean anything?

    Arguments as there; transfer_from: another model (or list), on which images are crafted too.
    Returns [{"name", "passed": bool, "text"}], the checks of `eval.py --checks`.
    """
    attack = common.Attack(protocol, "pgd", objective, eps, eps / 4 if step_size is None
                           else step_size, steps, restarts, random_start, seed)

    def entries(retrieval, attack):
        source = _listed(transfer_from) if transfer_from is not None else []
        with common.frozen(*source):
            return list(checks(retrieval, attack, outputs=_listed(embed),
                               source=source_of(retrieval, [_unit_rows(own) for own in source])))

    return _evaluated(embed, images_or_loader, labels, attack, (1,), batch_size, device, entries)[1]


def _listed(embed):
    return list(embed) if isinstance(embed, (list, tuple, nn.ModuleList)) else [embed]


def _unit_rows(model):
    return lambda images: F.normalize(model(images), dim=1)


def _evaluated(embed, images_or_loader, labels, attack, ks, batch_size, device, entries):
    """common.evaluate of any model: (clean, entries, warnings); all else is as before."""
    models = _listed(embed)
    modules = [model for model in models if isinstance(model, nn.Module)]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    if not models or batch_size < 1 or min(ks, default=0) < 1:
        raise ValueError("evaluate_robustness needs a model, batch_size >= 1 and ks >= 1")
    with torch.random.fork_rng(devices=cuda), common.frozen(*modules):
        images, labels = _images_and_labels(images_or_loader, labels)
        if device is None:
            parameters = (parameter for module in modules for parameter in module.parameters())
            device = next(parameters, images).device
        alerts = []
        for i, model in enumerate(models):
            with torch.no_grad():
                norms = _checked(model(images[:2].to(device)), 2).norm(dim=1)
            if (norms - 1).abs().max() > 1e-3:
                alerts.append(f"the outputs of model {i + 1} are not unit vectors (first norm "
                              f"{norms[0]:.3g}): they were normalised")
        rows = torch.arange(len(images)).split(batch_size)

        def batches():
            return ((images[batch].to(device), None, batch) for batch in rows)

        clean, found, more = common.evaluate([_unit_rows(model) for model in models], batches,
                                             labels.to(device), [attack], ks=ks, seed=attack.seed,
                                             entries=entries)
    return clean, found, alerts + more


def _images_and_labels(images, labels):
    """One tensor of images in [0, 1] and int64 labels, out of either form; checked."""
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(images, torch.Tensor):
        if labels is not None:
            raise ValueError("labels come with a tensor of images; a loader yields its own")
        batches = list(images)
        if not batches:
            raise ValueError("the loader is empty: it must yield (images, labels)")
        images, labels = zip(*batches)
        images, labels = torch.cat(images), torch.cat([torch.as_tensor(part) for part in labels])
    if labels is None:
        raise ValueError("a tensor of images needs labels (n,): only a loader yields its own")
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1] and labels whole numbers, found "
                         f"{images.dtype} and {labels.dtype}")
    labels = labels.to(torch.int64)
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(labels) < 2:
        raise ValueError(f"expected images (n, 3, H, W) and labels (n,) with n >= 2, found "
                         f"{tuple(images.shape)} and {tuple(labels.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-5 and high <= 1 + 1e-5):
        raise ValueError(f"images must be in [0, 1], found {low:.3g} to {high:.3g}: eps counts "
                         f"pixel values, so normalise inside the model, for example "
                         f"lambda x: net((x - mean) / std)")
    return images.float().clamp(0, 1), labels


def _checked(embeddings, count):
    if not (isinstance(embeddings, torch.Tensor) and embeddings.dim() == 2
            and len(embeddings) == count):
        found = tuple(getattr(embeddings, "shape", ())) or type(embeddings).__name__
        raise ValueError(f"embed must return embeddings (B, D): found {found} for B = {count}")
    return embeddings


# ---- attacks

def attack_entries(retrieval, attack, proxies=None):
    """The entries of results.json of any attack, one per inference rule.

    proxies: those of the training, one (C, D) per model; pal-pseudo needs them.
    """
    if attack.protocol == "ers":
        return [ers_entry(retrieval, attack)]
    if attack.alone:
        return member_entries(retrieval, attack, proxies)
    if attack.objective == "worst":
        return worst_entries(retrieval, attack, proxies)
    if attack.attack == "curve":
        return curve_entries(retrieval, attack, proxies)
    started = time.perf_counter()
    embeddings, gallery, more = attacked(retrieval, attack, proxies)
    return common.scored_entries(retrieval, attack, embeddings, gallery, started, more)


def member_entries(retrieval, attack, proxies=None):
    """Every member attacked alone: its entry, "against" that member."""
    found = []
    for i in range(len(retrieval.models)):
        own, name = copy.copy(retrieval), f"member_{i + 1}"
        own.models, own.clean = retrieval.models[i:i + 1], retrieval.clean[i:i + 1]
        own.gallery = retrieval.gallery and retrieval.gallery[i:i + 1]
        started = time.perf_counter()
        embeddings, gallery, more = attacked(own, attack, proxies and proxies[i:i + 1])
        (entry,) = common.scored_entries(own, attack, embeddings, gallery, started, more)
        found.append({**entry, "rule": name, "against": name, "alone": True})
    return found


def attacked(retrieval, attack, proxies=None):
    """(attacked embeddings of the queries, the gallery that they meet, {rule: more scores})."""
    if attack.objective.startswith("joint"):
        images, chosen = joint(retrieval, attack)
        embeddings = common.embed(retrieval.models, on_device(retrieval, images))
        return embeddings, None, share_scores(retrieval, attack, embeddings, chosen)
    aim, craft, extra = plan(retrieval, attack, proxies)
    embeddings, gallery = common.attacked_embeddings(retrieval, attack, aim, craft)
    return embeddings, gallery, extra(embeddings)


def plan(retrieval, attack, proxies=None):
    """How an attack is crafted, batch by batch: (aim, craft, extra); aim and craft as in
    common.attacked_embeddings, extra(embeddings): {rule: more scores}."""
    target, craft, chosen = None, None, attacked_share(retrieval, attack)

    def extra(embeddings):
        return share_scores(retrieval, attack, embeddings, chosen)

    if attack.objective in ("neighbour", "self"):
        aim = common.neighbour_objectives(retrieval, own=attack.objective == "self")
    elif attack.objective.startswith("targeted"):
        target = target_classes(retrieval, attack)
        aim = targeted_objectives(retrieval, target), None
        before = success_rates(retrieval, retrieval.clean, target)

        def extra(embeddings):
            after = success_rates(retrieval, embeddings, target)
            return {rule: {"success": rate, "success_clean": before[rule]}
                    for rule, rate in after.items()}
    else:
        if retrieval.gallery is not None and attack.protocol == "clustering" and (
                attack.objective, attack.against, chosen) != ("shift", "sum", None):
            raise UserError(f"{attack}: with a gallery of its own, clustering moves that too, and "
                            f"away from itself alone: use shift, or --protocol template")
        models, value = reading(retrieval, attack, proxies)
        aim = (lambda rows: lambda images: value([model(images) for model in models], rows)), chosen

    succeeds = success_tests(retrieval, target)
    if attack.attack == "strong-1":
        def craft(objective, images, rows):
            return ascend(objective, images, attack.eps, attack.step_size, attack.steps)
    elif attack.attack == "square":
        def craft(objective, images, rows):
            return square(objective, images, attack.eps, attack.steps)
    elif attack.attack == "cw":
        def craft(objective, images, rows):          # a smaller change than eps changes no score
            return carlini_wagner(lambda x, i: aim[0](rows[i.cpu()])(x),
                                  lambda x, i: succeeds(rows[i.cpu()])(x), images, attack.eps,
                                  attack.step_size, attack.steps, attack.random_start,
                                  enough=attack.eps)
    elif attack.attack == "min-eps":
        smallest = torch.full(retrieval.labels.shape, torch.inf, device=retrieval.labels.device)
        counted = slice(None) if aim[1] is None else aim[1]

        def craft(objective, images, rows):
            adversarial, smallest[rows] = minimal_radius(
                objective, succeeds(rows), images, attack.eps, attack.step_size, attack.steps,
                attack.random_start)
            return adversarial

        success = extra

        def extra(embeddings):
            scores, rule = success(embeddings), "member_1" if len(embeddings) == 1 else "vote"
            return {**scores, rule: {**scores.get(rule, {}), **radius_scores(smallest[counted])}}

    return aim, craft, extra


# ---- objectives

def measure(objective, own, labels, candidates=None, names=None, seed=0, proxies=None):
    """value(e (B, D), rows (B,)) -> (B,): what an attack maximises in one space of embeddings.

    own (n, D): the clean embeddings t of the queries, unit rows, with labels (n,). candidates
    (N, D), names (N,): where they are looked up; None: among themselves, each without itself.
    cos and Euclidean d to e, the embedding of the attacked image:

    shift           1 - cos to its own t
    push-mean       1 - cos to the mean t of its class, itself included
    target-other    cos to the t of one random image of another class
    decoy           cos to the mean t of another class: near ones first, the images of a class
                    spread evenly over the others
    nearest         d to the t of its class that is nearest to its own (alone in its class: its own)
    impostor        d to the nearest t of its class (alone: its own) minus d to the nearest of
                    another, both nearest to e: Recall@1 fails where it is not below 0, and for
                    whom is alone. impostor@K: to the Kth of others
    soft-impostor   the same over cosines with log-sum-exp at scale 16 in place of the extremes
    pal-pseudo      Proxy Anchor of e with the class whose proxy (C, D) is nearest to t
    """
    kind, _, rank = objective.partition("@")
    if kind == "shift":
        return lambda e, rows: 1 - (e * own[rows]).sum(1)
    if kind == "pal-pseudo":
        if proxies is None:
            raise UserError("pal-pseudo needs the proxies of the training: attack a run of a "
                            "Proxy Anchor method, or leave it out")
        nearest = torch.cat([(part @ F.normalize(proxies, dim=1).T).argmax(1)
                             for part in own.split(1024)])
        loss = torch.func.vmap(lambda e, label: common.proxy_anchor_loss(e[None], label[None],
                                                                         proxies))
        return lambda e, rows: loss(e, nearest[rows])
    among = candidates is None                                # the queries themselves
    candidates, names = (own, labels) if among else (candidates, names)
    if kind != "nearest" and (names[0] == names).all():
        raise UserError(f"{objective} needs candidates of two classes: give more data")

    def allowed(rows):
        """bool (B, N) each: of its class and not itself; of another class."""
        same = labels[rows, None] == names
        other = ~same
        if among:
            same[torch.arange(len(rows)), rows] = False
        return same, other

    def closeness(e):                                         # in the order of -d
        return e @ candidates.T - candidates.square().sum(1) / 2

    alone = common.candidate_counts(labels, None if among else names)[:, None] == 0   # (n, 1)
    if kind == "nearest":
        index = torch.cat([closeness(own[rows]).masked_fill(~allowed(rows)[0], -torch.inf).argmax(1)
                           for rows in torch.arange(len(own)).split(1024)])
        point = torch.where(alone, own, candidates[index])
        return lambda e, rows: common.euclidean(e, point[rows])
    if kind in ("push-mean", "decoy"):
        classes, index = names.unique(return_inverse=True)
        means = own.new_zeros(len(classes), own.shape[1]).index_add_(0, index, candidates)
        means = F.normalize(means, dim=1)
        if kind == "push-mean":
            place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
            point = torch.where((classes[place] == labels)[:, None], means[place], own)
            return lambda e, rows: 1 - (e * point[rows]).sum(1)
        point = means[decoys(own, means, labels, classes)]
        return lambda e, rows: (e * point[rows]).sum(1)
    if kind == "target-other":
        point = candidates[random_others(labels, names, seed)]
        return lambda e, rows: (e * point[rows]).sum(1)
    if kind == "impostor":
        def value(e, rows):
            same, other = allowed(rows)
            with torch.no_grad():
                near = closeness(e)
                friend = near.masked_fill(~same, -torch.inf).argmax(1)
                k = other.sum(1, keepdim=True).clamp(max=int(rank or 1))
                foe = near.masked_fill(~other, -torch.inf).topk(int(k.max())).indices
                foe = foe.gather(1, k - 1)[:, 0]
            friends = torch.where(alone[rows], own[rows], candidates[friend])
            return common.euclidean(e, friends) - common.euclidean(e, candidates[foe])
        return value

    if kind != "soft-impostor":
        raise ValueError(f"measure knows no objective {objective!r}")

    def value(e, rows):
        same, other = allowed(rows)
        cosine = 16 * e @ candidates.T
        friend = torch.where(alone[rows, 0], 16 * (e * own[rows]).sum(1),
                             cosine.masked_fill(~same, -torch.inf).logsumexp(1))
        return (cosine.masked_fill(~other, -torch.inf).logsumexp(1) - friend) / 16
    return value


def random_others(labels, names, seed):
    """For every query one candidate of another class, at random (n,)."""
    ranked, order = names.sort(stable=True)                   # a class is one block of the order
    first = torch.searchsorted(ranked, labels)
    size = torch.searchsorted(ranked, labels, right=True) - first
    draw = torch.from_numpy(common.random_stream(seed, 0, common.TARGETS).random(len(labels)))
    place = (draw.to(labels.device) * (len(names) - size)).long()
    return order[place + size * (place >= first)]


def decoys(own, means, labels, classes):
    """For every query (n, D) another class (n,), a row of means (C, D), near ones first by cosine:
    at most ceil(n_c / k) of the n_c queries of a class go to each of the k others."""
    goal = torch.empty_like(labels)
    for label in labels.unique():
        rows, same = (labels == label).nonzero()[:, 0], classes == label
        others = len(classes) - int(same.sum())
        # a query meets fewer full classes than there are queries: its nearest so many are enough
        near, place = (own[rows] @ means.T).masked_fill(same, -torch.inf).topk(
            min(len(rows), others))
        order = near.flatten().argsort(descending=True, stable=True)
        chosen, taken = {}, Counter()
        for row, other in zip((order // near.shape[1]).tolist(), place.flatten()[order].tolist()):
            if row not in chosen and taken[other] < math.ceil(len(rows) / others):
                chosen[row] = other
                taken[other] += 1
        goal[rows] = torch.tensor([chosen[i] for i in range(len(rows))], device=goal.device)
    return goal


VOTE_MARGIN = 0.1


def reading(retrieval, attack, proxies=None, current=None, ids=None):
    """What attack.against names: (its models, value(their embeddings of a batch, rows) -> (B,)).

    current: the candidates' embeddings now, one per model, in place of the clean ones. ids: labels
    in place of retrieval.labels, one per space.
    """
    members = members_of(attack, len(retrieval.models))
    values, together = [], attack.against in ("concat", "mean")
    if together and attack.objective == "pal-pseudo":
        raise UserError(f"pal-pseudo reads the proxies of each member: drop --against "
                        f"{attack.against}")
    for i, (own, candidates) in enumerate(spaces_of(retrieval, attack, current)):
        labels, names = ids[i] if ids else labels_in(retrieval, attack, own, candidates)
        objective = attack.objective.replace("impostor-pseudo", "impostor")
        if current:                             # the vote is won or lost by the exact condition
            objective = "impostor" if attack.against == "vote" else "soft-impostor"
        values.append(measure(objective, own, labels, candidates, names, attack.seed,
                              proxies[members[i]] if proxies else None))

    def value(found, rows):
        if together:
            found = [common.rule_spaces(found)[attack.against][0]]
        terms = [value(e, rows) for value, e in zip(values, found)]
        if attack.against == "vote":            # who is clearly wrong already counts no more
            terms = [term.clamp(max=VOTE_MARGIN) for term in terms]
        return sum(terms)

    return [retrieval.models[i] for i in members], value


def members_of(attack, count):
    """The numbers, from 0, of the networks that attack.against reads."""
    members = [int(i) - 1 for i in re.findall(r"\d+", attack.against)] or [*range(count)]
    if max(members) >= count or attack.against in ("concat", "mean", "vote") and count == 1:
        raise UserError(f"--against {attack.against}: the run's networks are {count} in number; "
                        f"drop it")
    return members


def spaces_of(retrieval, attack, embeddings=None):
    """[(queries, candidates or None)] of the spaces that attack.against reads."""
    spaces = common.rule_spaces(embeddings or retrieval.clean, retrieval.gallery)
    names = [attack.against] if attack.against in ("concat", "mean") else \
        [f"member_{i + 1}" for i in members_of(attack, len(retrieval.models))]
    return [spaces[name] for name in names]


def labels_in(retrieval, attack, own, candidates):
    """Labels of queries and candidates; for -pseudo objectives the ids of k-means on both."""
    if not attack.objective.endswith("-pseudo") or attack.objective == "pal-pseudo":
        return retrieval.labels, retrieval.gallery_labels
    both = own if candidates is None else torch.cat([own, candidates])
    ids = common.kmeans(both, len(retrieval.names.unique()), attack.seed)
    if (ids == ids[0]).all():                    # collapsed to a point: every image by itself
        ids = torch.arange(len(both), device=both.device)
    return ids[:len(own)], None if candidates is None else ids[len(own):]


def joint(retrieval, attack):
    """All images attacked together against where the others are now; EAT's own Eq. (3).

    Every step maximises soft-impostor against the present embeddings of all other images, held
    fixed for that step. Unlike shift and push-mean, under which the images of a class move together
    and meet again, it gets stronger with eps. -> ([attacked images of a batch], chosen or None),
    on the CPU: together they may be larger than a GPU.
    """
    if retrieval.gallery is not None:
        raise UserError("joint attacks images that are compared with each other: it needs a run "
                        "with --inshop-protocol query")
    chosen, models = attacked_share(retrieval, attack), retrieval.models
    ids = [labels_in(retrieval, attack, own, None) for own, _ in spaces_of(retrieval, attack)]
    sizes = halved(attack.step_size, attack.steps) if attack.attack == "strong-1" else \
        [attack.step_size] * attack.steps
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []

    def radius(images, rows):
        mask = torch.ones(len(rows)) if chosen is None else chosen[rows]
        return attack.eps * mask.to(images).view(-1, 1, 1, 1)

    with torch.random.fork_rng(devices=cuda), common.frozen(*models):
        now = []
        for number, (images, _, rows) in enumerate(retrieval.batches()):
            common.seed_torch(attack.seed, 0, common.EVALUATE, number)
            eps = radius(images, rows)
            start = torch.empty_like(images).uniform_(-1, 1) if attack.random_start else 0
            now.append(pgd(None, images, eps, 0, 0, start=images + eps * start).cpu())
        for size in sizes:
            current = common.embed(models, on_device(retrieval, now))
            read, value = reading(retrieval, attack, current=current, ids=ids)
            for number, (images, _, rows) in enumerate(retrieval.batches()):
                now[number] = pgd(lambda x: value([model(x) for model in read], rows), images,
                                  radius(images, rows), size, 1, start=now[number].to(images)).cpu()
    return now, chosen


def on_device(retrieval, images):
    """Batches of images as common.embed takes them."""
    return ((own.to(retrieval.labels.device), None, None) for own in images)


def halved(step_size, steps):
    """Half of the steps at step_size, a quarter at its half, the rest at its quarter."""
    return [step_size / (1 if step < steps // 2 else 2 if step < 3 * steps // 4 else 4)
            for step in range(steps)]


def ascend(objective, images, eps, step_size, steps):
    """PGD whose step size is halved twice; every stage begins at the best iterate so far."""
    best = None
    for size, stage in itertools.groupby(halved(step_size, steps)):
        best = pgd(objective, images, eps, size, len(list(stage)), start=best, keep="best")
    return best


def square(objective, images, eps, queries):
    """Square Attack (Andriushchenko et al., ECCV 2020, Alg. 1 and 2), l_inf: random search without
    gradients. Of every image, a square window of ever smaller side goes to +-eps, one sign a
    channel, and stays where the objective rises. Starts at vertical stripes of +-eps; sides as in
    the authors' code, from 0.8 of the area.
    """
    def signs(*shape):
        return 2.0 * torch.randint(2, shape, device=images.device) - 1

    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    with torch.no_grad():
        best = (images + eps * signs(count, channels, 1, width)).clamp(0, 1)
        value = objective(best)
        for query in range(queries):
            marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)      # of 10,000 queries
            area = 0.8 / 2 ** sum(10_000 * query >= mark * queries for mark in marks)
            side = max(1, min(round((area * height * width) ** 0.5), height, width))
            top = torch.randint(height - side + 1, (count, 1, 1, 1), device=images.device)
            left = torch.randint(width - side + 1, (count, 1, 1, 1), device=images.device)
            window = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
            tried = (images + eps * signs(count, channels, 1, 1)).clamp(0, 1)
            tried = torch.where(window, tried, best)
            risen = objective(tried)
            best = torch.where((risen > value).view(-1, 1, 1, 1), tried, best)
            value = torch.maximum(risen, value)
    return best


def attacked_share(retrieval, attack):
    """The images that are attacked (n,) bool, drawn from the seed; None: all."""
    count = len(retrieval.labels)
    if attack.attacker_share == 100:
        return None
    number = min(max(1, round(count * attack.attacker_share / 100)), count - 1)
    order = common.random_stream(attack.seed, 0, common.TARGETS, 1).permutation(count)
    return torch.from_numpy(np.isin(np.arange(count), order[:number])).to(retrieval.labels.device)


def share_scores(retrieval, attack, embeddings, chosen):
    """{rule: Recall@1 and AMI of the attacked and of the untouched images}; None: {}."""
    if chosen is None:
        return {}
    labels, clusters = retrieval.labels, len(retrieval.labels.unique())
    assigned = {rule: common.kmeans(own, clusters, attack.seed).cpu()
                for rule, (own, _) in common.rule_spaces(embeddings).items()}
    if len(embeddings) > 1:
        assigned["vote"] = common.vote_clusters(torch.stack(
            [assigned[f"member_{i + 1}"] for i in range(len(embeddings))]), clusters)
    hits, scores = per_query(retrieval, embeddings, None), {}
    for side, part in (("attacked", chosen.cpu()), ("untouched", ~chosen.cpu())):
        for rule, (hit, _) in hits.items():
            scores.setdefault(rule, {}).update({
                f"R@1_{side}": float(hit.cpu()[part].double().mean()),
                f"AMI_{side}": common.ami(labels.cpu()[part], assigned[rule][part])})
    return with_member_mean(scores, len(embeddings))


def with_member_mean(scores, count):
    """{rule: {name: number}} with the mean of the members beside them, where there are several."""
    if count == 1:
        return scores
    members = [scores[f"member_{i + 1}"] for i in range(count)]
    return {**scores, "member_mean": {
        name: statistics.mean(own[name] for own in members) if isinstance(value, float) else value
        for name, value in members[0].items() if not isinstance(value, (dict, str))}}


# ---- worst case

def worst_entries(retrieval, attack, proxies=None):
    """The worst of many attacks as entries of results.json, one per inference rule.

    Scores with _free: label-free attacks alone. worst_by: which attacks decide. parts: {attack:
    Recall@1 under it}. hits: the queries that the worst leaves right, bits in hexadecimal. bound,
    clustering alone: the mean over images of their lowest hit, which no one attack need reach.
    """
    started, found = time.perf_counter(), []
    for free, part in worst_parts(attack, len(retrieval.models), bool(proxies)):
        embeddings, gallery, _ = attacked(retrieval, part, proxies)
        scores = retrieval.scores(embeddings, gallery, attack.seed,
                                  clustering=attack.protocol == "clustering")
        name = part.words()[1] + (" (Square)" if part.attack == "square" else "")
        found.append((name, free, embeddings, per_query(retrieval, embeddings, gallery), scores))
    every = {}
    for rule in found[0][3]:
        own = {name: value for name, value in found[0][4][rule].items() if "tie" not in name}
        for suffix, parts in (("_free", [part for part in found if part[1]]), ("", found)):
            if attack.protocol == "template":
                worst, by, hit = worst_of_queries(retrieval, attack, gallery, parts, rule)
            else:
                worst, by, hit = worst_of_sets(parts, rule)
                all_hit = torch.stack([outcome[rule][0] for *_, outcome, _ in parts]).all(0)
                own[f"bound{suffix}"] = float(all_hit.double().mean())
            own |= {name + suffix: value for name, value in worst.items()}
            own[f"worst_by{suffix}"] = by
            own |= common.recall_interval(hit, retrieval.labels, attack.seed)     # the last: of all
        own["hits"] = np.packbits(hit.cpu().numpy()).tobytes().hex()
        own["parts"] = {name: scores[rule]["R@1"] for name, *_, scores in found}
        every[rule] = own
    every = with_member_mean(every, len(retrieval.models))
    amp = any(getattr(model, "amp", False) for model in retrieval.models)
    seconds = round(time.perf_counter() - started, 3)
    return [{"rule": rule, **attack.entry(), "amp": amp, "limited": retrieval.limited,
             "seconds": seconds, **every[rule]} for rule in found[0][4]]


def worst_of_queries(retrieval, attack, gallery, parts, rule):
    """Template: of every query the attack that makes it a miss, among several the lowest AP@R; one
    real perturbation each. -> (scores, {attack: share of the queries}, hits (n,))."""
    hit, precision = (torch.stack(own) for own in zip(*(part[3][rule] for part in parts)))  # (P, n)
    best = (2 * hit + precision).argmin(0)
    rows = torch.arange(len(best), device=best.device)
    chosen = [torch.stack(own)[best, rows] for own in zip(*(part[2] for part in parts))]
    scores = retrieval.scores(chosen, gallery, attack.seed, clustering=False)[rule]
    return ({name: value for name, value in scores.items() if scored(name)},
            {part[0]: float((best == i).double().mean()) for i, part in enumerate(parts)},
            hit[best, rows])


def worst_of_sets(parts, rule):
    """Clustering: of every metric the lowest score that one attack on the whole set reaches.
    -> (scores, {metric: attack}, hits (n,) under the attack that decides Recall@1)."""
    lowest = {name: min(parts, key=lambda part: part[4][rule][name])
              for name in parts[0][4][rule] if scored(name)}
    return ({name: part[4][rule][name] for name, part in lowest.items()},
            {name: part[0] for name, part in lowest.items()}, lowest["R@1"][3][rule][0])


def scored(name):
    """Whether a metric is one that an attack lowers."""
    return name in ("mAP@R", "NMI", "AMI", "F1") or name[:2] == "R@" and name[2:].isdigit()


def worst_parts(attack, count, proxies):
    """The attacks of `worst`: [(label-free?, Attack)].

    Every objective on the sum of the members; for several models also the one that is the exact
    condition of a miss (impostor; for clustering: joint) on concat, mean, each member, every
    majority of them, and the vote; for the recipe strong also Square on the margin.
    """
    clustering = attack.protocol == "clustering"
    exact = "joint" if clustering else "impostor"
    free = ["shift", f"{exact}-pseudo", *(["pal-pseudo"] if proxies else [])]
    aware = ["push-mean", "target-other", "decoy", "nearest", "impostor", "impostor@5",
             "soft-impostor", "joint" if clustering else "neighbour"]
    against = []
    if count > 1:
        majority = itertools.combinations(range(1, count + 1), count // 2 + 1)
        against = ["concat", "mean", *(f"member_{i + 1}" for i in range(count)), "vote",
                   *(f"members_{'+'.join(map(str, own))}" for own in majority if len(own) > 1
                     and len(own) < count)]

    def part(objective, against="sum", kind=attack.attack):
        numbers = () if kind != "pgd" else (
            attack.step_size, attack.steps, 1 if objective.startswith("joint") else attack.restarts,
            attack.random_start or objective == "shift")
        return common.Attack(attack.protocol, kind, objective, attack.eps, *numbers,
                             seed=attack.seed, against=against)

    parts = [(True, part(objective)) for objective in free]
    parts += [(False, part(objective)) for objective in aware]
    parts += [(False, part(exact, own)) for own in against]
    if attack.attack == "strong-1":
        parts += [(False, part("impostor", kind="square"))]
    return parts


RADII = (1, 2, 4, 8, 16, 32, 64, 128, 255)                                   # in 1/255


def curve_entries(retrieval, attack, proxies=None):
    """Recall@1 at growing radii, as entries: curve, {radius in 1/255: Recall@1}, and eps50_255, the
    radius at which it is half of its clean value. Ends where every rule is below that, or at eps.
    """
    started, last = time.perf_counter(), attack.eps * 255
    scores = retrieval.scores(retrieval.clean, retrieval.gallery or (
        retrieval.clean if attack.protocol == "template" else None), attack.seed, clustering=False)
    curves = {rule: {0: own["R@1"]} for rule, own in scores.items()}
    for radius in [*(radius for radius in RADII if radius < last - 1e-6), last]:
        part = common.Attack(attack.protocol, "pgd", attack.objective, radius / 255,
                             attack.step_size * radius / last, attack.steps, attack.restarts,
                             attack.random_start, attack.seed, attack.against)
        embeddings, gallery, _ = attacked(retrieval, part, proxies)
        scores = retrieval.scores(embeddings, gallery, attack.seed, clustering=False)
        for rule, own in scores.items():
            curves[rule][radius] = own["R@1"]
        if all(half_radius(curve) is not None for curve in curves.values()):
            break
    amp = any(getattr(model, "amp", False) for model in retrieval.models)
    seconds = round(time.perf_counter() - started, 3)
    return [{"rule": rule, **attack.entry(), "amp": amp, "limited": retrieval.limited,
             "seconds": seconds, "n_queries": len(retrieval.labels),
             "eps50_255": half_radius(curve), "curve": curve} for rule, curve in curves.items()]


def half_radius(curve):
    """The radius at which a curve {radius: Recall@1} is half of its first value, on straight lines
    between its points; None: never."""
    points = sorted(curve.items())
    for (low, above), (high, below) in itertools.pairwise(points):
        half = points[0][1] / 2
        if below <= half:
            return float(low + (high - low) * (above - half) / max(above - below, 1e-12))
    return None


def per_query(retrieval, embeddings, gallery):
    """{rule: (hit at rank 1 (n,) bool, AP@R (n,))} of the rules that rank candidates."""
    labels = retrieval.labels
    count = common.candidate_counts(labels, retrieval.gallery_labels)
    depth = max(int(count.max()), 1)
    lists = {rule: common.neighbour_labels(own, labels, depth, other, retrieval.gallery_labels)
             for rule, (own, other) in common.rule_spaces(embeddings, gallery).items()}
    if len(embeddings) > 1:
        lists["vote"] = common.vote_labels(torch.stack(
            [lists[f"member_{i + 1}"] for i in range(len(embeddings))]))
    return {rule: (found[:, 0] == labels, common.average_precision(found == labels[:, None], count))
            for rule, found in lists.items()}


# ---- searches and targets

def success_tests(retrieval, target=None):
    """make(rows) -> test(images): bool (B,), whether the attack on these queries has succeeded.

    It has when the label of the nearest candidate, voted where there are several models, is not
    the query's own; with target (n,): when it is the target. Ties count against the query.
    """
    galleries = retrieval.clean if retrieval.gallery is None else retrieval.gallery

    def make(rows):
        def test(images):
            first = []
            for model, gallery in zip(retrieval.models, galleries):
                similarity = model(images) @ gallery.T - gallery.square().sum(1) / 2
                if retrieval.gallery is None:                            # not the query itself
                    similarity[torch.arange(len(rows)), rows] = -torch.inf
                own = retrieval.labels[rows, None] == retrieval.names
                right = similarity.masked_fill(~own, -torch.inf).amax(1)
                wrong, other = similarity.masked_fill(own, -torch.inf).max(1)
                first.append(torch.where(right > wrong, retrieval.labels[rows],
                                         retrieval.names[other]))
            voted = common.vote_labels(torch.stack(first)[..., None])[:, 0]
            return voted != retrieval.labels[rows] if target is None else voted == target[rows]
        return test

    return make


CW_ROUNDS, HALVINGS = 30, 8                          # of carlini_wagner, of minimal_radius


def carlini_wagner(objective, succeeded, images, eps, step_size, steps, random_start=True, *,
                   enough=0.0, const=0.1, largest_const=20.0, smallest_tau=1 / 256):
    """Carlini & Wagner's l_inf attack (S&P 2017, Sec. VI-C), projected to |x' - x|_inf <= eps.

    A round minimises  sum max(|x' - x| - tau, 0) - c * objective(x') [not yet succeeded]  with
    `steps` of Adam at learning rate step_size. tau begins at 1; a success within tau makes it 0.9
    times the largest change, a failure doubles c. An image ends with tau below smallest_tau, with c
    above largest_const, with a change of at most `enough`, or after CW_ROUNDS. Clamping instead of
    tanh keeps it in [0, 1]. objective(x, i) -> (B,), higher is closer to success, and
    succeeded(x, i) -> bool (B,) see some of the images, i: their numbers.
    Returns, per image, the success with the smallest |x' - x|_inf or else the last iterate.
    """
    shape = (-1, 1, 1, 1)
    best = images + torch.empty_like(images).uniform_(-eps, eps) if random_start else images.clone()
    best = best.clamp(0, 1)                          # the nearest success so far, or the start
    size = torch.full((len(images),), torch.inf, device=images.device)
    tau, const = torch.ones_like(size), torch.full_like(size, const)
    last = best.clone()
    for _ in range(CW_ROUNDS):
        i = ((size > enough) & (tau > smallest_tau) & (const <= largest_const)).nonzero()[:, 0]
        if len(i) == 0:
            break
        x, clean, nearest = best[i].requires_grad_(), images[i], best[i]
        found = torch.full_like(size[i], torch.inf)                      # in this round
        adam = torch.optim.Adam([x], lr=step_size)
        for step in range(steps + 1):
            with torch.no_grad():
                hit = succeeded(x, i)
                change = (x - clean).abs().amax((1, 2, 3))
                better = hit & (change < found)
                nearest = torch.where(better.view(shape), x, nearest)
                found = torch.where(better, change, found)
            if step == steps or bool((found <= tau[i]).all()):
                break
            with torch.enable_grad():
                penalty = ((x - clean).abs() - tau[i].view(shape)).clamp(min=0).sum()
                loss = penalty - (const[i] * ~hit * objective(x, i)).sum()
            x.grad = torch.autograd.grad(loss, x)[0]
            adam.step()
            x.data.clamp_(0, 1)
        last[i] = x.detach()
        best[i] = torch.where((found < size[i]).view(shape), nearest, best[i])
        size[i] = torch.minimum(size[i], found)
        won = found <= tau[i]
        tau[i] = torch.where(won, 0.9 * found, tau[i])
        const[i] = torch.where(won, const[i], 2 * const[i])
    return pgd(None, images, eps, 0, 0, start=torch.where(size.isinf().view(shape), last, best))


def minimal_radius(objective, succeeded, images, eps, step_size, steps, random_start=True,
                   halvings=HALVINGS):
    """Bisection for the smallest radius at which PGD succeeds; Eq. (5) of Panum et al.

    Every image by itself, in (0, eps], to eps / 2^halvings; step_size is that of eps and shrinks
    with the radius. -> (images at that radius, radius (B,): inf where PGD fails at eps).
    """
    noise = torch.empty_like(images).uniform_(-1, 1) if random_start else torch.zeros_like(images)
    low = torch.zeros(len(images), device=images.device)
    high = torch.full_like(low, torch.inf)
    best = images
    for _ in range(halvings + 1):
        radius = torch.where(high.isinf(), eps, (low + high) / 2)
        ball = radius.view(-1, 1, 1, 1)
        adversarial = pgd(objective, images, ball, step_size * ball / eps, steps,
                          start=images + ball * noise)
        with torch.no_grad():
            hit = succeeded(adversarial)
        best = torch.where((hit | high.isinf()).view(-1, 1, 1, 1), adversarial, best)
        low, high = torch.where(hit, low, radius), torch.where(hit, radius, high)
    return best, high


def radius_scores(smallest):
    """Median of the smallest radii, in 1/255 (null: above eps), and the share that there are."""
    if len(smallest) == 0:
        return {"min_eps_255": None, "min_eps_found": None}
    median = statistics.median(smallest.tolist())
    return {"min_eps_255": 255 * median if math.isfinite(median) else None,
            "min_eps_found": float(smallest.isfinite().double().mean())}


def target_classes(retrieval, attack):
    """The class that every query is moved into (n,): the nearest other one, or a random one."""
    labels, classes = retrieval.labels, retrieval.names.unique()
    if len(classes) < 2:
        raise UserError("a targeted attack needs candidates of two classes: give more data")
    if attack.objective == "targeted-random":
        stream = common.random_stream(attack.seed, 0, common.TARGETS)
        own = (classes == labels[:, None]).long()                        # (n, C)
        others = len(classes) - own.sum(1)
        draw = (torch.from_numpy(stream.random(len(labels))).to(labels.device) * others).long()
        return classes[draw + ((own.argmax(1) <= draw) & own.any(1)).long()]
    spaces = common.rule_spaces(retrieval.clean, retrieval.gallery)
    own, gallery = spaces["concat" if "concat" in spaces else "member_1"]
    return retrieval.names[nearest_allowed(
        retrieval, own, gallery, lambda rows: labels[rows, None] != retrieval.names)]


def nearest_allowed(retrieval, own, gallery, allowed):
    """The nearest candidate (n,) with allowed(rows) (b, N); the query itself is none."""
    return torch.cat([similarity.masked_fill(~allowed(rows), -torch.inf).argmax(1)
                      for rows, similarity, _ in common.similarities(
                          own, retrieval.labels, gallery, retrieval.gallery_labels)])


def targeted_objectives(retrieval, target):
    """Towards the clean image of the target class that is nearest; Eq. (6) of Panum et al."""
    points = []
    for i, own in enumerate(retrieval.clean):
        gallery = None if retrieval.gallery is None else retrieval.gallery[i]
        nearest = nearest_allowed(retrieval, own, gallery,
                                  lambda rows: target[rows, None] == retrieval.names)
        points.append((own if gallery is None else gallery)[nearest])

    def make_objective(rows):
        return lambda images: -sum(common.euclidean(model(images), point[rows])
                                   for model, point in zip(retrieval.models, points))

    return make_objective


def success_rates(retrieval, embeddings, target):
    """{rule: share of the queries whose nearest candidate is of the target class}."""
    galleries = retrieval.clean if retrieval.gallery is None else retrieval.gallery
    first = {rule: common.neighbour_labels(own, retrieval.labels, 1, gallery,
                                           retrieval.gallery_labels)[:, 0]
             for rule, (own, gallery) in common.rule_spaces(embeddings, galleries).items()}
    rates = {rule: float((label == target).double().mean()) for rule, label in first.items()}
    members = [rule for rule in first if rule.startswith("member_")]
    if len(members) > 1:
        votes = torch.stack([first[rule] for rule in members])[..., None]
        voted = common.vote_labels(votes)[:, 0]
        rates |= {"vote": float((voted == target).double().mean()),
                  "member_mean": statistics.mean(rates[rule] for rule in members)}
    return rates


# ---- empirical robustness score
#
# Zhou & Patel, CVPR 2022; the attacks are those of Zhou et al., arXiv 2106.03614. Candidates are
# the clean embeddings of all images. d is averaged over the models. A rank is the share, in
# percent, of the other candidates that are strictly closer to the query.

def ers_entry(retrieval, attack):
    """The ten figures of a retrieval and their score, as an entry of results.json.

    The objective "ers-authors" repeats the slips of the authors' code: the image's own clean copy
    counts as a candidate (of CA, QA, LTM), GTM's target is the wrong image, ES starts at zero with
    a target that is 1e-7 off, and ES:D is measured before the last step.
    """
    started, count = time.perf_counter(), len(retrieval.labels)
    if retrieval.gallery is not None:
        raise UserError("--protocol ers looks test images up among themselves: it needs a run with "
                        "--inshop-protocol query")
    if count < 100:
        raise UserError(f"--protocol ers needs at least 100 images, because CA- and QA- choose "
                        f"among the nearest 1 %: found {count}")
    figures = ers_figures(retrieval, attack, attack.objective == "ers-authors")
    rule = "member_1" if len(retrieval.models) == 1 else "distance"
    return {"rule": rule, **attack.entry(),
            "amp": any(getattr(model, "amp", False) for model in retrieval.models),
            "limited": retrieval.limited, "seconds": round(time.perf_counter() - started, 3),
            "n_queries": count, "R@1_clean": recall_of(retrieval, retrieval.clean),
            **figures, "ERS": ers(figures)}


def ers(figures):
    """The mean of the ten figures on a scale of 0 to 100, the more the better (Zhou & Patel)."""
    scaled = [2 * figures["CA+"], 100 - figures["CA-"], 2 * figures["QA+"], 100 - figures["QA-"],
              100 * (1 - figures["TMA"]), 50 * (2 - figures["ES:D"]),
              *(figures[name] for name in ("ES:R", "LTM", "GTM", "GTT"))]
    return statistics.mean(scaled)


def ers_figures(retrieval, attack, authors=False):
    """{figure: value}; every attack is one PGD from zero (ES: from its random start).

    CA+, QA+ (rank)        a random query (candidate): up to the top
    CA-, QA- (rank)        one of the nearest 1 %: down
    TMA (cosine)           towards a random image
    ES:D (d), ES:R (R@1)   away from its own clean embedding
    LTM (R@1)              the farthest of another class nearer than the nearest of its own
    GTM (R@1)              towards the nearest of another class
    GTT (percent)          its nearest neighbour out of its top 4: the share that stays in
    """
    clean, labels, count = retrieval.clean, retrieval.labels, len(retrieval.labels)
    everything = torch.arange(count, device=labels.device)
    target = ers_targets(retrieval, attack.seed)

    def moved(objective, start=False, steps=attack.steps):
        def make(rows):
            rows = rows.to(labels.device)
            return lambda images: objective([model(images) for model in retrieval.models], rows)

        return common.attack_embeddings(
            retrieval.models, retrieval.batches(), make, eps=attack.eps, steps=steps,
            step_size=attack.step_size, random_start=start, seed=attack.seed)

    def closer(gaps, sign, counted=None, ties=False):
        """How many candidates are closer (n,) after the attack; sign 1: that lowers the number.

        counted: the gaps to count, where they are others than those that are attacked.
        """
        def objective(embeddings, rows):
            gap, allowed = gaps(embeddings, rows)
            return -(F.relu(sign * gap) * allowed).mean(1)

        embeddings = moved(objective)
        parts = [(counted or gaps)([own[rows] for own in embeddings], rows, exact=True)
                 for rows in everything.split(128)]
        return torch.cat([((gap >= 0 if ties else gap > 0) & allowed).sum(1)
                          for gap, allowed in parts])

    def rank(number):
        return 100 * float(number.double().mean()) / (count if authors else count - 1)

    def as_candidate(query):
        """gap > 0: that image is closer to the query than the attacked one."""
        def gaps(embeddings, rows, exact=False):
            q = query[rows]
            return (distance_to(retrieval, embeddings, q)[:, None]
                    - distances([own[q] for own in clean], clean, exact),
                    without(count, *(() if authors else (q, rows)), like=rows))
        return gaps

    def as_query(candidate, with_own=authors):
        """gap > 0: that image is closer to the attacked one than the candidate."""
        def gaps(embeddings, rows, exact=False):
            c = candidate[rows]
            return (distance_to(retrieval, embeddings, c)[:, None]
                    - distances(embeddings, clean, exact),
                    without(count, c, *(() if with_own else (rows,)), like=rows))
        return gaps

    def towards(candidate):
        return lambda embeddings, rows: -distance_to(retrieval, embeddings, candidate[rows])

    def cosine(embeddings, rows):
        return sum((own * other[target["random"][rows]]).sum(1)
                   for own, other in zip(embeddings, clean)) / len(clean)

    def shift(embeddings, rows):
        return sum(common.euclidean(own, other[rows] + 1e-7 * authors)
                   for own, other in zip(embeddings, clean)) / len(clean)

    def farthest_other(embeddings, rows):
        distance = distances(embeddings, clean)
        same = labels[rows, None] == labels
        own = same if authors else same & without(count, rows, like=rows)
        return -F.relu(distance.masked_fill(same, -torch.inf).amax(1)
                       - distance.masked_fill(~own, torch.inf).amin(1))

    shifted = moved(shift, start=not authors)
    measured = moved(shift, start=False, steps=attack.steps - 1) if authors else shifted
    matched, top = moved(cosine), target["top"]
    stays = closer(as_query(top), -1, as_query(top, with_own=False), ties=True) < 4
    return {"CA+": rank(closer(as_candidate(target["random query"]), 1)),
            "CA-": rank(closer(as_candidate(target["near query"]), -1)),
            "QA+": rank(closer(as_query(target["random candidate"]), 1)),
            "QA-": rank(closer(as_query(target["near candidate"]), -1)),
            "TMA": float(cosine(matched, everything).double().mean()),
            "ES:D": float(distance_to(retrieval, measured, everything).double().mean()),
            "ES:R": 100 * recall_of(retrieval, shifted),
            "LTM": 100 * recall_of(retrieval, moved(farthest_other)),
            "GTM": 100 * recall_of(retrieval, moved(
                towards(target["wrong" if authors else "other"]))),
            "GTT": 100 * float(stays.double().mean())}


def distances(embeddings, others, exact=False):
    """d (b, N) of all pairs, averaged over the models.

    exact: differences instead of a matrix product, which is off by 1e-3 for near-identical rows.
    """
    mode = f"{'donot_' if exact else ''}use_mm_for_euclid_dist"
    return sum(torch.cdist(own, other, compute_mode=mode)
               for own, other in zip(embeddings, others)) / len(others)


def distance_to(retrieval, embeddings, candidates):
    """d (b,) of every row to one clean candidate, averaged over the models."""
    return sum(common.euclidean(own, other[candidates])
               for own, other in zip(embeddings, retrieval.clean)) / len(embeddings)


def without(count, *excluded, like):
    """bool (b, N): every candidate but these, one a row."""
    allowed = torch.ones(len(like), count, dtype=torch.bool, device=like.device)
    for candidates in excluded:
        allowed.scatter_(1, candidates[:, None], False)
    return allowed


def recall_of(retrieval, embeddings):
    """Recall@1 of (attacked) queries among the clean images; ties count against the query."""
    labels, hits = retrieval.labels, []
    for rows in torch.arange(len(labels), device=labels.device).split(128):
        distance = distances([own[rows] for own in embeddings], retrieval.clean, exact=True)
        same = labels[rows, None] == labels
        own = same & without(len(labels), rows, like=rows)
        hits.append(distance.masked_fill(~own, torch.inf).amin(1)
                    < distance.masked_fill(same, torch.inf).amin(1))
    return float(torch.cat(hits).double().mean())


def ers_targets(retrieval, seed):
    """{name: candidate (n,)}: what each attack moves every image towards or away from."""
    labels, count = retrieval.labels, len(retrieval.labels)
    everything = torch.arange(count, device=labels.device)

    def draw(number, high):
        stream = common.random_stream(seed, 0, common.EVALUATE, number)
        return torch.from_numpy(stream.integers(high, size=count)).to(labels.device)

    near, other, wrong = [], [], []
    for rows in everything.split(128):
        distance = distances([own[rows] for own in retrieval.clean], retrieval.clean, exact=True)
        distance.scatter_(1, rows[:, None], torch.inf)
        near.append(distance.topk(count // 100, largest=False).indices)
        other.append(distance.masked_fill(labels[rows, None] == labels, torch.inf).argmin(1))
        # the authors': of a class other than the top's; its place among those alone, as a number
        differs = labels[near[-1][:, :1]] != labels
        first = distance.masked_fill(~differs, torch.inf).argmin(1, keepdim=True)
        wrong.append((differs.cumsum(1) - 1).gather(1, first)[:, 0])
    near = torch.cat(near)
    chosen = [near.gather(1, draw(number, near.shape[1])[:, None])[:, 0] for number in (2, 3)]
    anywhere = [(everything + 1 + draw(number, count - 1)) % count for number in (4, 5, 6)]
    return {"near query": chosen[0], "near candidate": chosen[1], "random query": anywhere[0],
            "random candidate": anywhere[1], "random": anywhere[2], "top": near[:, 0],
            "other": torch.cat(other), "wrong": torch.cat(wrong)}


# ---- checks
#
# Signs that an attack's scores say nothing, after Carlini et al. (arXiv 1902.06705) and the flags
# of AutoAttack (Croce & Hein, ICML 2020). Recall@1 is that of the vote, or of the one network.

CHECK = "check: "                                    # how their warnings begin
NOISE_DRAWS, RESTARTS, SWEEP = 20, (1, 5, 10), (2, 4, 8, 16, 32, 64, 128)    # the sweep in 1/255
BLIND = 0.01                                         # share of images: a flat spot is no masking


def tolerance(share, count):
    """How far apart two Recall@1 still count as equal: twice the standard error of a share of
    `count` images, what other images would change, and at least 2 points, what another seed of
    the attack may change."""
    return max(0.02, 2 * (share * (1 - share) / count) ** 0.5)


def checks(retrieval, attack, proxies=None, source=None, outputs=None):
    """Yields {"name", "passed", "text"}: whether the scores of this PGD attack mean anything.

    source: (Retrieval of other networks on the same images, their proxies), to transfer from.
    outputs: the models as they are, where those of the retrieval normalise their embeddings.
    """
    checkable([attack])
    if retrieval.gallery is not None and attack.protocol == "clustering":
        raise UserError("checks of queries that have a gallery need --protocol template")
    for name, passed, fact, meaning in itertools.chain(
            checks_of_outputs(retrieval, outputs or retrieval.models),
            checks_of_attack(retrieval, attack, proxies, source)):
        yield {"name": name, "passed": bool(passed),
               "text": fact if passed else f"{fact}: {meaning}"}


def checkable(attacks):
    """Refuse what --checks cannot examine."""
    if len(attacks) > 1 or any(own.attack != "pgd" or own.protocol == "ers"
                               or own.attacker_share < 100
                               or own.objective.startswith(("joint", "worst")) for own in attacks):
        raise UserError(f"--checks examines one PGD attack on all images, clustering or template, "
                        f"with an objective other than joint and worst: found "
                        f"{', '.join(map(str, attacks))}")


def checks_of_outputs(retrieval, models):
    """What is taken for granted of embeddings: of the first batch; the last one, of all."""
    batch = next(iter(retrieval.batches()))
    first, again = (common.embed(models, [batch]) for _ in range(2))
    apart = max(float((one - two).abs().max()) for one, two in zip(first, again))
    yield ("deterministic", apart == 0, f"the same images twice, embeddings differ by {apart:.2g}",
           "the network draws random numbers (dropout left on?), so every pass is another network; "
           "switch that off, or attack the mean of many draws")
    norms = torch.cat([own.norm(dim=1) for own in first])
    yield ("unit norm", (norms - 1).abs().max() <= 1e-3,
           f"embeddings have lengths from {norms.min():.4g} to {norms.max():.4g}",
           "the scores are those of unit vectors; normalise at the end of the network")
    cosine = max(common.mean_cosine(own) for own in retrieval.clean)
    yield ("collapse", cosine <= 0.95, f"the mean cosine of two images is {cosine:.3f}",
           "all images have nearly one embedding and their neighbours are an accident; no score of "
           "this network means much")


def checks_of_attack(retrieval, attack, proxies, source):
    """The attack's gradients and images, other images in its ball, then checks_of_variants."""
    eps, size, steps, planned = (attack.eps, attack.step_size, attack.steps,
                                 plan(retrieval, attack, proxies))
    seeing, foreign, noise = (copy.copy(attack) for _ in range(3))
    seeing.against = attack.against.replace("vote", "sum")   # members already won are not masked
    foreign.against = "sum"                                  # the source has members of its own
    noise.restarts = NOISE_DRAWS
    (make_objective, attacked), *_ = plan(retrieval, seeing, proxies)
    transfer = plan(source[0], foreign, source[1]) if source else None
    blind, excess = [], []

    def watched(objective, images, rows):                    # the attack itself
        start = pgd(None, images, eps, 0, 0, attack.random_start).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(make_objective(rows)(start).sum(), start)
        flat = ~gradient.flatten(1).any(1)
        blind.append(flat if attacked is None else flat[attacked[rows]])
        x = pgd(objective, images, eps, size, steps, start=start)
        excess.extend([float((x - images).abs().max()) - eps, float((x - 0.5).abs().max()) - 0.5])
        return x

    def rounded(objective, images, rows):                    # to the 8-bit points of the ball
        x = pgd(objective, images, eps, size, steps, attack.random_start)
        low, high = (255 * (images - eps) - 1e-3).ceil(), (255 * (images + eps) + 1e-3).floor()
        return (255 * x).round().clamp(low, high).clamp(0, 255) / 255

    def signs(objective, images, rows):
        return (images + eps * (2 * torch.randint_like(images, 2) - 1)).clamp(0, 1)

    recall = recall_under(retrieval, attack, planned, watched)
    equal, blind = tolerance(recall, len(retrieval.labels)), torch.cat(blind)
    share = int(blind.sum()) / max(len(blind), 1)
    yield ("zero gradients", share <= BLIND,
           f"{100 * share:.3g} % of the images have no gradient at the first step",
           "the attack cannot see through this network (gradient masking); scores under gradient "
           "attacks say nothing")
    yield ("ball and range", max(excess) <= 1e-6,
           f"attacked images leave eps or [0, 1] by {max(0, *excess):.1g}",
           "the attack breaks its own rules and its scores are too low")
    other = recall_under(retrieval, attack, planned, rounded)
    yield ("8 bit", other <= recall + equal, f"{arrow(recall, other)} as 8-bit pictures",
           "rounding undoes the attack, which holds for floating-point input alone")
    other = recall_under(retrieval, noise, planned, signs)
    yield ("random noise", other > recall + equal or recall <= chance_level(retrieval) + equal,
           f"{arrow(recall, other)} with random signs, the best of {NOISE_DRAWS} draws",
           "the attack does little that noise does not; it is too weak, its gradients are masked, "
           "or eps is too small to tell networks apart")
    if transfer:
        other = recall_under(retrieval, foreign, transfer)
        yield ("transfer", other >= recall - equal,
               f"{arrow(recall, other)} with images made for another network",
               "those do more than images made for this one, whose gradients mislead (gradient "
               "masking); quote the lower number")
    yield from checks_of_variants(retrieval, attack, proxies, recall)


def checks_of_variants(retrieval, attack, proxies, recall):
    """What more or less effort, no gradients and other radii make of Recall@1, now `recall`."""
    variants, count = variants_of(attack), len(retrieval.labels)
    equal = tolerance(recall, count)

    def under(name):
        return recall_under(retrieval, variants[name], plan(retrieval, variants[name], proxies))

    for name, how, meaning in (
            ("steps x 2", "", "the attack has not converged; quote the lower number"),
            ("steps x 5", "", "the attack has not converged; quote the lower number"),
            ("FGSM", " with one step of size eps", "one step does more than many, so gradients or "
             "steps mislead (gradient masking, or a wrong step size); quote the lower number")):
        other = under(name)
        yield name, other >= recall - equal, arrow(recall, other) + how, meaning
    found = [recall if number == attack.restarts else under(f"restarts {number}")
             for number in RESTARTS]
    yield ("restarts", min(found) >= recall - equal,
           f"{arrow(*found)} with {', '.join(map(str, RESTARTS))} starts",
           "the score hangs on the start; quote the lowest number and take more restarts")
    margin, other = under("margin"), under("Square")
    yield ("Square", other >= margin - tolerance(margin, count),
           f"{arrow(margin, other)} from PGD to Square, both on the impostor margin of queries",
           "without gradients an attack does more than with them, so these are masked; scores "
           "under gradient attacks say nothing")
    curve = [headline(retrieval, retrieval.clean, retrieval.gallery),
             *(under(f"eps {radius}") for radius in SWEEP)]
    chance = chance_level(retrieval, attack.protocol == "clustering")
    lowest = [max(low, chance) for low in itertools.accumulate(curve, min)]
    yield ("eps sweep falls",
           all(own <= low + tolerance(low, count) for own, low in zip(curve, lowest)),
           f"{arrow(*curve)} with target-other at eps 0, {', '.join(map(str, SWEEP))} / 255",
           "a larger radius holds the smaller one, so the attack gets lost (gradient masking, or "
           "too few steps)")
    yield ("eps sweep ends at chance", curve[-1] <= chance + tolerance(chance, count),
           f"Recall@1 {100 * curve[-1]:.1f} at eps {SWEEP[-1]}/255, {100 * chance:.1f} by chance",
           "there, all images can become the same grey one, so the attack fails where it need not "
           "(gradient masking, or too few steps)")


def variants_of(attack):
    """{name: Attack} of what --checks compares with an attack."""
    def same(steps, restarts, name="pgd"):
        return common.Attack(attack.protocol, name, attack.objective, attack.eps, attack.step_size,
                             steps, restarts, attack.random_start, attack.seed, attack.against)

    def other(protocol, objective, eps, *numbers, name="pgd"):
        return common.Attack(protocol, name, objective, eps, *numbers, seed=attack.seed)

    return {"steps x 2": same(2 * attack.steps, attack.restarts),
            "steps x 5": same(5 * attack.steps, attack.restarts),
            "FGSM": same(1, attack.restarts, "fgsm"),
            **{f"restarts {number}": same(attack.steps, number) for number in RESTARTS
               if number != attack.restarts},
            "margin": other("template", "impostor", attack.eps, attack.step_size, attack.steps,
                            attack.restarts),
            "Square": other("template", "impostor", attack.eps, name="square"),
            **{f"eps {radius}": other(attack.protocol, "target-other", radius / 255, None,
                                      2 * attack.steps) for radius in SWEEP}}


def recall_under(retrieval, attack, planned, craft=None):
    """Recall@1 under an attack as planned; craft: made otherwise than the plan says."""
    aim, own, _ = planned
    return headline(retrieval, *common.attacked_embeddings(retrieval, attack, aim, craft or own))


def headline(retrieval, embeddings, gallery):
    hits = per_query(retrieval, embeddings, gallery)
    return float(hits["vote" if len(embeddings) > 1 else "member_1"][0].double().mean())


def arrow(*scores):
    return "Recall@1 " + " -> ".join(f"{100 * score:.1f}" for score in scores)


def chance_level(retrieval, moved=False):
    """Recall@1 of a lookup that knows nothing: the share of a query's candidates in its class.

    moved: the candidates are those that, like the query, went to an image of another class.
    """
    _, index, size = retrieval.labels.unique(return_inverse=True, return_counts=True)
    count = common.candidate_counts(retrieval.labels, retrieval.gallery_labels).double()
    total = len(retrieval.names) - (retrieval.gallery is None)
    if moved:                            # less that class, of this size on average, for it has left
        total = total - ((size.square().sum() - size.square()) / (len(index) - size))[index]
    return float((count / total).mean())


def passes_of_checks(attack):
    """Forward and backward passes per image and network, at most; without the transfer."""
    every = [attack, attack, *variants_of(attack).values()]             # itself; as 8 bit
    return sum(passes_of(own) + own.restarts + 1 for own in every) + \
        2 * attack.restarts + NOISE_DRAWS + 4


def source_of(retrieval, models, proxies=None):
    """The source of the transfer check: these models on the same images; None where none are."""
    return (common.Retrieval(models, retrieval.batches, retrieval.labels,
                             gallery_batches=retrieval.gallery_batches,
                             gallery_labels=retrieval.gallery_labels), proxies) if models else None


def transfer_source(args, runs, checkpoints):
    """The checkpoint of --transfer-from, of the same data as every run; None without the flag."""
    def data_of(checkpoint):
        flags = checkpoint["args"]
        return (flags["dataset"], flags["image_size"], flags.get("crop"), checkpoint["classes"],
                flags["val_classes"], flags["dataset"] in common.GENERATED and flags["seed"])

    source = common.load_checkpoint(args.transfer_from) if args.transfer_from else None
    for run, checkpoint in zip(runs, checkpoints if source else []):
        if data_of(source) != data_of(checkpoint):
            raise UserError(f"--transfer-from {args.transfer_from} has other data than {run}: give "
                            f"a run with the same data set, classes and --image-size (and --seed, "
                            f"where images are generated)")
    return source


def check_run(run, checkpoint, source, outcome, args, device):
    """Print the checks of a run under the attack of the flags; they go into its results.json, and
    what has failed into outcome["warnings"]."""
    flags, results = argparse.Namespace(**checkpoint["args"]), outcome["results"]
    (attack,), (members, test) = attacks_of(args, flags.seed), open_run(checkpoint, flags, args,
                                                                        device)
    if source and Path(run).resolve() == Path(args.transfer_from).resolve():
        print(f"{run}: nothing to transfer from itself")
        source = None
    others = common.build_members(source, device) if source else []
    for network in others:
        network.amp = args.amp
    proxies, theirs = ([point.to(device) for point in (own or {"proxies": []})["proxies"]] or None
                       for own in (checkpoint, source))
    passes = len(members) * passes_of_checks(attack) + len(others) * (passes_of(attack) + 1)
    print(f"{run}: checks of {attack}, {len(test)} images: at most {passes * len(test):,} passes",
          flush=True)

    def entries(retrieval, attack):
        found = []
        for own in checks(retrieval, attack, proxies, source_of(retrieval, others, theirs)):
            print(f"{'pass' if own['passed'] else 'WARNING'}  {own['name']}: {own['text']}",
                  flush=True)
            found.append(own)
        return found

    with common.frozen(*others):
        _, found, _ = common.evaluate_set(
            members, test, [attack], batch_size=args.batch_size, workers=args.workers,
            device=device, seed=flags.seed, entries=entries)
    path = Path(run) / "results.json"                # as it is now: attacks have been stored there
    stored = common.read_json(path) if results else {"warnings": []}
    add_checks(stored, attack, {"attack_words": str(attack), **attack.entry(), "amp": args.amp,
                                "limited": test.limited, "n_queries": len(test)}, found)
    if results and not args.dry_run:
        common.write_atomic(path, json.dumps(stored, indent=1).encode())
    earlier = check_alerts(outcome)
    outcome["warnings"] = [alert for alert in outcome["warnings"] if alert not in earlier] + \
        check_alerts(stored)


def add_checks(results, attack, entry, found):
    """Put the checks of an attack into the content of results.json, in the place of those of the
    same names there; what has failed, of any attack, stands in its warnings."""
    same = common.entries_of(results.get("checks", []), attack, entry["n_queries"], entry["amp"])
    by_name = {own["name"]: own for old in [*same, {"checks": found}] for own in old["checks"]}
    results["checks"] = [old for old in results.get("checks", []) if old not in same]
    results["checks"].append({**entry, "checks": [*by_name.values()]})
    failed = {f"{CHECK}{own['name']}: {own['text']}": old["attack_words"]
              for old in results["checks"] for own in old["checks"] if not own["passed"]}
    results["warnings"] = [alert for alert in results["warnings"] if not alert.startswith(CHECK)]
    results["warnings"] += [f"{text} ({words})" for text, words in failed.items()]


def check_alerts(results):
    """The warnings that checks have left in results.json (None: there are none)."""
    return [alert for alert in (results or {"warnings": []})["warnings"] if alert.startswith(CHECK)]


# ---- command line

METRICS = ("R@1", "R@2", "R@4", "R@8", "R@10", "R@20", "R@100", "R@1000", "R@1_low", "R@1_high",
           "mAP@R", "NMI", "AMI", "F1", "mAP@R_free", "AMI_free", *common.FURTHER_FIGURES)


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="a run's folder, a checkpoint, or a quoted pattern of them")
    network = parser.add_argument_group(
        "network", "in place of a RUN. FILE may be a state dict of build_model, which has the "
                   "embedding\nlayer; with other weights that layer is random")
    common.network_flags(network, network)
    attack = parser.add_argument_group("attack")
    attack.add_argument("--protocol", choices=(*common.PROTOCOLS, "all"), default="clustering",
                        help="all: the papers' own attacks, the worst case and eps50 of clustering "
                             "and template, and ers")
    attack.add_argument("--attack", choices=("pgd", "fgsm", "cw", "square", "curve", "strong"),
                        nargs="+", default=None,
                        help="cw: Carlini & Wagner, template only; square: Square Attack, no "
                             "gradients; curve: pgd at growing radii up to --eps, and eps50, the "
                             "radius that halves Recall@1; strong: the frozen recipe strong-1, the "
                             "worst of many attacks (default: pgd)")
    attack.add_argument("--min-eps", action="store_true",
                        help="template: the smallest radius up to --eps at which PGD succeeds, by "
                             "bisection; its median (beside --attack, if given)")
    attack.add_argument("--objective", nargs="+", default=None,
                        metavar="NAME",
                        help="what is maximised (default: shift; neighbour for template; for "
                             "strong worst; for square impostor). "
                             f"clustering: {', '.join(common.OBJECTIVES['clustering'])}. "
                             f"template: {', '.join(common.OBJECTIVES['template'])}. targeted: "
                             "into another class; its success rate. worst: the worst of many")
    attack.add_argument("--against", default="sum", metavar="WHAT",
                        help="ensembles: the embeddings that the objective reads: sum (over the "
                             "members), concat, mean, vote, member_1 ..., members_1+2 ...")
    attack.add_argument("--attacker-share", type=common.number(float, 0, 100), nargs="+",
                        default=[100.0], metavar="PERCENT",
                        help="clustering: attack so many percent of the images")
    attack.add_argument("--ers-variant", choices=("corrected", "authors"), default="corrected",
                        help="ers: authors repeats the slips of the authors' code, for comparison "
                             "with the paper's column alone")
    attack.add_argument("--template-target", choices=("neighbour", "self"), default="neighbour",
                        help="self: away from the query's own clean embedding, as in the code of "
                             "Panum et al.")
    attack.add_argument("--eps", type=common.fraction, nargs="+", default=None, metavar="8/255",
                        help="radius, pixel values (default: 8/255; 0.01 for template; 32/255 for "
                             "--min-eps)")
    attack.add_argument("--step-size", type=common.fraction, default=None, metavar="2/255",
                        help="(default: eps / 4; 2 eps / steps for template; eps / 10 for cw)")
    attack.add_argument("--attack-steps", type=common.number(int, 0), default=None, metavar="N",
                        help="(default: 10; 5 for template; 50 a round for cw; 200 for square)")
    attack.add_argument("--restarts", type=common.number(int, 1), default=1,
                        help="keep the best of so many, image by image")
    attack.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                        help="start uniformly in the ball")
    attack.add_argument("--sweep-eps", type=common.fraction, nargs="*", default=None, metavar="EPS",
                        help="attack at each of these radii (no values: 0 2 4 8 16 32 64 /255)")
    attack.add_argument("--sweep-steps", type=common.number(int, 1), nargs="*", default=None,
                        metavar="N", help="attack with each of these numbers of steps (no values: "
                        "1 2 5 10 20 50); the default step size of template shrinks with them")
    attack.add_argument("--per-member", action="store_true",
                        help="attack every member of an ensemble alone, too: rows 'member_1 alone'")
    attack.add_argument("--seed", type=common.number(int, 0, 2**32 - 1), nargs="+", default=None,
                        help="of the attack; with several, tables show their mean (default: the "
                             "run's; 0 without RUN)")
    attack.add_argument("--checks", action="store_true",
                        help="look for signs that this attack's scores say nothing: gradient "
                             "masking, too few steps, random outputs, collapse ...; warnings go "
                             "into results.json and beside the run's rows in every table (some 50 "
                             "times the attack's time)")
    attack.add_argument("--transfer-from", default=None, metavar="RUN",
                        help="--checks: also make the images on the networks of this run, of the "
                             "same data, best an undefended one")
    data = parser.add_argument_group("data and machine")
    data.add_argument("--data-root", default=None,
                      help="(default: the run's; without RUN DATA_ROOT or data)")
    data.add_argument("--cache-gb", type=common.number(float, 0), default=4.0,
                      help="decode images once when they fit in this memory")
    data.add_argument("--limit-queries", type=common.number(int, 0), default=0, metavar="N",
                      help="a fixed class-balanced subset of N images (0: all), marked as limited")
    data.add_argument("--batch-size", type=common.number(int, 1), default=128)
    data.add_argument("--workers", type=common.number(int, 0, 256), default=2)
    data.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    data.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False,
                      help="bfloat16 backbone; the rows say so")
    data.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=False)
    output = parser.add_argument_group("output")
    output.add_argument("--json", default=None, metavar="FILE", help="write all of it here too")
    output.add_argument("--table", default=None, metavar="NAME",
                        help="write NAME.json and NAME.md: mean and standard deviation over seeds")
    output.add_argument("--into", default=None, metavar="FILE",
                        help="put the table of --table into this Markdown file, between the line "
                             "<!-- NAME.md --> (NAME as given there) and <!-- end -->")
    output.add_argument("--rules", nargs="+", type=inference_rule, default=None, metavar="RULE",
                        help="show these inference rules of ensembles alone: vote, member_mean, "
                             "concat, mean, member_1 ..., and no undefended rows")
    output.add_argument("--metrics", nargs="+", default=None, metavar="NAME",
                        choices=METRICS,
                        help="the columns of --table: R@1 mAP@R ...; R@1_low, R@1_high: its 95 %% "
                             "interval over classes (bootstrap); R@1_free: of worst, under the "
                             "label-free attacks alone")
    output.add_argument("--beside", default=None, metavar="FILE",
                        help="a CSV of published figures, whose first column names rows of "
                             "--table: its other columns stand beside them, but for those whose "
                             "names end in a metric that --metrics leaves out")
    output.add_argument("--figures", default=None, metavar="DIR",
                        help="draw embeddings, their shift and nearest neighbours before and after "
                             "the first attack, the curves of --eval-every, if there are any, and "
                             "those of --sweep-eps, --sweep-steps, --per-member (needs matplotlib; "
                             "scikit-learn for t-SNE)")
    output.add_argument("--save-embeddings", default=None, metavar="FILE.npz",
                        help="of the clean and the attacked test images, with labels and paths; of "
                             "one run and one attack")
    output.add_argument("--overwrite", action="store_true",
                        help="attack again where results.json has the entry")
    output.add_argument("--dry-run", action="store_true", help="one batch; writes nothing")
    defaults = {action.dest: action.default for action in network._group_actions}
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    if args.runs and given:
        parser.error(f"--{next(iter(given)).replace('_', '-')} describes a network without a run: "
                     f"drop it or {args.runs[0]}")
    if not args.runs and not given:
        parser.error("give a RUN, or a network with --arch, --weights and --dataset")
    if given.get("dataset", defaults["dataset"]) in common.GENERATED:
        defaults["image_size"] = 32
    args.network = argparse.Namespace(**defaults | given)
    common.network_defaults(args.network)
    if args.into and not args.table:
        parser.error("--into FILE needs --table NAME")
    for flag in ("metrics", "beside"):
        if getattr(args, flag) and not args.table:
            parser.error(f"--{flag} needs --table NAME")
    if args.protocol == "ers" and (args.attack or args.objective or args.min_eps
                                   or args.restarts > 1 or args.sweep_eps is not None
                                   or args.sweep_steps is not None or args.per_member
                                   or args.figures):
        parser.error("--protocol ers brings its own attacks: drop --attack, --objective, "
                     "--min-eps, --restarts, --sweep-eps, --sweep-steps, --per-member and "
                     "--figures")
    given = [f"--{name.replace('_', '-')}" for name in (
        "objective", "min_eps", "restarts", "against", "attacker_share", "template_target",
        "step_size", "sweep_eps", "sweep_steps",
        "per_member") if getattr(args, name) != parser.get_default(name)]
    if args.protocol == "all" and (given or args.attack not in (None, ["strong"]) or
                                   len(args.eps or [0]) > 1 or not args.random_start):
        parser.error(f"--protocol all has its own attacks; it takes one --eps, --attack-steps, "
                     f"--attack strong and --seed: drop {', '.join(given) or 'the others'}")
    if args.protocol == "all":
        args.metrics = args.metrics or ["R@1", "R@1_free", "eps50_255", "ERS"]
    if args.sweep_eps == []:
        args.sweep_eps = [number / 255 for number in (0, 2, 4, 8, 16, 32, 64)]
    if args.sweep_steps == []:
        args.sweep_steps = [1, 2, 5, 10, 20, 50]
    for flag, values, other, own in (
            ("--sweep-eps", args.sweep_eps, "--eps", args.eps),
            ("--sweep-steps", args.sweep_steps, "--attack-steps", args.attack_steps)):
        if values and (len(set(values)) < 2 or own is not None or args.min_eps or args.per_member):
            parser.error(f"{flag} takes two values or more, and not {other}, --min-eps or "
                         f"--per-member beside it: drop these")
    if args.sweep_steps and "fgsm" in (args.attack or []):
        parser.error("--sweep-steps: fgsm has one step; drop it from --attack")
    if args.ers_variant == "authors" and args.protocol != "ers":
        parser.error("--ers-variant belongs to --protocol ers: drop it")
    if args.template_target == "self" and (args.protocol != "template" or
                                           args.objective not in (None, ["neighbour"])):
        parser.error("--template-target self belongs to --protocol template and its objective "
                     "neighbour: drop it or the other flag")
    if args.transfer_from and not (args.checks and args.runs):
        parser.error("--transfer-from RUN needs --checks, of a RUN of the same data")
    if args.checks:
        checkable(attacks_of(args, 0))
    return args


def attacks_of(args, seed, swept=True):
    """The attacks that the flags ask for, on a run with this seed; swept False: but no sweep."""
    if args.protocol == "all":
        eps, strong = (args.eps or [None])[0], args.attack == ["strong"]
        return [common.Attack(protocol, name, objective, eps if name == "pgd" or strong else None,
                              steps=args.attack_steps if name == "pgd" else None, seed=of_attack)
                for of_attack in args.seed or [seed] for protocol in ("clustering", "template")
                for name, objective in (("pgd", None), ("strong" if strong else "pgd", "worst"),
                                        ("curve", None))] + \
            [common.Attack("ers", seed=of_attack) for of_attack in args.seed or [seed]]
    names = (args.attack or ([] if args.min_eps else ["pgd"])) + ["min-eps"] * args.min_eps
    objectives = ["self"] if args.template_target == "self" else args.objective or [None]
    if args.ers_variant == "authors":
        objectives = ["ers-authors"]
    radii, counts = args.eps or [None], [args.attack_steps]
    grids = [(args.sweep_eps, counts), (radii, args.sweep_steps)] if swept else []
    grids = [grid for grid in grids if all(grid)] or [(radii, counts)]
    found = [common.Attack(args.protocol, name, objective, eps, args.step_size, steps,
                           args.restarts, args.random_start, of_attack, args.against, share, alone)
             for share in args.attacker_share for alone in (False, True)[:1 + args.per_member]
             for radii, counts in grids for objective in objectives for name in names
             for eps in radii for steps in counts for of_attack in args.seed or [seed]]
    unique = {(*attack.entry().values(), attack.alone): attack for attack in found}
    return list(unique.values())                     # two sweeps share an attack


def inference_rule(text):
    if not re.fullmatch("vote|member_mean|concat|mean|distance|member_[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of vote, member_mean, concat, mean, "
                                         f"distance (ers), member_1, member_2 ...")
    return text


# ---- evaluation

def main(args):
    for flag, target in (("--json", args.json), ("--table", args.table),
                         ("--save-embeddings", args.save_embeddings)):
        if target and (not Path(target).absolute().parent.is_dir() or Path(target).is_dir()):
            raise UserError(f"{flag} {target}: not a file in a folder that exists; create it")
    if args.into:
        insert_table(Path(args.into), args.table, None)                   # both marks are there
    beside = published_figures(Path(args.beside)) if args.beside else {}
    attacks = attacks_of(args, 0)
    named = (run for pattern in args.runs for run in sorted(glob.glob(pattern)) or [pattern])
    runs = [run for run in dict.fromkeys(map(os.path.normpath, named)) if has_checkpoint(run)]
    checkpoints = [common.load_checkpoint(run) for run in runs]           # all, before any work
    if not args.runs:
        label, checkpoint = network_of(args)
        runs, checkpoints = [label], [checkpoint]
    if not runs:
        raise UserError("no run has a checkpoint yet: wait for its first epoch")
    if args.save_embeddings and (len(runs) > 1 or len(attacks) > 1 or args.protocol == "ers" or
                                 attacks[0].objective == "worst" or attacks[0].attack == "curve"):
        raise UserError(f"--save-embeddings is of one run and one attack, not of many: found "
                        f"{len(runs)} runs, {', '.join(map(str, attacks))}")
    for run, checkpoint in zip(runs, checkpoints):
        if args.per_member and len(checkpoint["members"]) < 2:
            raise UserError(f"--per-member attacks the members of ensembles: {run} has one "
                            f"network; drop this run or the flag")
    device = common.pick_device(args.device, args.deterministic)
    source = transfer_source(args, runs, checkpoints)
    if args.figures:
        pyplot()                                                          # installed?
        if not (drawable(attacks[0]) or args.sweep_eps or args.sweep_steps or args.per_member):
            raise UserError(f"--figures draws the images of the first attack, and {attacks[0]} is "
                            f"not crafted batch by batch: name another one first, or a sweep")
    rows, report = [], []
    for run, checkpoint in zip(runs, checkpoints):
        outcome = outcome_of(run, checkpoint, args, device)
        if args.checks:
            check_run(run, checkpoint, source, outcome, args, device)
        label = Path(run).stem if Path(run).is_file() else Path(run).resolve().name
        own = rows_of(outcome["clean"], outcome["found"], label, args.rules)
        undefended = None if args.rules else outcome["undefended"]
        if undefended:
            known = [(attack, known_entries(undefended["robust"], attack, args))
                     for attack, _ in outcome["found"]]
            name = f"{label} undefended" if undefended["epochs"] else f"{label} not trained"
            own += rows_of(undefended["clean"], [pair for pair in known if pair[1]], name)
        rows += own
        report.append({"run": label, "flags": checkpoint["args"], "rows": own,
                       "clean": outcome["clean"],
                       "warnings": checkpoint.get("warnings", []) + outcome["warnings"],
                       "found": outcome["found"],
                       "robust": [entry for _, found in outcome["found"] for entry in found]})
    if not rows:
        raise UserError(f"--rules {' '.join(args.rules)}: no run has them; drop --rules to see all")
    title, words = title_of(attacks)
    title += f", a fixed subset of {args.limit_queries} images" if args.limit_queries else ""
    title += ", bfloat16" if args.amp else ""
    print(f"{title}; scores in %")
    print(common.format_table([{**row, "name": " ".join([row["name"], words[row["attack"]]])}
                               for row in rows]))
    for outcome in report:
        for alert in outcome["warnings"]:
            print(f"warning: {outcome['run']}: {alert}")
    if args.dry_run:
        return
    if args.json:
        content = [{name: outcome[name] for name in ("run", "clean", "robust", "warnings")}
                   for outcome in report]
        common.write_atomic(Path(args.json), json.dumps(content, indent=1).encode())
    if args.table:
        content = table_content(report, attacks, title, args.metrics, beside)
        common.write_atomic(Path(args.table + ".json"), json.dumps(content, indent=1).encode())
        common.write_atomic(Path(args.table + ".md"), table_markdown(content).encode())
    if args.into:
        insert_table(Path(args.into), args.table, table_markdown(content))
    if args.figures:
        draw_figures(Path(args.figures), runs, checkpoints, report, args, device)


def network_of(args):
    """(label, checkpoint) of the network that the flags describe, as if a run had saved it."""
    flags, state = args.network, {}
    flags.data_root = args.data_root or os.environ.get("DATA_ROOT", "data")
    flags.seed, flags.val_classes = (args.seed or [0])[0], 0
    flags.batch_size = 1                             # of training: there is none
    if flags.weights not in ("imagenet", "none"):
        state = common.pretrained(flags.arch, flags.weights)
    whole = "head.weight" in state
    model = common.new_member(flags, "cpu", weights="none" if whole else None)
    if whole:
        common.load_weights(model, state, flags.arch, flags.weights)
    alerts = [] if whole else [f"the embedding layer is random: --weights {flags.weights} has no "
                               f"head.weight"]
    return (f"{flags.arch} {Path(flags.weights).stem}",
            {"args": vars(flags), "members": [model.state_dict()], "proxies": [],
             "warnings": alerts})


def outcome_of(run, checkpoint, args, device):
    """{"clean", "found": [(attack, entries)], "warnings", "undefended"} of a run: what its
    results.json has already is read, the rest is measured and stored there, attack by attack."""
    flags = argparse.Namespace(**checkpoint["args"])
    attacks, results = attacks_of(args, flags.seed), stored_results(run, checkpoint)
    known = [known_entries(results["robust"], attack, args) if results else []
             for attack in attacks]
    if args.save_embeddings and known[0]:
        print(f"{run}: attacked again for --save-embeddings")
    if args.overwrite or args.dry_run or args.save_embeddings:
        known = [[] for _ in attacks]
    missing = [attack for attack, entries in zip(attacks, known) if not entries]
    measured = []

    def done(retrieval, attack, entries):
        if results and not same_images(results["clean"], entries[0]):
            for entry in entries:                              # what it compares with
                entry["clean"] = retrieval.by_rule.get(entry["rule"], {})
        if results and not args.dry_run:
            store_entries(Path(run) / "results.json", attack, entries, args)
        measured.append(entries)

    if missing:
        clean, alerts = evaluate_run(checkpoint, flags, missing, args, device, done)
        alerts = alerts + check_alerts(results)
    else:
        clean, alerts = results["clean"], results["warnings"]
        if not same_images(clean, known[0][0]):
            clean = {**clean, "by_rule": {entry["rule"]: entry.get("clean", {})
                                          for entry in known[0]}}
    rest = iter(measured)
    return {"clean": clean, "warnings": alerts, "undefended": (results or {}).get("undefended"),
            "results": results,
            "found": [(attack, entries or next(rest)) for attack, entries in zip(attacks, known)]}


def store_entries(path, attack, entries, args):
    """Add an attack's entries to results.json as it is now: others may have added to it."""
    results = common.read_json(path)
    same = common.entries_of(results["robust"], attack, entries[0]["n_queries"], args.amp)
    if args.overwrite or not same:
        kept = [entry for entry in results["robust"] if entry not in same]
        results["robust"] = kept + entries
        common.write_atomic(path, json.dumps(results, indent=1).encode())


def same_images(clean, entry):
    """Whether a run's stored clean scores are those of an entry: of the same images, in float32."""
    return (entry["n_queries"], entry["amp"]) == (clean["n_queries"], False)


def rows_of(clean, found, label, rules=None):
    """A row per attack and inference rule {name, attack, clean, attacked, attack_seeds, attack_std}
    from [(attack, entries)]; attacked is the mean over the seeds of the attack."""
    by_attack, rows = {}, []
    for attack, entries in found:
        by_attack.setdefault(attack.words(), []).append((attack.seed, entries))
    for words, seeds in by_attack.items():
        tables = [common.results_table({"clean": clean, "robust": entries}, label,
                                       [entry["rule"] for entry in entries] if "alone" in words
                                       else rules) for _, entries in seeds]
        for same in zip(*tables):
            scores = spread([row["attacked"] for row in same])
            rows.append({**same[0], "attack": words, "attack_seeds": [seed for seed, _ in seeds],
                         "attacked": {name: mean for name, (mean, _) in scores.items()},
                         "attack_std": {name: std for name, (_, std) in scores.items()}})
    return rows


def title_of(attacks):
    """What all attacks share in words, and what is left to say of each: (title, {words: rest})."""
    every = list(dict.fromkeys(attack.words() for attack in attacks))
    shared = [len(set(column)) == 1 for column in itertools.zip_longest(*every)]
    title = str(attacks[0]) if all(shared) else ": ".join(filter(None, [
        attacks[0].protocol if shared[0] else "every protocol",
        ", ".join(word for word, same in zip(every[0][1:], shared[1:]) if same)]))
    return title, {words: " ".join(word for word, same in zip(words, shared) if not same)
                   for words in every}


def insert_table(path, name, table):
    """Replace what stands between the marks of this table in a Markdown file; None: check only."""
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --into {path} ({error}): give a Markdown file") from error
    start = f"<!-- {name}.md -->\n"
    before, found, rest = text.partition(start)
    old, closed, after = rest.partition("<!-- end -->")
    if not (found and closed) or "<!--" in old:
        raise UserError(f"{path} has no line {start.strip()} with <!-- end --> below it: add both")
    if table is not None:
        common.write_atomic(path, f"{before}{start}{table}{closed}{after}".encode())


def published_figures(path):
    """{name of a row: {column: text}} of a CSV file, as --beside takes it."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            head, *lines = [line for line in csv.reader(file) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read --beside {path} ({error or 'it is empty'}): give a CSV file "
                        f"with a line of column names") from error
    for line in lines:
        if len(line) != len(head):
            raise UserError(f"--beside {path}: {','.join(line)} has {len(line)} columns where the "
                            f"first line has {len(head)}")
    return {name: dict(zip(head[1:], figures)) for name, *figures in lines}


def table_content(report, attacks, title, metrics=None, beside=None):
    """What --table stores: a row per configuration, rule and attack, mean and std over its seeds
    (of the attack's seeds, where the training has one alone); the flags of every configuration's
    first run; and the published figures beside it."""
    groups, configurations, words = {}, {}, title_of(attacks)[1]
    for outcome in report:
        flags, seed = outcome["flags"], f"-s{outcome['flags']['seed']}"
        config = json.dumps({name: value for name, value in flags.items()
                             if name not in ("seed", *common.MOVABLE_FLAGS, *common.CALL_FLAGS)})
        configuration = outcome["run"].removesuffix(seed)
        configurations.setdefault(configuration, {
            name: Path(value).name if name in ("data_root", "weights", "out") else value
            for name, value in outcome["flags"].items()})
        for row in outcome["rows"]:
            name = row["name"].replace(outcome["run"], configuration)
            groups.setdefault((config, name, row["attack"]), []).append((flags["seed"], row))
    rows = []
    for (_, name, attack), found in groups.items():
        row = {"name": name, "attack": words[attack], "seeds": [seed for seed, _ in found],
               "attack_seeds": max(len(own["attack_seeds"]) for _, own in found),
               **{side: spread([own[side] for _, own in found]) for side in ("clean", "attacked")}}
        if row["attack_seeds"] > 1:
            row["attack_std"] = {metric: mean for metric, (mean, _) in
                                 spread([own["attack_std"] for _, own in found]).items()}
        if beside:
            row["beside"] = {column: figure for column, figure in beside.get(name, {}).items()
                             if not metrics or column.split()[-1] not in {*METRICS} - {*metrics}}
        rows.append(row)
    if beside and not any(row["name"] in beside for row in rows):
        raise UserError(f"--beside names none of these rows: it has {', '.join(list(beside)[:3])} "
                        f"..., the table {', '.join(row['name'] for row in rows[:3])} ...")
    return {"command": shlex.join(["python", "eval.py", *sys.argv[1:]]),
            "attacks": [attack.entry() for attack in attacks], "title": title, "metrics": metrics,
            "flags": configurations, "versions": common.versions(),
            "warnings": [f"{outcome['run']}: {alert}" for outcome in report
                         for alert in outcome["warnings"]], "rows": rows}


def spread(scores):
    """{metric: [mean, std]} of one row's seeds; std is None for one seed."""
    return {name: [statistics.mean(score[name] for score in scores),
                   statistics.stdev(score[name] for score in scores) if len(scores) > 1 else None]
            for name, value in scores[0].items()
            if isinstance(value, float) and all(isinstance(score.get(name), float)
                                                for score in scores)}


def table_markdown(content):
    """The Markdown of a --table file, made from its JSON alone: a line per configuration and rule,
    its attacks side by side."""
    rows, wanted = content["rows"], content.get("metrics")
    sides = dict.fromkeys([("clean", ""), *(("attacked", row.get("attack", "")) for row in rows)])
    columns = [(side, attack, metric) for side, attack in sides for metric in dict.fromkeys(
        metric for row in rows if side == "clean" or row.get("attack", "") == attack
        for metric in row[side])
        if metric in (wanted or ("mAP@R", "NMI", "AMI", "F1", "R@1", "R@8", "R@10",
                                 *common.FURTHER_FIGURES))]
    heads = [" ".join(filter(None, [attack or side, common.metric_name(metric)]))
             for side, attack, metric in columns]
    published = list(dict.fromkeys(column for row in rows for column in row.get("beside", {})))
    lines = ["| " + " | ".join(["in %", *heads, *published]) + " |",
             "|---" + "|---:" * (len(columns) + len(published)) + "|"]
    most = max(len(row["seeds"]) for row in rows)
    repeated = max(row.get("attack_seeds", 1) for row in rows)
    in_line, met = {}, Counter()                     # the rows of a line, one per attack
    for row in rows:
        row_key = (row["name"], row.get("attack", ""), *row["seeds"])
        in_line.setdefault((row["name"], met[row_key], *row["seeds"]), []).append(row)
        met[row_key] += 1
    for (name, _, *seeds), own in in_line.items():
        cells = [name + warning_mark(content, name, seeds)
                 + ("" if len(seeds) == most else f" (seeds: {len(seeds)})")]
        for side, attack, metric in columns:
            row = next((row for row in own if side == "clean" or row.get("attack", "") == attack),
                       {side: {}})
            mean, std = row[side].get(metric, [None, None])
            if side == "attacked" and len(seeds) == 1:
                std = row.get("attack_std", {}).get(metric)
            cells.append("-" if mean is None else common.cell(metric, mean)
                         + ("" if std is None else f" ± {common.cell(metric, std)}"))
        cells += [own[0]["beside"].get(column, "-") for column in published]
        lines.append("| " + " | ".join(cells) + " |")
    chance = rows[0]["clean"].get("NMI_chance") if "NMI" in (wanted or ["NMI"]) else None
    title = (f"{content['title']}; {most} seed{'s' if most > 1 else ''}"
             f"{f', {repeated} of the attack on each' if repeated > 1 else ''}"
             f"{', mean ± std' if max(most, repeated) > 1 else ''}"
             f"{f'; NMI by chance {100 * chance[0]:.1f}' if chance else ''}. "
             f"Made by `{content['command']}`.")
    return "\n".join([title, "", *lines, *(f"\nWarning [{number}]: {alert}" for number, alert in
                                           enumerate(content["warnings"], 1))]) + "\n"


def warning_mark(content, name, seeds):
    """" [1, 2]" for a row whose runs have these warnings; "" without one."""
    numbers = [number for number, alert in enumerate(content["warnings"], 1)
               for run in content.get("flags", {})
               if re.match(rf"{re.escape(run)}( (?!undefended|not trained)|$)", name)
               and alert.startswith((f"{run}: ", *(f"{run}-s{seed}: " for seed in seeds)))]
    return f" [{', '.join(map(str, numbers))}]" if numbers else ""


def has_checkpoint(run):
    """False, said in a line, for a run's folder that has not saved its first epoch."""
    if (Path(run) / "args.json").exists() and not (Path(run) / "last.pt").exists():
        print(f"{run}: no checkpoint yet, left out")
        return False
    return True


def stored_results(run, checkpoint):
    """A finished run's results.json; None for a bare checkpoint, an unfinished run or no run."""
    if "epoch" not in checkpoint or not Path(run).is_dir():
        return None
    if checkpoint["epoch"] < checkpoint["args"]["epochs"]:
        print(f"{run}: {checkpoint['epoch']} of {checkpoint['args']['epochs']} epochs are done; "
              f"nothing is stored")
        return None
    path = Path(run) / "results.json"
    return common.read_json(path) if path.exists() else None


def known_entries(robust, attack, args):
    """Stored entries with just these parameters, one per inference rule."""
    limit = args.limit_queries
    return [entry for entry in common.entries_of(robust, attack, amp=args.amp)
            if (entry["n_queries"] == limit if entry["limited"]
                else not limit or entry["n_queries"] <= limit)]


def evaluate_run(checkpoint, flags, attacks, args, device, done):
    """(clean, warnings) of a run's members on the images it reports on; every attack's entries go
    to done(retrieval, attack, entries) as soon as it is finished."""
    members, test = open_run(checkpoint, flags, args, device)
    proxies = [own.to(device) for own in checkpoint["proxies"]] or None
    passes = [1, *(1 + passes_of(attack, len(members), bool(proxies)) for attack in attacks)]
    named = ", ".join(map(str, attacks)) if len(attacks) < 4 else \
        f"{len(attacks)} attacks, {title_of(attacks)[0]}"
    print(f"{flags.dataset}: {len(test)} images, {len(members)} network{'s' * (len(members) > 1)}, "
          f"{named}: at most {len(test) * len(members) * sum(passes):,} passes", flush=True)
    spent = [0.0]                                    # seconds for each of `passes` so far

    def entries(retrieval, attack):
        spent[0], number = retrieval.seconds, len(spent)
        left = sum(spent) / sum(passes[:number]) * sum(passes[number:])
        stops_early = any(other.attack == "cw" for other in attacks[number - 1:])
        print(f"attack {number} of {len(attacks)}, {'at most' if stops_early else 'about'} "
              f"{duration(left)} left", flush=True)
        found = attack_entries(retrieval, attack, proxies)
        spent.append(found[0]["seconds"])
        done(retrieval, attack, found)
        if args.save_embeddings and not args.dry_run:
            save_embeddings(args.save_embeddings, retrieval, attack, test, flags.data_root)
        return found

    clean, _, alerts = common.evaluate_set(
        members, test, attacks, batch_size=args.batch_size, workers=args.workers, device=device,
        ks=common.KS.get(flags.dataset, (1, 2, 4, 8)), seed=flags.seed, entries=entries)
    return clean, alerts


def save_embeddings(path, retrieval, attack, test, root):
    """Write the embeddings of a retrieval as plain NumPy arrays (README, "Evaluate")."""
    def stacked(embeddings):
        return torch.stack(embeddings).cpu().numpy()

    def names(dataset):
        return [name if dataset.generated else Path(os.path.relpath(name, root)).as_posix()
                for name in dataset.paths]

    attacked, gallery = retrieval.attacked
    arrays = {"clean": stacked(retrieval.clean), "attacked": stacked(attacked),
              "labels": test.labels, "paths": names(test), "classes": test.classes,
              "attack": json.dumps(attack.entry())}
    if test.gallery is not None:
        arrays |= {"gallery": stacked(retrieval.gallery), "gallery_labels": test.gallery.labels,
                   "gallery_paths": names(test.gallery)}
        if attack.protocol == "clustering":                    # attacked too
            arrays["gallery_attacked"] = stacked(gallery)
    content = io.BytesIO()
    np.savez(content, **arrays)
    common.write_atomic(Path(path), content.getvalue())
    print(f"wrote {path}")


def duration(seconds):
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def open_run(checkpoint, flags, args, device):
    """A run's members and the images that it reports on."""
    if args.data_root is not None:
        flags.data_root = args.data_root
    flags.limit_queries = max(args.batch_size, 2) if args.dry_run else args.limit_queries
    train, test = common.load_run_data(flags)
    if not args.dry_run:
        common.cache_images([test, test.gallery], args.cache_gb, args.workers)
    members = common.build_members(checkpoint, device)
    for member in members:
        member.amp = args.amp
    return members, test


def passes_of(attack, count=1, proxies=False):
    """Forward and backward passes per image and network, at most."""
    if attack.objective == "worst":
        return sum(passes_of(part) for _, part in worst_parts(attack, count, proxies))
    if attack.objective.startswith("joint"):
        return 3 * attack.steps
    if attack.attack == "square":
        return attack.steps + 1
    if attack.attack == "curve":
        return len(RADII) * 3 * attack.steps * attack.restarts
    if attack.attack == "cw":
        return CW_ROUNDS * (3 * attack.steps + 1)
    if attack.protocol == "ers":
        return 9 * 2 * attack.steps
    if attack.attack == "min-eps":
        return (HALVINGS + 1) * (2 * attack.steps + 1)
    return 2 * (attack.steps + 2 * (attack.attack == "strong-1")) * attack.restarts


# ---- figures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKS = "os^vDP*X"
STYLES = [(line, *style) for line in ("-", "--", ":") for style in zip(COLOURS, MARKS)]


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("--figures needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")                            # files alone, no window
    import matplotlib.pyplot as plt
    return plt


def draw_figures(folder, runs, checkpoints, report, args, device):
    """embeddings.png, shift.png: the first run of every configuration before and after its first
    attack (of a sweep: the one without it); retrieval.png: the first run. training, sweep-eps,
    sweep-steps, per-member (.png, .json), if there are such scores: mean and range over seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    plt, views, figures, numbers, curves = pyplot(), {}, {}, {}, {}
    for run, checkpoint in zip(runs, checkpoints):
        scored = [line for line in common.read_log(run) if "robust_R@1" in line]
        if scored:
            curves.setdefault(configuration_of(run), []).append(
                {name: [line[name] for line in scored]
                 for name in ("epoch", "clean_R@1", "robust_R@1")})
        if configuration_of(run) not in views and drawable(attacks_of(args, 0)[0]):
            test, retrieval, attack, spaces = attacked_spaces(checkpoint, args, device)
            views[configuration_of(run)] = view_of(run, test, attack, spaces)
            if not figures:
                figures["retrieval"] = draw_retrieval(plt, run, test, retrieval, attack, spaces)
    if views:
        figures |= {"embeddings": draw_embeddings(plt, views), "shift": draw_shift(plt, views)}
    if curves:
        numbers["training"] = curves
        figures["training"] = draw_curves(plt, curves, "epoch", {
            "clean_R@1": "clean Recall@1 (%)", "robust_R@1": "attacked Recall@1 (%)"})
    metrics = {"R@1": "attacked Recall@1 (%)"}
    metrics |= {"NMI": "attacked NMI (%)"} if args.protocol == "clustering" else {}
    for name, values, x in (("sweep-eps", args.sweep_eps, "eps_255"),
                            ("sweep-steps", args.sweep_steps, "steps")):
        if values:
            numbers[name] = sweep_curves(report, x, args.rules, metrics)
            figures[name] = draw_curves(plt, numbers[name], x, metrics)
    if args.per_member:
        numbers["per-member"] = member_scores(report)
        figures["per-member"] = draw_members(plt, numbers["per-member"], report[0]["found"][0][0])
    for name, content in numbers.items():
        common.write_atomic(folder / f"{name}.json", json.dumps(content, indent=1).encode())
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
        print(f"wrote {folder / name}.png")
    plt.close("all")


def drawable(attack):
    """Whether its images are crafted batch by batch from nothing but the networks."""
    return not (attack.protocol == "ers" or attack.attack == "curve" or
                attack.objective in ("worst", "pal-pseudo", "joint", "joint-pseudo"))


def configuration_of(run):
    """The name of a run's folder without its seed."""
    return re.sub(r"-s\d+$", "", Path(run).name)


def attacked_spaces(checkpoint, args, device):
    """A run's test images, Retrieval, attack, and (queries, candidates) before and after it: an
    ensemble's embeddings are concatenated."""
    flags = argparse.Namespace(**checkpoint["args"])
    members, test = open_run(checkpoint, flags, args, device)
    attack = attacks_of(args, flags.seed, swept=False)[0]

    def batches_of(dataset):
        rows = torch.arange(len(dataset)).split(args.batch_size)
        return lambda: common.load_batches(dataset, rows, augment=False, workers=args.workers,
                                           device=device)

    gallery = {} if test.gallery is None else {"gallery_batches": batches_of(test.gallery),
                                               "gallery_labels": test.gallery.labels.to(device)}
    retrieval = common.Retrieval(members, batches_of(test), test.labels.to(device), **gallery)
    moved = common.attacked_embeddings(retrieval, attack, *plan(retrieval, attack)[:2])
    rule = "concat" if len(members) > 1 else "member_1"
    return test, retrieval, attack, [common.rule_spaces(*own)[rule] for own in
                                     ((retrieval.clean, retrieval.gallery), moved)]


def view_of(run, test, attack, spaces):
    """What figures show of a run: how far every query moves, and some of as many classes as there
    are colours."""
    clean, attacked = (own.cpu().numpy() for own, _ in spaces)
    rows = (test.labels < len(COLOURS)).nonzero()[:, 0]
    rows = rows[spread_rows(test.labels[rows], 600)].numpy()
    return {"run": Path(run).name, "attack": str(attack), "classes": test.classes,
            "labels": test.labels.numpy()[rows], "clean": clean[rows], "attacked": attacked[rows],
            "shift": 1 - (clean * attacked).sum(1)}


def spread_rows(labels, count):
    """At most `count` rows: the first image of every class, then the second of every class ...;
    with fewer rows than classes, the first of classes that are equally far apart."""
    by_class = labels.argsort(stable=True)
    turn = torch.arange(len(labels)) - torch.searchsorted(labels[by_class], labels[by_class])
    order = by_class[turn.argsort(stable=True)][:max(count, len(labels.unique()))]
    return order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]


def principal_axes(points):
    """The first two principal components (2, D) of points (n, D)."""
    return np.linalg.svd(points - points.mean(0), full_matrices=False)[2][:2]


def in_plane(clean, attacked):
    """(how, points (2 n, 2)): clean and attacked embeddings (n, D) in one map."""
    both = np.concatenate([clean, attacked])
    if both.shape[1] == 2:
        return "", both
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return ", PCA of the clean", both @ principal_axes(clean).T
    tsne = TSNE(perplexity=min(30, (len(both) - 1) / 3), init="random",      # PCA of a collapsed
                random_state=0)                                              # network is NaN
    return ", t-SNE", tsne.fit_transform(both)


def draw_embeddings(plt, views):
    """Up to eight classes: as they are in two dimensions, otherwise by t-SNE (without
    scikit-learn: in the plane of the first two principal components of the clean ones)."""
    figure, axes = plt.subplots(len(views), 2, figsize=(8, 3.5 * len(views)), squeeze=False,
                                layout="constrained")
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    for view, pair in zip(views.values(), axes):
        how, points = in_plane(view["clean"], view["attacked"])
        low, high = (points if how else circle).min(0), (points if how else circle).max(0)
        (left, bottom), half = (low + high) / 2, 0.55 * (high - low).max()
        for axis, part, title in zip(pair, np.split(points, 2), (
                f"{view['run']}\nclean{how}", f"{view['attack']}\nattacked{how}")):
            if not how:
                axis.plot(*circle.T, color="0.8", zorder=0)
            for label, (name, colour, mark) in enumerate(zip(view["classes"], COLOURS, MARKS)):
                axis.scatter(*part[view["labels"] == label].T, s=22, color=colour, marker=mark,
                             alpha=0.6, linewidth=0, label=name)
            axis.set(aspect="equal", xlim=(left - half, left + half), xticks=[],
                     ylim=(bottom - half, bottom + half), yticks=[])
            axis.set_title(title, fontsize="small")
        pair[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def panels(plt, count):
    """A figure with so many axes, three in a row."""
    figure, axes = plt.subplots(math.ceil(count / 3), min(count, 3), squeeze=False,
                                figsize=(4.2 * min(count, 3), 4 * math.ceil(count / 3)),
                                layout="constrained")
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def draw_shift(plt, views):
    """Arrows from some clean to their attacked embeddings in the plane of the first two principal
    components of the clean ones, and how many queries move how far."""
    figure, axes = panels(plt, len(views) + 1)
    arrows = [np.stack([view["clean"][:40], view["attacked"][:40]])
              @ principal_axes(view["clean"]).T for view in views.values()]
    half = 1.1 * max(1e-6, *(np.abs(ends).max() for ends in arrows))
    bins = np.linspace(0, max(1e-6, *(view["shift"].max() for view in views.values())), 41)
    for (name, view), (start, end), axis, (line, colour, _) in zip(
            views.items(), arrows, axes, itertools.cycle(STYLES)):
        colours = [COLOURS[label] for label in view["labels"][:40]]
        axis.quiver(*start.T, *(end - start).T, color=colours, angles="xy", scale_units="xy",
                    scale=1, width=0.005)
        axis.scatter(*start.T, s=14, color=colours)
        axis.set(aspect="equal", xlim=(-half, half), ylim=(-half, half))
        axis.locator_params(nbins=5)
        axis.set_title(f"{view['run']}\nclean to attacked, a colour per class", fontsize="small")
        share = np.full(len(view["shift"]), 100 / len(view["shift"]))
        axes[-1].hist(view["shift"], bins, weights=share, color=colour, histtype="step",
                      linestyle=line, linewidth=1.5,
                      label=f"{name}, median {np.median(view['shift']):.2g}")
    axes[-1].set(xlabel="shift, 1 - cos(attacked, clean)", ylabel="queries (%)")
    axes[-1].set_title(view["attack"], fontsize="small")
    figure.legend(loc="outside lower center", ncols=min(len(axes), 3), fontsize="small")
    return figure


def draw_retrieval(plt, run, test, retrieval, attack, spaces):
    """Six queries with their three nearest candidates before and after the attack: a solid blue
    frame around the right class, a dashed orange one around another."""
    candidates, which = (test, 0) if test.gallery is None else (test.gallery, 1)
    rows, depth = spread_rows(test.labels, 6), min(3, len(candidates) - 1)
    before, after = (torch.cat([similarity.topk(depth).indices for _, similarity, _ in
                                common.similarities(own, retrieval.labels, gallery,
                                                    retrieval.gallery_labels)])[rows].tolist()
                     for own, gallery in spaces)
    wanted, kept = {*rows.tolist(), *sum(after, [])}, {}

    def keep(number):
        return lambda images, seen: kept.update({
            (number, row): image.cpu() for image, row in zip(images, seen.tolist())
            if row in wanted})

    # the same attack once more: which images are wanted is known only now, and all are too many
    common.attacked_embeddings(retrieval, attack, *plan(retrieval, attack)[:2],
                               watch=(keep(0), keep(1)))
    moved = attack.protocol != "template"            # candidates are attacked as well
    figure, axes = plt.subplots(len(rows), 2 * depth + 3, squeeze=False, layout="constrained",
                                figsize=(1.35 * (2 * depth + 3), 1.35 * len(rows) + 0.8))
    for number, (row, line) in enumerate(zip(rows.tolist(), axes)):
        query, attacked = test[row][0], kept[0, row]
        change = (attacked - query) / max(2 * attack.eps, 1e-6) + 0.5
        near = [(f"nearest {j + 1}", candidates[i][0], i) for j, i in enumerate(before[number])]
        far = [(f"nearest {j + 1}{', attacked' * moved}",
                kept[which, i] if moved else candidates[i][0], i)
               for j, i in enumerate(after[number])]
        line[0].set_ylabel(test.classes[test.labels[row]][:18], fontsize="x-small")
        for axis, (title, image, i) in zip(line, [
                ("query", query, None), *near, ("attacked query", attacked, None),
                (f"change, ±{attack.eps * 255:.3g}/255", change, None), *far]):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title("" if number else title, fontsize="x-small")
            if i is not None:
                right = candidates.labels[i] == test.labels[row]
                colour, mark, style = (COLOURS[0], "\u2713", "-") if right else \
                    (COLOURS[1], "\u2717", (0, (2, 1)))
                for spine in axis.spines.values():
                    spine.set(color=colour, linewidth=3, linestyle=style, capstyle="butt")
                axis.text(0.05, 0.95, mark, weight="bold", va="top", color=colour,
                          transform=axis.transAxes,
                          bbox={"facecolor": "white", "linewidth": 0, "pad": 1})
    figure.suptitle(f"{Path(run).name}; {attack}", fontsize="medium")
    figure.supxlabel("\u2713 solid frame: the query's class      \u2717 dashed frame: another class"
                     "      change: magnified, eps fills the range", fontsize="small")
    return figure


def draw_curves(plt, curves, x, metrics):
    """A line per name, mean and range over its seeds. curves: {name: [{x: [...], metric: [...]}
    per seed]}; metrics: {metric: what its axis says}."""
    height = 3.8 + 0.2 * math.ceil(len(curves) / len(metrics))            # with its legend
    figure, axes = plt.subplots(1, len(metrics), figsize=(2 + 4.5 * len(metrics), height),
                                sharex=True, squeeze=False, layout="constrained")
    for (name, seeds), (line, colour, mark) in zip(curves.items(), itertools.cycle(STYLES)):
        at = min((own[x] for own in seeds), key=len)
        if "eps50" in seeds[0]:
            half = statistics.median(math.inf if own["eps50"] is None else own["eps50"]
                                     for own in seeds)
            name += f", eps50 {half:.1f}" if math.isfinite(half) else f", eps50 > {at[-1]:g}"
        for axis, metric in zip(axes[0], metrics):
            scores = 100 * np.array([own[metric][:len(at)] for own in seeds])
            axis.plot(at, scores.mean(0), line, color=colour, label=name, marker=mark, markersize=4)
            axis.fill_between(at, scores.min(0), scores.max(0), color=colour, alpha=0.2)
    for axis, words in zip(axes[0], metrics.values()):
        axis.set(xlabel={"eps_255": "eps (1/255)"}.get(x, x), ylabel=words, ylim=(0, 100))
        if x == "steps":
            axis.set_xscale("log")
            axis.set_xticks(at, at)
            axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(metrics), fontsize="small")
    return figure


def sweep_curves(report, x, rules, metrics):
    """{name: a dict per run} of the attacks that differ in x alone ("eps_255", "steps"): its
    values, the metrics there, mean over the seeds of the attack, and the clean Recall@1."""
    curves = {}
    for outcome in report:
        found, own = sorted(outcome["found"], key=lambda pair: pair[0].entry()[x]), {}
        values = {attack.words(): attack.entry()[x] for attack, _ in found}
        for row in rows_of(outcome["clean"], found, configuration_of(outcome["run"]),
                           rules or [outcome["clean"]["rule"]]):
            _, objective, name, radius = row["attack"]
            rest = name if x == "eps_255" else f"{name.partition('-')[0]}, {radius}"
            curve = own.setdefault(f"{row['name']}: {objective} {rest}", {
                "seed": outcome["flags"]["seed"], "clean_R@1": row["clean"]["R@1"], x: [],
                **{metric: [] for metric in metrics}})
            curve[x].append(values[row["attack"]])
            for metric in metrics:
                curve[metric].append(row["attacked"][metric])
        for name, curve in own.items():
            if len(curve[x]) > 1:                    # otherwise of the other sweep
                if x == "eps_255":
                    curve["eps50"] = half_radius(
                        {0: curve["clean_R@1"], **dict(zip(curve[x], curve["R@1"]))})
                curves.setdefault(name, []).append(curve)
    return curves


def member_scores(report):
    """{configuration: [{"seed", rule: {"clean", "shared", "alone"}} per run]}: Recall@1 of the vote
    and of every member under the attack on the sum, and of the members attacked alone."""
    scores = {}
    for outcome in report:
        own, first = {"seed": outcome["flags"]["seed"]}, outcome["found"][0][0].words()
        for row in rows_of(outcome["clean"], outcome["found"], ""):
            rule, (*words, side) = row["name"].strip(), (*row["attack"], "shared")[:5]
            if tuple(words) == first and re.fullmatch(r"vote|member_\d+", rule):
                own.setdefault(rule, {"clean": row["clean"]["R@1"]})[side] = row["attacked"]["R@1"]
        scores.setdefault(configuration_of(outcome["run"]), []).append(own)
    return scores


def draw_members(plt, scores, attack):
    """member_scores as bars, mean and range over seeds."""
    figure, axes = panels(plt, len(scores))
    for axis, (name, seeds) in zip(axes, scores.items()):
        rules = list(seeds[0])[1:]
        for side, place, colour, hatch, words in (
                ("shared", -0.2, COLOURS[0], "", "one attack on the sum"),
                ("alone", 0.2, COLOURS[1], "//", "attacked alone")):
            own = [i for i, rule in enumerate(rules) if side in seeds[0][rule]]
            bars = 100 * np.array([[seed[rules[i]][side] for i in own] for seed in seeds])
            mean, low, high = bars.mean(0), bars.min(0), bars.max(0)
            axis.bar(np.array(own) + place, mean, 0.4, color=colour, hatch=hatch, label=words,
                     edgecolor="white", capsize=3,
                     yerr=(mean - low, high - mean) if len(seeds) > 1 else None)
        axis.plot([100 * statistics.mean(seed[rule]["clean"] for seed in seeds) for rule in rules],
                  "k_", markersize=24, label="clean")
        axis.set_xticks(range(len(rules)), rules, fontsize="small")
        axis.set(ylabel="Recall@1 (%)", ylim=(0, 100))
        axis.set_title(name, fontsize="small")
    figure.suptitle(str(attack), fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize="small")
    return figure


if __name__ == "__main__":
    common.run_script(parse_args, main)
