"""The objectives of eval.py, what they read of an ensemble and what can be asked for, by hand.

`naive` is every objective of `measure` for one query, candidate by candidate.
"""

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_attacks import noisy_gallery, noisy_retrieval
from test_evaluation import seeded

import common
import eval as evaluator
from common import Attack, UserError, recall_at_k
from eval import decoys, measure, random_others

OBJECTIVES = ["shift", "push-mean", "target-other", "decoy", "nearest", "impostor", "impostor@3",
              "impostor@100", "soft-impostor", "pal-pseudo"]
SEARCHED = ["push-mean", "target-other", "decoy", "nearest", "impostor", "impostor@5",
            "soft-impostor"]
PROXIES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=1)


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


def naive(objective, e, i, own, labels, candidates=None, names=None, chosen=None, proxies=None):
    kind, _, rank = objective.partition("@")
    pool, titles = (own, labels) if candidates is None else (candidates, names)
    mine = [j for j in range(len(pool)) if titles[j] == labels[i]]
    friends = [pool[j] for j in mine if candidates is not None or j != i] or [own[i]]
    foes = [pool[j] for j in range(len(pool)) if titles[j] != labels[i]]
    if kind == "shift":
        return 1 - e @ own[i]
    if kind == "push-mean":
        mean = sum(pool[j] for j in mine) if mine else own[i]
        return 1 - e @ mean / mean.norm()
    if kind == "target-other":
        return e @ pool[chosen[i]]
    if kind == "decoy":
        mean = sum(pool[j] for j in range(len(pool)) if titles[j] == chosen[i])
        return e @ mean / mean.norm()
    if kind == "nearest":
        return (e - min(friends, key=lambda point: float((own[i] - point).norm()))).norm()
    if kind == "impostor":
        near, far = (torch.stack([(e - point).norm() for point in points]).sort().values
                     for points in (friends, foes))
        return near[0] - far[min(int(rank or 1), len(foes)) - 1]
    if kind == "soft-impostor":
        near, far = (sum((16 * (e @ point)).exp() for point in points).log()
                     for points in (friends, foes))
        return (far - near) / 16
    label = max(range(len(proxies)), key=lambda c: float(own[i] @ proxies[c] / proxies[c].norm()))
    return common.proxy_anchor_loss(e[None], torch.tensor([label]), proxies)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_and_its_gradient_equal_a_loop_over_candidates(objective, gallery):
    own, labels, candidates, names = embedded(gallery)
    pool, titles = (candidates, names) if gallery else (own, labels)
    proxies = 3 * torch.randn(5, 6, generator=seeded(3), dtype=torch.float64)
    chosen = random_others(labels, titles, 4)
    if objective == "decoy":
        classes = titles.unique()
        means = torch.stack([F.normalize(pool[titles == c].sum(0), dim=0) for c in classes])
        chosen = classes[decoys(own, means, labels, classes)]
    rows = torch.tensor([12, 3, 0, 1, 1, 7, 9])
    e = F.normalize(own[rows] + 0.7 * unit(7, 6, seed=5), dim=1).requires_grad_()
    found = measure(objective, own, labels, candidates, names, 4, proxies)(e, rows)
    wanted = torch.stack([naive(objective, x, int(i), own, labels, candidates, names, chosen,
                                proxies) for x, i in zip(e, rows)])
    torch.testing.assert_close(found, wanted)
    weight = torch.rand(7, generator=seeded(6), dtype=torch.float64)       # rows do not mix
    slopes = [torch.autograd.grad(weight @ value, e)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].isfinite().all() and (slopes[0].abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("gallery", [False, True])
def test_the_impostor_is_below_zero_exactly_where_recall_at_1_is_a_hit(gallery):
    own, labels, candidates, names = embedded(gallery)
    value, outcomes = measure("impostor", own, labels, candidates, names), Counter()
    for seed in range(10):
        e = F.normalize(own + 0.8 * unit(13, 6, seed=seed), dim=1)
        below = value(e, torch.arange(13)) < 0
        for i, label in enumerate(labels):
            rest = torch.arange(13) != i
            lookup = (candidates, names) if gallery else (own[rest], labels[rest])
            hit = recall_at_k(e[i:i + 1], labels[i:i + 1], (1,), *lookup)[1] == 1
            alone = not (lookup[1] == label).any()
            assert hit == (bool(below[i]) and not alone)
            outcomes[hit, alone] += 1
    assert min(outcomes.values()) > 5 and len(outcomes) == 3
    own, labels = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 0, 1, 1])       # a tie is a miss
    assert measure("impostor", own, labels)(own[:1], torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("objective", [*SEARCHED[:3], *SEARCHED[4:], "pal-pseudo"])
def test_one_class_alone_and_no_proxies_are_one_line(objective):
    with pytest.raises(UserError, match=f"{objective} needs (candidates of two|the proxies)"):
        measure(objective, unit(4, 3), torch.zeros(4, dtype=torch.int64))


def test_the_random_image_of_another_class_is_uniform_and_a_function_of_the_seed():
    names = torch.tensor([3, 9, 3, 5, 9, 3, 5, 9, 9])
    labels = torch.tensor([3, 5, 9, 4]).repeat(1500)
    found = random_others(labels, names, 0)
    for label in (3, 5, 9, 4):                                 # 4 has no candidates: any of all
        counts = Counter(found[labels == label].tolist())
        assert set(counts) == set((names != label).nonzero()[:, 0].tolist())
        expected = 1500 / len(counts)                          # chi-square: 26 is for p = 0.001
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26
    assert torch.equal(found, random_others(labels, names, 0))
    assert float((found == random_others(labels, names, 1)).double().mean()) < 0.3


@pytest.mark.parametrize("sizes", [(9, 4, 1, 6), (2, 2, 2, 2, 2, 2, 2), (7, 3)])
def test_decoys_are_the_nearest_classes_and_none_takes_more_than_its_share(sizes):
    classes = torch.arange(len(sizes)) * 2 + 1
    labels = classes.repeat_interleave(torch.tensor(sizes)).roll(5)
    own, means = unit(len(labels), 5), unit(len(classes), 5, seed=1)
    found = decoys(own, means, labels, classes)
    for label, size in zip(classes, sizes):
        goal, taken, most = {}, Counter(), math.ceil(size / (len(classes) - 1))
        pairs = [(row, c) for row in range(len(labels)) for c in range(len(classes))
                 if labels[row] == label != classes[c]]
        for row, c in sorted(pairs, key=lambda pair: -float(own[pair[0]] @ means[pair[1]])):
            if row not in goal and taken[c] < most:
                goal[row] = c
                taken[c] += 1
        assert {row: int(found[row]) for row in goal} == goal and len(goal) == size


# ---- against


def test_what_an_attack_reads_of_an_ensemble():
    retrieval, images = noisy_retrieval(3)
    rows, joined = torch.tensor([5, 0, 17]), {
        "concat": lambda parts: torch.cat(parts, 1) / 3 ** 0.5,
        "mean": lambda parts: F.normalize(sum(parts), dim=1)}
    found = [model(images[rows] + 0.1).detach() for model in retrieval.models]

    def of(e, own):
        return measure("impostor", own, retrieval.labels)(e, rows)

    each = [of(e, own) for e, own in zip(found, retrieval.clean)]
    wanted = {"sum": sum(each), "member_2": each[1], "members_1+3": each[0] + each[2],
              "vote": sum(value.clamp(max=0.1) for value in each),
              **{name: of(join(found), join(retrieval.clean)) for name, join in joined.items()}}
    for against, value in wanted.items():
        models, read = evaluator.reading(retrieval, Attack("template", objective="impostor",
                                                           against=against))
        numbers = {"member_2": [1], "members_1+3": [0, 2]}.get(against, [0, 1, 2])
        assert models == [retrieval.models[i] for i in numbers]
        torch.testing.assert_close(read([found[i] for i in numbers], rows), value)
    assert len({tuple(value.tolist()) for value in wanted.values()}) == 6
    _, read = evaluator.reading(retrieval, Attack(objective="pal-pseudo", against="member_3"),
                                PROXIES)
    own = measure("pal-pseudo", retrieval.clean[2], retrieval.labels, proxies=PROXIES[2])
    torch.testing.assert_close(read(found[2:], rows), own(found[2], rows))


def test_pseudo_labels_are_the_clusters_of_each_members_own_space():
    retrieval, rows = noisy_gallery(2), torch.arange(6)
    e, wanted = [own[:6].roll(1, 0) for own in retrieval.clean], []
    for own, gallery, moved in zip(retrieval.clean, retrieval.gallery, e):
        ids = common.kmeans(torch.cat([own, gallery]), 5, 3)   # the gallery has five classes
        wanted.append(measure("impostor", own, ids[:24], gallery, ids[24:])(moved, rows))
    _, value = evaluator.reading(retrieval, Attack("template", objective="impostor-pseudo", seed=3))
    torch.testing.assert_close(value(e, rows), sum(wanted))


# ---- Attack


@pytest.mark.parametrize("arguments, word", [
    ({"objective": "worst", "attack": "fgsm"}, "pgd or strong"),
    ({"objective": "joint", "attack": "square"}, "pgd or strong"),
    ({"objective": "worst", "attack": "cw", "protocol": "template"}, "pgd or strong"),
    ({"objective": "joint", "protocol": "template"}, "not part of"),
    ({"objective": "joint-pseudo", "protocol": "template"}, "not part of"),
    ({"objective": "impostor-pseudo"}, "not part of"),
    ({"objective": "impostor@K"}, "not part of"), ({"objective": "impostor@0"}, "not part of"),
    ({"objective": "shift@2"}, "not part of"), ({"objective": "worst", "protocol": "ers"}, "worst"),
    ({"objective": "ers", "protocol": "ers", "attack": "square"}, "its own attacks"),
    ({"objective": "ers", "protocol": "ers", "attack": "strong"}, "its own attacks"),
    ({"attack": "square", "step_size": 0.1}, "no step size"),
    ({"attack": "square", "random_start": False}, "its own random start"),
    ({"attack": "square", "restarts": 2}, "impostor with square has no restarts"),
    ({"objective": "joint", "restarts": 2}, "joint with pgd has no restarts"),
    ({"objective": "impostor", "against": "member_0"}, "choose sum"),
    ({"objective": "impostor", "against": "members_1"}, "choose sum"),
    ({"objective": "soft-impostor", "against": "vote"}, "who is wrong"),
    ({"objective": "worst", "against": "concat"}, "do not belong to worst"),
    ({"objective": "worst", "attacker_share": 5}, "do not belong to worst"),
    ({"protocol": "template", "against": "mean"}, "do not belong to neighbour"),
    ({"protocol": "template", "objective": "targeted-random", "against": "mean"}, "targeted"),
    ({"protocol": "ers", "against": "mean"}, "do not belong to ers"),
    ({"attacker_share": 0}, "percentage above 0"), ({"attacker_share": 101}, "percentage above 0"),
    ({"attacker_share": math.nan}, "percentage above 0"),
    ({"protocol": "template", "objective": "shift", "attacker_share": 5}, "belongs to --protocol"),
])
def test_attacks_that_are_none_are_refused_in_one_line(arguments, word):
    with pytest.raises(UserError, match=word) as refused:
        Attack(**arguments)
    assert "\n" not in str(refused.value)


def test_the_defaults_of_square_and_the_words_of_shares_and_spaces():
    attack = Attack("clustering", "square")
    assert (attack.objective, attack.steps, attack.random_start) == ("impostor", 200, True)
    assert attack.words()[2] == "Square-200"
    assert Attack(objective="joint", against="concat", attacker_share=2.5).words() == (
        "clustering", "joint against concat", "PGD-10 on 2.5 % of the images", "eps 8/255")
    with pytest.raises(UserError, match="drop --against mean"):
        evaluator.reading(noisy_retrieval(2)[0], Attack(objective="pal-pseudo", against="mean"),
                          PROXIES)


def test_entries_of_before_there_was_against_are_still_read():
    attacks = [Attack(**own) for own in (
        {}, {"attacker_share": 25}, {"objective": "impostor"},
        {"objective": "impostor", "against": "concat"},
        {"objective": "impostor", "against": "concat", "attacker_share": 25})]
    new = json.loads(json.dumps([{**attack.entry(), "amp": False} for attack in attacks]))
    assert [common.entries_of(new, attack) for attack in attacks] == [[entry] for entry in new]
    old = [{name: value for name, value in entry.items()
            if name not in ("against", "attacker_share")} for entry in (new[0], new[2])]
    assert [common.entries_of(old, attack) for attack in attacks] == [
        [old[0]], [], [old[1]], [], []]


def test_an_objective_that_there_is_not_is_no_other_one():
    with pytest.raises(ValueError, match="worst"):
        measure("worst", torch.eye(4), torch.tensor([0, 0, 1, 1]))
