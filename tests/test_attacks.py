"""The attacks of eval.py and the tables of several of them, against oracles written out by hand.

Loops over queries and candidates stand in for every lookup; for Carlini & Wagner and the smallest
radius a linear objective w.x + b, whose smallest l_inf change is |w.x + b| / |w|_1.
"""

import itertools
import json
import statistics
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import (
    NEIGHBOUR,
    Recorder,
    angle,
    network,
    noisy_classes,
    on_circle,
    picked,
    seeded,
    tensor_batches,
)

import common
import eval as evaluator
from common import Attack, Retrieval, UserError, pgd, recall_at_k
from eval import carlini_wagner, evaluate_robustness, minimal_radius, radius_scores

RADIUS = 0.1
DISTANCES = torch.tensor([0.01, 0.02, 0.03, 0.05, 0.07, 0.09, 0.13, 0.2, 0.025, 0.05])
REACHED = DISTANCES < RADIUS


class Counted:
    """A model that counts its forward passes, and those that a backward pass follows twice."""

    def __init__(self, model):
        self.model, self.passes = model, 0

    def __call__(self, images):
        self.passes += 1 + torch.is_grad_enabled()
        return self.model(images)


def template(**changes):
    """Arguments of a short attack in the template protocol."""
    return {"protocol": "template", "eps": 0.05, "steps": 4, **changes}


def nearest_row(query, candidates, out=None, allowed=lambda j: True):
    """The nearest candidate row to an embedding (D,), `out` left out, by a loop."""
    rows = [j for j in range(len(candidates)) if j != out and allowed(j)]
    return min(rows, key=lambda j: float((query - candidates[j]).norm().detach()))


def is_right(model, images, labels):
    """Which clean queries have a nearest neighbour of their class, by a loop."""
    clean = model(images).detach()
    return torch.tensor([bool(labels[nearest_row(clean[i], clean, i)] == labels[i])
                         for i in range(len(labels))])


def plurality(votes):
    """The label with the most votes, the earlier voter's at a tie."""
    return Counter(votes).most_common(1)[0][0]


def looked_up(models, images, clean_images, labels):
    """{rule: label of the nearest clean image of every query}, by loops; itself left out."""
    own = [model(images).detach() for model in models]
    clean = [model(clean_images).detach() for model in models]
    found = {f"member_{m + 1}": (own[m], clean[m]) for m in range(len(models))}
    if len(models) > 1:
        found["concat"] = torch.cat(own, 1), torch.cat(clean, 1)
        found["mean"] = F.normalize(sum(own), dim=1), F.normalize(sum(clean), dim=1)
    first = {rule: [int(labels[nearest_row(query, rows, i)]) for i, query in enumerate(queries)]
             for rule, (queries, rows) in found.items()}
    if len(models) > 1:
        members = [first[f"member_{m + 1}"] for m in range(len(models))]
        first["vote"] = [plurality(votes) for votes in zip(*members)]
    return first


def share(found, wanted):
    """How many of the labels found are the wanted ones."""
    return statistics.mean(int(one) == int(other) for one, other in zip(found, wanted))


def retrieval_of(models, images, labels, gallery=None, names=None):
    return Retrieval(models, tensor_batches(images), labels, gallery_labels=names,
                     gallery_batches=None if gallery is None else tensor_batches(gallery))


def noisy_retrieval(members=1, spread=0.5, seed=0):
    images, labels = noisy_classes(spread=spread, seed=seed)
    return retrieval_of([network(seed + m) for m in range(members)], images, labels), images


def noisy_gallery(members=1):
    """Queries of classes 0 to 5 in a gallery of other images, none of them of class 5."""
    images, labels = noisy_classes(spread=0.5)
    gallery, names = noisy_classes(spread=0.5, seed=7)
    keep = torch.randperm(20, generator=seeded(0))
    models = [network(m) for m in range(members)]
    return retrieval_of(models, images, labels, gallery[keep], names[keep])


def linear(distances=DISTANCES, seed=0):
    """Images, and objective(x, i) = w_i.x + b_i, zero at just this l_inf distance of each image."""
    images = 0.4 + 0.2 * torch.rand(len(distances), 3, 2, 2, generator=seeded(seed))
    weights = torch.randn(images.shape, generator=seeded(seed + 1))
    bias = -(weights * images).sum((1, 2, 3)) - distances * weights.abs().sum((1, 2, 3))
    return images, lambda x, i: (weights[i] * x).sum((1, 2, 3)) + bias[i]


def change_of(images, clean):
    return (images - clean).abs().amax((1, 2, 3))


def wagner(distances=DISTANCES, seed=0, eps=RADIUS, step_size=0.01, steps=20, **options):
    """(attacked images' change, whether they succeed) of C&W on the linear objective."""
    images, objective = linear(distances)
    torch.manual_seed(seed)
    found = carlini_wagner(objective, lambda x, i: objective(x, i) > 0, images, eps, step_size,
                           steps, **options)
    return change_of(found, images), objective(found, torch.arange(len(images))) > 0


# ---- queries in a clean gallery


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("attack", ["fgsm", "cw", "min-eps"])
def test_no_attack_on_right_queries_raises_recall(attack, seed):
    images, labels = noisy_classes(spread=0.4, seed=seed)
    result = evaluate_robustness(network(seed), images, labels, attack=attack,
                                 **template(objective="neighbour"))
    assert result["robust"][0]["R@1"] < result["clean"]["R@1"] < 1


@pytest.mark.parametrize("objective", ["neighbour", "self"])
@pytest.mark.parametrize("attack", ["pgd", "fgsm", "cw", "min-eps"])
def test_queries_that_are_wrong_are_not_moved_and_all_stays_in_the_ball(attack, objective):
    images, labels = noisy_classes(spread=0.5)
    model = Recorder(network())
    evaluate_robustness(model, images, labels, attack=attack, **template(objective=objective))
    right = is_right(model.model, images, labels)
    change = change_of(model.seen[-1], images)
    assert 0 < right.sum() < len(right)
    assert torch.equal(change > 0, right) and change.max() < 0.05 + 1e-6
    assert model.seen[-1].min() >= 0 and model.seen[-1].max() <= 1


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "cw"])
def test_attacked_queries_meet_clean_images_other_than_their_own(attack):
    images, labels = noisy_classes(spread=0.4)
    model = Recorder(network())
    (entry,) = evaluate_robustness(model, images, labels, attack=attack, ks=(1,),
                                   **template(objective="neighbour"))["robust"]
    first = looked_up([model.model], model.seen[-1], images, labels)["member_1"]
    assert entry["R@1"] == pytest.approx(share(first, labels))
    moved, clean = model.model(model.seen[-1]), model.model(images)
    with_self = [int(labels[nearest_row(query, clean)]) for query in moved]
    assert share(with_self, labels) > entry["R@1"]               # the copies would have saved some


def test_fgsm_on_queries_equals_a_loop_over_queries():
    images, labels = noisy_classes(spread=0.4)
    model = network()
    (entry,) = evaluate_robustness(model, images, labels, attack="fgsm", batch_size=7, ks=(1, 2),
                                   eps=0.03, **NEIGHBOUR)["robust"]
    clean, hits = model(images).detach(), {1: 0, 2: 0}
    for i, label in enumerate(labels):
        nearest, query = nearest_row(clean[i], clean, i), images[i:i + 1]
        if labels[nearest] == label:
            x = query.clone().requires_grad_()
            (model(x)[0] - clean[nearest]).norm().backward()
            query = (query + 0.03 * x.grad.sign()).clamp(0, 1)
        moved = model(query)[0].detach()
        order = sorted((j for j in range(len(labels)) if j != i),
                       key=lambda j: float((moved - clean[j]).norm()))
        for k in hits:
            hits[k] += any(labels[j] == label for j in order[:k])
    assert {k: entry[f"R@{k}"] for k in hits} == pytest.approx(
        {k: hit / len(labels) for k, hit in hits.items()})
    assert 0 < hits[1] < hits[2]


def test_queries_at_another_class_are_misses_though_dropping_the_nearest_would_save_them():
    # Panum et al.'s code drops the nearest column, taken to be the query: here it is the culprit.
    labels = torch.arange(20).repeat_interleave(5)
    clean = F.normalize(torch.randn(100, 64, generator=seeded(0)), dim=1)
    other = (torch.arange(100) + 5 * torch.randint(1, 20, (100,), generator=seeded(1))) % 100
    assert (labels[other] != labels).all()
    moved = F.normalize(clean + 0.6 * (clean[other] - clean), dim=1)
    second = torch.cdist(moved, clean).argsort(1)[:, 1]
    assert recall_at_k(moved, labels, (1,), gallery=clean) == {1: 0.0}
    assert float((labels[second] == labels).double().mean()) > 0.5


# ---- away from the own clean embedding


@pytest.mark.parametrize("attack, step, steps", [("pgd", 0.02, 3), ("fgsm", 0.05, 1)])
def test_the_self_objective_moves_right_queries_off_themselves_from_a_random_start(
        attack, step, steps):
    images, labels = noisy_classes(spread=0.5)
    model = Recorder(network())
    (entry,) = evaluate_robustness(
        model, images, labels, attack=attack, step_size=0.02, seed=3,
        **template(objective="self", steps=3))["robust"]
    clean, right = model.model(images).detach(), is_right(model.model, images, labels)
    common.seed_torch(3, 0, common.EVALUATE, 0)
    start = (images + torch.empty_like(images).uniform_(-0.05, 0.05)).clamp(0, 1)
    x = start.clone()
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((model.model(x) - clean).norm(dim=1).sum(), x)
        x = (x.detach() + step * gradient.sign()).clamp(images - 0.05, images + 0.05).clamp(0, 1)
    assert torch.allclose(model.seen[-1][right], x[right], atol=1e-6)
    assert torch.equal(model.seen[-1][~right], images[~right])
    assert entry["random_start"] is True and entry["objective"] == "self"
    first = looked_up([model.model], model.seen[-1], images, labels)["member_1"]
    assert entry["R@1"] == pytest.approx(share(first, labels))


@pytest.mark.parametrize("own", [False, True])
def test_in_an_ensemble_the_members_that_are_right_contribute_their_distance(own):
    retrieval, _ = noisy_retrieval(3)
    labels, images = retrieval.labels, torch.rand(24, 3, 8, 8, generator=seeded(1))
    make_objective, attacked = common.neighbour_objectives(retrieval, own=own)
    value, rows = [], torch.randperm(24, generator=seeded(2))
    for i, row in enumerate(rows):
        distances = []
        for model, clean in zip(retrieval.models, retrieval.clean):
            nearest = nearest_row(clean[row], clean, row)
            if labels[nearest] == labels[row]:
                point = clean[row if own else nearest]
                distances.append(float((model(images[i:i + 1])[0].detach() - point).norm()))
        value.append(sum(distances))
        assert bool(attacked[row]) == bool(distances)
    assert make_objective(rows)(images).tolist() == pytest.approx(value, abs=1e-5)
    assert 0 < attacked.sum() < 24


def test_the_self_objective_without_a_random_start_is_refused():
    for attack in common.ATTACKS:
        with pytest.raises(UserError, match="random start"):
            Attack("template", attack, "self", random_start=False)


# ---- Carlini & Wagner


@pytest.mark.parametrize("random_start", [True, False])
def test_carlini_wagner_comes_close_to_the_smallest_change_of_a_linear_objective(random_start):
    change, success = wagner(random_start=random_start, steps=40)
    assert torch.equal(success, REACHED)
    assert (change[REACHED] >= DISTANCES[REACHED] - 1e-6).all()
    assert (change[REACHED] <= 1.3 * DISTANCES[REACHED]).all()
    assert (change[~REACHED] <= RADIUS + 1e-6).all()


def test_carlini_wagner_stays_within_the_pixel_range_and_asks_for_nothing_outside():
    images = torch.rand(6, 3, 2, 2, generator=seeded(0)).round()             # black and white
    weights = torch.randn(images.shape, generator=seeded(1))
    seen = []

    def objective(x, i):
        seen.append(x.detach().clone())
        return (weights[i] * (x - images[i])).sum((1, 2, 3)) - 0.3

    found = carlini_wagner(objective, lambda x, i: objective(x, i) > 0, images, 0.1, 0.05, 10)
    asked = torch.cat(seen)
    assert asked.min() == 0 and asked.max() == 1                  # it was at the borders, no more
    assert found.min() >= 0 and found.max() <= 1
    assert change_of(found, images).max() <= 0.1 + 1e-6


def test_carlini_wagner_shrinks_changes_that_succeed_at_once_until_tau():
    for tau in (1 / 256, 0.02):
        change, success = wagner(torch.full((6,), -0.5), smallest_tau=tau)
        assert success.all()
        assert (change > 0).all() and (change < 1.2 * tau).all()  # ends with 0.9 change below tau
    assert (change > 0.5 * tau).all()
    assert wagner(torch.full((6,), -0.5), random_start=False)[0].max() == 0


def test_what_is_enough_ends_carlini_wagner_early_and_costs_no_success():
    images, objective = linear()
    calls = {}
    for enough in (0.0, RADIUS):
        calls[enough] = 0

        def counted(x, i):
            calls[enough] += len(x)
            return objective(x, i)

        torch.manual_seed(0)
        found = carlini_wagner(counted, lambda x, i: objective(x, i) > 0, images, RADIUS, 0.01, 20,
                               enough=enough)
        success = objective(found, torch.arange(len(images))) > 0
        assert torch.equal(success, REACHED)
        assert change_of(found, images).max() <= RADIUS + 1e-6
    assert calls[RADIUS] < 0.7 * calls[0.0]


def test_the_best_change_of_carlini_wagner_never_grows_with_more_rounds(monkeypatch):
    changes = []
    for rounds in range(1, 13):
        monkeypatch.setattr(evaluator, "CW_ROUNDS", rounds)
        change, success = wagner(eps=0.3, step_size=0.03, steps=10)
        changes.append(torch.where(success, change, torch.inf))
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(changes))
    assert (changes[-1] < 0.9 * changes[0]).any() and changes[-1].isfinite().all()


def test_the_generator_decides_the_start_of_carlini_wagner():
    first, again, other = (wagner(seed=seed, steps=3)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    still = [wagner(seed=seed, steps=3, random_start=False)[0] for seed in (0, 1)]
    assert torch.equal(*still)


def test_carlini_wagner_never_mixes_its_images_up():
    # the objective of image i pulls towards its own point and sees only images near its own
    distances = torch.tensor([-0.1, 0.08, 0.01, 0.5, 0.04, 0.02])      # they end at different times
    images, objective = linear(distances)
    images = images + torch.linspace(-0.3, 0.3, 6).view(-1, 1, 1, 1)
    subsets = []

    def near(x, i):
        subsets.append(i.tolist())
        assert (change_of(x, images[i]) < 0.2).all()
        return objective(x - torch.linspace(-0.3, 0.3, 6)[i].view(-1, 1, 1, 1), i)

    found = carlini_wagner(near, lambda x, i: near(x, i) > 0, images, RADIUS, 0.005, 22,
                           random_start=False, largest_const=0.7)
    success = near(found, torch.arange(6)) > 0
    assert torch.equal(success, distances < RADIUS)
    assert len({tuple(subset) for subset in subsets}) > 2
    assert [0, 1, 2, 3, 4, 5] in subsets


def test_carlini_wagner_with_a_huge_radius_leaves_no_query_right():
    images, labels = on_circle(0.0, 10.0, 180.0, 190.0), torch.tensor([0, 0, 1, 1])
    result = evaluate_robustness(angle, images, labels, attack="cw", eps=1, steps=30, ks=(1,),
                                 **NEIGHBOUR)
    assert result["clean"]["R@1"] == 1 and result["robust"][0]["R@1"] == 0


def test_carlini_wagner_on_queries_stops_within_the_radius():
    # every query has failed within eps in the first round; getting nearer would take all of them
    images, labels = on_circle(0.0, 10.0, 180.0, 190.0), torch.tensor([0, 0, 1, 1])
    model, attack = Counted(angle), Attack("template", "cw", eps=0.5, steps=20)
    evaluator.attack_entries(retrieval_of([model], images, labels), attack)
    assert model.passes < 0.05 * evaluator.passes_of(attack)


@pytest.mark.parametrize("random_start", [True, False])
def test_carlini_wagner_on_queries_starts_as_the_attack_says(random_start):
    images, labels = noisy_classes(spread=0.1)
    model = Recorder(network())
    evaluate_robustness(model, images, labels, attack="cw", random_start=random_start,
                        **template(objective="neighbour", steps=0))
    assert bool((change_of(model.seen[-1], images) > 0).all()) == random_start
    assert torch.equal(model.seen[-1], images) != random_start


def test_carlini_wagner_makes_the_vote_of_an_ensemble_fail():
    images, labels = noisy_classes(spread=0.3)
    models = [network(seed) for seed in range(3)]
    members = [Recorder(model) for model in models]
    result = evaluate_robustness(members, images, labels, attack="cw", ks=(1,), steps=4,
                                 step_size=0.02, eps=0.1, **NEIGHBOUR)
    attacked = members[0].seen[-1]
    assert all(torch.equal(member.seen[-1], attacked) for member in members)
    voted = looked_up(models, attacked, images, labels)["vote"]
    entry = next(entry for entry in result["robust"] if entry["rule"] == "vote")
    assert entry["R@1"] == pytest.approx(share(voted, labels))
    assert entry["R@1"] < 0.5 * result["clean"]["R@1"]           # the vote is what has to fail


# ---- the smallest radius


def minimal(distances=DISTANCES, rows=slice(None), **options):
    images, objective = linear(distances)
    rows = torch.arange(len(images))[rows]
    images = images[rows]
    found, radius = minimal_radius(lambda x: objective(x, rows), lambda x: objective(x, rows) > 0,
                                   images, RADIUS, 0.04, 6, **options)
    return radius, change_of(found, images), objective(found, rows) > 0


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("halvings", [8, 4, 0])
def test_bisection_finds_the_smallest_radius_of_a_linear_objective(halvings, random_start):
    torch.manual_seed(0)
    radius, change, success = minimal(random_start=random_start, halvings=halvings)
    assert torch.equal(radius.isfinite(), REACHED)
    above = (radius - DISTANCES)[REACHED]
    assert (above >= -1e-6).all() and (above <= RADIUS / 2 ** halvings + 1e-6).all()
    assert torch.equal(success, REACHED)
    assert (change <= radius.clamp(max=RADIUS) + 1e-6).all()
    assert (change[REACHED] >= DISTANCES[REACHED] - 1e-6).all()
    assert (radius * 2 ** halvings / RADIUS)[REACHED].frac().abs().max() < 1e-3


def test_the_start_of_a_bisection_shrinks_with_the_radius():
    images, radii = torch.full((3, 3, 2, 2), 0.5), {}
    for halvings in (0, 5):
        torch.manual_seed(0)
        found, _ = minimal_radius(None, lambda x: torch.ones(3, dtype=torch.bool), images, RADIUS,
                                  0.04, 0, halvings=halvings)
        radii[halvings] = change_of(found, images)
    assert (radii[0] < RADIUS).all() and torch.allclose(radii[5], radii[0] / 32, atol=1e-6)


def test_bisection_takes_every_image_by_itself():
    together = minimal(random_start=False)[0]
    alone = [float(minimal(rows=[i], random_start=False)[0]) for i in range(len(DISTANCES))]
    assert together.tolist() == alone


def test_images_that_succeed_already_get_the_smallest_radius_there_is():
    radius, change, success = minimal(torch.full((3,), -0.5))
    assert success.all() and radius.tolist() == pytest.approx([RADIUS / 256] * 3)
    assert (change <= radius + 1e-6).all()


def test_scores_of_radii_are_their_median_and_the_share_found():
    inf = float("inf")
    assert radius_scores(torch.tensor([4 / 255, 1 / 255, inf, 2 / 255, 3 / 255])) == pytest.approx(
        {"min_eps_255": 3.0, "min_eps_found": 0.8})
    assert radius_scores(torch.tensor([inf, 1 / 255, inf])) == {
        "min_eps_255": None, "min_eps_found": pytest.approx(1 / 3)}
    assert radius_scores(torch.tensor([])) == {"min_eps_255": None, "min_eps_found": None}


def test_the_smallest_radius_of_queries_equals_a_bisection_query_by_query():
    images, labels = noisy_classes(spread=0.5)
    model = network()
    (entry,) = evaluate_robustness(model, images, labels, attack="min-eps", random_start=False,
                                   **template(objective="neighbour", step_size=0.02))["robust"]
    clean, radii = model(images).detach(), []
    for i, label in enumerate(labels):
        nearest = nearest_row(clean[i], clean, i)
        if labels[nearest] != label:
            continue
        low, high = 0.0, float("inf")
        for _ in range(9):
            radius = 0.05 if high == float("inf") else (low + high) / 2
            x = pgd(lambda z: (model(z) - clean[nearest]).norm(dim=1), images[i:i + 1], radius,
                    0.4 * radius, 4, start=images[i:i + 1])
            failed = labels[nearest_row(model(x)[0].detach(), clean, i)] != label
            low, high = (low, radius) if failed else (radius, high)
            if high == float("inf"):
                break
        radii.append(high)
    found = [radius for radius in radii if radius < 1]
    assert 0 < len(found) <= len(radii) < len(images)
    assert entry["min_eps_found"] == pytest.approx(len(found) / len(radii))
    assert entry["min_eps_255"] == pytest.approx(255 * statistics.median(radii), rel=1e-4)


def test_an_ensemble_reports_the_radius_that_fails_its_vote_alone():
    images, labels = noisy_classes(spread=0.3)
    result = evaluate_robustness([network(seed) for seed in range(3)], images, labels,
                                 attack="min-eps", **template(objective="shift", eps=0.2))
    by_rule = {entry["rule"]: entry for entry in result["robust"]}
    assert [rule for rule, entry in by_rule.items() if "min_eps_255" in entry] == ["vote"]
    # the returned images succeed where a radius was found, and only there
    assert by_rule["vote"]["R@1"] == pytest.approx(1 - by_rule["vote"]["min_eps_found"])
    assert 0 < by_rule["vote"]["min_eps_found"] and by_rule["vote"]["min_eps_255"] > 0


# ---- targeted attacks: into which class


def random_targets(labels, seed=0, names=None):
    points = torch.rand(len(labels), 3, 1, 1, generator=seeded(seed))
    others = None if names is None else torch.rand(len(names), 3, 1, 1, generator=seeded(1))
    return evaluator.target_classes(retrieval_of([angle], points, labels, others, names),
                                    Attack("template", objective="targeted-random", seed=seed))


def test_random_target_classes_are_uniform_over_the_other_classes():
    classes = torch.tensor([2, 3, 5, 9])                         # numbers with gaps
    labels = classes[torch.randint(0, 4, (3000,), generator=seeded(5))]
    target = random_targets(labels)
    assert (target != labels).all()
    for label in classes:                                    # chi-square: 13.8 is for p = 0.001
        counts = Counter(target[labels == label].tolist())
        expected = int((labels == label).sum()) / 3
        assert set(counts) == set(classes.tolist()) - {int(label)}
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 13.8


def test_random_target_classes_are_a_function_of_the_seed():
    labels = torch.arange(6).repeat(20)
    first, again, other = (random_targets(labels, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert 0.05 < float((first == other).double().mean()) < 0.5         # one in five by chance


def test_random_target_classes_come_from_the_gallery():
    labels = torch.tensor([1, 4, 6]).repeat(100)
    target = random_targets(labels, names=torch.tensor([6, 4, 8, 1, 4, 1]))
    for label in (1, 4, 6):
        assert set(target[labels == label].tolist()) == {1, 4, 6, 8} - {label}


@pytest.mark.parametrize("members", [1, 3])
def test_the_nearest_target_class_is_that_of_the_nearest_image_of_another_class(members):
    retrieval, _ = noisy_retrieval(members)
    labels, joined = retrieval.labels, torch.cat(retrieval.clean, 1)
    target = evaluator.target_classes(retrieval, Attack("template", objective="targeted-nearest"))
    wanted = [int(labels[nearest_row(joined[i], joined, i, lambda j: labels[j] != labels[i])])
              for i in range(len(labels))]
    assert target.tolist() == wanted and len(set(wanted)) > 2


@pytest.mark.parametrize("members", [1, 2])
def test_the_nearest_target_class_is_looked_up_in_the_gallery(members):
    retrieval = noisy_gallery(members)
    own, gallery = torch.cat(retrieval.clean, 1), torch.cat(retrieval.gallery, 1)
    target = evaluator.target_classes(retrieval, Attack("template", objective="targeted-nearest"))
    wanted = [int(retrieval.names[nearest_row(query, gallery, None,
                                              lambda j: retrieval.names[j] != label)])
              for query, label in zip(own, retrieval.labels)]
    assert target.tolist() == wanted and 5 not in wanted


@pytest.mark.parametrize("objective", ["targeted-random", "targeted-nearest"])
def test_a_targeted_attack_needs_two_classes(objective):
    images, _ = noisy_classes()
    with pytest.raises(UserError, match="two classes"):
        evaluate_robustness(network(), images, torch.zeros(24, dtype=torch.int64),
                            **template(objective=objective))


# ---- targeted attacks: how, and how often they succeed


@pytest.mark.parametrize("members, other", [(1, False), (3, False), (1, True), (2, True)])
def test_targeted_objectives_lead_to_the_nearest_image_of_the_target_class(members, other):
    retrieval = noisy_gallery(members) if other else noisy_retrieval(members)[0]
    names, rows = retrieval.names, torch.tensor([3, 17, 0, 8])
    target = evaluator.target_classes(retrieval, Attack("template", objective="targeted-random"))
    images = torch.rand(4, 3, 8, 8, generator=seeded(1))
    value = evaluator.targeted_objectives(retrieval, target)(rows)(images).detach()
    for i, row in enumerate(rows):
        distance = 0
        for m, model in enumerate(retrieval.models):
            candidates = (retrieval.gallery or retrieval.clean)[m]
            point = nearest_row(retrieval.clean[m][row], candidates, None,
                                lambda j: names[j] == target[row])
            distance += float((model(images[i:i + 1])[0].detach() - candidates[point]).norm())
        assert float(value[i]) == pytest.approx(-distance, abs=1e-5)


@pytest.mark.parametrize("objective", ["targeted-random", "targeted-nearest"])
@pytest.mark.parametrize("attack", ["pgd", "cw"])
def test_the_success_rates_equal_a_count_for_every_rule(attack, objective):
    images, labels = noisy_classes(spread=0.5)
    for models in ([network()], [network(seed) for seed in range(3)]):
        members = [Recorder(model) for model in models]
        settings = template(attack=attack, objective=objective, eps=0.08, steps=2,
                            step_size=0.03)
        entries = evaluate_robustness(members, images, labels, **settings)["robust"]
        attacked = members[0].seen[-1]
        assert (change_of(attacked, images) > 0).all()           # every query, right or wrong
        target = evaluator.target_classes(retrieval_of(models, images, labels),
                                          Attack("template", objective=objective))
        for side, x in (("success", attacked), ("success_clean", images)):
            rates = {rule: share(first, target)
                     for rule, first in looked_up(models, x, images, labels).items()}
            if len(models) > 1:
                rates["member_mean"] = statistics.mean(
                    rates[f"member_{m + 1}"] for m in range(3))
            assert {entry["rule"]: entry[side] for entry in entries} == pytest.approx(rates)
        assert entries[0]["success"] > entries[0]["success_clean"]


def test_the_success_rate_is_that_of_the_gallery():
    retrieval = noisy_gallery(2)
    attack = Attack("template", objective="targeted-nearest", eps=0.05)
    attacked, _ = common.attacked_embeddings(retrieval, attack,
                                             *evaluator.plan(retrieval, attack)[:2])
    target = evaluator.target_classes(retrieval, attack)
    entries = {entry["rule"]: entry for entry in evaluator.attack_entries(retrieval, attack)}
    for m in range(2):
        first = [int(retrieval.names[nearest_row(query, retrieval.gallery[m])])
                 for query in attacked[m]]
        assert entries[f"member_{m + 1}"]["success"] == pytest.approx(share(first, target))


@pytest.mark.parametrize("attack", ["pgd", "cw"])
def test_a_model_that_can_be_steered_is_led_into_every_target(attack):
    images, labels = on_circle(0.0, 10.0, 90.0, 100.0, 180.0, 190.0), torch.arange(3).repeat(2)
    labels = labels.sort().values
    for objective in ("targeted-nearest", "targeted-random"):
        (entry,) = evaluate_robustness(angle, images, labels, attack=attack, eps=0.7,
                                       step_size=0.02, steps=60, ks=(1,), protocol="template",
                                       objective=objective)["robust"]
        assert entry["success_clean"] == 0 and entry["success"] == 1 and entry["R@1"] == 0


@pytest.mark.parametrize("attack", ["pgd", "cw"])
def test_a_targeted_attack_of_size_zero_succeeds_as_often_as_none(attack):
    images, labels = noisy_classes(spread=0.5)
    result = evaluate_robustness([network(0), network(1)], images, labels, attack=attack,
                                 **template(objective="targeted-nearest", eps=0))
    assert all(entry["success"] == entry["success_clean"] > 0 for entry in result["robust"])
    assert all(picked(entry) == picked(result["clean"]["by_rule"][entry["rule"]])
               for entry in result["robust"])


# ---- whether an attack has succeeded


def uneven(seed):
    """Embeddings of different lengths: the nearest is not the one with the largest product."""
    return network(seed)[:-1]


@pytest.mark.parametrize("member", [network, uneven])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_success_is_the_label_of_the_nearest_candidate(member, members, other, targeted):
    images, labels = noisy_classes(spread=0.3)
    gallery, names = noisy_classes(spread=0.3, seed=7)
    order = torch.randperm(24, generator=seeded(2))
    lookup = (gallery[order], names[order]) if other else ()
    retrieval = retrieval_of([member(seed) for seed in range(members)], images, labels,
                             *lookup)
    rows = torch.randperm(24, generator=seeded(3))[:15]
    moved = (images[rows] + 0.15 * torch.randn(15, 3, 8, 8, generator=seeded(4))).clamp(0, 1)
    target = (labels + 1) % 6
    success = evaluator.success_tests(retrieval, target if targeted else None)(rows)(moved)
    for i, row in enumerate(rows):
        votes = []
        for m, model in enumerate(retrieval.models):
            candidates = (retrieval.gallery if other else retrieval.clean)[m]
            votes.append(int(retrieval.names[nearest_row(
                model(moved[i:i + 1])[0].detach(), candidates, None if other else row)]))
        label = plurality(votes)
        assert bool(success[i]) == (label == target[row] if targeted else label != labels[row])
    assert success.any() and not success.all()


# ---- Attack


@pytest.mark.parametrize("arguments, eps, step, steps, random_start", [
    ({"attack": "cw"}, 0.01, 0.001, 50, True),
    ({"attack": "cw", "eps": 0.2, "steps": 7}, 0.2, 0.02, 7, True),
    ({"attack": "cw", "step_size": 0.3, "random_start": False}, 0.01, 0.3, 50, False),
    ({"attack": "min-eps"}, 32 / 255, 2 * 32 / 255 / 5, 5, True),
    ({"attack": "min-eps", "eps": 0.1, "steps": 4}, 0.1, 0.05, 4, True),
    ({"objective": "targeted-random"}, 0.01, 0.004, 5, True),
    ({"objective": "targeted-nearest", "random_start": False}, 0.01, 0.004, 5, False),
    ({"objective": "targeted-nearest", "attack": "fgsm"}, 0.01, 0.01, 1, False),
    ({"objective": "self"}, 0.01, 0.004, 5, True),
    ({"objective": "self", "attack": "fgsm"}, 0.01, 0.01, 1, True),
    ({"objective": "shift", "attack": "fgsm"}, 0.01, 0.01, 1, True),
])
def test_the_defaults_of_the_template_attacks(arguments, eps, step, steps, random_start):
    attack = Attack("template", **arguments)
    assert (attack.eps, attack.step_size) == pytest.approx((eps, step))
    assert (attack.steps, attack.random_start) == (steps, random_start)
    assert attack.objective == arguments.get("objective", "neighbour")


@pytest.mark.parametrize("arguments, word", [
    ({"attack": "cw"}, "template"), ({"attack": "min-eps"}, "template"),
    ({"objective": "self"}, "template"), ({"objective": "targeted-random"}, "template"),
    ({"objective": "targeted-nearest"}, "template"),
    ({"protocol": "template", "attack": "cw", "restarts": 2}, "no restarts"),
    ({"protocol": "template", "attack": "min-eps", "restarts": 2}, "no restarts"),
    ({"protocol": "template", "attack": "cw", "objective": "shift", "random_start": False},
     "random start"),
    ({"protocol": "template", "attack": "min-eps", "eps": 1.5}, "0 <= eps <= 1"),
    ({"protocol": "template", "attack": "deepfool"}, "unknown attack"),
    ({"protocol": "template", "objective": "targeted"}, "with the objective"),
    ({"protocol": "ranking"}, "unknown protocol"),
])
def test_attacks_that_do_not_fit_together_are_refused_with_a_reason(arguments, word):
    with pytest.raises(UserError, match=word):
        Attack(**arguments)


@pytest.mark.parametrize("arguments, words", [
    ({"attack": "cw", "eps": 8 / 255}, ("neighbour", "C&W-50", "eps 8/255")),
    ({"attack": "fgsm", "eps": 0.05}, ("neighbour", "FGSM", "eps 12.8/255")),
    ({"attack": "min-eps"}, ("neighbour", "smallest eps, PGD-5", "up to 32/255")),
    ({"objective": "targeted-random", "steps": 3}, ("targeted-random", "PGD-3", "eps 2.55/255")),
])
def test_an_attack_in_words(arguments, words):
    attack = Attack("template", **arguments)
    assert attack.words() == ("template", *words)
    assert str(attack) == "template: {} {}, {}".format(*words)


def test_the_entry_of_an_attack_is_what_made_it():
    entry = Attack("template", "cw", "targeted-nearest", 0.1, 0.02, 7, 1, False, 4).entry()
    assert entry == {"protocol": "template", "attack": "cw", "objective": "targeted-nearest",
                     "norm": "linf", "eps": 0.1, "eps_255": pytest.approx(25.5), "step": 0.02,
                     "step_255": pytest.approx(5.1), "steps": 7, "restarts": 1,
                     "random_start": False, "seed": 4, "against": "sum", "attacker_share": 100.0}
    one = Attack("clustering", "pgd", "joint", 0.1, 0.02, 7, seed=4, against="concat",
                 attacker_share=25).entry()
    assert one["against"] == "concat" and one["attacker_share"] == 25
    for own in (entry, one):
        assert Attack(**{name: own[name] for name in (
            "protocol", "attack", "objective", "eps", "steps", "restarts", "random_start", "seed",
            "against", "attacker_share")}, step_size=own["step"]).entry() == own


@pytest.mark.parametrize("attack, step", [("cw", 0.004), ("pgd", 0.01), ("min-eps", 0.01)])
def test_the_step_of_evaluate_robustness_follows_the_attack(attack, step):
    images, labels = on_circle(0.0, 10.0, 180.0, 190.0), torch.tensor([0, 0, 1, 1])
    result = evaluate_robustness(angle, images, labels, attack=attack, eps=0.04, steps=2, ks=(1,),
                                 **NEIGHBOUR)
    assert result["robust"][0]["step"] == pytest.approx(step)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("arguments", [
    {}, {"restarts": 3}, {"attack": "fgsm"}, {"attack": "cw", "steps": 3},
    {"attack": "min-eps", "steps": 3}, {"attack": "cw", "steps": 2, "objective": "shift"}])
def test_no_attack_takes_more_passes_than_are_announced(arguments):
    images, labels = noisy_classes(spread=0.3)
    model = Counted(network())
    retrieval, attack = retrieval_of([model], images, labels), Attack("template", **arguments)
    model.passes = 0
    evaluator.attack_entries(retrieval, attack)
    spare = attack.restarts if attack.restarts > 1 else 0       # one more look at every restart
    assert model.passes <= evaluator.passes_of(attack) + 1 + spare
    if attack.attack != "cw":                                    # which may end early
        assert model.passes >= evaluator.passes_of(attack)


# ---- craft of common.attacked_embeddings, more of common.scored_entries


def test_a_craft_of_ones_own_is_called_and_its_images_are_scored():
    retrieval, images = noisy_retrieval()
    attack = Attack("template", objective="shift", eps=0.3)
    calls = []

    def craft(objective, batch, rows):
        calls.append((tuple(objective(batch).shape), batch, rows))
        return (batch + 0.2).clamp(0, 1)

    embeddings, gallery = common.attacked_embeddings(retrieval, attack, craft=craft)
    (entry,) = common.scored_entries(retrieval, attack, embeddings, gallery, time.perf_counter())
    ((shape, batch, rows),) = calls
    assert shape == (24,) and torch.equal(batch, images) and rows.tolist() == list(range(24))
    moved = retrieval.models[0]((images + 0.2).clamp(0, 1)).detach()
    scores = recall_at_k(moved, retrieval.labels, (1, 2, 4, 8), gallery=retrieval.clean[0])
    assert [entry[f"R@{k}"] for k in (1, 2, 4, 8)] == list(scores.values())
    assert picked(entry) != picked(retrieval.scores(retrieval.clean, None, 0)["member_1"])


def test_rows_that_are_not_attacked_stay_clean_whatever_craft_makes_of_them():
    retrieval, images = noisy_retrieval()
    attacked = torch.rand(24, generator=seeded(1)) < 0.5
    attack = Attack("template", objective="shift", eps=0.3)
    aim = common.shift_objectives(retrieval), attacked
    (moved,), _ = common.attacked_embeddings(retrieval, attack, aim, lambda *_: 0 * images + 0.5)
    assert torch.allclose(moved[~attacked], retrieval.clean[0][~attacked], atol=1e-6)
    assert torch.allclose(moved[attacked], retrieval.models[0](images * 0 + 0.5)[:1], atol=1e-6)
    assert 0 < attacked.sum() < 24


def test_of_several_restarts_of_a_craft_the_highest_objective_is_kept():
    retrieval, images = noisy_retrieval()
    attack = Attack("template", objective="shift", eps=0.3, restarts=3)
    drawn = []

    def craft(objective, batch, rows):
        drawn.append((batch + 0.1 * torch.randn(batch.shape)).clamp(0, 1))
        return drawn[-1]

    (moved,), _ = common.attacked_embeddings(retrieval, attack, craft=craft)
    options = torch.stack([retrieval.models[0](x).detach() for x in drawn])          # (3, 24, D)
    shift = 1 - (options * retrieval.clean[0]).sum(2)
    wanted = options[shift.argmax(0), torch.arange(24)]
    assert len(drawn) == 3 and len(set(shift.argmax(0).tolist())) == 3
    assert torch.allclose(moved, wanted, atol=1e-6)


def test_what_more_there_is_of_a_rule_stands_in_its_entry_alone():
    retrieval, _ = noisy_retrieval(2)
    attack = Attack("template", objective="shift")
    embeddings, gallery = common.attacked_embeddings(retrieval, attack)
    more = {"vote": {"luck": 0.5}, "concat": {"luck": 0.25, "R@1": 9.0}}
    entries = {entry["rule"]: entry for entry in common.scored_entries(
        retrieval, attack, embeddings, gallery, time.perf_counter(), more)}
    plain = {entry["rule"]: entry for entry in common.attack_entries(retrieval, attack)}
    assert {rule: entry.get("luck") for rule, entry in entries.items()} == {
        **dict.fromkeys(plain), "vote": 0.5, "concat": 0.25}
    assert entries["concat"]["R@1"] == 9.0 and entries["mean"]["R@1"] == plain["mean"]["R@1"]
    assert all({**entry, "seconds": 0} == {**plain[rule], "seconds": 0}
               for rule, entry in entries.items() if rule not in more)


@pytest.mark.parametrize("targeted", [False, True])
def test_what_a_plan_says_of_the_attacked_embeddings_stands_in_the_entries(targeted, monkeypatch):
    retrieval, _ = noisy_retrieval(2)
    attack = Attack("template", objective="targeted-nearest" if targeted else "shift")
    plan, seen = evaluator.plan, []

    def with_luck(*arguments):
        aim, craft, extra = plan(*arguments)

        def lucky(embeddings):
            seen.append(embeddings)
            return {**extra(embeddings), "vote": {"luck": 0.5}}
        return aim, craft, lucky

    monkeypatch.setattr(evaluator, "plan", with_luck)
    entries = {entry["rule"]: entry for entry in evaluator.attack_entries(retrieval, attack)}
    assert {rule for rule, entry in entries.items() if "luck" in entry} == {"vote"}
    assert ("success" in entries["mean"]) == targeted
    (embeddings,) = seen
    assert len(embeddings) == 2 and not torch.equal(embeddings[0], retrieval.clean[0])


# ---- several attacks and seeds in one table


def stored(rule="member_1", **scores):
    return {"rule": rule, "n_queries": 24, "NMI": None, **scores}


CLEAN = {"by_rule": {"member_1": {"R@1": 0.9, "mAP@R": 0.6, "NMI": 0.8, "NMI_chance": 0.31}}}
PGD = {"protocol": "template", "eps": 8 / 255}
FIRST, AGAIN, LAST = 0.1, 0.3, 0.35


def three_seeds():
    """The rows of PGD under three seeds and C&W under one."""
    found = [(Attack(**PGD, seed=seed), [stored(**{"R@1": score, "mAP@R": score / 2})])
             for seed, score in enumerate((FIRST, AGAIN, LAST))]
    found.append((Attack(**PGD, attack="cw"), [stored(**{"R@1": 0.05, "mAP@R": 0.02})]))
    return found


def test_a_row_is_the_mean_and_standard_deviation_over_the_seeds_of_an_attack():
    first, other = evaluator.rows_of(CLEAN, three_seeds(), "run")
    mean, std = 0.25, ((0.15 ** 2 + 0.05 ** 2 + 0.1 ** 2) / 2) ** 0.5
    assert first["name"] == "run" and first["clean"] == CLEAN["by_rule"]["member_1"]
    assert first["attack"] == Attack(**PGD).words() and first["attack_seeds"] == [0, 1, 2]
    assert first["attacked"] == pytest.approx({"R@1": mean, "mAP@R": mean / 2})
    assert first["attack_std"] == pytest.approx({"R@1": std, "mAP@R": std / 2})
    assert other["attacked"] == {"R@1": 0.05, "mAP@R": 0.02} and other["attack_seeds"] == [0]
    assert other["attack_std"] == {"R@1": None, "mAP@R": None}


def test_rows_are_made_per_rule_and_a_score_that_a_seed_lacks_is_left_out():
    clean = {"by_rule": {"vote": {"R@1": 0.5}, "mean": {"R@1": 0.4}}}
    found = [(Attack(**PGD, attack="min-eps", seed=seed), [
        stored("mean", **{"R@1": 0.5}),
        stored("vote", **{"R@1": 0.1 + 0.1 * seed, "min_eps_255": radius})])
        for seed, radius in enumerate((3.0, None))]
    rows = evaluator.rows_of(clean, found, "run")
    assert [row["name"] for row in rows] == ["run vote", "run mean"]
    assert rows[0]["attacked"] == {"R@1": pytest.approx(0.15)}
    assert rows[1]["attacked"] == {"R@1": 0.5} and rows[1]["attack_std"] == {"R@1": 0.0}
    assert [row["name"] for row in evaluator.rows_of(clean, found, "run", ["mean"])] == ["run mean"]


def test_a_title_says_what_attacks_share_and_the_columns_the_rest():
    cw, pgds = Attack(**PGD, attack="cw"), [Attack(**PGD), Attack(**PGD, seed=1)]
    far = Attack("template", eps=16 / 255)
    assert evaluator.title_of(pgds) == (str(pgds[0]), {pgds[0].words(): ""})
    assert evaluator.title_of([*pgds, cw]) == (
        "template: neighbour, eps 8/255", {pgds[0].words(): "PGD-5", cw.words(): "C&W-50"})
    assert evaluator.title_of([pgds[0], far]) == (
        "template: neighbour, PGD-5", {pgds[0].words(): "eps 8/255", far.words(): "eps 16/255"})
    random = Attack(**PGD, objective="targeted-random", attack="cw")
    assert evaluator.title_of([pgds[0], random]) == (
        "template: eps 8/255", {pgds[0].words(): "neighbour PGD-5",
                                random.words(): "targeted-random C&W-50"})


def outcome(seed, found, clean=CLEAN, run="eat", **flags):
    label = f"{run}-s{seed}"
    return {"run": label, "warnings": [], "rows": evaluator.rows_of(clean, found, label),
            "flags": {"seed": seed, "data_root": "photos/cub", "weights": "none", "device": "cpu",
                      "workers": 2, "out": f"runs/{label}", "lr": 0.1, **flags}}


def table_of(report, attacks, metrics=None):
    """(title, heads, {name: cells}) of the Markdown, read through JSON as the files are."""
    content = json.loads(json.dumps(evaluator.table_content(
        report, attacks, evaluator.title_of(attacks)[0], metrics)))
    title, _, heads, _, *lines = evaluator.table_markdown(content).splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (heads, *lines)]
    return title, split[0][1:], {name: cells for name, *cells in split[1:]}


def test_attacks_stand_side_by_side_with_the_spread_of_the_attack_for_one_training_seed():
    found = three_seeds()
    title, heads, lines = table_of([outcome(4, found)], [attack for attack, _ in found])
    assert heads == ["clean R@1", "clean mAP@R", "clean NMI", "PGD-5 R@1", "PGD-5 mAP@R",
                     "C&W-50 R@1", "C&W-50 mAP@R"]
    cells = dict(zip(heads, lines["eat"]))
    std = statistics.stdev([FIRST, AGAIN, LAST])
    assert list(lines) == ["eat"]
    assert cells["PGD-5 R@1"] == f"25.0 ± {100 * std:.1f}"
    assert cells["PGD-5 mAP@R"] == f"12.5 ± {50 * std:.1f}"
    assert cells["C&W-50 R@1"] == "5.0" and cells["clean R@1"] == "90.0"
    assert title.startswith("template: neighbour, eps 8/255; 1 seed, 3 of the attack on each, "
                            "mean ± std; NMI by chance 31.0. Made by `python eval.py")


def test_with_several_training_seeds_the_spread_is_theirs():
    report, means = [], []
    for seed, shift in enumerate((0.0, 0.2, 0.05)):
        found = [(attack, [{**entry, "R@1": entry["R@1"] + shift} for entry in entries])
                 for attack, entries in three_seeds()]
        clean = {"by_rule": {"member_1": {"R@1": 0.9 - shift}}}
        report.append(outcome(seed, found, clean))
        means.append(0.25 + shift)
    attacks = [attack for attack, _ in three_seeds()]
    title, heads, lines = table_of(report, attacks, ["R@1"])
    std = 100 * statistics.stdev(means)
    assert heads == ["clean R@1", "PGD-5 R@1", "C&W-50 R@1"]
    assert lines == {"eat": [f"{100 * (0.9 - 0.25 / 3):.1f} ± {std:.1f}",
                             f"{100 * statistics.mean(means):.1f} ± {std:.1f}",
                             f"{100 * (0.05 + 0.25 / 3):.1f} ± {std:.1f}"]}
    assert "; 3 seeds, 3 of the attack on each, mean ± std" in title
    content = evaluator.table_content(report, attacks, evaluator.title_of(attacks)[0])
    assert content["rows"][0]["seeds"] == [0, 1, 2] and content["rows"][0]["attack_seeds"] == 3
    # of the attack, per training seed, averaged
    assert content["rows"][0]["attack_std"]["R@1"] == pytest.approx(
        statistics.stdev([FIRST, AGAIN, LAST]))
    assert "attack_std" not in content["rows"][1]


def test_other_flags_are_another_line_and_places_are_no_flags():
    found = three_seeds()[:1]
    report = [outcome(0, found), outcome(1, found, out="elsewhere/eat-s1", device="cuda"),
              outcome(0, found, run="eat-lr", lr=0.2)]
    _, _, lines = table_of(report, [found[0][0]])
    assert list(lines) == ["eat", "eat-lr (seeds: 1)"]
    flags = evaluator.table_content(report, [found[0][0]], "")["flags"]
    assert flags["eat"]["data_root"] == "cub" and flags["eat"]["out"] == "eat-s0"


def test_the_metrics_asked_for_are_the_columns_and_radii_are_not_in_percent():
    attack = Attack("template", "min-eps")
    found = [(attack, [stored(**{"R@1": 0.25, "mAP@R": 0.5, "min_eps_255": 3.456,
                                 "success": 0.75})])]
    title, heads, lines = table_of([outcome(0, found)], [attack], ["R@1", "min_eps_255"])
    assert dict(zip(heads, lines["eat"])) == {
        "clean R@1": "90.0", "attacked R@1": "25.0", "attacked eps/255": "3.46"}
    assert "chance" not in title                                  # of NMI, which is not shown
    title, heads, lines = table_of([outcome(0, found)], [attack], ["success", "NMI"])
    assert dict(zip(heads, lines["eat"])) == {"clean NMI": "80.0", "attacked success": "75.0"}
    assert "NMI by chance 31.0" in title
    _, heads, _ = table_of([outcome(0, found)], [attack])
    assert {"attacked success", "attacked eps/255", "attacked mAP@R"} <= set(heads)


def test_the_printed_table_shows_success_and_radii():
    shown = common.format_table([
        {"name": "a", "clean": {"R@1": 0.5}, "attacked": {"success": 0.75, "min_eps_255": 2.0}},
        {"name": "b", "clean": {"R@1": 0.25}, "attacked": {"success": 1.0, "min_eps_255": None}}])
    _, heads, first, second = (line.split() for line in shown.splitlines())
    assert heads == ["|", "R@1", "|", "success", "eps/255"]
    assert first == ["a", "|", "50.0", "|", "75.0", "2.00"]
    assert second == ["b", "|", "25.0", "|", "100.0", "-"]


# ---- command line


def test_flags_of_several_values_are_every_combination_of_them():
    args = evaluator.parse_args(
        "run --protocol template --attack pgd cw --min-eps --eps 0.01 0.05 --seed 3 4 --objective "
        "neighbour targeted-random --attack-steps 2".split())
    attacks = evaluator.attacks_of(args, 9)
    assert Counter((attack.attack, attack.objective, attack.eps, attack.seed)
                   for attack in attacks) == Counter(itertools.product(
                       ("pgd", "cw", "min-eps"), ("neighbour", "targeted-random"), (0.01, 0.05),
                       (3, 4)))
    assert all(attack.steps == 2 for attack in attacks)


@pytest.mark.parametrize("flags, attacks", [
    ("", [("clustering", "pgd", "shift", 8 / 255, 9)]),
    ("--protocol template --min-eps", [("template", "min-eps", "neighbour", 32 / 255, 9)]),
    ("--protocol template --template-target self", [("template", "pgd", "self", 0.01, 9)]),
    ("--protocol template --attack fgsm --min-eps --seed 1",
     [("template", "fgsm", "neighbour", 0.01, 1),
      ("template", "min-eps", "neighbour", 32 / 255, 1)]),
])
def test_the_attacks_that_flags_ask_for(flags, attacks):
    found = evaluator.attacks_of(evaluator.parse_args(["run", *flags.split()]), 9)
    assert [(attack.protocol, attack.attack, attack.objective, pytest.approx(attack.eps),
             attack.seed) for attack in found] == attacks


@pytest.mark.parametrize("flags, word", [
    ("--template-target self", "template"), ("--metrics R@1", "--table"),
    ("--into a.md", "--table"),
    ("--protocol template --template-target self --objective shift", "neighbour")])
def test_flags_that_do_not_fit_together_end_the_program(flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        evaluator.parse_args(["run", *flags.split()])
    assert end.value.code == 2 and word in capsys.readouterr().err


# ---- what the review of this file found

def test_a_tie_counts_as_success_of_the_attack_as_it_counts_as_a_miss():
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    retrieval = Retrieval([lambda images: images.flatten(1)[:, :2]],
                          lambda: iter([(twins.view(4, 1, 1, 2), None, torch.arange(4))]), labels)
    failed = evaluator.success_tests(retrieval)(torch.arange(4))(twins.view(4, 1, 1, 2))
    assert recall_at_k(twins, labels, (1,))[1] == 0 and failed.all()


def test_a_random_target_of_a_class_without_candidates_may_be_any_class():
    labels, names = torch.full((600,), 3), torch.tensor([1, 2, 4, 5])
    points = torch.nn.functional.one_hot(torch.arange(600) % 4, 4).float()
    retrieval = Retrieval.__new__(Retrieval)
    retrieval.labels, retrieval.names, retrieval.clean = labels, names, [points]
    attack = Attack("template", objective="targeted-random", seed=0)
    counts = Counter(evaluator.target_classes(retrieval, attack).tolist())
    assert set(counts) == {1, 2, 4, 5} and min(counts.values()) > 100


def test_the_smallest_radius_up_to_nothing_is_refused():
    with pytest.raises(UserError, match="larger"):
        Attack("template", "min-eps", eps=0)


def test_attacks_that_share_their_protocol_alone_have_it_as_their_title():
    attacks = [Attack("template", "fgsm", eps=0.01), Attack("template", "pgd", "shift", eps=0.05)]
    title, words = evaluator.title_of(attacks)
    assert title == "template" and sorted(words.values()) == [
        "neighbour FGSM eps 2.55/255", "shift PGD-5 eps 12.8/255"]


def test_a_title_names_the_protocol_that_all_attacks_share_or_says_that_there_are_several():
    two = [Attack(steps=3), Attack("template", eps=8 / 255, steps=3)]
    assert evaluator.title_of(two)[0].startswith("every protocol: ")
    assert evaluator.title_of([two[0], Attack(steps=4)])[0].startswith("clustering: shift")
