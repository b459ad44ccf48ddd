"""Ensembles, joint attacks, Square and the worst of many attacks, against loops by hand.

`lookups` ranks one query at a time. Networks are tiny and random; the members of the vote by hand
are linear.
"""

import json
import math
import statistics

import numpy as np
import pytest
import test_scripts
import torch
import torch.nn.functional as F
from test_attacks import change_of, noisy_gallery, noisy_retrieval, plurality, retrieval_of
from test_evaluation import Recorder, network, noisy_classes, seeded, tensor_batches
from test_objectives import PROXIES, SEARCHED, naive
from test_scripts import HERE, evaluate, stored

import common
import eval as evaluator
from common import Attack, UserError, pgd, recall_at_k, recall_interval
from eval import ascend, evaluate_robustness, halved, joint, square

pictures, finished_run = test_scripts.pictures, test_scripts.finished_run
finished, fails = test_scripts.finished, test_scripts.fails


def by_rule(retrieval, attack, proxies=None):
    return {entry["rule"]: entry for entry in evaluator.attack_entries(retrieval, attack, proxies)}


# ---- against


def line(offset, slope):
    """A member: one number, linear in the first pixel; the others say which image it is."""
    def member(images):
        knob, place, query = images[:, :, 0, 0].T
        return (10 * place.round() + (slope * (knob - 0.5) + offset) * query.round())[:, None]
    return member


def test_a_vote_that_only_an_attack_on_those_who_are_right_breaks():
    # the first is wrong by far, and can be made no better; the others need the other sign
    models = [line(8.0, 8.0), line(4.8, -3.0), line(4.8, -3.0)]
    queries = torch.tensor([0.5, 0.0, 1.0]).repeat(3, 1).view(3, 3, 1, 1)
    gallery = torch.tensor([[0.5, 0.0, 0.0], [0.5, 1.0, 0.0]]).view(2, 3, 1, 1)
    retrieval = retrieval_of(models, queries, torch.zeros(3, dtype=torch.int64), gallery,
                             torch.arange(2))
    clean = retrieval.scores(retrieval.clean, retrieval.gallery, 0, clustering=False)
    assert [clean[rule]["R@1"] for rule in ("member_1", "member_2", "vote")] == [0, 1, 1]
    for against, right in (("sum", 1), ("vote", 0), ("members_2+3", 0)):
        attack = Attack("template", objective="impostor", eps=0.2, against=against)
        assert by_rule(retrieval, attack)["vote"]["R@1"] == right


@pytest.mark.parametrize("seed", [0, 3, 6])
def test_one_member_does_not_undo_the_clusters_and_concat_falls_to_its_own_attack(seed):
    images, labels = noisy_classes(6, 6, spread=0.15)
    models = [network(seed + m) for m in range(3)]
    entries = by_rule(retrieval_of(models, images, labels),
                      Attack(objective="joint", eps=0.05, against="member_1"))
    assert entries["member_1"]["AMI"] < 0.3 and entries["vote"]["AMI"] > 0.8
    retrieval = retrieval_of(models, *noisy_classes(6, 6, spread=0.3))
    summed, joined = (by_rule(retrieval, Attack(
        "template", objective="impostor", eps=0.08, steps=10, against=against))["concat"]["R@1"]
        for against in ("sum", "concat"))
    assert joined < 0.5 * summed


@pytest.mark.parametrize("against, count", [("vote", 1), ("concat", 1), ("mean", 1),
                                            ("member_4", 3), ("members_1+4", 3)])
def test_networks_that_there_are_not_are_one_line(against, count):
    attack = Attack("template", objective="impostor", against=against)
    with pytest.raises(UserError, match=f"{count} in number"):
        evaluator.attack_entries(noisy_retrieval(count)[0], attack)


# ---- joint, and a share of attackers


@pytest.mark.parametrize("kind, objective, share", [
    ("pgd", "joint", 100), ("pgd", "joint", 30), ("pgd", "shift", 30), ("square", "impostor", 100),
    ("square", "impostor", 30), ("strong", "joint-pseudo", 30), ("strong", "impostor", 30)])
def test_attacked_images_stay_in_the_ball_and_the_others_to_the_bit(kind, objective, share):
    plain, images = noisy_retrieval(2)
    seen, labels = Recorder(plain.models[0]), plain.labels
    retrieval = retrieval_of([seen, plain.models[1]], images, labels)
    entries = by_rule(retrieval, Attack("clustering", kind, objective, 0.04, seed=1,
                                        attacker_share=share))
    moved = seen.seen[-1]
    chosen = change_of(moved, images) > 0
    assert change_of(moved, images).max() <= 0.04 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    assert chosen.sum() == round(24 * share / 100)
    assert torch.equal(moved[~chosen], images[~chosen])
    assert ("R@1_attacked" in entries["vote"]) == (share < 100)
    if share < 100:
        e = plain.models[1](moved).detach()
        hits = torch.tensor([hit for hit, _ in lookups([e], [e], labels, labels, True)])
        ids, two = common.kmeans(e, 6, 1), entries["member_2"]
        for side, part in (("attacked", chosen), ("untouched", ~chosen)):
            assert two[f"R@1_{side}"] == pytest.approx(float(hits[part].double().mean()))
            assert two[f"AMI_{side}"] == pytest.approx(common.ami(labels[part], ids[part]))
            assert entries["member_mean"][f"AMI_{side}"] == pytest.approx(
                (entries["member_1"][f"AMI_{side}"] + two[f"AMI_{side}"]) / 2)


def test_who_is_attacked_is_drawn_from_the_seed_and_never_nobody_or_everybody():
    retrieval, _ = noisy_retrieval()
    first, again, other = (evaluator.attacked_share(retrieval, Attack(
        seed=seed, attacker_share=25)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert [int(evaluator.attacked_share(retrieval, Attack(attacker_share=share)).sum())
            for share in (0.1, 99.9)] == [1, 23]


@pytest.mark.parametrize("objective, against", [
    ("joint", "sum"), ("joint", "concat"), ("joint", "vote"), ("joint-pseudo", "member_2")])
def test_a_step_of_joint_is_a_step_against_where_the_others_are_now(objective, against):
    retrieval, images = noisy_retrieval(2)
    retrieval.batches, x = tensor_batches(images, 10), []
    attack = Attack(objective=objective, eps=0.1, step_size=0.03, steps=2, seed=5, against=against)
    found, chosen = joint(retrieval, attack)
    for number, batch in enumerate(images.split(10)):
        common.seed_torch(5, 0, common.EVALUATE, number)
        x.append((batch + 0.1 * torch.empty_like(batch).uniform_(-1, 1)).clamp(0, 1))
    x, labels = torch.cat(x), retrieval.labels

    def spaces(x):
        found = [model(x) for model in retrieval.models]
        return {"concat": [torch.cat(found, 1) / 2 ** 0.5], "member_2": found[1:]}.get(
            against, found)

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
    e = retrieval.models[1](torch.cat(found)).detach()
    assert by_rule(retrieval, attack)["member_2"]["R@1"] == recall_at_k(e, retrieval.labels)[1]
    # all but the signs of slopes that round to zero
    assert chosen is None and ((torch.cat(found) - x).abs() < 1e-5).double().mean() > 0.999


def test_joint_gets_stronger_with_eps_down_to_nothing_and_shift_does_not():
    images, labels = noisy_classes(6, 6, spread=0.2)
    recall = {objective: [by_rule(retrieval_of([network()], images, labels), Attack(
        objective=objective, eps=eps))["member_1"]["R@1"] for eps in (0.02, 0.04, 0.16, 0.64, 1)]
        for objective in ("joint", "shift")}
    assert recall["joint"][0] > recall["joint"][1] > recall["joint"][2]
    assert recall["joint"] == sorted(recall["joint"], reverse=True)
    assert recall["joint"][2] <= 5 / 35 and recall["shift"][-1] > recall["shift"][2] + 0.3


@pytest.mark.parametrize("options", [{"objective": "joint"}, {"objective": "worst", "steps": 1},
                                     {"attack": "square"}])
def test_models_and_generators_are_as_before(options):
    images, labels = noisy_classes(3, 3, spread=0.3)
    model = network().train()
    model[4].bias.grad = torch.ones(8)

    def condition():
        return ([module.training for module in model.modules()],
                [(p.requires_grad, str(p.grad)) for p in model.parameters()],
                {name: value.tolist() for name, value in model.state_dict().items()},
                torch.get_rng_state().tolist(), str(np.random.get_state()))

    before = condition()
    evaluator.attack_entries(retrieval_of([model], images, labels), Attack(**options))
    assert condition() == before


def test_a_gallery_of_its_own_refuses_what_would_move_it():
    for objective, share in (("joint", 100), ("impostor", 100), ("shift", 50), ("worst", 100)):
        with pytest.raises(UserError, match="gallery|inshop-protocol"):
            evaluator.attack_entries(noisy_gallery(), Attack(objective=objective, steps=1,
                                                             attacker_share=share))


# ---- the worst case


@pytest.mark.parametrize("protocol, exact, last", [
    ("clustering", "joint", "joint"), ("template", "impostor", "neighbour")])
def test_the_parts_of_the_worst(protocol, exact, last):
    def names(*arguments):
        return [(free, part.words()[1]) for free, part in evaluator.worst_parts(*arguments)]

    def against(*rules):
        return [(False, f"{exact} against {rule}") for rule in rules]

    attack = Attack(protocol, objective="worst", eps=0.03, steps=4, restarts=3, seed=7)
    free = [(True, "shift"), (True, f"{exact}-pseudo")]
    rest = [(False, name) for name in [*SEARCHED, last]]
    assert names(attack, 1, False) == free + rest
    assert names(attack, 1, True) == [*free, (True, "pal-pseudo"), *rest]
    assert names(attack, 2, False) == free + rest + against("concat", "mean", "member_1",
                                                            "member_2", "vote")
    assert names(attack, 3, False) == free + rest + against(
        "concat", "mean", "member_1", "member_2", "member_3", "vote", "members_1+2", "members_1+3",
        "members_2+3")
    for _, part in evaluator.worst_parts(attack, 3, True):
        assert (part.eps, part.steps, part.seed, part.step_size) == (0.03, 4, 7, attack.step_size)
        assert part.restarts == (1 if part.objective.startswith("joint") else 3)
    strong = evaluator.worst_parts(Attack(protocol, "strong", eps=0.03, seed=7), 1, False)
    assert [part.attack for _, part in strong] == ["strong-1"] * 10 + ["square"]
    assert [free for free, _ in strong] == [True] * 2 + [False] * 9
    assert all((part.eps, part.seed) == (0.03, 7) for _, part in strong)
    still = evaluator.worst_parts(Attack(protocol, objective="worst", random_start=False), 1, True)
    assert [part.objective for _, part in still if part.random_start] == ["shift"]


def lookups(queries, candidates, labels, names, among):
    """[(hit, AP@R)] of every query; several spaces vote on each position of the list."""
    found = []
    for i, label in enumerate(labels.tolist()):
        lists = []
        for own, other in zip(queries, candidates):
            order = (own[i] - other).norm(dim=1).argsort().tolist()
            lists.append([int(names[j]) for j in order if not among or j != i])
        hit = [plurality(votes) == label for votes in zip(*lists)]
        count = int((names == label).sum()) - among
        found.append((hit[0], sum(sum(hit[:k + 1]) / (k + 1) for k in range(count) if hit[k])
                      / max(count, 1)))
    return found


def spaces_of(rule, parts):
    return {"vote": parts, "member_1": parts[:1], "member_2": parts[1:2],
            "concat": [torch.cat(parts, 1)], "mean": [F.normalize(sum(parts), dim=1)]}[rule]


def worst_of(retrieval, attack, proxies, monkeypatch):
    """(entries by rule, {part: its embeddings}) of a worst case."""
    seen, attacked = {}, evaluator.attacked

    def watched(retrieval, part, proxies):
        found = attacked(retrieval, part, proxies)
        seen[part.words()[1]] = found[0]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "attacked", watched)
        return by_rule(retrieval, attack, proxies), seen


def unpacked(entry, count):
    return np.unpackbits(np.frombuffer(bytes.fromhex(entry["hits"]), np.uint8))[:count].tolist()


@pytest.mark.parametrize("other, members", [(False, 3), (True, 1)])
def test_the_worst_of_queries_is_of_each_the_attack_that_makes_it_a_miss(
        other, members, monkeypatch):
    retrieval = noisy_gallery(1) if other else retrieval_of(
        [network(m) for m in range(3)], *noisy_classes(4, 4, spread=0.3, seed=1))
    labels, gallery, count = retrieval.labels, retrieval.gallery or retrieval.clean, \
        len(retrieval.labels)
    entries, seen = worst_of(retrieval, Attack("template", objective="worst", eps=0.03, steps=2),
                             None if other else PROXIES, monkeypatch)
    free = [name for name in seen if name in ("shift", "impostor-pseudo", "pal-pseudo")]
    counted = common.candidate_counts(labels, retrieval.names if other else None) > 0
    for rule in ("member_1",) if other else ("vote", "concat", "mean", "member_2"):
        entry, every = entries[rule], {name: lookups(
            spaces_of(rule, e), spaces_of(rule, gallery), labels, retrieval.names, not other)
            for name, e in seen.items()}
        for suffix, names in (("", list(seen)), ("_free", free)):
            by = [min(names, key=lambda name: every[name][i]) for i in range(count)]
            hits, precisions = zip(*(every[name][i] for i, name in enumerate(by)))
            scores = retrieval.scores(
                [torch.stack([seen[name][m][i] for i, name in enumerate(by)])
                 for m in range(members)], gallery if not other else retrieval.gallery, 0,
                clustering=False)[rule]                        # of the perturbations together
            assert entry["R@1" + suffix] == scores["R@1"] == pytest.approx(statistics.mean(hits))
            assert entry["mAP@R" + suffix] == scores["mAP@R"] == pytest.approx(statistics.mean(
                own for own, one in zip(precisions, counted) if one), abs=1e-6)
            assert entry["R@8" + suffix] == scores["R@8"]
            assert entry["worst_by" + suffix] == pytest.approx(
                {name: by.count(name) / count for name in names})
        misses = {name: [hit for hit, _ in found] for name, found in every.items()}
        assert unpacked(entry, count) == [min(own) for own in zip(*misses.values())]
        interval = recall_interval(torch.tensor(unpacked(entry, count)), labels, 0)
        assert {name: entry[name] for name in interval} == interval
        assert entry["parts"] == pytest.approx({name: statistics.mean(own)
                                                for name, own in misses.items()})
        assert not any("tie" in name for name in entry)
    if members > 1:
        assert entries["vote"]["R@1"] < min(entries["vote"]["R@1_free"],
                                            *entries["vote"]["parts"].values())
        assert entries["member_mean"]["R@1_free"] == pytest.approx(statistics.mean(
            entries[f"member_{i}"]["R@1_free"] for i in (1, 2, 3)))
        assert not {"hits", "parts", "worst_by"} & set(entries["member_mean"])


@pytest.mark.parametrize("members, rules", [(1, ["member_1"]), (3, ["vote", "concat"])])
def test_the_worst_of_sets_is_one_attack_for_each_figure(members, rules, monkeypatch):
    images, labels = noisy_classes(4, 4, spread=0.2)
    retrieval = retrieval_of([network(m) for m in range(members)], images, labels)
    settings = {"eps": 0.05, "steps": 2, "seed": 2}
    entries, seen = worst_of(retrieval, Attack(objective="worst", **settings), None, monkeypatch)
    scores = {name: retrieval.scores(e, None, 2) for name, e in seen.items()}
    for rule in rules:
        entry = entries[rule]
        hits = {name: [hit for hit, _ in lookups(*[spaces_of(rule, e)] * 2, labels, labels, True)]
                for name, e in seen.items()}
        for suffix, names in (("", list(seen)), ("_free", ["shift", "joint-pseudo"])):
            assert set(entry["worst_by" + suffix]) == {"R@1", "R@2", "R@4", "R@8", "mAP@R", "NMI",
                                                       "AMI", "F1"}
            for figure, by in entry["worst_by" + suffix].items():
                assert entry[figure + suffix] == scores[by][rule][figure] == \
                    min(scores[name][rule][figure] for name in names)
            assert entry["bound" + suffix] == pytest.approx(statistics.mean(
                all(own) for own in zip(*(hits[name] for name in names))))
            assert entry["bound" + suffix] <= entry["R@1" + suffix]
        assert unpacked(entry, 16) == hits[entry["worst_by"]["R@1"]]
        interval = recall_interval(torch.tensor(hits[entry["worst_by"]["R@1"]]), labels, 2)
        assert {name: entry[name] for name in interval} == interval
        assert entry["parts"] == {name: own[rule]["R@1"] for name, own in scores.items()}
    if members > 1:
        objective, _, against = entries["vote"]["worst_by"]["AMI"].partition(" against ")
        again = Attack(objective=objective, against=against or "sum", **settings)
        assert by_rule(retrieval, again)["vote"]["AMI"] == entries["vote"]["AMI"]
        assert entries["member_mean"]["bound"] == pytest.approx(statistics.mean(
            entries[f"member_{i}"]["bound"] for i in (1, 2, 3)))


@pytest.mark.parametrize("arguments, objective, steps", [
    ({}, "shift", 10), ({"protocol": "template", "attack": "cw"}, "shift", 10),
    ({"attack": "square"}, "impostor", 200),
    ({"attack": "square", "objective": "push-mean", "steps": 3}, "push-mean", 3)])
def test_what_evaluate_robustness_takes_unasked(arguments, objective, steps):
    (entry,) = evaluate_robustness(network(), *noisy_classes(2, 2), **arguments)["robust"]
    assert (entry["objective"], entry["steps"]) == (objective, steps)


@pytest.mark.parametrize("protocol", ["clustering", "template"])
def test_the_worst_of_a_network_that_has_collapsed_is_zero(protocol):
    result = evaluate_robustness(lambda x: 0 * x.flatten(1)[:, :4] + 0.5, *noisy_classes(3, 3),
                                 protocol=protocol, objective="worst", steps=1)
    assert result["robust"][0]["R@1"] == 0 and "collapsed" in result["warnings"][0]


@pytest.mark.parametrize("count, options, parts", [
    (2, {"objective": "worst", "steps": 2}, 15), (2, {"objective": "worst", "steps": 1,
                                                      "protocol": "template"}, 15),
    (1, {"attack": "strong", "protocol": "template"}, 11)])
def test_evaluate_robustness_knows_the_worst_of_functions(count, options, parts):
    models = [network(seed).forward for seed in range(count)]
    result = evaluate_robustness(models, *noisy_classes(3, 3, spread=0.2), **options)
    entry = result["robust"][0]
    assert entry["objective"] == "worst" and len(entry["parts"]) == parts
    assert entry["R@1"] <= min(entry["parts"].values()) and "pal-pseudo" not in entry["parts"]
    assert ("impostor (Square)" in entry["parts"]) == (entry["attack"] == "strong-1")
    json.dumps(result, allow_nan=False)


# ---- square, ascend, strong-1


def test_square_tries_ever_smaller_squares_of_one_sign_a_channel_and_keeps_what_rises():
    images = 0.3 + 0.4 * torch.rand(5, 3, 9, 8, generator=seeded(0))
    asked, values, extents = [], [], {}

    def objective(x):
        assert not torch.is_grad_enabled()
        asked.append(((x - images) / 0.1).round())
        values.append((37 * x.flatten(1).sum(1)).round() % 11)             # it has no slope
        return values[-1]

    torch.manual_seed(0)
    found = square(objective, images, 0.1, 400)
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


def test_square_gains_and_is_weaker_than_pgd():
    retrieval = retrieval_of([network()], *noisy_classes(6, 6, spread=0.15))
    clean = recall_at_k(retrieval.clean[0], retrieval.labels, (1,))[1]
    found = {kind: by_rule(retrieval, Attack("template", kind, "impostor", 0.04))["member_1"]["R@1"]
             for kind in ("square", "pgd")}
    assert found["pgd"] + 0.1 < found["square"] < clean - 0.05


def test_ascend_halves_its_step_twice_and_goes_on_from_the_best():
    assert halved(4.0, 20) == [4.0] * 10 + [2.0] * 5 + [1.0] * 5
    images = 0.3 + 0.4 * torch.rand(6, 3, 4, 4, generator=seeded(0))
    top, seen = images + 0.05 * torch.rand(images.shape, generator=seeded(1)), []

    def objective(x):
        seen.append(-(x - top).square().sum((1, 2, 3)).detach())
        return -(x - top).square().sum((1, 2, 3))

    torch.manual_seed(0)
    found = ascend(objective, images, 0.04, 0.02, 20)
    assert change_of(found, images).max() <= 0.04 + 1e-6
    best = torch.stack(seen).amax(0)
    assert torch.equal(objective(found), best)
    for stage in (11, 17):                                     # each starts at the best so far
        assert torch.equal(seen[stage], torch.stack(seen[:stage]).amax(0))
    torch.manual_seed(0)
    assert (objective(pgd(objective, images, 0.04, 0.02, 20)) < best - 1e-4).all()


@pytest.mark.parametrize("kind, objective, sizes", [
    ("strong", "joint", [0, *halved(0.02, 20)]), ("strong", "impostor", [0.02, 0.01, 0.005] * 2),
    ("pgd", "joint", [0, *[0.02] * 10])])
def test_the_steps_that_an_attack_takes(kind, objective, sizes, monkeypatch):
    taken = []

    def recorded(aim, images, eps, step_size, *rest, **options):
        taken.append(step_size)
        return pgd(aim, images, eps, step_size, *rest, **options)

    monkeypatch.setattr(evaluator, "pgd", recorded)
    by_rule(noisy_retrieval()[0], Attack("clustering", kind, objective, 0.08))
    assert taken == sizes


@pytest.mark.parametrize("flags", [{"steps": 20}, {"step_size": 0.01}, {"restarts": 2},
                                   {"random_start": False}])
def test_strong_is_frozen(flags):
    for protocol in ("clustering", "template"):
        with pytest.raises(UserError, match="frozen recipe, strong-1"):
            Attack(protocol, "strong", **flags)
    attack = Attack("template", "strong", eps=0.1, seed=3)
    assert attack.words() == ("template", "worst", "strong-1", "eps 25.5/255")
    assert [attack.entry()[name] for name in ("attack", "steps", "step", "restarts")] == [
        "strong-1", 20, 0.025, 2]
    assert Attack("clustering", "strong", "joint").restarts == 1


# ---- passes, and the command line


@pytest.mark.parametrize("arguments", [{"attack": "square", "steps": 4}, {"objective": "joint"},
                                       {"attack": "strong", "objective": "shift"}])
def test_no_attack_takes_more_passes_than_are_announced(arguments):
    passes, own, (images, labels) = [], network(), noisy_classes()

    def counted(x):
        passes.append("forward")
        x = x.clone()
        if x.requires_grad:
            x.register_hook(lambda _: passes.append("backward"))
        return own(x)

    retrieval, attack = retrieval_of([counted], images, labels), Attack(**arguments)
    passes.clear()
    evaluator.attack_entries(retrieval, attack)
    assert len(passes) == evaluator.passes_of(attack) + 1                  # the last: to score it


def test_the_worst_case_and_shares_of_runs(finished, capsys):
    evaluate(finished, "--objective", "worst", *HERE)
    entry = next(entry for entry in stored(finished)["robust"] if entry["objective"] == "worst")
    assert "pal-pseudo" in entry["parts"] and entry["bound"] <= entry["R@1"] <= entry["R@1_free"]
    shown = capsys.readouterr().out
    assert "R@1 label-free" in shown and "bound R@1" in shown
    evaluate(finished, "--attacker-share", "5", "25", *HERE)
    assert [entry["attacker_share"] for entry in stored(finished)["robust"]
            if "R@1_untouched" in entry] == [5.0] * 6 + [25.0] * 6
    assert "on 25 % of the images" in capsys.readouterr().out


def test_a_single_network_has_a_strong_attack_and_no_vote(finished, tmp_path, fails, monkeypatch):
    content, bare = common.load_checkpoint(finished), tmp_path / "single.pt"
    torch.save({**content, "members": content["members"][:1]}, bare)
    fails(2, ["--against vote", "1 in number"], evaluator, bare, "--objective", "impostor",
          "--against", "vote", *HERE)
    fails(2, ["frozen"], evaluator, bare, "--attack", "strong", *HERE)
    parts = evaluator.worst_parts
    monkeypatch.setattr(evaluator, "worst_parts", lambda *given: parts(*given)[2::4])
    evaluate(bare, "--attack", "strong", "--protocol", "template", "--limit-queries", "6",
             "--workers", "0", "--json", tmp_path / "all.json")
    (entry,) = json.loads((tmp_path / "all.json").read_text())[0]["robust"]
    assert (entry["attack"], entry["objective"]) == ("strong-1", "worst")
    assert list(entry["parts"]) == ["pal-pseudo", "nearest", "neighbour"]


@pytest.mark.parametrize("flags", [["--objective", "worst"], ["--objective", "pal-pseudo"],
                                   ["--protocol", "ers"], ["--attack", "curve"],
                                   ["--objective", "joint", "--against", "mean"]])
def test_what_cannot_be_drawn_is_one_line_before_any_work(flags, finished, tmp_path, fails):
    pytest.importorskip("matplotlib")
    fails(2, ["--figures"], evaluator, finished, *flags, "--figures",
          tmp_path / "drawn", *HERE)
    assert len(stored(finished)["robust"]) == 6
