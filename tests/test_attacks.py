"""The objectives and attacks of eval.py against oracles written out by hand, and torchattacks.

`naive` is every objective for one query, candidate by candidate; loops stand in for every lookup.
For Carlini & Wagner there is a linear objective w.x + b, whose smallest l_inf change is
|w.x + b| / |w|_1.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluation import (
    attacked_images,
    change_of,
    is_right,
    looked_up,
    nearest_row,
    network,
    noisy_classes,
    noisy_gallery,
    noisy_retrieval,
    plurality,
    retrieval_of,
    scores_of,
    seeded,
    share,
    tensor_batches,
)

import common
import eval as evaluator
from common import pgd, recall_at_k
from eval import VALUES, Space, aim, attack_of, attacked, measured, missed, targets


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("arguments, options, objective, eps, step, steps, restarts", [
    (("clustering",), {}, "shift", 8 / 255, 2 / 255, 10, 1),
    (("clustering",), {"eps": 0.1, "steps": 3}, "shift", 0.1, 0.025, 3, 1),
    (("template",), {}, "neighbour", 0.01, 0.004, 5, 1),
    (("template",), {"eps": 0.1, "steps": 10}, "neighbour", 0.1, 0.02, 10, 1),
    (("template", "fgsm"), {"step_size": 0.3, "steps": 7}, "neighbour", 0.01, 0.01, 1, 1),
    (("clustering", "fgsm"), {}, "shift", 8 / 255, 8 / 255, 1, 1),
    (("template", "cw"), {"eps": 0.2, "steps": 7}, "neighbour", 0.2, 0.02, 7, 1),
    (("template", "cw"), {"step_size": 0.3}, "neighbour", 0.01, 0.3, 50, 1),
    (("clustering", "square"), {}, "impostor", 8 / 255, 16 / 255, 200, 1),
    (("template", "strong"), {"eps": 0.1}, "worst", 0.1, 0.025, 20, 2),
    (("clustering", "strong"), {"eps": 0.1, "objective": "joint"}, "joint", 0.1, 0.025, 20, 1),
    (("ers",), {"eps": 0.04}, "ers", 0.04, 0.015, 32, 1)])
def test_the_numbers_of_an_attack_are_its_protocols_unless_given(
        arguments, options, objective, eps, step, steps, restarts):
    attack = attack_of(*arguments, **options)
    assert (attack.eps, attack.step) == pytest.approx((eps, step))
    assert (attack.objective, attack.steps, attack.restarts) == (objective, steps, restarts)
    assert attack.protocol == arguments[0] and attack.seed == 0 and attack.against == "sum"
    assert attack.attack.split("-")[0] == (arguments[1:] or ("pgd",))[0]


# ---- objectives

def embedded(gallery):
    """(own, labels, candidates, names): the last query is alone, a gallery has no class 2."""
    labels = torch.tensor([4, 0, 0, 2, 4, 2, 0, 2, 4, 0, 4, 2, 7])
    own = F.normalize(unit(13, 6) + unit(8, 6, seed=1)[labels], dim=1)
    if not gallery:
        return own, labels, None, None
    names = torch.tensor([5, 0, 4, 0, 5, 4, 4, 1, 0, 4, 5])
    candidates = F.normalize(unit(11, 6, seed=2) + unit(8, 6, seed=1)[names], dim=1)
    return own, labels, candidates * torch.linspace(0.7, 1.3, 11)[:, None], names


def naive(objective, e, i, own, labels, candidates=None, names=None, target=None):
    pool, titles = (own, labels) if candidates is None else (candidates, names)
    mine = [j for j in range(len(pool)) if titles[j] == labels[i]]
    friends = [pool[j] for j in mine if candidates is not None or j != i] or [own[i]]
    foes = [pool[j] for j in range(len(pool)) if titles[j] != labels[i]]
    if objective == "shift":
        return 1 - e @ own[i]
    if objective == "push-mean":
        mean = sum(pool[j] for j in mine) if mine else own[i]
        return 1 - e @ mean / mean.norm()
    if objective == "target":
        return e @ pool[target[i]]
    if objective == "impostor":
        near, far = (torch.stack([(e - point).norm() for point in points]).min()
                     for points in (friends, foes))
        return near - far
    near, far = (sum((16 * (e @ point)).exp() for point in points).log()
                 for points in (friends, foes))
    return (far - near) / 16


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("objective", ["shift", "push-mean", "target", "impostor", "soft-impostor"])
def test_an_objective_and_its_gradient_equal_a_loop_over_candidates(objective, gallery):
    own, labels, candidates, names = embedded(gallery)
    target = torch.randint(11, (13,), generator=seeded(4))
    rows = torch.tensor([12, 3, 0, 1, 1, 7, 9])
    e = F.normalize(own[rows] + 0.7 * unit(7, 6, seed=5), dim=1).requires_grad_()
    found = VALUES[objective](e, rows, Space(own, labels, candidates, names, target))
    wanted = torch.stack([naive(objective, x, int(i), own, labels, candidates, names, target)
                          for x, i in zip(e, rows)])
    torch.testing.assert_close(found, wanted)
    weight = torch.rand(7, generator=seeded(6), dtype=torch.float64)       # rows do not mix
    slopes = [torch.autograd.grad(weight @ value, e)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].isfinite().all() and (slopes[0].abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("gallery", [False, True])
def test_the_impostor_is_below_zero_exactly_where_recall_at_1_is_a_hit(gallery):
    own, labels, candidates, names = embedded(gallery)
    space, outcomes = Space(own, labels, candidates, names), Counter()
    for seed in range(10):
        e = F.normalize(own + 0.8 * unit(13, 6, seed=seed), dim=1)
        below = VALUES["impostor"](e, torch.arange(13), space) < 0
        wrong = missed([space], [e], torch.arange(13))
        for i, label in enumerate(labels):
            rest = torch.arange(13) != i
            lookup = (candidates, names) if gallery else (own[rest], labels[rest])
            hit = recall_at_k(e[i:i + 1], labels[i:i + 1], (1,), *lookup)[1] == 1
            alone = not (lookup[1] == label).any()
            assert hit == (bool(below[i]) and not alone) == (not wrong[i])
            outcomes[hit, alone] += 1
    assert min(outcomes.values()) > 5 and len(outcomes) == 3
    own, labels = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 0, 1, 1])       # a tie is a miss
    value = VALUES["impostor"](own[:1], torch.tensor([0]), Space(own, labels))
    wrong = missed([Space(own, labels)], [own[:1]], torch.tensor([0]))
    assert value.tolist() == [0] and wrong.all()


def test_the_soft_impostor_becomes_the_impostor_of_cosines_at_a_large_scale():
    own, labels, _, _ = embedded(False)
    e, rows = F.normalize(own + 0.7 * unit(13, 6, seed=5), dim=1), torch.arange(12)
    same, cosine = labels[:, None] == labels, e @ own.T
    friend = cosine.masked_fill(~same | torch.eye(13).bool(), -2).amax(1)
    margin = (cosine.masked_fill(same, -2).amax(1) - friend)[rows]         # the last is alone
    soft = VALUES["soft-impostor"](1e4 * e[rows], rows, Space(own, labels)) / 1e4
    assert (soft - margin).abs().max() < 1e-4 < margin.abs().min()


# ---- targets (Panum et al., Eq. (6))

def test_the_random_image_of_another_class_is_uniform_and_a_function_of_the_seed():
    names, labels = torch.tensor([3, 9, 3, 5, 9, 3, 5, 9, 9]), torch.tensor([3, 5, 9, 4])
    retrieval = retrieval_of([network()], torch.rand(6000, 3, 8, 8), labels.repeat(1500),
                             torch.rand(9, 3, 8, 8), names)
    first, again, other = (targets(retrieval, attack_of("template", objective="target", seed=seed))
                           for seed in (0, 0, 1))
    for label in (3, 5, 9, 4):                                 # 4 has no candidates: any of all
        counts = Counter(first[retrieval.labels == label].tolist())
        assert set(counts) == set((names != label).nonzero()[:, 0].tolist())
        expected = 1500 / len(counts)                          # chi-square: 26 is for p = 0.001
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26
    assert torch.equal(first, again) and float((first == other).double().mean()) < 0.3


@pytest.mark.parametrize("members, gallery", [(1, False), (3, False), (2, True)])
def test_the_nearest_target_is_the_nearest_image_of_another_class(members, gallery):
    retrieval = noisy_gallery(members) if gallery else noisy_retrieval(members)[0]
    own, names = torch.cat(retrieval.clean, 1), retrieval.names
    pool = torch.cat(retrieval.gallery, 1) if gallery else own
    found = targets(retrieval, attack_of("template", objective="target-nearest"))
    wanted = [nearest_row(query, pool, None, lambda j: names[j] != label)
              for query, label in zip(own, retrieval.labels)]
    assert found.tolist() == wanted and len(set(wanted)) > 5


@pytest.mark.parametrize("objective", ["target", "target-nearest"])
def test_success_is_the_share_of_queries_that_find_the_class_of_their_target(objective):
    images, labels = noisy_classes(spread=0.5)
    for models in ([network()], [network(seed) for seed in range(3)]):
        retrieval = retrieval_of(models, images, labels)
        attack = attack_of("template", objective=objective, eps=0.08, steps=4)
        moved = attacked_images(retrieval, attack)
        assert (change_of(moved, images) > 0).all()            # every query, right or wrong
        goal = labels[targets(retrieval, attack)]
        rates = {rule: share(first, goal)
                 for rule, first in looked_up(models, moved, images, labels).items()}
        if len(models) > 1:
            rates["member_mean"] = sum(rates[f"member_{m}"] for m in (1, 2, 3)) / 3
        scores = measured(retrieval, attack)[0]["scores"]
        assert {rule: row["success"] for rule, row in scores.items()} == pytest.approx(rates)
        assert 0.2 < scores["member_1"]["success"] < 1


def test_each_space_of_an_ensemble_is_attacked_by_its_own_objective():
    retrieval, images = noisy_retrieval(3)
    rows, wanted = torch.tensor([5, 0, 17]), {}
    e = [model(images[rows] + 0.1).detach() for model in retrieval.models]

    def of(queries, own):
        return VALUES["impostor"](queries, rows, Space(own, retrieval.labels))

    each = [of(queries, own) for queries, own in zip(e, retrieval.clean)]
    for name, join in (("concat", lambda parts: torch.cat(parts, 1) / 3 ** 0.5),
                       ("mean", lambda parts: F.normalize(sum(parts), dim=1))):
        wanted[name] = of(join(e), join(retrieval.clean))
    wanted |= {"sum": sum(each), "member_2": each[1], "members_1+3": each[0] + each[2],
               "vote": sum(value.clamp(max=0.1) for value in each)}
    for against, value in wanted.items():
        attack = attack_of("template", objective="impostor", against=against)
        found, only = aim(retrieval, attack)
        torch.testing.assert_close(found(e, rows), value)
        assert only is None
    assert len({tuple(value.tolist()) for value in wanted.values()}) == 6


def test_pseudo_labels_are_the_clusters_of_each_members_own_space_and_read_no_labels():
    retrieval, rows = noisy_gallery(2), torch.arange(6)
    e, wanted = [own[:6].roll(1, 0) for own in retrieval.clean], []
    for own, gallery, moved in zip(retrieval.clean, retrieval.gallery, e):
        ids = common.kmeans(torch.cat([own, gallery]), 5, 3)   # the gallery has five classes
        wanted.append(VALUES["impostor"](moved, rows, Space(own, ids[:24], gallery, ids[24:])))
    attack = attack_of("template", objective="impostor-pseudo", seed=3)
    torch.testing.assert_close(aim(retrieval, attack)[0](e, rows), sum(wanted))
    for protocol, objective in (("template", "impostor-pseudo"), ("clustering", "joint-pseudo"),
                                ("clustering", "shift")):
        moved = []
        for shuffle in (torch.arange(24), torch.randperm(24, generator=seeded(1))):
            retrieval, _ = noisy_retrieval(2)
            retrieval.labels = retrieval.names = retrieval.labels[shuffle]
            moved.append(attacked(retrieval, attack_of(protocol, objective=objective, steps=2))[0])
        torch.testing.assert_close(*moved)


@pytest.mark.parametrize("objective", ["neighbour", "self"])
@pytest.mark.parametrize("attack", ["pgd", "fgsm", "cw"])
def test_only_right_queries_are_moved_and_recall_never_rises(attack, objective):
    retrieval, images = noisy_retrieval()
    attack = attack_of("template", attack, objective=objective, eps=0.05, steps=4)
    moved, right = attacked_images(retrieval, attack), is_right(network(), images, retrieval.labels)
    assert 0 < right.sum() < 24
    assert torch.equal(change_of(moved, images) > 0, right)
    assert change_of(moved, images).max() < 0.05 + 1e-6 and 0 <= moved.min() <= moved.max() <= 1
    first = looked_up([network()], moved, images, retrieval.labels)["member_1"]
    record = measured(retrieval, attack)[0]
    assert record["R@1"] == pytest.approx(share(first, retrieval.labels))
    assert record["R@1"] <= float(right.double().mean())


def test_fgsm_starts_at_the_image_unless_there_is_no_gradient_there():
    for protocol, objective, at_image in (("template", "neighbour", True), ("clustering", "shift",
                                          False), ("template", "self", False)):
        retrieval, images = noisy_retrieval()
        moved = attacked_images(retrieval, attack_of(protocol, "fgsm", objective=objective))
        inner = (images > 0.1) & (images < 0.9) & (moved != images)
        change = (moved - images)[inner].abs()
        assert (change.max() - change.min() < 1e-6) == at_image


@pytest.mark.parametrize("objective", ["neighbour", "self"])
def test_in_an_ensemble_the_members_that_are_right_contribute_their_distance(objective):
    retrieval, _ = noisy_retrieval(3)
    labels, images = retrieval.labels, torch.rand(24, 3, 8, 8, generator=seeded(1))
    away, only = aim(retrieval, attack_of("template", objective=objective))
    value, rows = [], torch.randperm(24, generator=seeded(2))
    for i, row in enumerate(rows):
        distances = []
        for model, clean in zip(retrieval.models, retrieval.clean):
            nearest = nearest_row(clean[row], clean, row)
            if labels[nearest] == labels[row]:
                point = clean[row if objective == "self" else nearest]
                distances.append(float((model(images[i:i + 1])[0].detach() - point).norm()))
        value.append(sum(distances))
        assert bool(only[row]) == bool(distances)
    found = away([model(images) for model in retrieval.models], rows)
    assert found.tolist() == pytest.approx(value, abs=1e-5)
    assert 0 < only.sum() < 24


# ---- torchattacks: a gallery with one image a class is a classifier with the logits 2 - d

def as_classifier(spread, classes):
    """(retrieval, images, labels, the module of its logits)."""
    images, labels = noisy_classes(classes, 60 // classes, spread=spread)
    images = images.clamp(0.01, 0.99)                      # theirs takes the atanh of 2 x - 1
    gallery, names = noisy_classes(classes, 1, spread=0)
    retrieval = retrieval_of([network()], images, labels, gallery, names)

    class Logits(torch.nn.Module):
        def forward(self, x):
            return 2 - (retrieval.models[0](x)[:, None] - retrieval.gallery[0]).norm(dim=2)

    return retrieval, images, labels, Logits().eval()


def test_pgd_and_fgsm_equal_torchattacks_on_two_classes():
    # of two classes, cross-entropy rises with the margin: the signs of their gradients are the same
    torchattacks = pytest.importorskip("torchattacks")
    retrieval, images, labels, logits = as_classifier(0.3, 2)
    for attack, theirs in (
            ("pgd", torchattacks.PGD(logits, eps=0.04, alpha=0.01, steps=6, random_start=True)),
            ("fgsm", torchattacks.FGSM(logits, eps=0.04))):
        ours = attacked_images(retrieval, attack_of("template", attack, objective="impostor",
                                                    eps=0.04, step_size=0.01, steps=6, seed=2))
        common.seed_torch(2, 0, common.EVALUATE, 0)
        assert ((ours - theirs(images, labels)).abs() < 1e-5).double().mean() > 0.999


def test_square_misleads_as_many_queries_as_that_of_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    retrieval, images, labels, logits = as_classifier(0.15, 6)
    theirs = torchattacks.Square(logits, eps=0.06, n_queries=200, seed=0)(images, labels)
    wrong = float((logits(theirs).argmax(1) != labels).double().mean())
    ours = 1 - scores_of(retrieval, "template", "square", eps=0.06)["member_1"]["R@1"]
    clean = float((logits(images).argmax(1) != labels).double().mean())
    assert abs(ours - wrong) < 0.1 and clean + 0.2 < min(ours, wrong) and max(ours, wrong) < 0.95


def test_carlini_wagner_reaches_within_l_inf_all_that_the_l_2_attack_of_torchattacks_reaches():
    torchattacks = pytest.importorskip("torchattacks")
    retrieval, images, labels, logits = as_classifier(0.15, 6)
    theirs = torchattacks.CW(logits, c=1000, steps=100, lr=0.01)(images, labels)
    change, wrong = change_of(theirs, images), logits(theirs).argmax(1) != labels
    eps = float(change[wrong & (change > 0)].median())
    ours = attacked_images(retrieval, attack_of("template", "cw", objective="impostor", eps=eps))
    reached, theirs_within = logits(ours).argmax(1) != labels, wrong & (change <= eps)
    assert (reached >= theirs_within).all() and reached.sum() > theirs_within.sum() > 10
    assert change_of(ours, images).max() <= eps + 1e-6


# ---- Carlini & Wagner

RADIUS = 0.1
DISTANCES = torch.tensor([0.01, 0.02, 0.03, 0.05, 0.07, 0.09, 0.13, 0.2, 0.025, 0.05])


def linear(distances=DISTANCES, seed=0):
    """Images, and objective(x, i) = w_i.x + b_i, zero at just this l_inf distance of each image."""
    images = 0.4 + 0.2 * torch.rand(len(distances), 3, 2, 2, generator=seeded(seed))
    weights = 0.3 * torch.randn(images.shape, generator=seeded(seed + 1))
    bias = -(weights * images).sum((1, 2, 3)) - distances * weights.abs().sum((1, 2, 3))
    return images, lambda x, i: (weights[i] * x).sum((1, 2, 3)) + bias[i]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_carlini_wagner_succeeds_exactly_where_a_linear_objective_can_be_reached(seed):
    images, objective = linear(seed=seed)
    torch.manual_seed(seed)
    found = evaluator.carlini_wagner(objective, lambda x, i: objective(x, i) > 0, images, RADIUS,
                                     0.01, 40)
    change, success = change_of(found, images), objective(found, torch.arange(10)) > 0
    assert torch.equal(success, DISTANCES < RADIUS) and change.max() <= RADIUS + 1e-6
    assert (change[success] >= DISTANCES[success] - 1e-6).all()


def test_carlini_wagner_stays_within_the_pixel_range_and_never_mixes_its_images_up():
    # the objective of image i pulls towards its own point and sees only images near its own
    distances, subsets = torch.tensor([-0.1, 0.08, 0.01, 0.5, 0.04, 0.02]), []
    images, objective = linear(distances)
    offset = torch.linspace(-0.4, 0.4, 6).view(-1, 1, 1, 1)
    images, asked = images + offset, []

    def near(x, i):
        subsets.append(tuple(i.tolist()))
        asked.append(x.detach().clone())
        assert (change_of(x, images[i]) < 0.3).all()
        return objective(x - offset[i], i)

    found = evaluator.carlini_wagner(near, lambda x, i: near(x, i) > 0, images, RADIUS, 0.005, 22)
    assert min(x.min() for x in asked) == 0 and max(x.max() for x in asked) == 1
    assert 0 <= found.min() <= found.max() <= 1 and change_of(found, images).max() <= RADIUS + 1e-6
    assert len(set(subsets)) > 2 and (0, 1, 2, 3, 4, 5) in subsets      # they end one by one
    success = objective(found - offset, torch.arange(6)) > 0
    assert success[[0, 2, 4, 5]].all() and not success[3]


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("gallery", [False, True])
def test_a_query_is_missed_where_the_vote_names_another_class(members, gallery):
    retrieval = noisy_gallery(members) if gallery else noisy_retrieval(members, spread=0.3)[0]
    images, labels = noisy_classes(spread=0.5 if gallery else 0.3)
    rows = torch.randperm(24, generator=seeded(3))[:15]
    moved = (images[rows] + 0.15 * torch.randn(15, 3, 8, 8, generator=seeded(4))).clamp(0, 1)
    e = [model(moved).detach() for model in retrieval.models]
    spaces = evaluator.spaces_of(retrieval, attack_of("template", objective="impostor"))
    found = missed(spaces, e, rows)
    for i, row in enumerate(rows):
        votes = [int(retrieval.names[nearest_row(own[i], pool, None if gallery else row)])
                 for own, pool in zip(e, retrieval.gallery or retrieval.clean)]
        assert bool(found[i]) == (plurality(votes) != labels[row])
    assert found.any() and not found.all()


def test_square_tries_ever_smaller_squares_of_one_sign_a_channel_and_keeps_what_rises():
    images = 0.3 + 0.4 * torch.rand(5, 3, 9, 8, generator=seeded(0))
    asked, values, extents = [], [], {}

    def objective(x):
        assert not torch.is_grad_enabled()
        asked.append(((x - images) / 0.1).round())
        values.append((37 * x.flatten(1).sum(1)).round() % 11)             # it has no slope
        return values[-1]

    streams = [np.random.default_rng(i) for i in range(5)]
    found = evaluator.square(objective, images, 0.1, 400, streams)
    assert len(asked) == 401 and torch.stack(asked).abs().unique().tolist() == [1]
    assert (asked[0] == asked[0][:, :, :1]).all() and 0.3 < (asked[0] > 0).double().mean() < 0.7
    best, value = asked[0], values[0]
    marks = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]           # of 10,000
    for query, (x, own) in enumerate(zip(asked[1:], values[1:])):
        area = 0.8 / 2 ** max(i for i, mark in enumerate(marks) if 25 * query >= mark)
        side = min(8, max(1, round((72 * area) ** 0.5)))
        for i, one in enumerate(x):
            places = (one != best[i]).nonzero()
            assert len({tuple(place) for place in places[:, :1].tolist()}) == len(
                {(int(c), float(one[c, y, z])) for c, y, z in places})      # one sign a channel
            if len(places):
                extent = int((places.amax(0) - places.amin(0))[1:].max()) + 1
                extents[side] = max(extents.get(side, 0), extent)
                assert extent <= side
        best = torch.where((own > value).view(-1, 1, 1, 1), x, best)
        value = torch.maximum(own, value)
    assert torch.equal(((found - images) / 0.1).round(), best)
    assert all(extent == side for side, extent in extents.items()) and set(extents) > {8, 5, 4, 1}


def test_ascend_halves_its_step_twice_and_goes_on_from_the_best():
    assert evaluator.halved(4.0, 20) == [4.0] * 10 + [2.0] * 5 + [1.0] * 5
    images = 0.3 + 0.4 * torch.rand(6, 3, 4, 4, generator=seeded(0))
    top, seen = images + 0.05 * torch.rand(images.shape, generator=seeded(1)), []

    def objective(x):
        seen.append(-(x - top).square().sum((1, 2, 3)).detach())
        return -(x - top).square().sum((1, 2, 3))

    torch.manual_seed(0)
    found = evaluator.ascend(objective, images, 0.04, 0.02, 20)
    assert change_of(found, images).max() <= 0.04 + 1e-6
    best = torch.stack(seen).amax(0)
    assert torch.equal(objective(found), best)
    for stage in (11, 17):                                     # each starts at the best so far
        assert torch.equal(seen[stage], torch.stack(seen[:stage]).amax(0))
    torch.manual_seed(0)
    assert (objective(pgd(objective, images, 0.04, 0.02, 20)) < best - 1e-4).all()


@pytest.mark.parametrize("kind, objective, sizes", [
    ("strong", "joint", [0, *evaluator.halved(0.02, 20)]), ("pgd", "joint", [0, *[0.02] * 10]),
    ("strong", "impostor", [0.02, 0.01, 0.005] * 2)])
def test_the_steps_that_an_attack_takes(kind, objective, sizes, monkeypatch):
    taken = []

    def recorded(goal, images, eps, step_size, steps, *rest, **options):
        taken.extend([step_size] if objective == "joint" or steps else [])
        return pgd(goal, images, eps, step_size, steps, *rest, **options)

    monkeypatch.setattr(evaluator, "pgd", recorded)
    scores_of(noisy_retrieval()[0], "clustering", kind, objective=objective, eps=0.08)
    assert taken == sizes


@pytest.mark.parametrize("objective, against, members", [
    ("joint", "sum", 2), ("joint", "concat", 2), ("joint", "vote", 2), ("joint", "vote", 1),
    ("joint-pseudo", "member_2", 2)])
def test_a_step_of_joint_is_a_step_against_where_the_others_are_now(objective, against, members):
    retrieval, images = noisy_retrieval(members)
    retrieval.batches, x, made = tensor_batches(images, 10), [], {}
    attack = attack_of("clustering", objective=objective, eps=0.1, step_size=0.03, steps=2, seed=5,
                       against=against)
    passes, models = Counter(), list(retrieval.models)
    retrieval.models = [lambda x, m=m: (passes.update({m: len(x) * x.requires_grad}),
                                        models[m](x))[1] for m in range(members)]
    e = evaluator.joint(retrieval, attack, watch=lambda x, rows: made.update(zip(rows.tolist(), x)))
    moved = torch.stack([made[row] for row in range(24)])
    assert passes == {m: 2 * 24 * (against != "member_2" or m == 1) for m in range(members)}  # N T
    for number, batch in enumerate(images.split(10)):
        common.seed_torch(5, 0, common.EVALUATE, number)
        x.append((batch + 0.1 * torch.empty_like(batch).uniform_(-1, 1)).clamp(0, 1))
    x, labels = torch.cat(x), retrieval.labels

    def spaces(x):
        parts = [model(x) for model in models]
        return {"concat": [torch.cat(parts, 1) / 2 ** 0.5], "member_2": parts[1:]}.get(
            against, parts)

    if objective == "joint-pseudo":
        labels = common.kmeans(retrieval.clean[1], 6, 5)
    for _ in range(2):
        now = [own.detach() for own in spaces(x)]
        terms = [naive("impostor" if against == "vote" else "soft-impostor", own[i], i, other,
                       labels) for own, other in zip(spaces(x.requires_grad_()), now)
                 for i in range(24)]
        total = sum(term.clamp(max=0.1 if against == "vote" else math.inf) for term in terms)
        (slope,) = torch.autograd.grad(total, x)
        x = (x.detach() + 0.03 * slope.sign()).clamp(images - 0.1, images + 0.1).clamp(0, 1)
    assert ((moved - x).abs() < 1e-5).double().mean() > 0.999      # but slopes that round to zero
    torch.testing.assert_close(e, [model(moved).detach() for model in models])


def test_joint_gets_stronger_with_eps_down_to_nothing_and_shift_does_not():
    images, labels = noisy_classes(6, 6, spread=0.2)
    recall = {name: [scores_of(retrieval_of([network()], images, labels), "clustering",
                               objective=name, eps=eps)["member_1"]["R@1"]
                     for eps in (0.02, 0.04, 0.16, 0.64, 1)] for name in ("joint", "shift")}
    assert recall["joint"][0] > recall["joint"][1] > recall["joint"][2]
    assert recall["joint"] == sorted(recall["joint"], reverse=True)
    assert recall["joint"][2] <= 5 / 35 and recall["shift"][-1] > recall["shift"][2] + 0.3
