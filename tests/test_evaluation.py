"""evaluate_robustness: its result, what it leaves behind, protocols and inference rules, by hand.

`on_circle` makes images whose embedding is a chosen angle, so that neighbours can be read off. The
tiny networks, data and loops at the top serve the other tests of eval.py as well.
"""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import common
from common import Retrieval, map_at_r, nmi, pgd, recall_at_k
from eval import attack_of, attacked, evaluate_robustness, measured

EPS = 8 / 255
RETRIEVAL = ("R@1", "R@2", "R@4", "R@8", "mAP@R")
METRICS = (*RETRIEVAL, "NMI", "AMI", "F1")
ATTACK = {"protocol", "attack", "objective", "against", "eps", "eps_255", "step", "steps",
          "restarts", "seed"}
SHORT = {"steps": 3, "eps": 0.05}


# ---- helpers

def seeded(seed):
    return torch.Generator().manual_seed(seed)


class UnitRows(nn.Module):
    def forward(self, rows):
        return F.normalize(rows, dim=1)


def network(seed=0, dim=8):
    """Unit embeddings of 3 x 8 x 8 images; BatchNorm, so that modes matter."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(),
                         nn.Linear(54, dim), UnitRows()).eval()


class Recorder:
    """A model that keeps the images it saw without gradients; the last are the attacked ones."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, images):
        if not torch.is_grad_enabled():
            self.seen.append(images.clone())
        return self.model(images)


def noisy_classes(classes=6, per_class=4, spread=0.25, seed=0):
    """Images (n, 3, 8, 8) around one prototype per class, and labels."""
    labels = torch.arange(classes).repeat_interleave(per_class)
    prototypes = torch.rand(classes, 3, 8, 8, generator=seeded(seed))
    noise = spread * torch.randn(len(labels), 3, 8, 8, generator=seeded(seed + 1))
    return (prototypes[labels] + noise).clamp(0, 1), labels


def on_circle(*degrees):
    """Images (n, 3, 1, 1) that `angle` embeds at these degrees."""
    angles = torch.tensor(degrees).deg2rad()
    points = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)
    return 0.5 + 0.3 * points[..., None, None]


def angle(images):
    return F.normalize(images.flatten(1)[:, :2] - 0.5, dim=1)


def tensor_batches(images, size=128):
    """What Retrieval calls `batches`."""
    rows = torch.arange(len(images)).split(size)
    return lambda: ((images[batch], None, batch) for batch in rows)


def retrieval_of(models, images, labels, gallery=None, names=None, **options):
    return Retrieval(models, tensor_batches(images), labels, gallery_labels=names,
                     gallery_batches=None if gallery is None else tensor_batches(gallery),
                     **options)


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


def scores_of(retrieval, *arguments, **options):
    """{rule: scores} of attack_of(...) on a retrieval."""
    return measured(retrieval, attack_of(*arguments, **options))[0]["scores"]


def attacked_images(retrieval, attack):
    """The images (n, 3, H, W) that an attack makes."""
    made = {row: image for images, _, rows in retrieval.batches()      # who is not attacked stays
            for row, image in zip(rows.tolist(), images)}
    attacked(retrieval, attack, watch=lambda x, rows: made.update(zip(rows.tolist(), x.clone())))
    return torch.stack([made[row] for row in range(len(made))])


def change_of(images, clean):
    return (images - clean).abs().amax((1, 2, 3))


def nearest_row(query, candidates, out=None, allowed=lambda j: True):
    """The nearest candidate row to an embedding (D,), `out` left out, by a loop."""
    rows = [j for j in range(len(candidates)) if j != out and allowed(j)]
    return min(rows, key=lambda j: float((query - candidates[j]).norm().detach()))


def plurality(votes):
    """The label with the most votes, the earlier voter's at a tie."""
    return max(votes, key=lambda label: (votes.count(label), -votes.index(label)))


def looked_up(models, images, clean_images, labels):
    """{rule: label of the nearest clean image of every query}, by loops; itself left out."""
    own = [model(images).detach() for model in models]
    clean = [model(clean_images).detach() for model in models]
    spaces = {f"member_{m + 1}": (own[m], clean[m]) for m in range(len(models))}
    if len(models) > 1:
        spaces["concat"] = torch.cat(own, 1), torch.cat(clean, 1)
        spaces["mean"] = F.normalize(sum(own), dim=1), F.normalize(sum(clean), dim=1)
    first = {rule: [int(labels[nearest_row(query, rows, i)]) for i, query in enumerate(queries)]
             for rule, (queries, rows) in spaces.items()}
    if len(models) > 1:
        members = [first[f"member_{m + 1}"] for m in range(len(models))]
        first["vote"] = [plurality(list(votes)) for votes in zip(*members)]
    return first


def share(found, wanted):
    """How many of the labels found are the wanted ones."""
    return sum(int(one) == int(other) for one, other in zip(found, wanted)) / len(wanted)


def is_right(model, images, labels):
    """Which clean queries have a nearest neighbour of their class, by a loop."""
    found = looked_up([model], images, images, labels)["member_1"]
    return torch.tensor(found) == labels


def picked(scores, names=RETRIEVAL):
    return {name: scores[name] for name in names}


def without_seconds(result):
    return {**result, "robust": [{**record, "seconds": None} for record in result["robust"]]}


# ---- the result and what it leaves behind

@pytest.mark.parametrize("protocol, objective", [("clustering", "shift"),
                                                 ("template", "neighbour")])
@pytest.mark.parametrize("members", [1, 3])
def test_the_result_is_what_results_json_holds(protocol, objective, members):
    images, labels = noisy_classes()
    result = evaluate_robustness([network(m) for m in range(members)], images, labels,
                                 protocol=protocol, **SHORT)
    assert result == json.loads(json.dumps(result, allow_nan=False))
    clean, (record,) = result["clean"], result["robust"]
    scored = {*METRICS} if protocol == "clustering" else {*RETRIEVAL}
    rules = {"member_1"} if members == 1 else {"vote", "member_mean", "concat", "mean", "member_1",
                                               "member_2", "member_3"}
    assert set(result) == {"clean", "robust", "warnings"}
    for side, names in (clean, {*METRICS}), (record, scored):
        assert side["rule"] == ("member_1" if members == 1 else "vote")
        assert set(side["scores"]) == rules
        for rule, scores in side["scores"].items():
            assert set(scores) == names | ({"hits"} if rule != "member_mean" else set())
            assert all(0 <= scores[name] <= 1 for name in names - {"AMI"})
        assert picked(side, [*names, "hits"]) == side["scores"][side["rule"]]
    assert set(clean) == {*METRICS, "hits", "rule", "scores", "NMI_chance", "n_queries",
                          "n_singletons"}
    assert set(record) == scored | ATTACK | {"hits", "rule", "scores", "limited", "seconds",
                                             "n_queries"} | ({"all_fail"} if members > 1 else set())
    assert (record["protocol"], record["objective"], record["attack"]) == (
        protocol, objective, "pgd")
    assert (record["against"], record["limited"], record["n_queries"]) == ("sum", False, 24)
    assert record["eps"] == 0.05 and record["eps_255"] == pytest.approx(12.75)


def test_hits_are_the_queries_that_are_right_and_all_fail_those_that_no_member_has():
    images, labels = noisy_classes(spread=0.5)
    models = [network(m) for m in range(3)]
    result = evaluate_robustness(models, images, labels, protocol="template", **SHORT)
    right = torch.stack([is_right(model, images, labels) for model in models])
    for i, wanted in enumerate(right.tolist(), 1):
        hits = result["clean"]["scores"][f"member_{i}"]["hits"]
        assert common.unpack(hits, 24).tolist() == wanted and len(hits) == 6
    record = result["robust"][0]
    members = [common.unpack(record["scores"][f"member_{i}"]["hits"], 24) for i in (1, 2, 3)]
    assert record["all_fail"] == pytest.approx(float((~np.any(members, axis=0)).mean()))
    assert 0 < record["all_fail"] < 1


@pytest.mark.parametrize("options", [
    {}, {"restarts": 2, "protocol": "template"}, {"objective": "joint"}, {"protocol": "ers"},
    {"objective": "worst", "steps": 1}, {"attack": "square"},
    {"attack": "cw", "protocol": "template"}])
def test_modes_gradients_buffers_generators_and_images_are_as_before(options):
    images, labels = noisy_classes(classes=25)
    model, pixels = network().train(), images.clone()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(8)

    def condition():
        name, keys, *position = np.random.get_state()
        return ([module.training for module in model.modules()],
                [p.requires_grad for p in model.parameters()],
                [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
                {name: value.tolist() for name, value in model.state_dict().items()},
                torch.get_rng_state().tolist(), keys.tolist(), position, random.getstate())

    before = condition()
    evaluate_robustness(model, images, labels, **{**SHORT, "steps": 2, **options})
    assert condition() == before and torch.equal(images, pixels)
    with pytest.raises(ValueError):
        evaluate_robustness(model, images + 2, labels)
    assert condition() == before


# ---- what is accepted

@pytest.mark.parametrize("low, high, cure", [
    (-0.01, 1, "normalise inside the model"), (0, 1.01, "normalise inside the model"),
    (-2.1, 2.6, "normalise inside the model"), (0, float("nan"), "normalise inside the model"),
    (0, 255, "divide by 255")])
def test_images_outside_the_range_are_refused_with_the_cure(low, high, cure):
    images, labels = noisy_classes()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = low, high
    with pytest.raises(ValueError, match=cure):
        evaluate_robustness(network(), images, labels)


def test_rounding_errors_of_the_range_are_accepted():
    images, labels = noisy_classes()
    images[0], images[1] = -9e-6, 1 + 9e-6
    result, wanted = (evaluate_robustness(network(), x, labels, **SHORT)
                      for x in (images, images.clamp(0, 1)))
    assert without_seconds(result) == without_seconds(wanted)


def test_arguments_and_outputs_that_do_not_fit_are_refused():
    images, labels = noisy_classes()
    for options, word in (({"eps": 8}, "did you mean 8/255"), ({"eps": float("nan")}, "eps"),
                          ({"protocol": "ranking"}, "ranking")):
        with pytest.raises(ValueError, match=word):
            evaluate_robustness(network(), images, labels, **options)
    for given in ([images], [images, labels[:-1]], [images, labels[:, None]], [images, labels / 2],
                  [[(images, labels)], labels], [[]], [[{"pixels": images, "label": labels}]]):
        with pytest.raises(ValueError, match="give images .* found"):
            evaluate_robustness(network(), *given)
    for alone in (0 * labels, torch.arange(24)):
        with pytest.raises(ValueError, match="two classes"):
            evaluate_robustness(network(), images, alone)
    for wrong in (lambda x: x, lambda x: x.mean(), lambda x: (x, x)):
        with pytest.raises(ValueError, match="must return embeddings"):
            evaluate_robustness(wrong, images, labels)
    blind = torch.no_grad()(network().forward)
    with pytest.raises(ValueError, match="no gradient"):
        evaluate_robustness(blind, images, labels)
    assert evaluate_robustness(blind, images, labels, attack="square", steps=2)["robust"]


def test_loaders_and_arrays_give_what_the_tensors_give():
    images, labels = noisy_classes()
    wanted = evaluate_robustness(network(), images, labels, **SHORT)
    data = TensorDataset(images, labels)
    loader = DataLoader(data, batch_size=5)
    by_hand = [(images[:7], labels[:7].tolist()), (images[7:], labels[7:])]
    words = [{"images": images, "label": labels, "paths": ["a", "b"]}]
    for given in ((loader,), (iter(loader),), (by_hand,), (images.numpy(), labels.tolist()),
                  (words,), ([(images, labels, torch.arange(24))],)):
        result = evaluate_robustness(network(), *given, **SHORT)
        assert without_seconds(result) == without_seconds(wanted)
    shuffled = DataLoader(data, batch_size=5, shuffle=True, generator=seeded(0))
    result = evaluate_robustness(network(), shuffled, **SHORT)["clean"]
    assert picked(result) == pytest.approx(picked(wanted["clean"]))


# ---- what every evaluation looks for in a model

@pytest.mark.parametrize("embed, word", [
    (lambda net: net.train(), None), (lambda net: lambda x: net(x).double().squeeze(), None),
    (lambda net: net[:-1].eval(), "not unit vectors"),
    (lambda net: lambda x: net(x.sub_(0.5).add_(0.5)), "changed in place"),
    (lambda net: net.train().forward, "in training mode: it is in evaluation mode here")])
def test_what_is_mended_for_a_model_is_said_and_changes_no_score(embed, word):
    data, net = noisy_classes(), network()
    options = {**SHORT, "objective": "impostor", "batch_size": 23}      # the last batch has one
    wanted, model = evaluate_robustness(network(), *data, **options), embed(net)
    before = [module.training for module in net.modules()], str(net.state_dict())
    result = evaluate_robustness(model, *data, **options)
    assert wanted["warnings"] == [] and len(result["warnings"]) == (word is not None)
    assert all(word in text for text in result["warnings"])
    assert before == ([module.training for module in net.modules()], str(net.state_dict()))
    for side in (lambda r: r["clean"], lambda r: r["robust"][0]):
        assert picked(side(result), METRICS) == pytest.approx(picked(side(wanted), METRICS))


def test_what_is_wrong_with_a_model_or_its_labels_is_said():
    (images, labels), net, state = noisy_classes(2), network(), torch.get_rng_state()
    singletons = torch.tensor([0, 0, 0, 1, 1, 1, 7, 9])
    for model, given, word in (
            (lambda x: F.normalize(net(x) - net(x).mean(0) / 2, dim=1), labels, "other images"),
            (lambda x: F.normalize(F.dropout(net(x), 0.1), dim=1), labels, "random numbers"),
            (net, singletons, "2 of 8 queries have no candidate")):
        result = evaluate_robustness(model, images, given, **SHORT)
        assert len(result["warnings"]) == 1 and word in result["warnings"][0]
    assert (result["clean"]["n_singletons"], result["clean"]["n_queries"]) == (2, 8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value, word", [(1.0, "collapsed"), (float("nan"), "NaN counts")])
@pytest.mark.parametrize("options", [{}, {"protocol": "template"}, {"objective": "impostor"}])
def test_a_model_that_has_collapsed_or_is_nan_scores_zero(value, word, options):
    result = evaluate_robustness(lambda x: F.normalize(0 * x.flatten(1)[:, :4] + value, dim=1),
                                 *noisy_classes(), **options, **SHORT)
    assert any(word in text for text in result["warnings"])
    assert result["clean"]["R@1"] == result["robust"][0]["R@1"] == result["clean"]["mAP@R"] == 0


def test_members_share_the_attacked_images_and_their_mean_is_a_rule():
    images, labels = noisy_classes(spread=0.5)
    members = [Recorder(network(seed)) for seed in range(3)]
    result = evaluate_robustness(members, images, labels, **SHORT)
    attacked = members[0].seen[-1]
    assert all(torch.equal(member.seen[-1], attacked) for member in members)
    assert not torch.equal(attacked, images)
    for side in (result["clean"], result["robust"][0]):
        for name in METRICS:
            own = [side["scores"][f"member_{i}"][name] for i in (1, 2, 3)]
            assert side["scores"]["member_mean"][name] == pytest.approx(sum(own) / 3)
    own = [member.model(attacked).detach() for member in members]
    for rule, joined in (("concat", torch.cat(own, 1)), ("mean", F.normalize(sum(own), dim=1)),
                         ("member_2", own[1])):
        scores = result["robust"][0]["scores"][rule]
        assert scores["R@2"] == recall_at_k(joined, labels, (2,))[2]
        assert scores["mAP@R"] == pytest.approx(map_at_r(joined, labels))


def test_clustering_moves_every_image_in_the_ball_and_compares_moved_ones():
    images, labels = noisy_classes(spread=0.5)
    model = Recorder(network())
    (record,) = evaluate_robustness(model, images, labels, eps=EPS)["robust"]
    moved = model.seen[-1]
    assert (change_of(moved, images) > 0.5 * EPS).all()
    assert change_of(moved, images).max() <= EPS + 1e-6 and 0 <= moved.min() <= moved.max() <= 1
    attacked = model.model(moved).detach()
    assert record["R@1"] == recall_at_k(attacked, labels, (1,))[1]
    assert record["NMI"] == pytest.approx(nmi(labels, common.kmeans(attacked, 6, 0)))


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_attacked_queries_in_a_clean_gallery_equal_a_loop_over_queries(attack):
    images, labels = noisy_classes(spread=0.4)
    model, eps, step, steps = network(), 0.03, 0.01, 4
    result = evaluate_robustness(model, images, labels, protocol="template", attack=attack, eps=eps,
                                 step_size=step, steps=steps, batch_size=7, ks=(1, 2))
    clean, hits, precisions = model(images).detach(), {1: 0, 2: 0}, []
    for number, rows in enumerate(torch.arange(24).split(7)):
        common.seed_torch(0, 0, common.EVALUATE, number)
        starts = images[rows] + torch.empty_like(images[rows]).uniform_(-eps, eps)
        for i, start in zip(rows.tolist(), starts):
            nearest, query = nearest_row(clean[i], clean, i), images[i:i + 1]
            if labels[nearest] == labels[i]:
                start = start[None] if attack == "pgd" else query
                query = pgd(lambda x: (model(x) - clean[nearest]).norm(dim=1), query, eps,
                            *((step, steps) if attack == "pgd" else (eps, 1)), start=start)
            moved = model(query)[0].detach()
            order = sorted((j for j in range(24) if j != i),
                           key=lambda j: float((moved - clean[j]).norm()))
            right = [bool(labels[j] == labels[i]) for j in order[:3]]                    # R = 3
            for k in hits:
                hits[k] += any(right[:k])
            precisions.append(sum(sum(right[:k + 1]) / (k + 1) for k in range(3) if right[k]) / 3)
    (record,) = result["robust"]
    assert {k: record[f"R@{k}"] for k in hits} == pytest.approx({k: hits[k] / 24 for k in hits})
    assert record["mAP@R"] == pytest.approx(sum(precisions) / 24)
    assert 0 < record["R@1"] < result["clean"]["R@1"] < 1


@pytest.mark.parametrize("options", [
    {}, {"protocol": "template"}, {"protocol": "template", "attack": "cw"}, {"objective": "joint"},
    {"objective": "target"}, {"attack": "square"}, {"attack": "strong", "objective": "impostor"}])
def test_an_attack_of_size_zero_leaves_the_clean_scores(options):
    images, labels = noisy_classes(spread=0.5)
    result = evaluate_robustness(network(), images, labels, eps=0, **options)
    names = RETRIEVAL if "protocol" in options else METRICS
    assert picked(result["robust"][0], names) == picked(result["clean"], names)


def test_restarts_are_nested_and_keep_the_best_image_by_image():
    images, labels = noisy_classes()
    shift = {}
    for restarts in (1, 3):
        model = Recorder(network())
        evaluate_robustness(model, images, labels, eps=0.1, step_size=0.02, steps=1,
                            restarts=restarts)
        moved, clean = model.model(model.seen[-1]), model.model(images)
        shift[restarts] = 1 - (moved * clean).sum(1).detach()
    assert (shift[3] >= shift[1] - 1e-6).all()
    assert (shift[3] > shift[1] + 1e-4).any()
    assert torch.isclose(shift[3], shift[1], atol=1e-6).any()     # the first was the best


# ---- a gallery of its own (In-Shop)

def in_shop(**options):
    """(record, the images seen, queries, gallery): queries at 0, 90, 180 degrees of classes 0, 1,
    2; the gallery has none of class 2."""
    queries, gallery = on_circle(0.0, 90.0, 180.0), on_circle(20.0, 60.0, 130.0, 0.0)
    model = Recorder(angle)
    retrieval = retrieval_of([model], queries, torch.tensor([0, 1, 2]), gallery,
                             torch.tensor([0, 1, 1, 1]), ks=(1, 2))
    clean = common.clean_scores(retrieval, 0)
    return clean, measured(retrieval, attack_of(**options))[0], model.seen, queries, gallery


def test_queries_are_looked_up_in_the_gallery():
    clean, record, _, _, _ = in_shop(protocol="template", eps=0)
    # query 0: the exact copy is of class 1, its own class second; query 90: class 1 is nearest
    for scores in (clean, record):
        assert scores["R@1"] == pytest.approx(1 / 3) and scores["R@2"] == pytest.approx(2 / 3)
        assert scores["mAP@R"] == pytest.approx((0 + 2 / 3) / 2)   # query 90: yes, yes, no
    assert (clean["n_singletons"], clean["n_queries"]) == (1, 3)


def test_the_gallery_stays_clean_in_template_and_is_attacked_in_clustering():
    _, _, seen, queries, gallery = in_shop(protocol="template", objective="shift", eps=0.05)
    assert len(seen) == 3 and not torch.equal(seen[-1], queries)   # queries, gallery, attacked
    assert torch.equal(seen[1], gallery)
    _, record, seen, queries, gallery = in_shop(protocol="clustering", eps=0.05)
    assert len(seen) == 4 and (seen[2] != queries).any() and (seen[3] != gallery).any()
    assert max(change_of(seen[2], queries).max(), change_of(seen[3], gallery).max()) < 0.05 + 1e-6
    wanted = recall_at_k(angle(seen[2]), torch.tensor([0, 1, 2]), (1, 2), angle(seen[3]),
                         torch.tensor([0, 1, 1, 1]))
    assert (record["R@1"], record["R@2"]) == (wanted[1], wanted[2])
