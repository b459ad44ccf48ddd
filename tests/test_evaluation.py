"""The evaluator: evaluate_robustness, protocols and inference rules, by hand where possible.

`on_circle` makes images whose embedding is a chosen angle, so that neighbours can be read off.
"""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import common
from common import Attack, map_at_r, metrics_by_rule, nmi, pgd, recall_at_k
from eval import evaluate_robustness

EPS = 8 / 255
RETRIEVAL = ("R@1", "R@2", "R@4", "R@8", "mAP@R")
CLUSTERING = ("NMI", "AMI", "F1")
SCORES = {*RETRIEVAL, *CLUSTERING, "R@1_low", "R@1_high", "NMI_chance", "n_queries",
          "n_singletons"}
ATTACK = {"protocol", "attack", "objective", "norm", "eps", "eps_255", "step", "step_255", "steps",
          "restarts", "random_start", "seed", "against", "attacker_share"}
SHORT = {"steps": 3, "eps": 0.05}
NEIGHBOUR = {"protocol": "template", "objective": "neighbour"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def network(seed=0, dim=8):
    """Unit embeddings of 3 x 8 x 8 images; BatchNorm, so that modes matter."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(),
                         nn.Linear(54, dim), UnitRows()).eval()


class UnitRows(nn.Module):
    def forward(self, rows):
        return F.normalize(rows, dim=1)


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
    """What common.evaluate calls `batches`."""
    rows = torch.arange(len(images)).split(size)
    return lambda: ((images[batch], None, batch) for batch in rows)


def picked(scores, names=RETRIEVAL):
    return {name: scores[name] for name in names}


def without_seconds(result):
    return {**result, "robust": [{**entry, "seconds": None} for entry in result["robust"]]}


# ---- the result and what it leaves behind


@pytest.mark.parametrize("protocol", ["clustering", "template"])
def test_the_result_has_the_documented_keys(protocol):
    images, labels = noisy_classes()
    result = evaluate_robustness(network(), images, labels, protocol=protocol, **SHORT)
    assert set(result) == {"clean", "robust", "warnings"}
    assert set(result["clean"]) == SCORES | {"rule", "by_rule"}
    assert result["clean"]["rule"] == "member_1"
    assert set(result["clean"]["by_rule"]) == {"member_1"}
    (entry,) = result["robust"]
    assert set(entry) == SCORES | ATTACK | {"rule", "limited", "seconds", "amp"}
    assert entry["norm"] == "linf" and entry["limited"] is False and entry["n_queries"] == 24
    assert entry["eps"] == 0.05 and entry["eps_255"] == pytest.approx(0.05 * 255)
    assert entry["step"] == pytest.approx(0.0125) and entry["steps"] == 3       # step: eps / 4
    assert (entry["NMI"] is None) == (protocol == "template")
    assert entry["against"] == "sum" and entry["attacker_share"] == 100
    json.dumps(result)
    assert all(0 <= entry[name] <= 1 for name in RETRIEVAL)


def test_modes_gradients_and_random_generators_are_as_before():
    images, labels = noisy_classes()
    model = network().train()
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
    for options in ({}, NEIGHBOUR):
        evaluate_robustness(model, images, labels, restarts=2, **SHORT, **options)
        assert condition() == before
    with pytest.raises(ValueError):
        evaluate_robustness(model, images + 2, labels)
    assert condition() == before


def test_the_images_are_not_changed_and_the_seed_decides():
    images, labels = noisy_classes()
    before = images.clone()
    first, again = (evaluate_robustness(network(), images, labels, **SHORT) for _ in range(2))
    assert torch.equal(images, before)
    assert without_seconds(first) == without_seconds(again)


# ---- what is accepted


@pytest.mark.parametrize("low, high", [(-0.01, 1), (0, 1.01), (-2.1, 2.6), (0, float("nan"))])
def test_images_outside_the_range_are_refused_with_a_word_on_normalisation(low, high):
    images, labels = noisy_classes()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = low, high
    with pytest.raises(ValueError, match="normalise inside the model"):
        evaluate_robustness(network(), images, labels)


def test_rounding_errors_of_the_range_are_accepted_and_clamped():
    images, labels = noisy_classes()
    images[0], images[1] = 0, 1
    wanted = evaluate_robustness(network(), images, labels, **SHORT)
    images[0], images[1] = -9e-6, 1 + 9e-6
    result = evaluate_robustness(network(), images, labels, **SHORT)
    assert without_seconds(result) == without_seconds(wanted)


def test_uint8_images_are_refused():
    images, labels = noisy_classes()
    with pytest.raises(ValueError):
        evaluate_robustness(network(), (255 * images).to(torch.uint8), labels)


def test_wrong_labels_are_refused():
    images, labels = noisy_classes()
    with pytest.raises(ValueError, match="needs labels"):
        evaluate_robustness(network(), images)
    for wrong in (labels[:-1], labels[:, None]):
        with pytest.raises(ValueError, match="found"):
            evaluate_robustness(network(), images, wrong)
    with pytest.raises(ValueError, match="loader"):
        evaluate_robustness(network(), [(images, labels)], labels)


def test_outputs_that_are_no_embeddings_are_refused():
    images, labels = noisy_classes()
    for wrong in (lambda x: x, lambda x: x.mean(), lambda x: (x, x)):
        with pytest.raises(ValueError, match="must return embeddings"):
            evaluate_robustness(wrong, images, labels)


@pytest.mark.parametrize("options", [
    {"protocol": "ranking"}, {"attack": "bim"}, {"objective": "entropy"},
    {"objective": "neighbour"},                                    # clustering has no neighbour
    {"random_start": False}, {"protocol": "template", "random_start": False},
    {"eps": 8}, {"eps": -0.1}, {"eps": float("nan")}, {"steps": -1}, {"restarts": 0},
])
def test_arguments_that_make_no_sense_are_a_value_error(options):
    with pytest.raises(ValueError):
        evaluate_robustness(network(), *noisy_classes(), **options)


def test_a_loader_gives_what_the_tensors_give():
    images, labels = noisy_classes()
    wanted = evaluate_robustness(network(), images, labels, **SHORT)
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    by_hand = [(images[:7], labels[:7].tolist()), (images[7:], labels[7:])]
    for form in (loader, iter(loader), by_hand):
        result = evaluate_robustness(network(), form, **SHORT)
        assert without_seconds(result) == without_seconds(wanted)


def test_a_shuffled_loader_gives_the_same_clean_retrieval():
    images, labels = noisy_classes()
    wanted = evaluate_robustness(network(), images, labels, **SHORT)["clean"]
    loader = DataLoader(TensorDataset(images, labels), batch_size=5, shuffle=True)
    result = evaluate_robustness(network(), loader, **SHORT)["clean"]
    assert picked(result) == pytest.approx(picked(wanted))


def test_a_callable_scores_like_the_module():
    images, labels = noisy_classes()
    model = network()
    wanted = evaluate_robustness(model, images, labels, **SHORT)
    result = evaluate_robustness(lambda x: model(x), images, labels, **SHORT)
    assert without_seconds(result) == without_seconds(wanted)


def test_outputs_that_are_not_unit_vectors_warn_and_score_like_the_normalised_model():
    images, labels = noisy_classes()
    model = network()
    wanted = evaluate_robustness(model, images, labels, **SHORT)
    result = evaluate_robustness(model[:-1], images, labels, **SHORT)
    assert any("not unit vectors" in alert for alert in result["warnings"])
    assert not any("not unit vectors" in alert for alert in wanted["warnings"])
    for side in (lambda r: r["clean"], lambda r: r["robust"][0]):
        assert picked(side(result), RETRIEVAL + CLUSTERING) == pytest.approx(
            picked(side(wanted), RETRIEVAL + CLUSTERING))


# ---- ensembles and inference rules


def test_a_list_of_models_is_scored_by_every_rule():
    images, labels = noisy_classes()
    result = evaluate_robustness([network(seed) for seed in range(3)], images, labels, **SHORT)
    rules = {"vote", "member_mean", "concat", "mean", "member_1", "member_2", "member_3"}
    assert set(result["clean"]["by_rule"]) == {entry["rule"] for entry in result["robust"]} == rules
    assert result["clean"]["rule"] == "vote"
    attacked = {entry["rule"]: entry for entry in result["robust"]}
    for scores in (result["clean"]["by_rule"], attacked):
        for name in RETRIEVAL + CLUSTERING:
            members = [scores[f"member_{i}"][name] for i in (1, 2, 3)]
            assert scores["member_mean"][name] == pytest.approx(sum(members) / 3)


def test_all_members_see_the_same_attacked_images():
    images, labels = noisy_classes()
    members = [Recorder(network(seed)) for seed in range(2)]
    evaluate_robustness(members, images, labels, **SHORT)
    assert torch.equal(members[0].seen[-1], members[1].seen[-1])
    assert not torch.equal(members[0].seen[-1], images)


def test_concat_and_mean_are_what_their_names_say():
    labels = torch.arange(5).repeat(4)
    first, second = (F.normalize(torch.randn(20, 6, generator=seeded(i)), dim=1) for i in (0, 1))
    scores = metrics_by_rule([first, second], labels, ks=(1, 2), clusters=5, seed=0)
    for name, own in (("concat", torch.cat([first, second], 1)),
                      ("mean", F.normalize(first + second, dim=1)), ("member_2", second)):
        assert scores[name]["R@2"] == recall_at_k(own, labels, (1, 2))[2]
        assert scores[name]["mAP@R"] == pytest.approx(map_at_r(own, labels))


def test_the_vote_counts_ties_at_rank_one():
    # Member m finds the gallery row that it names: its label is the member's vote for the query.
    votes = torch.tensor([[0, 1, 0, 1, 1],             # queries in columns, all of class 0
                          [0, 0, 1, 1, 2],
                          [1, 2, 2, 0, 3]])            # ties: columns 2, 3 and 5
    gallery, labels = torch.eye(4), torch.zeros(5, dtype=torch.int64)
    scores = metrics_by_rule([gallery[vote] for vote in votes], labels, ks=(1,), clusters=2, seed=0,
                             gallery=[gallery] * 3, gallery_labels=torch.arange(4),
                             clustering=False)
    vote = scores["vote"]
    assert vote["R@1"] == pytest.approx(2 / 5)         # columns 1 and 3
    assert vote["tie_share"] == pytest.approx(3 / 5)
    assert vote["R@1_ties_lost"] == pytest.approx(1 / 5)
    assert vote["R@1_ties_won"] == pytest.approx(3 / 5)
    assert [scores[f"member_{i}"]["R@1"] for i in (1, 2, 3)] == pytest.approx([2 / 5, 2 / 5, 1 / 5])
    assert scores["member_mean"]["R@1"] == pytest.approx(1 / 3)


def test_the_vote_lies_between_ties_lost_and_ties_won():
    images, labels = noisy_classes(spread=1)
    result = evaluate_robustness([network(seed) for seed in range(3)], images, labels, **SHORT)
    for scores in (result["clean"]["by_rule"]["vote"], result["robust"][0]):
        assert scores.get("rule", "vote") == "vote" and 0 < scores["tie_share"] <= 1
        assert scores["R@1_ties_lost"] <= scores["R@1"] <= scores["R@1_ties_won"]


# ---- template protocol


def test_attacked_queries_in_a_clean_gallery_equal_a_loop_over_queries():
    images, labels = noisy_classes(spread=0.4)
    model = network()
    result = evaluate_robustness(model, images, labels, eps=EPS, steps=4, random_start=False,
                                 batch_size=5, **NEIGHBOUR)
    with torch.no_grad():
        clean = model(images)
    recall, precisions = 0, []
    for i, query in enumerate(images):
        others = [j for j in range(len(images)) if j != i]
        nearest = min(others, key=lambda j: float((clean[i] - clean[j]).norm()))
        query = query[None]
        if labels[nearest] == labels[i]:
            query = pgd(lambda x: (model(x) - clean[nearest]).norm(dim=1), query, EPS, EPS / 4, 4,
                        start=query)
        with torch.no_grad():
            moved = model(query)[0]
        ranking = sorted(others, key=lambda j: float((moved - clean[j]).norm()))
        relevant = [bool(labels[j] == labels[i]) for j in ranking[:3]]           # R = 3
        recall += relevant[0]
        precisions.append(sum(sum(relevant[:k + 1]) / (k + 1) for k in range(3) if relevant[k]) / 3)
    (entry,) = result["robust"]
    assert entry["R@1"] == pytest.approx(recall / len(images))
    assert entry["mAP@R"] == pytest.approx(sum(precisions) / len(images))
    assert entry["R@1"] < result["clean"]["R@1"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_neighbour_attack_never_helps(seed):
    images, labels = noisy_classes(spread=0.5, seed=seed)
    result = evaluate_robustness(network(seed), images, labels, **NEIGHBOUR, **SHORT)
    assert result["robust"][0]["R@1"] <= result["clean"]["R@1"]


@pytest.mark.parametrize("objective", ["neighbour", "shift"])
def test_only_the_neighbour_objective_spares_queries_that_are_wrong_already(objective):
    images, labels = noisy_classes(spread=0.5)
    model = Recorder(network())
    result = evaluate_robustness(model, images, labels, protocol="template", objective=objective,
                                 **SHORT)
    with torch.no_grad():
        clean = model.model(images)
    similarity = (clean @ clean.T).fill_diagonal_(-2)
    right = labels[similarity.argmax(1)] == labels
    assert 0 < right.sum() < len(labels)
    assert result["clean"]["R@1"] == pytest.approx(float(right.double().mean()))
    moved = (model.seen[-1] != images).flatten(1).any(1)
    assert torch.equal(moved, right if objective == "neighbour" else torch.ones_like(right))


def test_a_query_is_not_saved_by_its_own_clean_copy():
    # 0 and -50 degrees are pushed towards each other by ten degrees: each stays nearest to its own
    # clean copy, 10 degrees off, then comes the other class at 40, the own class at 50 or more.
    images, labels = on_circle(0.0, 40.0, -50.0, -90.0), torch.tensor([0, 0, 1, 1])
    result = evaluate_robustness(angle, images, labels, eps=0.05, step_size=0.05, steps=2, ks=(1,),
                                 random_start=False, **NEIGHBOUR)
    assert result["clean"]["R@1"] == 1
    assert result["robust"][0]["R@1"] == 0.5


def test_a_huge_attack_pushes_every_query_onto_the_other_class():
    images, labels = on_circle(0.0, 10.0, 180.0, 190.0), torch.tensor([0, 0, 1, 1])
    result = evaluate_robustness(angle, images, labels, eps=1, steps=10, ks=(1,), **NEIGHBOUR)
    assert result["clean"]["R@1"] == 1
    assert result["robust"][0]["R@1"] == result["robust"][0]["mAP@R"] == 0


@pytest.mark.parametrize("options", [NEIGHBOUR, {"protocol": "template"}, {}])
def test_an_attack_of_size_zero_leaves_the_clean_scores(options):
    images, labels = noisy_classes(spread=0.5)
    result = evaluate_robustness(network(), images, labels, eps=0, steps=2, **options)
    names = RETRIEVAL if options else RETRIEVAL + CLUSTERING
    assert picked(result["robust"][0], names) == picked(result["clean"], names)


# ---- clustering protocol and attacks


def test_the_clustering_protocol_attacks_every_image_within_the_ball():
    images, labels = noisy_classes(spread=0.5)
    model = Recorder(network())
    evaluate_robustness(model, images, labels, eps=EPS)
    moved = (model.seen[-1] - images).abs().flatten(1).amax(1)
    assert (moved > 0.5 * EPS).all() and moved.max() <= EPS + 1e-6
    assert model.seen[-1].min() >= 0 and model.seen[-1].max() <= 1


def test_the_clustering_protocol_scores_attacked_images_against_attacked_ones():
    images, labels = noisy_classes(spread=0.5)
    model = Recorder(network())
    (entry,) = evaluate_robustness(model, images, labels, eps=EPS)["robust"]
    with torch.no_grad():
        attacked = model.model(model.seen[-1])
    assert entry["R@1"] == recall_at_k(attacked, labels, (1,))[1]
    assert entry["NMI"] == pytest.approx(nmi(labels, common.kmeans(attacked, 6, 0)))


@pytest.mark.parametrize("options", [{}, {"protocol": "template"}])
def test_fgsm_is_one_step_of_size_eps(options):
    images, labels = noisy_classes()
    one, other = Recorder(network()), Recorder(network())
    (entry,) = evaluate_robustness(one, images, labels, attack="fgsm", eps=EPS, step_size=0.001,
                                   steps=7, **options)["robust"]
    evaluate_robustness(other, images, labels, eps=EPS, step_size=EPS, steps=1, **options)
    assert entry["steps"] == 1 and entry["step"] == EPS and entry["random_start"] is True
    assert torch.equal(one.seen[-1], other.seen[-1])


def test_template_fgsm_steps_from_the_image_against_its_neighbour():
    images, labels = noisy_classes(spread=0.1)
    model = Recorder(network())
    result = evaluate_robustness(model, images, labels, attack="fgsm", eps=EPS, **NEIGHBOUR)
    assert result["clean"]["R@1"] == 1 and result["robust"][0]["random_start"] is False
    with torch.no_grad():
        clean = model.model(images)
    target = clean[(clean @ clean.T).fill_diagonal_(-2).argmax(1)]
    x = images.clone().requires_grad_()
    (model.model(x) - target).norm(dim=1).sum().backward()
    assert torch.allclose(model.seen[-1], (images + EPS * x.grad.sign()).clamp(0, 1), atol=1e-6)


def test_restarts_are_nested_and_keep_the_best_image_by_image():
    images, labels = noisy_classes()
    shift = {}
    for restarts in (1, 3):
        model = Recorder(network())
        evaluate_robustness(model, images, labels, eps=0.1, step_size=0.02, steps=1,
                            restarts=restarts)
        with torch.no_grad():
            shift[restarts] = 1 - (model.model(model.seen[-1]) * model.model(images)).sum(1)
    assert (shift[3] >= shift[1] - 1e-6).all()
    assert (shift[3] > shift[1] + 1e-4).any()
    assert torch.isclose(shift[3], shift[1], atol=1e-6).any()     # the first was the best
    assert shift[3].mean() > shift[1].mean()


def test_a_constant_model_has_collapsed_and_scores_zero():
    images, labels = noisy_classes()
    result = evaluate_robustness(lambda x: F.normalize(0 * x.flatten(1)[:, :4] + 1, dim=1), images,
                                 labels, **SHORT)
    assert any("collapsed" in alert for alert in result["warnings"])
    assert result["clean"]["R@1"] == result["robust"][0]["R@1"] == result["clean"]["mAP@R"] == 0


def test_a_good_model_gives_no_warning():
    images, labels = on_circle(0.0, 10.0, 180.0, 190.0), torch.tensor([0, 0, 1, 1])
    result = evaluate_robustness(angle, images, labels, ks=(1,), **SHORT)
    assert result["warnings"] == []


# ---- a gallery of its own (In-Shop)


def gallery_scores(attack):
    """Queries at 0, 90, 180 degrees of classes 0, 1, 2; the gallery has none of class 2."""
    queries, gallery = on_circle(0.0, 90.0, 180.0), on_circle(20.0, 60.0, 130.0, 0.0)
    model = Recorder(angle)
    clean, (entry,), _ = common.evaluate(
        [model], tensor_batches(queries), torch.tensor([0, 1, 2]), [attack], ks=(1, 2),
        gallery_batches=tensor_batches(gallery), gallery_labels=torch.tensor([0, 1, 1, 1]))
    return clean, entry, model.seen, queries, gallery


def test_queries_are_looked_up_in_the_gallery():
    clean, entry, _, _, _ = gallery_scores(Attack("template", eps=0))
    # query 0: the exact copy is of class 1, its own class second; query 90: class 1 is nearest
    for scores in (clean, entry):
        assert scores["R@1"] == pytest.approx(1 / 3) and scores["R@2"] == pytest.approx(2 / 3)
        assert scores["n_singletons"] == 1 and scores["n_queries"] == 3
        assert scores["mAP@R"] == pytest.approx((0 + 2 / 3) / 2)   # query 90: yes, yes, no


def test_the_gallery_stays_clean_in_template_and_is_attacked_in_clustering():
    _, _, seen, queries, gallery = gallery_scores(Attack("template", objective="shift", eps=0.05))
    assert len(seen) == 3 and not torch.equal(seen[-1], queries)   # queries, gallery, attacked
    assert torch.equal(seen[1], gallery)
    _, entry, seen, queries, gallery = gallery_scores(Attack(eps=0.05))
    assert len(seen) == 4
    attacked = [angle(seen[2]), angle(seen[3])]
    assert (seen[2] != queries).any() and (seen[3] != gallery).any()
    wanted = recall_at_k(attacked[0], torch.tensor([0, 1, 2]), (1, 2), attacked[1],
                         torch.tensor([0, 1, 1, 1]))
    assert (entry["R@1"], entry["R@2"]) == (wanted[1], wanted[2])


# ---- numbers beside the scores


def test_the_chance_level_of_nmi_is_that_of_random_assignments():
    labels = torch.arange(20).repeat(4)
    embeddings = F.normalize(torch.randn(80, 4, generator=seeded(0)), dim=1)
    chance = metrics_by_rule([embeddings], labels, ks=(1,), clusters=20, seed=0)["member_1"]
    wanted = [nmi(labels, torch.randint(0, 20, (80,), generator=seeded(i))) for i in range(50)]
    assert chance["NMI_chance"] == pytest.approx(np.mean(wanted), abs=0.03)
    assert 0.3 < chance["NMI_chance"] < 0.7


def test_images_that_are_alone_in_their_class_are_counted():
    images, _ = noisy_classes(classes=2, per_class=4)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 7, 9])
    result = evaluate_robustness(network(), images, labels, **SHORT)
    assert result["clean"]["n_singletons"] == result["robust"][0]["n_singletons"] == 2
    assert result["clean"]["n_queries"] == 8


# ---- defaults of Attack


@pytest.mark.parametrize("arguments, eps, step, steps, objective, random_start", [
    ({}, 8 / 255, 2 / 255, 10, "shift", True),
    ({"protocol": "template"}, 0.01, 0.004, 5, "neighbour", True),
    ({"protocol": "template", "attack": "fgsm"}, 0.01, 0.01, 1, "neighbour", False),
    ({"attack": "fgsm"}, 8 / 255, 8 / 255, 1, "shift", True),
    ({"eps": 0.1}, 0.1, 0.025, 10, "shift", True),
    ({"protocol": "template", "eps": 0.1, "steps": 10}, 0.1, 0.02, 10, "neighbour", True),
])
def test_the_defaults_of_an_attack(arguments, eps, step, steps, objective, random_start):
    attack = Attack(**arguments)
    assert math.isclose(attack.eps, eps) and math.isclose(attack.step_size, step)
    assert (attack.steps, attack.objective, attack.random_start) == (steps, objective, random_start)
    assert (attack.restarts, attack.seed) == (1, 0)


def test_the_documented_defaults_of_evaluate_robustness():
    images, labels = noisy_classes()
    (entry,) = evaluate_robustness(network(), images, labels)["robust"]
    assert picked(entry, ("protocol", "attack", "objective", "steps", "restarts", "seed")) == {
        "protocol": "clustering", "attack": "pgd", "objective": "shift", "steps": 10, "restarts": 1,
        "seed": 0}
    assert math.isclose(entry["eps"], 8 / 255) and math.isclose(entry["step"], 2 / 255)
