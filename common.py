# SPDX-License-Identifier: MIT
"""What every script here shares, because a fair comparison needs it to be identical.

Copy this file next to one method script and the script runs. In this order: losses, attack,
metrics, evaluation, networks, data, batches, command line, and `Run`, the books of a training.
Images are float (B, 3, S, S) in [0, 1]; the network normalises them itself, so an attack radius eps
is a number of pixel values. Embeddings are unit vectors (B, D), distances are Euclidean on the unit
sphere unless a docstring says otherwise, labels are int64, scores are floats in [0, 1]."""

import argparse
import contextlib
import copy
import ctypes
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms import functional as TF


class UserError(ValueError):
    """An expected failure, one line. code: the exit code; 2: bad input, 1: the run failed."""
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# Every random stream is a function of (seed, epoch, purpose), so that continuing a run needs no
# state. Network i of an ensemble has purposes of its own: purpose + MEMBER * i.
DATA, SPLIT, BATCHES, AUGMENT, TRAIN, EVALUATE, INITIAL, PROXIES, TARGETS, CLASSES = range(10)
MEMBER = 100


def random_stream(seed: int, epoch: int, purpose: int, index: int = 0) -> np.random.Generator:
    """An independent numpy generator for one purpose (and one image, for augmentation)."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, purpose, index]))


def seed_torch(seed: int, epoch: int, purpose: int, index: int = 0) -> None:
    """Seed torch's global generators from the stream (seed, epoch, purpose, index)."""
    torch.manual_seed(int(random_stream(seed, epoch, purpose, index).integers(2**62)))


# ---- losses ----------------------------------------------------------------------------------
def proxy_anchor_loss(embeddings, labels, proxies, margin: float = 0.1, scale: float = 32.0):
    """Proxy Anchor, Eq. (4) of Kim et al., CVPR 2020 (https://arxiv.org/abs/2003.13911).
    embeddings (B, D) and proxies (C, D) of any norm, labels (B,). margin: its delta, in cosine.
    scale: its alpha. A class absent from the batch adds nothing to the pull, but to the push."""
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(proxies, dim=1).T           # (B, C)
    positive = F.one_hot(labels, len(proxies)).bool()                                  # (B, C)
    pull = (-scale * (cosine - margin)).masked_fill(~positive, -torch.inf).logsumexp(0)
    push = (scale * (cosine + margin)).masked_fill(positive, -torch.inf).logsumexp(0)
    # softplus(logsumexp(z)) = log(1 + sum exp z) without overflow
    return F.softplus(pull).sum() / positive.any(0).sum() + F.softplus(push).mean()


def triplet_loss(anchor, positive, negative, margin: float = 0.2, reduction: str = "mean"):
    """max(0, d(a, p) - d(a, n) + margin) of embeddings (T, D); without triplets 0, with a graph.
    reduction: "mean" over all triplets, or "nonzero": over the strictly positive terms."""
    terms = F.relu(euclidean(anchor, positive) - euclidean(anchor, negative) + margin)
    return _reduce(terms, reduction, torch.ones_like(terms, dtype=torch.bool))


def contrastive_loss(first, second, same, margin: float = 1.0, reduction: str = "mean"):
    """d(x, y) of positive pairs plus max(0, margin - d(x, y)) of negative pairs, a mean of each
    (Panum et al., Sec. 3.1; Hadsell et al. 2006). first, second (T, D); same: bool (T,), whether
    the pair is a positive one. reduction as in triplet_loss."""
    distance = euclidean(first, second)
    return _reduce(distance, reduction, same) + _reduce(F.relu(margin - distance), reduction, ~same)


def euclidean(first, second):
    """Euclidean distance of rows; its gradient at first == second is 0 (no epsilon is added)."""
    return torch.linalg.vector_norm(first - second, dim=1)


def _reduce(terms, reduction, kind):
    """The mean of the terms of this kind (bool): masked, because a GPU waits to pick them out."""
    count = (kind & (terms > 0) if reduction == "nonzero" else kind).sum().clamp(min=1)
    return terms.where(kind, 0).sum() / count


@torch.no_grad()
def mine_triplets(embeddings, labels, how: str, generator=None, *, anchors=None,
                  margin: float = 0.2, cutoffs=(0.5, 1.4), partners=None):
    """Draw one triplet per anchor: (a, p, n), row numbers int64 (T,).
    anchors: rows to use (None: every row). An anchor without another image of its class or without
    an image of another class is dropped, so T may be 0. The positive is uniform among the OTHER
    rows of the class (softhard excepted), the negative is

        random    uniform over rows of other classes
        semihard  uniform over negatives with d(a, p) < d(a, n) < d(a, p) + margin, else random
        softhard  uniform over negatives nearer than the farthest positive, else random; its
                  positive is uniform over positives farther than the nearest negative, else random
        distance  drawn with probability 1 / q(d), distance-weighted sampling (Wu et al., ICCV 2017)
        hardest   the nearest one

    cutoffs: distances below the first count as it; negatives beyond the second are left out unless
    none is nearer; None switches either off. partners: the anchors' positives (softhard draws)."""
    rows = torch.arange(len(labels), device=labels.device)
    anchors = rows if anchors is None else anchors.to(labels.device)
    same = labels[anchors, None] == labels                                             # (A, B)
    other = same & (anchors[:, None] != rows)
    usable = other.any(1) & ~same.all(1)
    def here(part):                      # nothing waits for a GPU if the labels are on the CPU
        return part[usable].to(embeddings.device, non_blocking=True)
    anchors, positive, negative = here(anchors), here(other), here(~same)
    finite = embeddings.float().nan_to_num(0, 0, 0)  # a diverged network gets a loss that says so
    distance = torch.cdist(finite[anchors], finite,            # (T, B); the matmul form is off by
                           compute_mode="donot_use_mm_for_euclid_dist")     # 1e-3 for near rows
    to_negative = distance.masked_fill(~negative, torch.inf)
    def draw(wanted, fallback):          # torch.multinomial's draw; its checks make a GPU wait
        weight = 1.0 * torch.where(wanted.any(1, keepdim=True), wanted, fallback)
        return (weight / torch.empty_like(weight).exponential_(generator=generator)).argmax(1)
    if how == "softhard":
        p = draw(positive & (distance > to_negative.amin(1, keepdim=True)), positive)
    else:
        p = draw(positive, positive) if partners is None else here(partners.to(labels.device))
    if how == "hardest":
        return anchors, p, to_negative.argmin(1)
    if how == "distance":
        weight = _distance_weights(to_negative, embeddings.shape[1], cutoffs)
        return anchors, p, draw(weight, weight)
    to_positive = distance.gather(1, p[:, None])
    farthest = distance.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    wanted = {"random": negative, "softhard": negative & (distance < farthest),
              "semihard": negative & (distance > to_positive) & (distance < to_positive + margin)}
    return anchors, p, draw(wanted[how], negative)


def mine_pairs(embeddings, labels, source):
    """One triplet (a, p, n) per pair of pair_batches; p is the partner (softhard draws its own)."""
    even = torch.arange(0, len(labels), 2, device=labels.device)
    return mine_triplets(embeddings, labels, source, anchors=even, partners=even + 1,
                         cutoffs=(None, None))                 # Zhou & Patel's have no cutoffs


def _distance_weights(distance, dim, cutoffs):
    """Weights 1 / q(d) of the negatives, by row, q(d) ~ d^(dim - 2) (1 - d^2 / 4)^((dim - 3) / 2)
    being the density of distances on the sphere; distance (T, B) is inf where not a negative."""
    low, high = cutoffs
    high = torch.inf if high is None else high
    allowed = (distance < high) | (distance == distance.amin(1, keepdim=True))
    d = distance.double().clamp(max(low or 0, 1e-4), 1.99)
    log_weight = (2 - dim) * d.log() - (dim - 3) / 2 * torch.log1p(-d.square() / 4)
    return log_weight.masked_fill(~allowed, -torch.inf).softmax(1)       # by row: no underflow


# ---- attack ----------------------------------------------------------------------------------
def pgd(objective, images, eps: float, step_size: float, steps: int, random_start: bool = True,
        start=None):
    """Maximise objective(x) over ||x - images||_inf <= eps and x in [0, 1], by sign steps.
    Projected gradient ascent (Madry et al., ICLR 2018, Sec. 2.1). images (B, C, H, W) in [0, 1];
    eps and step_size in pixel values. objective: images -> one value per image, or one per tuple
    of images when tuples are stacked ([a; p; n] gives (B / 3,)); its sum is ascended. start: begin
    here (projected) instead of uniformly at random in the ball (random_start) or at the images.
    Returns images in [0, 1], detached. The model's mode is the caller's: `with frozen(model):`."""
    images = images.detach()
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    x = images if start is None else start.detach()
    if start is None and random_start:
        x = images + torch.empty_like(images).uniform_(-eps, eps)
    x = x.clamp(lower, upper)
    for _ in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(x).sum(), x)
        x = (x.detach() + step_size * gradient.sign()).clamp(lower, upper)
    return x


def shift_objective(models, references):
    """sum_i 1 - cos(F_i(x'), F_i(x)); EAT, Eq. (5) in Eq. (10). references: the F_i(x), one (B, D)
    per model. At x' = x the gradient is zero or rounding noise: start anywhere else."""
    references = [reference.detach() for reference in references]
    return lambda images: sum(1 - (model(images) * reference).sum(1)
                              for model, reference in zip(models, references))


# ---- metrics ---------------------------------------------------------------------------------
def nearness(rows, points, half_norm, out):
    """Write x.y - |y|^2 / 2 into out (b, N): rows x (b, D), points y (N, D). On a CPU 512 points at
    a time, because a product of few rows with many points takes twice the time."""
    size = 512 if out.is_cpu else max(len(points), 1)
    with torch.autocast(out.device.type, enabled=False):
        for part, half, place in zip(points.split(size), half_norm.split(size), out.split(size, 1)):
            torch.mm(rows, part.T, out=place).sub_(half)
    return out


def similarities(embeddings, labels, gallery=None, gallery_labels=None):
    """Yield (rows (b,), similarity (b, N), best (b,)) for one chunk of queries after another, small
    classes first; the next chunk overwrites similarity.
    similarity orders candidates as the Euclidean distance does: x.y - |y|^2 / 2. Those of the
    query's class are lowered by the last bit, so that they lose every tie; best is the highest of
    them (-inf: none). The query itself is -inf. NaN counts against the query."""
    embeddings = embeddings.detach()
    gallery = embeddings if gallery is None else gallery.detach()
    names = labels if gallery_labels is None else gallery_labels
    # A matrix product rounds equal columns differently, and equal images must tie: multiply once.
    points, column = gallery.unique(dim=0, return_inverse=True)
    points = gallery if len(points) == len(gallery) else points
    half_norm, low = points.square().sum(1) / 2, gallery.new_tensor(-torch.inf)
    finite = bool(embeddings.isfinite().all() & gallery.isfinite().all())
    # The candidates of every class stand together in `order`, from `start` on.
    index = torch.cat([labels, names]).unique(return_inverse=True)[1]
    own, index = index.split([len(labels), len(names)])
    order, size = index.argsort(stable=True), index.bincount(minlength=len(index) + len(own))
    start, every = size.cumsum(0) - size, torch.arange(len(labels), device=labels.device)
    chunks = size[own].argsort(stable=True).split(max(1, min(1024, 2**26 // max(len(gallery), 1))))
    space = points.new_empty(len(chunks[0]), len(points))     # new memory costs time, too
    for rows in chunks:
        similarity = nearness(embeddings[rows], points, half_norm, space[:len(rows)])
        similarity = similarity if points is gallery else similarity[:, column]
        if not finite:
            similarity.nan_to_num_(torch.inf, torch.inf, -torch.inf)
        count = size[own[rows]]                                  # (b,), of its class
        query = every[:len(rows)].repeat_interleave(count)       # (sum of count,), as is place
        place = (start[own[rows]] - count.cumsum(0) + count).repeat_interleave(count)
        place = order[place + torch.arange(len(place), device=place.device)]
        relevant = similarity[query, place]
        relevant = torch.nextafter(relevant, low).where(relevant.isfinite(), low)
        if gallery_labels is None:
            relevant = relevant.where(place != rows[query], low)
            similarity[every[:len(rows)], rows] = low
        similarity[query, place] = relevant
        yield rows, similarity, low.repeat(len(rows)).scatter_reduce(0, query, relevant, "amax")


def highest(similarity, k):
    """similarity.topk(k) in a third of the time: the k highest of a row stand in the k blocks of 64
    columns with the highest maxima."""
    width = similarity.shape[1] // 64 * 64
    if 256 * k > width:
        return similarity.topk(k)
    block = similarity[:, :width].unflatten(1, (-1, 64)).amax(2).topk(k).indices
    column = torch.arange(similarity.shape[1], device=block.device)
    column = torch.cat([(64 * block[:, :, None] + column[:64]).flatten(1),
                        column[width:].expand(len(block), -1)], 1)
    value, place = similarity.gather(1, column).topk(k)
    return value, column.gather(1, place)


@torch.no_grad()
def ranking_scores(embeddings, labels, ks, gallery=None, gallery_labels=None, precision=True):
    """(Recall@K query by query, bool (n, len(ks)); AP@R (n,), 0 where R = 0) in one pass."""
    count = candidate_counts(labels, gallery_labels)
    names = labels if gallery_labels is None else gallery_labels
    limits = torch.tensor(ks, device=labels.device)
    hits = torch.zeros(len(labels), len(ks), dtype=torch.bool, device=labels.device)
    average = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for rows, similarity, best in similarities(embeddings, labels, gallery, gallery_labels):
        if precision:
            value, nearest = highest(similarity, int(count[rows].max()))
            hit = (names[nearest] == labels[rows, None]) & (value > -torch.inf)
            average[rows] = average_precision(hit, count[rows])
        if ks:                                        # in place: a third of the time
            nearer = similarity.gt_(best[:, None]).sum(1, dtype=torch.float32)
            hits[rows] = best.isfinite()[:, None] & (nearer[:, None] < limits)
    return hits.cpu(), average


@torch.no_grad()
def recall_at_k(embeddings, labels, ks=(1, 2, 4, 8), gallery=None, gallery_labels=None):
    """Recall@K: the share of queries with a same-class item among their K nearest candidates.
    embeddings (n, D), labels (n,). gallery None: leave-one-out. gallery without gallery_labels: the
    same images in the same order (template matching), row i is not a candidate of query i; with
    them another set. Ties count against the query: a hit needs fewer than K candidates of other
    classes at least as near as the nearest of its own. Without one: a miss. -> {K: share}."""
    hit, _ = ranking_scores(embeddings, labels, ks, gallery, gallery_labels, precision=False)
    return {k: count / max(len(labels), 1) for k, count in zip(ks, hit.sum(0).tolist())}


@torch.no_grad()
def map_at_r(embeddings, labels, gallery=None, gallery_labels=None) -> float:
    """mAP@R (Musgrave et al., ECCV 2020): the mean of AP@R = 1/R sum_{k<=R} precision@k * rel_k.
    R: how many candidates of its class a query has; R = 0 is left out. Else as in recall_at_k."""
    average = ranking_scores(embeddings, labels, (), gallery, gallery_labels)[1]
    return float(average.sum() / (candidate_counts(labels, gallery_labels) > 0).sum().clamp(min=1))


def average_precision(hit, count):
    """AP@R per query from hit (b, k >= R) in rank order and R = count (b,); 0 where R = 0."""
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    hit = hit & (rank <= count[:, None])
    return (hit.cumsum(1) / rank * hit).double().sum(1) / count.clamp(min=1)


def candidate_counts(labels, gallery_labels):
    """How many candidates of its own class every query has (n,), itself left out."""
    names = labels if gallery_labels is None else gallery_labels
    index = torch.cat([labels, names]).unique(return_inverse=True)[1]
    return index[len(labels):].bincount(minlength=int(index.max()) + 1)[index[:len(labels)]] \
        - int(gallery_labels is None)


def neighbour_labels(embeddings, labels, k, gallery=None, gallery_labels=None):
    """Labels (n, k) of the k nearest candidates; gallery forms and ties as in recall_at_k."""
    names = labels if gallery_labels is None else gallery_labels
    nearest = names.new_empty(len(labels), min(k, len(names)))
    for rows, similarity, _ in similarities(embeddings, labels, gallery, gallery_labels):
        nearest[rows] = names[highest(similarity, nearest.shape[1])[1]]
    return nearest


@torch.no_grad()
def kmeans(embeddings: Tensor, clusters: int, seed: int) -> Tensor:
    """Lloyd's k-means from k-means++ centres (above 1,000 clusters distinct random rows), at most
    20 iterations: cluster ids int64 (N,). A cluster that loses all its rows keeps its centre."""
    stream = random_stream(seed, 0, EVALUATE)
    points = embeddings.float()
    clusters = min(clusters, len(points))
    if clusters > 1000:
        chosen = stream.permutation(len(points))[:clusters].tolist()
    else:
        chosen = [int(stream.integers(len(points)))]
        nearest = (points - points[chosen[0]]).square().sum(1)
        for _ in range(clusters - 1):                 # next centre with probability ~ distance^2
            cumulative = nearest.double().cpu().cumsum(0)      # on a GPU the sum's order varies
            draw = stream.random() * float(cumulative[-1])
            row = int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(points) - 1))
            chosen.append(row)
            nearest = torch.minimum(nearest, (points - points[row]).square().sum(1))
    centres = points[torch.tensor(chosen, device=points.device)]
    assigned = torch.full((len(points),), -1, device=points.device)
    chunks = points.split(max(1, min(1024, 2**26 // clusters)))
    space = points.new_empty(len(chunks[0]), clusters)
    for _ in range(20):
        half_norm = centres.square().sum(1) / 2
        nearest = torch.cat([nearness(chunk, centres, half_norm, space[:len(chunk)]).argmax(1)
                             for chunk in chunks])
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        count = torch.bincount(assigned, minlength=clusters)[:, None]
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return assigned


def _contingency(labels, clusters):
    """Sizes of classes, of clusters and of their non-empty intersections, float64; the mutual
    information of the two labelings and the mean of their two entropies, in nats."""
    labels, clusters = (ids.cpu().unique(return_inverse=True)[1] for ids in (labels, clusters))
    pairs, both = (labels * len(labels) + clusters).unique(return_counts=True)
    rows, columns, both = (size.double() for size in (labels.bincount(), clusters.bincount(), both))
    i, j, total = pairs // len(labels), pairs % len(labels), both.sum()
    ratio = both.log() + total.log() - rows[i].log() - columns[j].log()
    entropies = [float(-(size / total * (size / total).log()).sum()) for size in (rows, columns)]
    return rows, columns, both, float((both / total * ratio).sum()), sum(entropies) / 2


def nmi(labels: Tensor, clusters: Tensor) -> float:
    """Normalised mutual information 2 I(L; C) / (H(L) + H(C)), in [0, 1] (EAT, Eq. (13))."""
    *_, information, entropy = _contingency(labels, clusters)
    return min(max(information / entropy, 0.0), 1.0) if entropy else 1.0


def ami(labels: Tensor, clusters: Tensor) -> float:
    """Adjusted mutual information (Vinh et al., JMLR 2010), NMI with chance at 0:
    (I - E[I]) / (mean(H(L), H(C)) - E[I]), E over random assignments with the same sizes."""
    rows, columns, _, information, entropy = _contingency(labels, clusters)
    if not entropy:
        return 1.0
    total, expected = rows.sum(), 0.0
    # E[I] (their Eq. 24a) depends on the sizes a, b alone: sum over distinct sizes, with counts.
    for a, times_a in zip(*rows.unique(return_counts=True)):
        for b, times_b in zip(*columns.unique(return_counts=True)):
            n = torch.arange(float(max(1, a + b - total)), float(min(a, b)) + 1).double()
            log_probability = sum(torch.lgamma(1 + k) for k in (a, b, total - a, total - b)) \
                - sum(torch.lgamma(1 + k) for k in (total, n, a - n, b - n, total - a - b + n))
            terms = n / total * (n * total / (a * b)).log() * log_probability.exp()
            expected += float(times_a * times_b * terms.sum())
    room, tiny = entropy - expected, float(np.finfo(np.float64).eps)
    return (information - expected) / (room if abs(room) > tiny else math.copysign(tiny, room))


def pairwise_f1(labels: Tensor, clusters: Tensor) -> float:
    """F1 of "these two images are of one class" read off the clusters (EAT, Eq. (12))."""
    rows, columns, both, *_ = _contingency(labels, clusters)
    right, *pairs = (float((size * (size - 1) / 2).sum()) for size in (both, rows, columns))
    return 2 * right / sum(pairs) if sum(pairs) else 0.0


def vote_labels(votes: Tensor) -> Tensor:
    """Plurality over the first dimension, the N members: (N, ...) labels -> (...) labels. Among
    tied labels the one whose first voter comes first: [A, B, B, C, C] -> B, [A, B, C] -> A."""
    agreeing = torch.stack([(votes == own).sum(0, dtype=torch.uint8) for own in votes])
    return votes.gather(0, agreeing.argmax(0, keepdim=True))[0]          # argmax: the first maximum


@torch.no_grad()
def vote_clusters(assignments: Tensor, clusters: int) -> Tensor:
    """One clustering (n,) out of the N members', assignments (N, n) of ids below `clusters`. The
    ids are renamed after the member that agrees best with the others (highest mean NMI), the
    largest overlap first. Then the plurality decides, image by image; ties go to that member."""
    assignments = assignments.cpu()
    agreement = [sum(nmi(ids, others) for others in assignments) for ids in assignments]
    first = int(np.argmax(agreement))
    reference, renamed = assignments[first], [assignments[first]]
    for ids in [*assignments[:first], *assignments[first + 1:]]:
        cells, overlap = (ids * clusters + reference).unique(return_counts=True)
        name, free = torch.full((clusters,), -1), set(range(clusters))
        for cell in cells[overlap.argsort(descending=True, stable=True)].tolist():
            row, column = divmod(cell, clusters)
            if name[row] < 0 and column in free:
                name[row] = column
                free.remove(column)
        name[name < 0] = torch.tensor(sorted(free), dtype=torch.int64)    # none overlaps enough
        renamed.append(name[ids])
    return vote_labels(torch.stack(renamed))


def vote_ranking(embeddings, labels, ks, gallery=None, gallery_labels=None):
    """ranking_scores of one list: place j has the label of most members' j-th neighbours."""
    count = candidate_counts(labels, gallery_labels)
    names = labels if gallery_labels is None else gallery_labels
    depth = min(max(int(count.max()), *ks), len(names) - int(gallery_labels is None))
    hits = torch.zeros(len(labels), len(ks), dtype=torch.bool, device=labels.device)
    average = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for chunk in zip(*(similarities(own, labels, other, gallery_labels) for own, other
                       in zip(embeddings, gallery or [None] * len(embeddings)))):
        rows = chunk[0][0]
        votes = torch.stack([names[highest(similarity, depth)[1]] for _, similarity, _ in chunk])
        right = vote_labels(votes) == labels[rows, None]
        hits[rows] = torch.stack([right[:, :k].any(1) for k in ks], 1)
        average[rows] = average_precision(right, count[rows])
    return hits.cpu(), average


# ---- evaluation ------------------------------------------------------------------------------
KS = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20), "inshop-gallery": (1, 10, 20)}
# What the two protocols of a closing evaluation attack with; step is in units of eps.
PROTOCOLS = {"clustering": {"objective": "shift", "eps": 8 / 255, "step": 1 / 4, "steps": 10},
             "template": {"objective": "neighbour", "eps": 0.01, "step": 2 / 5, "steps": 5}}


@torch.no_grad()
def embed(models, batches) -> list[Tensor]:
    """The embeddings (n, D) of every model, in the order of the batches; evaluation mode."""
    with frozen(*models):
        outputs = [[model(images).float() for model in models] for images, _, _ in batches]
    return [torch.cat(parts) for parts in zip(*outputs)]


class Attack(NamedTuple):
    """The numbers of one attack, as they stand in results.json.
    protocol "clustering": every image is attacked and compared with attacked images (EAT);
    "template": queries are attacked, the gallery is clean (Panum et al., Algorithm 1). objective:
    what is maximised. against: what of an ensemble it reads. eps, step: pixel values."""
    protocol: str = "clustering"
    objective: str = "shift"
    attack: str = "pgd"
    against: str = "sum"
    eps: float = 8 / 255
    step: float = 2 / 255
    steps: int = 10
    restarts: int = 1
    seed: int = 0

    def __str__(self):
        attack = f"PGD-{self.steps}" if self.attack == "pgd" else self.attack
        against = "" if self.against == "sum" else f" against {self.against}"
        return f"{self.protocol}: {self.objective}{against}, {attack}, eps {255 * self.eps:.3g}/255"


def protocol_attack(protocol: str, eps: float | None = None, seed: int = 0) -> Attack:
    """A protocol's own attack, at another radius if one is given: its step scales with eps."""
    numbers = PROTOCOLS[protocol] | ({} if eps is None else {"eps": eps})
    return Attack(protocol, numbers["objective"], eps=numbers["eps"], steps=numbers["steps"],
                  step=numbers["step"] * numbers["eps"], seed=seed)


class Retrieval:
    """Networks, the queries that they embed, and where these are looked up.
    batches: a function that returns a fresh iterator of (images, labels, rows) in order. labels
    (n,): of all queries. gallery_batches and gallery_labels: another set to look them up in.
    clean: [(n, D)], the queries' embeddings, one per model. gallery: [(N, D)], the candidates', or
    None where queries look each other up. names (N,): the labels of the candidates."""
    def __init__(self, models, batches, labels, ks=(1, 2, 4, 8), gallery_batches=None,
                 gallery_labels=None):
        self.models, self.batches, self.labels, self.ks = models, batches, labels, ks
        self.gallery_batches, self.gallery_labels = gallery_batches, gallery_labels
        self.clean = embed(models, batches())
        self.gallery = embed(models, gallery_batches()) if gallery_batches else None
        self.names = labels if gallery_labels is None else gallery_labels

    def attacked(self, attack, value, *, reads=None, only=None, craft=None, batches=None):
        """The embeddings [(n, D)] of the queries after ONE attack on all networks.
        value([(B, D)], rows) -> (B,) is maximised; of several restarts the highest is kept, image
        by image. reads: the networks that value reads (None: all); it gets None of the others.
        only: bool (n,), the queries to attack. craft(objective, images, rows, start) -> images:
        how, if not by PGD from a uniform start. batches: attack these in place of the queries."""
        moved, places = [[] for _ in self.models], []
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=cuda), frozen(*self.models):
            for number, (images, rows, *starts) in enumerate(
                    self._packed(attack, only, batches or self.batches)):
                def objective(x, rows=rows):
                    return value([model(x) if reads is None or i in reads else None
                                  for i, model in enumerate(self.models)], rows)
                best = highest = None
                for restart in range(attack.restarts):       # the same start whatever their number
                    seed_torch(attack.seed, restart, EVALUATE, number)
                    start = starts[restart] if starts else None
                    x = craft(objective, images, rows, start) if craft else pgd(
                        objective, images, attack.eps, attack.step, attack.steps, start=start)
                    with torch.no_grad():
                        now = objective(x) if attack.restarts > 1 else None
                    if restart:
                        x = torch.where((now > highest).view(-1, 1, 1, 1), x, best)
                        now = torch.maximum(now, highest)
                    best, highest = x, now
                places.append(rows.to(self.labels.device))
                with torch.no_grad():
                    for outputs, model in zip(moved, self.models):
                        outputs.append(model(best).float())
        if only is None:
            return [torch.cat(outputs) for outputs in moved]
        return [clean.index_copy(0, torch.cat(places), torch.cat(outputs)) if places else clean
                for outputs, clean in zip(moved, self.clean)]

    def _packed(self, attack, only, batches):
        """(images, rows), or of the queries `only` (images, rows, a start for every restart), full
        batches: a query's start is the one that it has when all are attacked."""
        held, size = None, 0
        for number, (images, _, rows) in enumerate(batches()):
            if only is None:
                yield images, rows
                continue
            kept, starts, size = only[rows].nonzero()[:, 0], [], max(size, len(rows))
            for restart in range(attack.restarts):
                seed_torch(attack.seed, restart, EVALUATE, number)
                starts.append(pgd(None, images, attack.eps, 0, 0)[kept])
            new = [images[kept], rows[kept.cpu()], *starts]
            held = [torch.cat(pair) for pair in zip(held, new)] if held else new
            while len(held[0]) >= size:
                yield [part[:size] for part in held]
                held = [part[size:] for part in held]
        if held and len(held[0]):
            yield held

    def gallery_met(self, attack, craft=None) -> list[Tensor] | None:
        """The candidates [(N, D)] that attacked queries meet; None: each other."""
        if attack.protocol == "template":
            return self.gallery or self.clean
        return self.gallery and self.attacked(attack, shift(self, self.gallery)[0], craft=craft,
                                              batches=self.gallery_batches)

    def score(self, embeddings, gallery=None, *, seed=0, clustering=True) -> dict[str, dict]:
        """{inference rule: {metric: score, "hits": bits}} of embeddings of the queries [(n, D)].
        gallery: [(N, D)]; None: the queries look each other up. Rules: member_1 ...; of an ensemble
        also vote, member_mean (the mean of the members' scores), concat (concatenated embeddings)
        and mean (their normalised average). hits: the queries right at rank 1, as hexadecimal bits.
        clustering False: no NMI, AMI and F1."""
        labels, clusters, assigned = self.labels, len(self.labels.unique()), {}
        for rule, (queries, _) in rule_spaces(embeddings).items() if clustering else ():
            assigned[rule] = kmeans(queries, clusters, seed).cpu()
        members = [ids for rule, ids in assigned.items() if rule.startswith("member_")]
        if len(members) > 1:
            assigned["vote"] = vote_clusters(torch.stack(members), clusters)
        scores = self.rated(self.ranked(embeddings, gallery))
        for rule, ids in assigned.items():
            scores[rule] |= {"NMI": nmi(labels, ids), "AMI": ami(labels, ids),
                             "F1": pairwise_f1(labels, ids)}
        return with_member_mean(scores)

    def ranked(self, embeddings, gallery=None) -> dict[str, tuple]:
        """{rule: ranking_scores at K = 1 and the ks}, arguments as in `score`."""
        shared = self.labels, (1, *self.ks)
        ranked = {rule: ranking_scores(queries, *shared, candidates, self.gallery_labels)
                  for rule, (queries, candidates) in rule_spaces(embeddings, gallery).items()}
        return ranked if len(embeddings) == 1 else {
            "vote": vote_ranking(embeddings, *shared, gallery, self.gallery_labels), **ranked}

    def rated(self, ranked) -> dict[str, dict]:
        """{rule: {"R@K" ..., "mAP@R", "hits"}} out of what `ranked` returns."""
        matched = (candidate_counts(self.labels, self.gallery_labels) > 0).sum().clamp(min=1)
        return {rule: {
            **{f"R@{k}": float(right.double().mean()) for k, right in zip(self.ks, hit[:, 1:].T)},
            "mAP@R": float(precision.sum() / matched),
            "hits": np.packbits(hit[:, 0].numpy()).tobytes().hex()}
            for rule, (hit, precision) in ranked.items()}


def with_member_mean(scores) -> dict[str, dict]:
    """The scores; of an ensemble with the mean of its members' behind the vote."""
    members = [row for rule, row in scores.items() if rule.startswith("member_")]
    mean = {metric: float(np.mean([row[metric] for row in members])) for metric, score in
            members[0].items() if isinstance(score, float)}
    return scores if len(members) == 1 else {"vote": scores["vote"], "member_mean": mean, **scores}


def unpack(hits: str, count: int) -> np.ndarray:
    """bool (count,) out of the "hits" of results.json, hexadecimal bits."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(hits), np.uint8), count=count).astype(bool)


def rule_spaces(embeddings, gallery=None) -> dict[str, tuple]:
    """{rule: (embeddings, gallery or None)} of the rules that look neighbours up in one space."""
    spaces = {f"member_{i + 1}": (own, gallery and gallery[i]) for i, own in enumerate(embeddings)}
    if len(embeddings) > 1:
        for name, combine in (("concat", lambda parts: torch.cat(parts, 1) / len(parts) ** 0.5),
                              ("mean", lambda parts: F.normalize(sum(parts), dim=1))):
            spaces[name] = (combine(embeddings), gallery and combine(gallery))
    return spaces


def shift(retrieval, references=None):
    """(value, None): away from the queries' own clean embeddings (or references); EAT, Eq. (10)."""
    references = references or retrieval.clean
    return (lambda embeddings, rows: sum(1 - (e * clean[rows]).sum(1)
                                         for e, clean in zip(embeddings, references))), None


def neighbour(retrieval, itself=False):
    """(value, only): away from the clean nearest neighbour; Algorithm 1 of Panum et al.
    only: bool (n,), the queries to attack: a neighbour has their label. A member whose neighbour is
    right adds its distance. itself: away from the own clean embedding (the authors' code)."""
    targets, right = [], []
    for i, clean in enumerate(retrieval.clean):
        gallery = clean if retrieval.gallery is None else retrieval.gallery[i]
        nearest = torch.empty_like(retrieval.labels)
        for rows, similarity, _ in similarities(clean, retrieval.labels, gallery,
                                                retrieval.gallery_labels):
            nearest[rows] = similarity.argmax(1)
        targets.append(clean if itself else gallery[nearest])
        right.append(retrieval.names[nearest] == retrieval.labels)
    def value(embeddings, rows):
        return sum(hit[rows] * euclidean(e, target[rows])
                   for e, target, hit in zip(embeddings, targets, right))
    return value, torch.stack(right).any(0)


def retrieval_of(models, dataset, *, ks=(1, 2, 4, 8), batch_size=128, workers=0, device="cpu"):
    """The Retrieval of an ImageSet and its gallery. An attack's starts follow the batches."""
    def labelled(images):
        order = torch.arange(len(images)).split(batch_size)
        return (lambda: progress(load_batches(images, order, augment=False, workers=workers,
                                              device=device), "evaluating", len(order)),
                images.labels.to(device))
    gallery = () if dataset.gallery is None else labelled(dataset.gallery)
    return Retrieval(models, *labelled(dataset), ks, *gallery)


def clean_scores(retrieval, seed) -> dict:
    """"clean" of results.json: every rule's scores, the headline rule's on top; NMI_chance: of five
    random assignments; n_singletons: queries without a match."""
    scores = retrieval.score(retrieval.clean, retrieval.gallery, seed=seed)
    rule, labels = next(iter(scores)), retrieval.labels
    matches = candidate_counts(labels, retrieval.gallery_labels)
    draws = random_stream(seed, 0, EVALUATE).integers(len(labels.unique()), size=(5, len(labels)))
    chance = float(np.mean([nmi(labels, draw) for draw in torch.from_numpy(draws)]))
    return {"rule": rule, "scores": scores, **scores[rule], "NMI_chance": chance,
            "n_queries": len(labels), "n_singletons": int((matches == 0).sum())}


def attack_record(retrieval, attack, scores, seconds, limited=False) -> dict:
    """One attack as it stands in results.json: its numbers, every rule's scores, the headline
    rule's on top. all_fail: the share of queries that no member of an ensemble has right."""
    rule, count = next(iter(scores)), len(retrieval.labels)
    right = [unpack(row["hits"], count) for name, row in scores.items()
             if name.startswith("member_") and "hits" in row]
    failed = {"all_fail": float(1 - np.any(right, axis=0).mean())} if len(right) > 1 else {}
    return {**attack._asdict(), "eps_255": 255 * attack.eps, "n_queries": count, "limited": limited,
            "seconds": round(seconds, 3), **failed, "rule": rule, "scores": scores, **scores[rule]}


def collapse_warnings(retrieval) -> list[str]:
    """One line for every network that maps all images to nearly one embedding."""
    return [f"member_{i} {'has collapsed' if mean > 0.95 else 'is not finite'}: cosine {mean:.3f}"
            for i, mean in enumerate(map(mean_cosine, retrieval.clean), 1) if not mean <= 0.95]


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine of two different rows of unit embeddings (n, D): 1 when they have collapsed."""
    total = embeddings.double().sum(0).square().sum() - embeddings.double().square().sum()
    return float(total / max(len(embeddings) * (len(embeddings) - 1), 1))


def evaluate(models, dataset, attacks, *, ks=(1, 2, 4, 8), seed=0, workers=0, device="cpu"):
    """The closing evaluation, PGD on shift or neighbour: {"clean", "robust", "warnings"}."""
    retrieval = retrieval_of(models, dataset, ks=ks, workers=workers, device=device)
    clean, robust = clean_scores(retrieval, seed), []
    for attack in attacks:
        started = time.perf_counter()
        value, only = {"shift": shift, "neighbour": neighbour}[attack.objective](retrieval)
        embeddings = retrieval.attacked(attack, value, only=only)
        scores = retrieval.score(embeddings, retrieval.gallery_met(attack), seed=attack.seed,
                                 clustering=attack.protocol == "clustering")
        robust.append(attack_record(retrieval, attack, scores, time.perf_counter() - started,
                                    dataset.limited))
    return {"clean": clean, "robust": robust, "warnings": collapse_warnings(retrieval)}


def percent(scores) -> dict[str, str]:
    """The scores of one rule as a table shows them, in percent."""
    return {key: f"{100 * score:.1f}" for key, score in scores.items() if isinstance(score, float)}


def format_table(rows) -> str:
    """An aligned table of rows [(name, {heading: text})]."""
    heads = list(dict.fromkeys(heading for _, cells in rows for heading in cells))
    lines = [["", *heads], *([name, *(cells.get(heading, "-") for heading in heads)]
                             for name, cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width)
                               in enumerate(zip(line, widths))) for line in lines)


# ---- networks --------------------------------------------------------------------------------
ARCHS = ("convnet", "mobilenetv2", "bninception", "resnet18", "resnet50")
TORCHVISION = {"mobilenetv2": "mobilenet_v2", "resnet18": "resnet18", "resnet50": "resnet50"}


class EmbeddingModel(nn.Module):
    """Images (B, 3, S, S) in [0, 1] -> unit embeddings (B, D): normalise, backbone, pool, linear.
    caffe: BGR and Caffe's mean in place of ImageNet's. amp: the backbone in bfloat16."""

    def __init__(self, backbone, channels, embedding_dim, pool, caffe=False):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(channels, embedding_dim)
        self.pool, self.caffe, self.amp = pool, caffe, False
        mean, std = ([104 / 255, 117 / 255, 128 / 255], [1 / 255] * 3) if caffe else \
            ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images):
        normalised = ((images.flip(1) if self.caffe else images) - self.mean) / self.std
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            maps = self.backbone(normalised)                          # (B, channels, h, w)
        maps = maps.float() if self.amp else maps
        pooled = maps.mean((2, 3))
        if self.pool == "avgmax":
            pooled = pooled + maps.amax((2, 3))
        return F.normalize(self.head(pooled), dim=1)


def _convnet():
    """Four 3 x 3 convolutions, the first three with stride 2: small, and fast on a CPU."""
    layers, width = [], 3
    for channels, stride in ((16, 2), (32, 2), (64, 2), (128, 1)):
        layers += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels),
                   nn.ReLU(inplace=True)]
        width = channels
    return nn.Sequential(*layers), width


class BNInception(nn.Module):
    """Inception with batch normalisation (Ioffe & Szegedy, ICML 2015), the Caffe version, with the
    parameter names of the public weights (`bn_inception-52deb4733.pth`)."""

    # block: input, 1x1, (3x3_reduce, 3x3), (double_3x3_reduce, double_3x3), pool, pool_proj.
    # Blocks without 1x1 have stride 2 and pass their pooled input through.
    BLOCKS = {
        "3a": (192, 64, (64, 64), (64, 96), "avg", 32),
        "3b": (256, 64, (64, 96), (64, 96), "avg", 64),
        "3c": (320, 0, (128, 160), (64, 96), "max", 0),
        "4a": (576, 224, (64, 96), (96, 128), "avg", 128),
        "4b": (576, 192, (96, 128), (96, 128), "avg", 128),
        "4c": (576, 160, (128, 160), (128, 160), "avg", 128),
        "4d": (608, 96, (128, 192), (160, 192), "avg", 128),
        "4e": (608, 0, (128, 192), (192, 256), "max", 0),
        "5a": (1056, 352, (192, 320), (160, 224), "avg", 128),
        "5b": (1024, 352, (192, 320), (192, 224), "max", 128),
    }

    def __init__(self):
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, 2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        for block, (width, one, three, double, _, proj) in self.BLOCKS.items():
            stride = 1 if one else 2
            for name, channels, out, kernel, step in (
                    ("1x1", width, one, 1, 1), ("3x3_reduce", width, three[0], 1, 1),
                    ("3x3", *three, 3, stride), ("double_3x3_reduce", width, double[0], 1, 1),
                    ("double_3x3_1", *double, 3, 1),
                    ("double_3x3_2", double[1], double[1], 3, stride),
                    ("pool_proj", width, proj, 1, 1)):
                if out:
                    self._add(f"inception_{block}_{name}", channels, out, kernel, step)

    def _add(self, name, channels, out, kernel, stride=1):
        self.add_module(name, nn.Conv2d(channels, out, kernel, stride, kernel // 2))
        self.add_module(name + "_bn", nn.BatchNorm2d(out))

    def _run(self, maps, block, *names):
        for name in names:
            maps = F.relu(getattr(self, f"{block}{name}_bn")(getattr(self, block + name)(maps)))
        return maps

    def forward(self, maps):
        # ceil_mode in every pooling: Caffe rounds sizes up.
        maps = F.max_pool2d(self._run(maps, "conv1_", "7x7_s2"), 3, 2, ceil_mode=True)
        maps = self._run(maps, "conv2_", "3x3_reduce", "3x3")
        maps = F.max_pool2d(maps, 3, 2, ceil_mode=True)
        for block, (_, one, _, _, pool, _) in self.BLOCKS.items():
            block = f"inception_{block}_"
            out = [self._run(maps, block, "1x1")] if one else []
            out.append(self._run(maps, block, "3x3_reduce", "3x3"))
            out.append(self._run(maps, block + "double_", "3x3_reduce", "3x3_1", "3x3_2"))
            pooled = F.avg_pool2d(maps, 3, 1, 1, ceil_mode=True) if pool == "avg" else \
                F.max_pool2d(maps, 3, 1 if one else 2, 1 if one else 0, ceil_mode=True)
            out.append(self._run(pooled, block, "pool_proj") if one else pooled)
            maps = torch.cat(out, 1)
        return maps


def build_model(arch: str, embedding_dim: int = 128, weights: str = "none") -> EmbeddingModel:
    """A network from [0, 1] images (B, 3, S, S) to unit embeddings (B, embedding_dim).
    arch: one of ARCHS. weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none"
    or a file. convnet and bninception add a map's maximum to its average (Proxy Anchor's head)."""
    if arch not in ARCHS:
        raise UserError(f"unknown --arch {arch!r}: choose one of {', '.join(ARCHS)}")
    if arch in TORCHVISION:
        layers = OrderedDict(torchvision.models.get_model(TORCHVISION[arch]).named_children())
        head = layers.popitem()[1]
        channels = (head[-1] if arch == "mobilenetv2" else head).in_features
        layers.pop("avgpool", None)
        backbone = nn.Sequential(layers)                             # keeps torchvision's names
    else:
        backbone, channels = (BNInception(), 1024) if arch == "bninception" else _convnet()
    if weights != "none":
        load_weights(backbone, arch, weights)
    model = EmbeddingModel(backbone, channels, embedding_dim, caffe=arch == "bninception",
                           pool="avg" if arch in TORCHVISION else "avgmax")
    return model.to(memory_format=torch.channels_last)               # faster convolutions


def pretrained(arch, weights):
    """The named tensors of an ImageNet network, torchvision's or those of the user's file."""
    if weights == "imagenet":
        if arch not in TORCHVISION:
            raise UserError(f"torchvision has no {arch}: pass --weights FILE, or --weights none")
        entry = torchvision.models.get_model_weights(TORCHVISION[arch])["IMAGENET1K_V1"]
        cached = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))
        if cached.exists() and sha256(cached.read_bytes()).hexdigest()[:8] not in cached.stem:
            raise UserError(f"{cached} is damaged or something else: delete it")
        try:
            return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:             # no network, a full disk ...
            raise UserError(f"cannot get {os.path.basename(entry.url)} ({error}): fetch it from "
                            f"{entry.url} and pass --weights FILE, or --weights none") from error
    state = torch_load(weights, f"weights of {arch}")
    for wrapper in ("state_dict", "model_state_dict", "model"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {str(name): value for name, value in state.items() if isinstance(value, Tensor) and
             value.is_floating_point() and not (value.is_sparse or value.is_meta)}
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_weights(network, arch, weights):
    """Load the tensors of `pretrained`, with or without a classifier, into a backbone."""
    expected = network.state_dict()
    state = {name: value for name, value in pretrained(arch, weights).items()
             if not name.startswith(("classifier.", "fc.", "last_linear."))}
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):          # absent in files of old torch versions
            state.setdefault(name, value)
        elif name in state and state[name].shape == (1, *value.shape):
            state[name] = state[name][0]                  # old bninception files: BatchNorm (1, C)
    wrong = [name for name in [*expected, *state] if name not in state or name not in expected
             or expected[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{weights} does not fit --arch {arch}: {len(wrong)} tensors are missing, "
                        f"unknown or of another shape (first: {wrong[0]}); give weights of {arch}")
    network.load_state_dict(state)


@contextlib.contextmanager
def frozen(*models):
    """Evaluation mode and no gradients of parameters inside the `with`, where attacks are made."""
    modules = [part for model in models if isinstance(model, nn.Module) for part in model.modules()]
    switched = [(module, "training") for module in modules if getattr(module, "training", False)]
    switched += [(parameter, "requires_grad") for module in modules
                 for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    def switch(on):
        for owner, name in switched:
            setattr(owner, name, on)
    switch(False)
    try:
        yield
    finally:
        switch(True)


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Training mode; freeze_bn fixes the BatchNorm statistics (weight and bias still train)."""
    model.train()
    for module in model.modules():
        if freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def load_model(path, device="cpu") -> list[nn.Module]:
    """The members of a run in eval mode. path: its folder, its last.pt or what is in that file."""
    checkpoint, members = path if isinstance(path, dict) else load_checkpoint(path), []
    try:
        for state in checkpoint["members"]:
            model = build_model(checkpoint["args"]["arch"], checkpoint["args"]["embedding_dim"])
            model.load_state_dict(state)
            members.append(model.to(device).eval())
        return members
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"a network of the checkpoint is damaged ({error}): restore it") from error


# ---- data ------------------------------------------------------------------------------------
# The folder of the archive, what is in it, and how many images train and test have.
OFFICIAL = {
    "cub": ("CUB_200_2011", "images/001.Black_footed_Albatross/*.jpg", 5864, 5924),
    "cub2010": ("CUB_200_2010", "images/001.Black_footed_Albatross/*.jpg", 2990, 3043),
    "cars": ("stanford_cars", "cars_annos.mat + car_ims/, cars_train/ + cars_test/ + devkit/, "
             "car_data/{train,test}/<class>/ or images/<class>/", 8054, 8131),
    "sop": ("Stanford_Online_Products", "Ebay_train.txt, Ebay_test.txt", 59551, 60502),
    "inshop": ("Inshop_Clothes", "list_eval_partition.txt and img/", 25882, 14218),
    "inshop-gallery": ("Inshop_Clothes", "list_eval_partition.txt and img/", 25882, 14218, 12612),
}
GENERATED = ("glyphs", "gaussian")
DATASETS = (*GENERATED, *OFFICIAL, "folder")


class ImageSet:
    """The images of one split: `len()`, `.labels` (int64), `.paths`, `.classes`, `[i]`.
    `[i]` is the evaluation view of image i, (float (3, S, S) in [0, 1], int label): shorter side
    resized to R = round(256 * S / 224), centre S x S crop; square: the whole image squashed to
    R x R. flip: mirror training views at random. gallery: the set to look these images up in.
    store: uint8 (n, 3, R, R) of a generated set, otherwise images are read from `paths`."""
    def __init__(self, items, image_size, classes=None, store=None):
        self.paths = [path for path, _ in items]
        self.classes = sorted({name for _, name in items}) if classes is None else classes
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([index[name] for _, name in items], dtype=torch.int64)
        self.image_size, self.resized = image_size, round(256 * image_size / 224)
        self.store, self.generated = store, store is not None         # of uint8 (3, h, w)
        self.square, self.flip, self.gallery, self.limited = False, not self.generated, None, False

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.view(index).float() / 255, int(self.labels[index])

    def subset(self, rows):
        """The images in `rows`; without a gallery labels are renumbered to 0..C-1 again."""
        part = copy.copy(self)
        part.paths = [self.paths[row] for row in rows]
        part.store = None if self.store is None else [self.store[row] for row in rows]
        part.labels = self.labels[torch.as_tensor(rows)]
        if self.gallery is None:                     # which would share the label map
            kept, part.labels = part.labels.unique(return_inverse=True)
            part.classes = [self.classes[label] for label in kept]
        return part

    def view(self, index):
        """Evaluation view of image `index`: uint8 (3, S, S)."""
        return TF.center_crop(self.pixels(index), [self.image_size, self.image_size])

    def random_view(self, index, stream, scale):
        """Training view, uint8 (3, S, S): RandomResizedCrop(S, scale) of the cached copy or the
        photo; square and generated sets: a random S x S crop of the R x R image. Then the flip."""
        size, image = self.image_size, self.pixels(index, resize=self.square)
        height, width = image.shape[1:]
        if self.square or self.generated:
            top, left = stream.integers(0, [height - size + 1, width - size + 1])
            image = image[:, top:top + size, left:left + size]
        else:
            top, left, height, width = random_crop_box(stream, height, width, scale)
            image = image[None, :, top:top + height, left:left + width].float()
            image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0]
            image = image.round_().byte()             # the pixels of TF.resized_crop, sooner
        return image.flip(2) if self.flip and stream.random() < 0.5 else image

    def pixels(self, index, resize=True):
        """uint8 (3, h, w), cached or decoded (and resized to shorter side R)."""
        from PIL import Image  # comes with torchvision
        if self.store is not None:
            return self.store[index]
        try:
            with Image.open(self.paths[index]) as image:
                if image.mode == "F":
                    raise ValueError("floating-point pixels have no fixed range")
                if image.mode.startswith("I"):       # 16 bits a pixel, which convert() would cut
                    image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype("uint8"))
                pixels = TF.pil_to_tensor(image.convert("RGB"))
        except Exception as error:                   # a damaged file raises nearly anything
            raise UserError(f"cannot read the image {self.paths[index]} ({error}): replace the "
                            f"file or remove it from the data set") from error
        height, width = pixels.shape[1:]             # the ends of a long strip are never seen
        pixels = TF.center_crop(pixels, [min(height, 8 * width), min(width, 8 * height)])
        size = [self.resized, self.resized] if self.square else self.resized
        return TF.resize(pixels, size, antialias=True) if resize else pixels


def random_crop_box(stream, height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(top, left, height, width) of torchvision's RandomResizedCrop, drawn from our own stream."""
    for _ in range(10):
        area = height * width * stream.uniform(*scale)
        aspect = math.exp(stream.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(stream.integers(height - h + 1)), int(stream.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])          # ten misses: the central crop
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def load_dataset(name: str, root=None, *, image_size: int | None = None, seed: int = 0):
    """(train, test) of a data set, split by class: no test class is seen in training.
    name: one of DATASETS; "inshop" looks queries up among themselves (EAT), "inshop-gallery" in
    `test.gallery`. root: its folder (default: environment DATA_ROOT, then "data"). image_size: side
    S of the views (224; 32 for generated sets, which depend on `seed`)."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    size = image_size or (32 if name in GENERATED else 224)
    if name in GENERATED:
        return {"glyphs": _glyphs, "gaussian": _gaussian}[name](seed, size)
    root = Path(root or os.environ.get("DATA_ROOT") or "data")
    folder, layout, *expected = OFFICIAL.get(name, ("", "at least 2 folders that hold images"))
    listing = {"cars": _list_cars, "sop": _list_sop, "folder": _list_folder}.get(
        name, _list_cub if "cub" in name else _list_inshop)
    try:
        lists = listing(name, [root / part for part in (
            "", folder, name.removesuffix("-gallery"), *(
                ("CUB_200_2011", "CUB_200_2010", "cub", "cub2010") if "cub" in name else
                ("cars196", "car_data", "online_products", "in-shop")))])
        for path in (path for items in lists or () for path, _ in items):
            os.stat(path)
    except (OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read the files or a list of {name} under {root} ({error}): unpack "
                        f"the archive again, or check the permissions") from None
    if not lists:
        there = ", ".join(sorted(path.name for path in root.glob("*"))[:8]) or "nothing"
        raise UserError(f"no {name} data under {root}: expected {layout}; found {there}. Unpack "
                        f"the archive there or pass --data-root (README, 'Data')")
    lists = lists[:len(expected) or 2]
    counts = [len(items) for items in lists]
    if sum(counts) < sum(expected) / 2:
        raise UserError(f"{name} under {root} has {sum(counts)} images, expected {sum(expected)}: "
                        f"the archive is not fully unpacked; unpack it again")
    if expected and counts != expected:
        warnings.warn(f"{name} has {counts} images, expected {expected}: a classification split, a "
                      f"half-unpacked archive or files of something else?", stacklevel=2)
    classes = sorted({name for items in lists[1:] for _, name in items})
    train, test, *gallery = ImageSet(lists[0], size), *(       # query and gallery share the labels
        ImageSet(items, size, classes) for items in lists[1:])
    test.gallery = gallery[0] if gallery else None
    return train, test


def _images_by_class(folder):
    """[(path, class)] of a tree, sorted by class: a class is a folder that holds images itself, at
    any depth, named by its path. Hidden files (`._*` of macOS archives) do not count."""
    from PIL import Image  # comes with torchvision
    formats, listing, others = {*Image.registered_extensions()} - {".pdf", ".palm"}, [], []
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        name = Path(os.path.relpath(path, folder)).as_posix()
        for file in (file for file in files if file[0] != "."):
            image = name != "." and os.path.splitext(file)[1].lower() in formats
            (listing if image else others).append((name, os.path.join(path, file)))
    if others:
        warnings.warn(f"left out: {len(others)} files, such as {others[0][1]}", stacklevel=4)
    return [(path, name) for name, path in sorted(listing)]


# Each lists [(path, class name)] per side, or returns None where its archive is not found.
def _split_by_class_id(listing, first_test):
    """Class folders are numbered, `001.Name`: ids up to first_test - 1 train, the rest test."""
    train = [item for item in listing if int(item[1].split(".")[0]) < first_test]
    return train, [item for item in listing if int(item[1].split(".")[0]) >= first_test]


def _list_cub(name, folders):
    """Both editions have one layout, but 2011 has a list and shorter Flickr ids in its names."""
    other = None
    for folder in folders:
        listing, listed = _images_by_class(folder / "images"), folder / "images.txt"
        if listed.is_file():
            names = [line.split()[1] for line in listed.read_text().splitlines() if line.strip()]
            listing = [(str(folder / "images" / path), path.split("/")[0]) for path in names
                       if "/._" not in path]
        listing = [item for item in listing if item[1].split(".")[0].isdecimal()]
        ids = [len(Path(path).stem.rsplit("_", 1)[-1]) for path, _ in listing]
        newer = listed.is_file() or sum(digits < 7 for digits in ids) >= len(ids) / 2
        if listing and newer == (name == "cub"):
            return _split_by_class_id(listing, 101)
        other = folder if listing else other
    if other:
        raise UserError(f"{other} holds the other edition of CUB-200: give --dataset "
                        f"{'cub2010' if name == 'cub' else 'cub'}")


def _read_mat(path, field, folder):
    """[(image path, class number)] of a .mat list; `field` holds the file name."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path} needs scipy: pip install scipy, or one folder per class") from None
    return [(str(folder / str(row[field])), int(row["class"]))
            for row in loadmat(str(path), squeeze_me=True)["annotations"]]


def _list_cars(name, folders):
    """Train and test halves pooled, then split by class: ids (or names, sorted) 1-98 train."""
    for folder in folders:
        if (folder / "cars_annos.mat").is_file():                              # old: one list
            listing = _read_mat(folder / "cars_annos.mat", "relative_im_path", folder)
        elif (folder / "cars_train").is_dir():                                 # new: two lists
            test = folder / "cars_test_annos_withlabels.mat"    # the devkit's own has no classes
            test = test if test.is_file() else folder / "devkit" / test.name
            listing = _read_mat(folder / "devkit" / "cars_train_annos.mat", "fname",
                                folder / "cars_train")
            listing += _read_mat(test, "fname", folder / "cars_test")
        else:
            # One folder per class: alphabetical order differs from id order, the first 98 do not.
            inner = folder / "car_data" if (folder / "car_data").is_dir() else folder
            halves = ("train", "test") if (inner / "test").is_dir() else ("images",)
            listing = [item for half in halves for item in _images_by_class(inner / half)]
            order = {label: i for i, label in enumerate(sorted({name for _, name in listing}), 1)}
            listing = [(path, order[label]) for path, label in listing]
        if listing:
            return _split_by_class_id([(path, f"{number:03d}") for path, number in listing], 99)


def _list_sop(name, folders):
    """Header `image_id class_id super_class_id path`, then one image a line."""
    for lists, images in [pair for folder in folders for pair in (
            (folder, folder), (folder / "Info_Files", folder / "images"))]:
        if (lists / "Ebay_train.txt").is_file():
            halves = [(lists / f"Ebay_{side}.txt").read_text().splitlines()[1:] for side in SIDES]
            return [[(str(images / path), f"{int(number):05d}") for _, number, _, path in
                     filter(None, map(str.split, half))] for half in halves]


def _list_inshop(name, folders):
    """Line 1 the count, line 2 `image_name item_id evaluation_status`, then padded columns."""
    for folder, file in [(folder, folder / part / "list_eval_partition.txt")
                         for folder in folders for part in ("", "Eval", "Anno")]:
        if file.is_file():
            rows = [line.split() for line in file.read_text().splitlines()[2:] if line.strip()]
            inner = folder / "Img" if (folder / "Img" / rows[0][0]).is_file() else folder
            return [[(str(inner / path), f"{int(item[3:]):08d}") for path, item, status in rows
                     if status == side] for side in ("train", "query", "gallery")]


def _list_folder(name, folders):
    """ROOT/train and ROOT/test, in any case, or the first half of ROOT's classes and the rest."""
    sides = {entry.name.lower(): entry for entry in folders[0].iterdir() if entry.is_dir()}
    if {"train", "test"} <= sides.keys():
        train, test = (_images_by_class(sides.pop(side)) for side in SIDES)
        if sides:
            warnings.warn(f"left out: {', '.join(sides)} beside train and test", stacklevel=4)
    else:
        listing = _images_by_class(folders[0])
        names = sorted({label for _, label in listing})
        first = set(names[:math.ceil(len(names) / 2)])
        train = [item for item in listing if item[1] in first]
        test = [item for item in listing if item[1] not in first]
    shared = sorted({label for _, label in train} & {label for _, label in test})
    if shared:
        raise UserError(f"train/ and test/ share {len(shared)} classes ({shared[0]}, ...): this is "
                        f"a classification split; metric learning is tested on unseen classes")
    return [train, test] if train and test else None


def _glyphs(seed, size, classes=100, per_class=30):
    """Random drawings of three curved strokes. An image is its class's drawing with jittered
    strokes, a new pose, pen width, colours, shading and noise; half of the classes trains."""
    side, count = round(256 * size / 224), classes * per_class
    stream = random_stream(seed, 0, DATA)
    drawing = stream.uniform(-0.8, 0.8, (classes, 3, 3, 2))         # 3 strokes of 3 control points
    points = drawing.repeat(per_class, 0) + stream.normal(0, 0.07, (count, 3, 3, 2))
    angle, zoom = stream.normal(0, 0.15, count), stream.uniform(0.75, 1.05, (count, 2))
    rotation = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1),
                         np.stack([np.sin(angle), np.cos(angle)], -1)], 1)        # (n, 2, 2)
    points = np.einsum("nij,nskj->nski", rotation, points) * zoom[:, None, None]
    points += stream.uniform(-0.12, 0.12, (count, 1, 1, 2))
    # A stroke is a quadratic Bezier curve, drawn as 4 short segments: (n, 12, 2) ends.
    t = np.linspace(0, 1, 5)
    curve = np.einsum("nskj,kt->nstj", points, [(1 - t) ** 2, 2 * t * (1 - t), t**2])
    curve = curve.astype(np.float32)
    start, end = curve[:, :, :-1].reshape(count, -1, 2), curve[:, :, 1:].reshape(count, -1, 2)
    width = stream.uniform(0.05, 0.11, (count, 1)).astype(np.float32)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)     # (side * side, 2), x then y
    along = end - start
    length = (along**2).sum(-1).clip(1e-6)[:, None]                 # squared, (n, 1, 12)
    ink = np.empty((count, side * side), np.float32)
    for rows in np.array_split(np.arange(count), count // 50):      # distance to nearest segment
        offset = ((grid**2).sum(-1)[:, None] - 2 * grid @ start[rows].transpose(0, 2, 1)
                  + (start[rows] ** 2).sum(-1)[:, None])            # squared, (50, pixels, 12)
        dot = grid @ along[rows].transpose(0, 2, 1) - (start * along)[rows].sum(-1)[:, None]
        t = (dot / length[rows]).clip(0, 1)
        distance = np.sqrt((offset - 2 * t * dot + t**2 * length[rows]).min(-1).clip(0))
        ink[rows] = ((width[rows] - distance) * side / 2 + 0.5).clip(0, 1)
    paper = stream.uniform(0.4, 0.8, (count, 3, 1))
    contrast = -stream.uniform(0.13, 0.28, (count, 1, 1))           # ink is darker than paper
    tint = stream.normal(0, 0.05, (count, 3, 1))
    shading = (stream.normal(0, 0.06, (count, 2)).astype(np.float32) @ grid.T)[:, None]
    pixels = 0.03 * stream.standard_normal((count, 3, side * side), np.float32)
    pixels += (contrast + tint).astype(np.float32) * ink[:, None] + shading
    pixels += paper.astype(np.float32)
    pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8).reshape(count, 3, side, side)
    names = [f"drawing-{image // per_class:03d}" for image in range(count)]
    items = [(f"glyphs/{name}/{i % per_class:02d}", name) for i, name in enumerate(names)]
    whole = ImageSet(items, size, store=torch.from_numpy(pixels))
    return whole.subset(range(count // 2)), whole.subset(range(count // 2, count))


def _gaussian(seed, size):
    """Appendix E of Panum et al.: N(0.25, s^2) against N(0.75, s^2) per pixel, s = 0.025, 512 each,
    split at random into 508 and 516: both classes are in both halves."""
    side = round(256 * size / 224)
    stream = random_stream(seed, 0, DATA)
    mean = np.repeat([0.25, 0.75], 512)
    pixels = stream.normal(size=(1024, 3, side, side), scale=0.025).astype(np.float32)
    pixels = ((pixels + mean[:, None, None, None]).clip(0, 1) * 255).round().astype(np.uint8)
    order = stream.permutation(1024)
    names = [f"mean-{value:.2f}" for value in mean]
    items = [(f"gaussian/{name}/{row:04d}", name) for row, name in enumerate(names)]
    whole = ImageSet(items, size, store=torch.from_numpy(pixels))
    return whole.subset(np.sort(order[:508])), whole.subset(np.sort(order[508:]))


def balanced_subset(dataset: ImageSet, count: int) -> ImageSet:
    """A fixed subset of `count` images, two of every class a round, so that each has a match."""
    seen, turn = Counter(), []
    for label in dataset.labels.tolist():
        turn.append(seen[label] // 2)
        seen[label] += 1
    part = dataset.subset(sorted(np.argsort(turn, kind="stable")[:count].tolist()))
    part.limited = True
    return part


# ---- batches ---------------------------------------------------------------------------------
def class_balanced_batches(labels, batch_size, images_per_class, seed, epoch, purpose=BATCHES):
    """P x K batches: P distinct classes, K images of each. Images are dealt at random into groups
    of K; a batch draws P classes, likelier the more groups are left, while P classes have any."""
    per_batch, rest = divmod(batch_size, images_per_class)
    stream, labels, groups = random_stream(seed, epoch, purpose), labels.numpy(), []
    for label in np.unique(labels):
        rows = stream.permutation(np.flatnonzero(labels == label))
        groups.append([rows[i:i + images_per_class]
                       for i in range(0, len(rows) - images_per_class + 1, images_per_class)])
    left = np.array([len(group) for group in groups])
    if rest or not 0 < per_batch <= (left > 0).sum():
        raise UserError(f"a batch of {batch_size} needs {per_batch} classes of {images_per_class} "
                        f"images, not {(left > 0).sum()}: change --batch-size, --images-per-class")
    batches = []
    while (left > 0).sum() >= per_batch:
        drawn = stream.choice(len(left), per_batch, replace=False, p=left / left.sum())
        left[drawn] -= 1
        batches.append(torch.from_numpy(np.concatenate([groups[c][left[c]] for c in drawn])))
    return batches


def pair_batches(labels: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Zhou & Patel's batches of pairs, [a0, p0, a1, p1, ...]: every image once as a, with a random
    other image of its class; who has none is left out. batch_size counts images and is even."""
    stream, labels = random_stream(seed, epoch, BATCHES), labels.numpy()
    order = np.argsort(labels, kind="stable")                    # class after class
    size, start = np.bincount(labels), np.searchsorted(labels[order], labels)
    place = np.argsort(order) - start                            # of an image within its class
    anchors = stream.permutation(len(labels))
    anchors = anchors[size[labels[anchors]] > 1]
    sizes = size[labels[anchors]]
    partners = order[start[anchors] + (place[anchors] + stream.integers(1, sizes)) % sizes]
    return list(torch.from_numpy(np.stack([anchors, partners], 1).reshape(-1)).split(batch_size))


def split_by_image(labels: Tensor, parts: int, seed: int) -> Tensor:
    """Part 0..parts-1 of every image (n,), equal within one image: each class is shuffled and dealt
    out in turn, going on where the previous class stopped."""
    stream = random_stream(seed, 0, SPLIT)
    rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    order = torch.cat([own[torch.from_numpy(stream.permutation(len(own)))] for own in rows])
    return (torch.arange(len(labels)) % parts)[order.argsort()]


def epoch_batches(args, labels: Tensor, epoch: int, *, batch_size=None, pool=None, member=0):
    """An epoch's batches of image numbers: class_balanced_batches with --images-per-class, else a
    shuffle, whose last partial batch is dropped unless it is the only one. pool: the images to draw
    from (None: all). member: which network of an ensemble draws for itself."""
    pool = torch.arange(len(labels)) if pool is None else pool
    size, purpose = batch_size or args.batch_size, BATCHES + MEMBER * member
    if args.images_per_class:
        batches = class_balanced_batches(labels[pool], size - size % args.images_per_class,
                                         args.images_per_class, args.seed, epoch, purpose)
    else:
        order = random_stream(args.seed, epoch, purpose).permutation(len(pool))
        batches = torch.from_numpy(order[:max(len(pool) // size, 1) * size]).split(size)
    return [pool[batch] for batch in batches]


def load_batches(dataset: ImageSet, batches, seed: int = 0, epoch: int = 0, *, augment: bool = True,
                 scale=(0.08, 1.0), workers: int = 0, device="cpu"):
    """Yield (images (B, 3, S, S) in [0, 1], labels (B,), indices (B,)) for each batch, the indices
    on the CPU, because reading them there never waits for a GPU. augment: random views, a function
    of (seed, epoch, index); else evaluation views. workers: threads that prepare two batches."""
    def views(rows):
        return [dataset.random_view(i, random_stream(seed, epoch, AUGMENT, i), scale)
                if augment else dataset.view(i) for i in rows.tolist()]
    def finish(parts, batch):
        images = torch.stack([image for part in parts for image in part])
        images = images.pin_memory() if torch.device(device).type == "cuda" else images
        images = images.to(device, non_blocking=True).float().div_(255)
        return (images.contiguous(memory_format=torch.channels_last),      # faster than of bytes
                dataset.labels[batch].to(device, non_blocking=True), batch)
    # One thread a worker, because with more threads than cores a network takes twice the time.
    threads, waiting = torch.get_num_threads(), deque()
    pool = ThreadPoolExecutor(max(workers, 1), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for batch in batches:
            parts = batch.split(-(-len(batch) // max(workers, 1)) or 1)     # a task has its price
            waiting.append(((pool.map if workers else map)(views, parts), batch))
            if len(waiting) > 2 * bool(workers):
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)


# ---- command line ----------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, exit code 2, and that guesses no prefixes."""
    def __init__(self, description=None, add_help=True):
        super().__init__(description=description, allow_abbrev=False, add_help=add_help,
                         formatter_class=HelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and a flag's default unless its help tells it."""
    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or ""):
            return action.help
        default = f"{255 * action.default:g}/255" if action.type is fraction else "%(default)s"
        return f"{action.help} (default: {default})" if action.help else f"default: {default}"


def fraction(text: str) -> float:
    """An l_inf radius in pixel values of [0, 1]: "8/255" or "0.01"."""
    numerator, _, denominator = text.partition("/")
    value = float(numerator) / (float(denominator or 1) or math.nan)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction such as 8/255")
    if value > 1:
        hint = "" if denominator else f": did you mean {numerator}/255?"
        raise argparse.ArgumentTypeError(f"{text!r} is above 1, and pixels are in [0, 1]{hint}")
    return value


def number(kind, low, high=1e9):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not between {low} and {high:,.0f}")
        return value
    parse.__name__ = kind.__name__                 # argparse then says "invalid int value"
    return parse


def base_parser(description=None) -> Parser:
    """The flags every training script shares, with EAT's defaults."""
    switch, count, parser = argparse.BooleanOptionalAction, number(int, 0), Parser(description)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="glyphs", metavar="NAME", help=", ".join(DATASETS))
    add("--data-root", default=os.environ.get("DATA_ROOT", "data"), metavar="DIR", help="folder")
    add("--cache-gb", type=number(float, 0), default=4.0, metavar="GB", help="of resized images")
    add("--workers", type=number(int, 0, 256), default=2, metavar="N", help="loading threads")
    add("--val-classes", type=count, default=0, metavar="N", help="tune on last N training classes")
    add("--limit-queries", type=count, default=0, metavar="N",
        help="report on a fixed class-balanced subset of N images (0: all)")
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=ARCHS, default="mobilenetv2", metavar="NAME", help=", ".join(ARCHS))
    add("--weights", metavar="{imagenet,none,FILE}", help="start (default: imagenet; convnet none)")
    add("--embedding-dim", type=number(int, 1), default=128, metavar="D", help="of the last layer")
    add("--image-size", type=number(int, 16, 4096), default=224, metavar="S",
        help="side of the input; test images: Resize(256 S / 224), crop")
    add("--crop", choices=("resized", "square"), default="resized",
        help="training views: RandomResizedCrop, or a crop of the squashed photo")
    add("--flip", action=switch, help="mirror training views at random (default: photos yes)")
    add("--freeze-bn", action=switch, help="keep BatchNorm statistics (default: if pretrained)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=200, metavar="N", help="passes over the data")
    add("--warmup-epochs", type=count, metavar="N",
        help="first train head and proxies alone (default: 1; without weights 0)")
    add("--batch-size", type=number(int, 1), default=120, metavar="B", help="images a network sees")
    add("--images-per-class", type=count, default=0, metavar="K", help="in a batch (0: shuffled)")
    add("--lr", type=number(float, 0, 1e3), default=1e-4, help="learning rate")
    add("--weight-decay", type=number(float, 0), default=1e-4, metavar="W", help="of Adam, AdamW")
    add = parser.add_argument_group("attack (l_inf, pixel values in [0, 1])").add_argument
    add("--eps", type=fraction, default=16 / 255, help="training: radius")
    add("--step-size", type=fraction, default=4 / 255, metavar="STEP", help="training: its size")
    add("--attack-steps", type=count, default=10, metavar="T", help="training: steps")
    add("--eps-ramp", type=count, nargs=2, default=[0, 0], metavar=("BENIGN", "GROW"),
        help="no attack for BENIGN epochs, then eps grows from 0 over GROW (default: 0 0)")
    add("--eval-eps", type=fraction, default=8 / 255, metavar="EPS", help="of the closing attack")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="of all randomness")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--amp", action=switch, default=False, help="bfloat16 for the backbone in training")
    add("--deterministic", action=switch, default=False, help="to the bit on a GPU, too (slower)")
    add("--out", metavar="DIR", help="folder (default: runs/METHOD-DATASET-ARCH-sSEED)")
    add("--eval-every", type=count, default=0, metavar="E", help="log scores so often (0: never)")
    return parser


def parse_run(parser: Parser, argv, small: dict) -> argparse.Namespace:
    """A training script's flags, complete. small: the method's defaults on generated data."""
    args = parser.parse_args(argv)
    if args.dataset in GENERATED:
        parser.set_defaults(**small)
        args = parser.parse_args(argv)
    args.weights = args.weights or ("none" if args.arch == "convnet" else "imagenet")
    begun, photos = args.weights != "none", args.dataset not in GENERATED
    for name, value in {"warmup_epochs": int(begun), "freeze_bn": begun, "flip": photos}.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


def warn_reach(args, radii: int) -> None:
    """Say in one line when the training attack never begins, or cannot travel `radii` times eps: 2
    from a uniform start, which may be at the other end of the ball, 1 from the image itself."""
    if args.eps_ramp[0] + bool(args.eps_ramp[1]) >= args.epochs:
        print(f"note: no attack in training: --eps-ramp begins after --epochs {args.epochs}")
    if args.attack_steps * args.step_size < radii * args.eps * (1 - 1e-9):
        print(f"note: {args.attack_steps} steps of {255 * args.step_size:g}/255 do not reach "
              f"{radii} x eps {255 * args.eps:g}/255: raise --step-size or --attack-steps")


def run_script(parse_args, main) -> None:
    """Parse and run; an expected failure becomes one line and an exit code."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main(parse_args())
        return sys.stdout.flush()
    except UserError as error:
        code, message = error.code, str(error)
    except BrokenPipeError:                        # `python eat.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 1, "nobody reads the output; the same command continues the run"
    except OSError as error:                       # an unreadable folder; no name: the output
        code = 2 if error.filename else 1
        message = f"cannot use {error.filename or 'the output'} ({error.strerror}): check it"
    except (MemoryError, RuntimeError, ValueError) as error:
        if not re.search("[Mm]emory|new thread|size is too small|more than 1 value", repr(error)):
            raise
        code, message = 1, f"{error!r}: change --batch-size, --image-size or --workers"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command continues the run"
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def progress(iterable, label, total):
    """The iterable, with a bar when tqdm is installed and somebody is watching."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm
        return tqdm(iterable, desc=label, total=total, leave=False, disable=None)
    return iterable


# ---- runs: files -----------------------------------------------------------------------------
FORMAT, SIDES, RESULTS = 2, ("train", "test"), ("clean", "robust", "warnings")
MOVABLE = ("device", "workers", "out", "data_root", "cache_gb")     # may differ when continuing


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """The torch device of --device; "auto" is cuda where there is one, else cpu."""
    if deterministic:                          # cuBLAS reads the variable when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(name, name)
    try:
        torch.zeros(1, dtype=torch.float64, device=name).cpu()         # of scores; mps has none
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0][:100]}): try "
                        f"--device cpu ({torch.cuda.device_count()} GPUs were found)") from error
    if name == "cpu" and sys.platform == "linux":          # freed memory stays with the process
        for option, value in ((-4, 0), (-1, 2**31 - 1)):   # M_MMAP_MAX, M_TRIM_THRESHOLD of glibc
            getattr(ctypes.CDLL(None), "mallopt", max)(option, value)
    return torch.device(name)


def load_run_data(args, checkpoint=None) -> tuple[ImageSet, ImageSet]:
    """(train, the set reported on) as a run's flags say; nothing is decoded yet. `train.census`:
    both sides' classes with their counts, which must be the checkpoint's, if one is given."""
    train, test = load_dataset(args.dataset, args.data_root, image_size=args.image_size,
                               seed=args.seed)
    census = {side: [[*pair] for pair in zip(part.classes, part.labels.bincount(
        minlength=len(part.classes)).tolist())] for side, part in zip(SIDES, (train, test))}
    for side, now in census.items() if checkpoint else ():
        then = checkpoint["classes"][side]
        if then != now:
            changed = next(pair for pair in [*then, *now] if pair not in then or pair not in now)
            raise UserError(f"the data has changed since this run was trained: its {side} side had "
                            f"{len(then)} classes, now {len(now)}, first difference {changed[0]}; "
                            f"restore the data, or give another --out")
    for part in filter(None, (train, test, test.gallery)):
        part.square, part.flip = args.crop == "square", args.flip
    if args.val_classes:
        held_out = train.labels >= len(train.classes) - args.val_classes
        train, test = (train.subset(rows.nonzero()[:, 0]) for rows in (~held_out, held_out))
    if args.limit_queries and args.limit_queries < len(test):
        test = balanced_subset(test, args.limit_queries)
    alone = test.gallery is None and test.labels.bincount(minlength=1).max() < 2
    if min(len(train.classes), len(test.labels.unique())) < 2 or alone:
        raise UserError(f"{args.dataset} leaves {len(train.classes)} classes to train on and "
                        f"{len(test.labels.unique())} to report on: both need 2, two images of one")
    train.census = census
    return train, test


def cache_images(datasets, limit_gb: float, workers: int) -> None:
    """Decode the sets that fit into limit_gb (photos count as 4:3) once, in threads."""
    for dataset in filter(None, datasets):
        needed = len(dataset) * 3 * dataset.resized**2 * (1 if dataset.square else 4 / 3) / 1e9
        if dataset.store is None and needed <= limit_gb:
            limit_gb -= needed
            with ThreadPoolExecutor(max(workers, 1)) as pool:
                decoded = pool.map(dataset.pixels, range(len(dataset)))
                dataset.store = list(progress(decoded, "decoding", len(dataset)))


@contextlib.contextmanager
def locked(folder, wait: bool = False):
    """Hold a folder alone in the `with`; another process is waited for or refused (not Windows)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process works on {folder}: wait, or give --out") from None
        yield
    finally:
        os.close(handle)


def provenance(device) -> dict:
    """Versions, commit and machine of this process."""
    here = shlex.quote(str(Path(__file__).parent))
    commit, changes = (subprocess.getoutput(f"git -C {here} {command}") for command in
                       ("rev-parse HEAD", "status --porcelain --untracked-files=no"))
    known = len(commit) == 40                      # otherwise git's complaint
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "commit": commit if known else None, "dirty": bool(changes) if known else None,
            "device_name": name, "threads": torch.get_num_threads()}


def write_atomic(path, content) -> None:
    """Write bytes, or JSON, under a temporary name, then rename: the file is whole at any time."""
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=1).encode()
    temporary = Path(f"{os.path.realpath(path)}.{os.getpid()}.tmp")       # a link stays a link
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): what was saved before is whole, "
                        f"and the same command continues from there", code=1) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path, *needed) -> dict:
    try:
        content = {**json.loads(Path(path).read_text())}
        return content | {name: content[name] for name in needed}
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): remove it or restore it") from error


def load_checkpoint(path) -> dict:
    """The content of a run's last.pt, given the file or its folder."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    checkpoint = torch_load(path, "a checkpoint")
    kinds = dict(format=int, method=str, args=dict, epoch=int, members=list, proxies=list,
                 optimizers=list, state=dict, classes=dict)
    inner = dict(arch=str, dataset=str, epochs=int, log=list, train=list, test=list)
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    wrong = wrong or [name for name, kind in inner.items() if not isinstance(
        {**checkpoint["args"], **checkpoint["state"], **checkpoint["classes"]}.get(name), kind)]
    if wrong or checkpoint["format"] != FORMAT or not checkpoint["members"]:
        raise UserError(f"{path} is no checkpoint of format {FORMAT}, or damaged: {wrong}")
    return checkpoint


def torch_load(path, what) -> dict:
    """A file of tensors and plain types; nothing in it is executed. what: is expected there."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")         # torch.load does not read them
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give {what}") from error
    except Exception as error:                 # a damaged file raises nearly anything
        raise UserError(f"{path} is not {what} that can be read ({type(error).__name__}): it is "
                        f"damaged, cut off, a web page or a pickled network") from error


def _on_cpu(content):
    """The same nested lists and dicts with their tensors on the CPU: any machine can load them."""
    if isinstance(content, dict):
        return {name: _on_cpu(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_on_cpu(value) for value in content]
    return content.detach().cpu() if isinstance(content, Tensor) else content


def peak_gb(device) -> float | None:
    """Peak memory so far in GB: of the GPU, or of the process on a CPU (not on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(ImportError):
        from resource import RUSAGE_SELF, getrusage
        return getrusage(RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e9 / 1024)


def two_drops(epoch: int, epochs: int) -> float:
    """The learning rate's factor in this epoch: 0.1 from half, 0.01 from three quarters on."""
    return 0.1 ** sum(epoch >= drop for drop in (epochs // 2, 3 * epochs // 4) if drop > 0)


class Run:
    """The books of one training: data, device, folder, log, checkpoint and closing table. The
    training itself is the script's. What `restore` is given, and `state`, is saved every epoch."""

    def __init__(self, args, method, name):
        self.args, self.method, self.name, self.epoch, self.state = args, method, name, 0, {}
        self.folder = Path(args.out or f"runs/{name}-{args.dataset}-{args.arch}-s{args.seed}")
        self.train, self.test = load_run_data(args)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = locked(self.folder)            # until `finish`, or the process, ends it
        self.lock.__enter__()
        self.checkpoint = self._claim(self.folder / "args.json", self.folder / "last.pt")
        self.device = pick_device(args.device, args.deterministic)
        self.provenance = provenance(self.device)

    def _claim(self, record, last):
        """The checkpoint to go on from, None for a new run; other flags or data are refused."""
        if not last.exists():                      # nothing is saved, and nothing can be lost
            if (self.folder / "results.json").exists():
                raise UserError(f"{last} is gone, results.json is not: restore it, or delete both")
            return None
        checkpoint = load_checkpoint(last)
        stored = {**checkpoint["args"], "method": checkpoint["method"],
                  **(read_json(record) if record.exists() else {})}
        for flag, value in {"method": self.method, **vars(self.args)}.items():
            if flag not in MOVABLE and stored.get(flag) != value:
                raise UserError(f"{self.folder} has --{flag.replace('_', '-')} {stored.get(flag)}, "
                                f"not {value}: give that, another --out, or delete the folder")
        load_run_data(self.args, checkpoint)
        return checkpoint

    def network(self, i: int = 0) -> nn.Module:
        """Network i on the device; its random parts come from a stream of its own."""
        seed_torch(self.args.seed, 0, INITIAL + MEMBER * i)
        weights = "none" if self.checkpoint else self.args.weights
        return build_model(self.args.arch, self.args.embedding_dim, weights).to(self.device)

    def proxies(self, i: int = 0) -> nn.Parameter:
        """Proxy Anchor's proxies (C, D) of network i."""
        seed_torch(self.args.seed, 0, PROXIES + MEMBER * i)
        proxies = torch.empty(len(self.train.classes), self.args.embedding_dim)
        return nn.Parameter(nn.init.kaiming_normal_(proxies, mode="fan_out").to(self.device))

    def adamw(self, model, proxies):
        """AdamW; the proxies learn 100 times faster (Proxy Anchor, Sec. 4)."""
        rate, groups = self.args.lr, [{"params": list(model.parameters())}, {"params": [proxies]}]
        groups[1]["lr"] = 100 * rate
        return torch.optim.AdamW(groups, rate, weight_decay=self.args.weight_decay, foreach=True)

    def set_lr(self, factor: float):
        """--lr times this factor; the proxies' is 100 times as high."""
        for optimizer in self.optimizers:
            for group, rate in zip(optimizer.param_groups, (self.args.lr, 100 * self.args.lr)):
                group["lr"] = rate * factor

    def ball(self, epoch: int) -> tuple[float, float]:
        """(eps, step size) in this epoch. --eps-ramp B G: 0 for B epochs, then growing over G."""
        benign, grow = self.args.eps_ramp
        share = min(max(epoch - benign, 0) / grow, 1) if grow else float(epoch >= benign)
        return share * self.args.eps, share * self.args.step_size

    def restore(self, members, optimizers, proxies=()):
        """Put the checkpoint, if there is one, into these lists of objects, and start the run."""
        args, saved, last = self.args, self.checkpoint, self.folder / "last.pt"
        self.members, self.optimizers, self.points = members, optimizers, list(proxies)
        self.state["log"] = []
        try:
            if saved:
                for target, state in zip([*members, *optimizers],
                                         saved["members"] + saved["optimizers"], strict=True):
                    target.load_state_dict(state)
                for target, state in zip(self.points, saved["proxies"], strict=True):
                    target.data.copy_(state.view_as(target))
                self.epoch, self.state = saved["epoch"], saved["state"]
                [line["seconds"] for line in self.state["log"]][self.epoch - 1]      # one an epoch
        except Exception as error:             # a damaged state raises nearly anything
            raise UserError(f"{last} does not fit this run ({error!r}): restore it") from error
        for leftover in self.folder.glob("*.*.[0-9]*.tmp"):  # of a process that was killed
            leftover.unlink()
        flags = {**vars(args), "method": self.method, **self.provenance}
        if not saved or not (self.folder / "args.json").exists():
            write_atomic(self.folder / "args.json", flags)
        self._write_log()                      # the checkpoint's, whatever became of the file
        if not (self.folder / "results.json").exists():
            cache_images([self.train, self.test, self.test.gallery], args.cache_gb, args.workers)
            print(f"{args.dataset}: {len(self.train)} training images of {len(self.train.classes)} "
                  f"classes, {len(self.test)} of {len(self.test.classes)} to report on; {self.name}"
                  f", {self.device}; weights {args.weights}, {args.warmup_epochs} warm-up epochs, "
                  f"BatchNorm statistics {'frozen' if args.freeze_bn else 'live'}", flush=True)

    def epochs(self, protocol: str = "clustering"):
        """The epochs still to do: torch seeded from (seed, epoch), networks in training mode; then
        a checkpoint and a line in the log. protocol: of the scores that --eval-every logs."""
        args = self.args
        while self.epoch < args.epochs:
            seed_torch(args.seed, self.epoch, TRAIN)
            self.terms, started = {}, time.perf_counter()
            for member in self.members:
                train_mode(member, args.freeze_bn)
                member.amp = args.amp
                member.backbone.requires_grad_(self.epoch >= args.warmup_epochs)
            yield self.epoch
            self.epoch += 1
            line = {name: float(torch.stack(values).mean()) for name, values in self.terms.items()}
            line["lr"] = self.optimizers[0].param_groups[0]["lr"]
            embedded = embed(self.members, [self.last_batch])
            line["collapse"] = float(np.max([*map(mean_cosine, embedded)]))      # NaN stays NaN
            if not all(map(math.isfinite, line.values())):
                raise UserError(f"epoch {self.epoch} is not finite ({line}): lower --lr in another "
                                f"--out; {self.folder}/last.pt holds {self.epoch - 1} epochs", 1)
            line["seconds"] = round(time.perf_counter() - started, 3)
            if args.eval_every and self.epoch % args.eval_every == 0:
                scores = self._evaluate([protocol])
                line |= {f"{side}_{name}": part[name] for name in ("R@1", "mAP@R") for side, part
                         in (("clean", scores["clean"]), ("robust", scores["robust"][0]))}
            self.state["log"].append({"epoch": self.epoch, **line})
            self._save()
            print(f"epoch {self.epoch}/{args.epochs}  " + "  ".join(
                f"{name} {value:.4g}" for name, value in line.items()), flush=True)

    def batches(self, batches, scale=(0.08, 1.0)):
        """load_batches of the training set. scale: of RandomResizedCrop."""
        loaded = load_batches(self.train, batches, self.args.seed, self.epoch, scale=scale,
                              workers=self.args.workers, device=self.device)
        for batch in progress(loaded, f"epoch {self.epoch + 1}", len(batches)):
            self.last_batch = batch
            yield batch

    def note(self, **terms: Tensor):
        """Add to the means of this epoch's log line, without waiting for a GPU."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach())

    def _save(self):
        content = io.BytesIO()                     # a full disk is then an OSError of one write
        torch.save(_on_cpu({
            "format": FORMAT, "method": self.method, "args": vars(self.args), "epoch": self.epoch,
            "members": [member.state_dict() for member in self.members], "proxies": self.points,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "state": self.state, "classes": self.train.census,
            "versions": self.provenance["versions"]}), content)
        write_atomic(self.folder / "last.pt", content.getvalue())
        self._write_log()

    def _write_log(self):
        write_atomic(self.folder / "log.jsonl", b"".join(
            json.dumps(line).encode() + b"\n" for line in self.state["log"]))

    def _evaluate(self, protocols):
        args = self.args
        for member in self.members:
            member.amp = False
        attacks = [protocol_attack(protocol, args.eval_eps, args.seed) for protocol in protocols]
        return evaluate(self.members, self.test, attacks, ks=KS.get(args.dataset, (1, 2, 4, 8)),
                        seed=args.seed, workers=args.workers, device=self.device)

    def finish(self, *protocols: str):
        """Clean and attacked scores of the networks: results.json, and a table."""
        path, started, args = self.folder / "results.json", time.perf_counter(), self.args
        if path.exists():
            print(f"{self.folder} is complete (delete the folder to start again):")
        else:
            scores = self._evaluate(protocols)
            trained = sum(line["seconds"] for line in self.state["log"])
            write_atomic(path, {
                "method": self.method, "variant": self.name.removeprefix(self.method).strip("-"),
                "dataset": args.dataset, "arch": args.arch, "seed": args.seed, "epoch": self.epoch,
                **scores, "seconds": round(trained + time.perf_counter() - started, 1),
                "peak_gb": peak_gb(self.device),
                "env": {"device": str(self.device), **self.provenance}})
        self.lock.__exit__(None, None, None)
        results, what = read_json(path, *RESULTS), "validation" if args.val_classes else "unseen"
        for record in results["robust"][:len(protocols)]:
            attack = Attack(*(record[name] for name in Attack._fields))
            print(f"\n{args.dataset}: {len(self.test)} images of {len(self.test.classes)} {what} "
                  f"classes{', a fixed subset' * self.test.limited}; {attack}; in %, NMI by chance "
                  f"{100 * results['clean']['NMI_chance']:.1f}")
            print(format_table([
                (f"{self.name} {rule} {side}", percent(scores[rule])) for rule in record["scores"]
                for side, scores in (("clean", results["clean"]["scores"]),
                                     ("attacked", record["scores"]))]))
        for warning in results["warnings"]:
            print(f"warning: {warning}")
