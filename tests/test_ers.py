"""The Empirical Robustness Score of eval.py against loops over images, queries and candidates.

`Naive` attacks one image at a time and counts ranks one candidate at a time; its models are linear
maps of 2 x 2 images, normalised. Its only loan from eval.py is what each image moves towards.
"""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import ATTACK, network, noisy_classes, seeded, tensor_batches, without_seconds

import common
import eval as evaluator
from common import Attack, Retrieval, UserError
from eval import ers, ers_entry, ers_figures, ers_targets, evaluate_robustness, recall_of

FIGURES = ("CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT")
RANKS = FIGURES[:4]
RECALLS = ("ES:R", "LTM", "GTM")
TARGETS = ("near query", "near candidate", "random query", "random candidate", "random")


def tiny(count=120, classes=12, spread=0.2, seed=0):
    """Images (count, 3, 2, 2) around one prototype per class, and labels; the last is alone."""
    labels = torch.arange(count) % classes
    labels[-1] = classes
    prototypes = torch.rand(classes + 1, 3, 2, 2, generator=seeded(seed))
    noise = spread * torch.randn(count, 3, 2, 2, generator=seeded(seed + 1))
    return (prototypes[labels] + noise).clamp(0, 1), labels


def linear(seed=0, dim=6):
    weight = torch.randn(12, dim, generator=seeded(100 + seed))
    return lambda images: F.normalize((images - 0.5).flatten(1) @ weight, dim=1)


def retrieval_of(models, images, labels, **options):
    return Retrieval(models, tensor_batches(images), labels, **options)


def figures_of(models, images, labels, authors=False, **options):
    objective = "ers-authors" if authors else "ers"
    return ers_figures(retrieval_of(models, images, labels),
                       Attack("ers", objective=objective, **options), authors)


def starts(images, eps, seed):
    """Where a random start begins: one draw for each batch of 128, from the seed of the attack."""
    found = []
    for number, batch in enumerate(images.split(128)):
        common.seed_torch(seed, 0, common.EVALUATE, number)
        found += (batch + torch.empty_like(batch).uniform_(-eps, eps)).clamp(0, 1)
    return found


class Naive:
    """The ten figures of Zhou & Patel, one image at a time."""

    def __init__(self, models, images, labels, attack, authors=False):
        self.models, self.images, self.labels = models, images, labels.tolist()
        self.attack, self.authors, self.all = attack, authors, range(len(images))
        self.clean = [torch.stack([model(image[None])[0] for image in images])
                      for model in models]
        self.target = ers_targets(retrieval_of(models, images, labels), attack.seed)
        self.between = torch.stack([self.to_all([own[i] for own in self.clean])
                                    for i in self.all])

    def to_all(self, embeddings):
        """d to every candidate (n,), the mean over the models."""
        return sum((own - e).norm(dim=1) for own, e in zip(self.clean, embeddings)) \
            / len(self.models)

    def attacked(self, i, value, start=None, steps=None):
        """The embeddings of image i after sign steps up the value of its embeddings."""
        clean, eps = self.images[i], self.attack.eps
        x = clean if start is None else start
        for _ in range(self.attack.steps if steps is None else steps):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(value([model(x[None])[0] for model in self.models]), x)
            x = x.detach() + self.attack.step_size * slope.sign()
            x = torch.maximum(torch.minimum(x, clean + eps), clean - eps).clamp(0, 1)
        return [model(x[None])[0] for model in self.models]

    def names(self, *out):
        return [x for x in self.all if x not in out]

    def candidate(self, name, sign):
        """CA+ (1: up, towards fewer closer ones) or CA- (-1): mean rank in percent."""
        ranks = []
        for i, q in enumerate(self.target[name].tolist()):
            others = self.names() if self.authors else self.names(i, q)
            rivals = self.between[q][others]
            e = self.attacked(i, lambda e: -F.relu(sign * (self.to_all(e)[q] - rivals)).sum())
            own = float(self.to_all(e)[q])
            ranks.append(100 * sum(rival < own for rival in rivals.tolist())
                         / (len(self.all) - (not self.authors)))
        return statistics.mean(ranks)

    def query(self, name, sign, own_copy):
        """[how many candidates are closer to the attacked query than the one of that name]"""
        found = []
        for i, c in enumerate(self.target[name].tolist()):
            others = self.names(c) if self.authors else self.names(i, c)
            e = self.attacked(i, lambda e: -F.relu(
                sign * (self.to_all(e)[c] - self.to_all(e)[others])).sum())
            d = self.to_all(e).tolist()
            found.append(sum(d[x] < d[c] for x in self.all if x != c and (own_copy or x != i)))
        return found

    def recall(self, embeddings):
        hits = []
        for i, e in enumerate(embeddings):
            d = self.to_all(e).tolist()
            same = [d[x] for x in self.names(i) if self.labels[x] == self.labels[i]]
            other = [d[x] for x in self.names(i) if self.labels[x] != self.labels[i]]
            hits.append(min(same, default=math.inf) < min(other))
        return 100 * statistics.mean(hits)

    def farthest_other(self, i):
        same = [x for x in self.all if self.labels[x] == self.labels[i]]
        own = same if self.authors else [x for x in same if x != i]

        def value(e):
            d = self.to_all(e)
            return -F.relu(d[self.names(*same)].max() - d[own].min()) if own else 0 * d.sum()
        return value

    def figures(self):
        count, authors = len(self.all), self.authors
        zero = [None] * count
        begin = zero if authors else starts(self.images, self.attack.eps, self.attack.seed)

        def away(i, offset):
            return lambda e: sum((own - other[i] - offset).norm()
                                 for own, other in zip(e, self.clean))

        # the authors' first step: away from a point that is 1e-7 off
        shifted = [self.attacked(i, away(i, 1e-7 * authors), begin[i], self.attack.steps)
                   for i in self.all]
        measured = [self.attacked(i, away(i, 1e-7), None, self.attack.steps - 1)
                    for i in self.all] if authors else shifted
        t = self.target["random"].tolist()

        def cosine(e, j):
            return sum((own * other[j]).sum() for own, other in zip(e, self.clean)) / len(e)

        matched = [self.attacked(i, lambda e: cosine(e, t[i])) for i in self.all]
        u = self.target["wrong" if authors else "other"].tolist()
        share = 100 / (count - (not authors)) / count
        return {
            "CA+": self.candidate("random query", 1), "CA-": self.candidate("near query", -1),
            "QA+": share * sum(self.query("random candidate", 1, authors)),
            "QA-": share * sum(self.query("near candidate", -1, authors)),
            "TMA": statistics.mean(float(cosine(e, t[i])) for i, e in enumerate(matched)),
            "ES:D": statistics.mean(float(self.to_all(e)[i]) for i, e in enumerate(measured)),
            "ES:R": self.recall(shifted),
            "LTM": self.recall([self.attacked(i, self.farthest_other(i)) for i in self.all]),
            "GTM": self.recall([self.attacked(i, lambda e: -self.to_all(e)[u[i]])
                                for i in self.all]),
            "GTT": 100 * statistics.mean(n < 4 for n in self.query("top", -1, False))}


def assert_close(found, wanted, names=FIGURES):
    """A rank or two out of n^2 may differ by rounding, recalls not at all."""
    for name in names:
        margin = 0.005 if name in RANKS else 1e-5
        assert found[name] == pytest.approx(wanted[name], abs=margin), name


# ---- the score


@pytest.mark.parametrize("row, figures, score", [
    # Zhou & Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", CVPR 2022,
    # the table that compares defenses: ten figures and ERS as published
    ("CUB, undefended", (0, 100, 0, 99.9, 0.883, 1.762, 0, 0, 14.1, 0), 3.8),
    ("CUB, EST 8", (0.5, 97.3, 0.5, 91.3, 0.875, 1.325, 3.9, 0.4, 14.9, 0), 7.9),
    ("CUB, HM&ICS 8", (12.9, 40.9, 14.7, 33.7, 0.806, 0.487, 17.1, 13.2, 26.3, 2.3), 33.5),
    ("CARS, ACT 8", (19.3, 33.1, 20.3, 32.3, 0.413, 0.760, 18.4, 15.0, 28.6, 1.2), 39.8),
    ("CARS, HM&ICS 8", (21.0, 23.3, 23.1, 22.2, 0.698, 0.415, 31.2, 38.0, 47.8, 9.6), 47.9),
    ("SOP, EST 32", (12.5, 43.6, 10.6, 34.8, 0.468, 0.830, 9.6, 7.2, 17.3, 3.8), 31.7),
    ("SOP, HM 8", (29.9, 4.7, 31.6, 3.6, 0.455, 0.283, 39.3, 40.9, 38.8, 43.0), 61.7)])
def test_the_score_of_published_figures_is_the_published_score(row, figures, score):
    assert ers(dict(zip(FIGURES, figures))) == pytest.approx(score, abs=0.15)


def test_every_figure_counts_a_tenth_from_its_worst_to_its_best():
    worst = dict(zip(FIGURES, (0, 100, 0, 100, 1, 2, 0, 0, 0, 0)))
    best = dict(zip(FIGURES, (50, 0, 50, 0, 0, 0, 100, 100, 100, 100)))
    assert ers(worst) == 0 and ers(best) == 100
    for name in FIGURES:
        assert ers({**worst, name: best[name]}) == pytest.approx(10)


# ---- the figures


def test_every_figure_equals_a_loop_over_images():
    images, labels = tiny(204)
    options = {"eps": 0.1, "steps": 2, "seed": 3}
    found = figures_of([linear()], images, labels, **options)
    assert tuple(found) == FIGURES
    assert_close(found, Naive([linear()], images, labels, Attack("ers", **options)).figures())
    assert all(5 < found[name] < 75 for name in (*RECALLS, "GTT"))


def test_an_ensemble_averages_the_distances_of_its_members():
    images, labels = tiny()
    models, attack = [linear(1), linear(2, dim=4)], Attack("ers", eps=0.06, steps=2)
    found = figures_of(models, images, labels, eps=0.06, steps=2)
    assert_close(found, Naive(models, images, labels, attack).figures())


def test_two_copies_of_a_model_have_the_figures_of_the_one():
    images, labels = tiny()
    one, two = (figures_of([linear()] * copies, images, labels, eps=0.06, steps=2)
                for copies in (1, 2))
    assert_close(two, one)
    (entry,) = evaluate_robustness([linear()] * 2, images, labels, protocol="ers",
                                   eps=0.06, steps=1)["robust"]
    assert entry["rule"] == "distance"


def test_before_any_attack_the_figures_are_those_of_clean_retrieval():
    images, labels = tiny(204)
    found = figures_of([linear()], images, labels, eps=0, steps=0)
    naive = Naive([linear()], images, labels, Attack("ers", eps=0, steps=0))
    clean = naive.recall([[row] for row in naive.clean[0]])
    assert abs(found["CA+"] - 50) < 8 and abs(found["QA+"] - 50) < 8
    assert 0 <= found["QA-"] <= 100 / 203 and 0 < found["CA-"] < 3     # two images are 1 % of 204
    assert found["ES:D"] == 0 and found["GTT"] == 100
    assert [found[name] for name in RECALLS] == pytest.approx([clean] * 3)
    assert 20 < clean < 95


def test_large_radii_move_every_figure_in_its_direction():
    images, labels = tiny()
    clean = figures_of([linear()], images, labels, eps=0, steps=0)
    moved = figures_of([linear()], images, labels, eps=0.3, steps=12)
    up = ("CA-", "QA-", "TMA", "ES:D")
    for name in FIGURES:
        assert (moved[name] > clean[name]) == (name in up) and moved[name] != clean[name], name
    assert moved["CA+"] < 10 and moved["QA+"] < 10 and moved["CA-"] > 50 and moved["QA-"] > 50
    assert moved["TMA"] > 0.7 and moved["ES:D"] > 1.2
    assert max(moved[name] for name in ("ES:R", "GTM", "GTT")) < 30
    assert ers(moved) < ers(clean) - 40


def test_a_collapsed_model_finds_nothing_and_has_finite_figures():
    images, labels = tiny()
    collapsed = lambda x: F.normalize(1 + 0 * x.flatten(1), dim=1)              # noqa: E731
    found = figures_of([collapsed], images, labels, steps=2)
    assert all(math.isfinite(value) for value in found.values())
    assert [found[name] for name in RECALLS] == [0, 0, 0]
    assert [found[name] for name in (*RANKS, "ES:D")] == [0] * 5
    assert found["TMA"] == pytest.approx(1) and math.isfinite(ers(found))
    authors = figures_of([collapsed], images, labels, authors=True, steps=2)
    assert all(math.isfinite(value) for value in authors.values())


def test_recall_counts_ties_against_the_query():
    points = torch.tensor([0.0, 1.0, 1.0, 3.0, 3.5]).deg2rad()
    images = torch.stack([points.cos(), points.sin()], 1)
    retrieval = retrieval_of([lambda x: x], images, torch.tensor([0, 0, 1, 1, 1]))
    # 0: tie. 1, 2: a twin of the other class. 3 and 4: each other.
    assert recall_of(retrieval, retrieval.clean) == pytest.approx(2 / 5)


def test_rows_that_are_nearly_equal_are_told_apart():
    spread = 1e-3 * torch.randn(200, 16, generator=seeded(0))
    rows, labels, hits = F.normalize(1 + spread, dim=1), torch.arange(200) % 4, 0
    for i in range(200):
        d = (rows.double() - rows[i].double()).norm(dim=1).tolist()
        hits += int(labels[min({*range(200)} - {i}, key=d.__getitem__)] == labels[i])
    retrieval = retrieval_of([lambda x: x], rows, labels)
    assert recall_of(retrieval, [rows]) == pytest.approx(hits / 200)
    top = ers_targets(retrieval, 0)["top"]
    exact = torch.cdist(rows.double(), rows.double()).fill_diagonal_(9)
    assert torch.equal(top, exact.argmin(1))


# ---- what every image is moved towards


@pytest.mark.parametrize("count, near, members", [(199, 1, 1), (204, 2, 2), (305, 3, 1)])
def test_targets_are_what_a_loop_over_images_finds(count, near, members):
    images, labels = tiny(count)
    models = [linear(i) for i in range(members)]
    clean, mine, slips = [model(images) for model in models], labels.tolist(), 0
    target = {name: rows.tolist() for name, rows in
              ers_targets(retrieval_of(models, images, labels), 0).items()}
    places = {name: set() for name in TARGETS[:2]}
    for i in range(count):
        d = sum((own - own[i]).norm(dim=1) for own in clean).tolist()    # a sum orders as a mean
        order = sorted((j for j in range(count) if j != i), key=d.__getitem__)
        assert target["top"][i] == order[0]
        assert target["other"][i] == next(j for j in order if mine[j] != mine[i])
        for name in TARGETS[:2]:
            assert target[name][i] in order[:near]
            places[name].add(order.index(target[name][i]))
        # the authors' slip: the nearest of a class other than the top's, as a place among those
        apart = [j for j in range(count) if mine[j] != mine[order[0]]]
        found = next(j for j in order if j in apart)
        assert target["wrong"][i] == apart.index(found)
        slips += target["wrong"][i] != found
    assert all(places[name] == set(range(near)) for name in places) and slips > count / 4


def test_random_targets_are_any_image_but_the_own_and_the_seed_decides():
    retrieval = retrieval_of([linear()], *tiny(204))
    first, again, other = (ers_targets(retrieval, seed) for seed in (0, 0, 1))
    for name in TARGETS:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
        assert (first[name] != torch.arange(204)).all()
    for name in TARGETS[2:]:
        assert 0 <= first[name].min() < 8 and 196 <= first[name].max() < 204
        steps = torch.cat([(ers_targets(retrieval, seed)[name] - torch.arange(204)) % 204
                           for seed in range(10)])
        assert set(steps.tolist()) == set(range(1, 204))
    assert len({tuple(first[name].tolist()) for name in TARGETS}) == len(TARGETS)


# ---- the slips of the authors' code


def test_the_variant_of_the_authors_equals_a_loop_with_their_slips():
    # own clean copy among the candidates, shares of n, GTM's wrong image, LTM's own clean copy
    images, labels = tiny(140)
    attack = Attack("ers", eps=0.05, steps=2)
    found = figures_of([linear()], images, labels, authors=True, eps=0.05, steps=2)
    wanted = Naive([linear()], images, labels, attack, authors=True).figures()
    assert_close(found, wanted, (*RANKS, "TMA", "LTM", "GTM"))
    assert found["ES:D"] == pytest.approx(wanted["ES:D"], rel=0.1)  # its first step is arbitrary
    corrected = figures_of([linear()], images, labels, eps=0.05, steps=2)
    assert all(abs(found[name] - corrected[name]) > 0.1 for name in (*RANKS, "LTM", "GTM"))
    assert found["TMA"] == corrected["TMA"]


def test_the_authors_shift_starts_at_zero_and_its_last_step_is_not_measured(monkeypatch):
    images, labels = tiny()
    settings, attacked = [], common.attack_embeddings

    def recorded(*args, **options):
        settings.append((options["random_start"], options["steps"]))
        return attacked(*args, **options)

    monkeypatch.setattr(evaluator.common, "attack_embeddings", recorded)
    one = figures_of([linear()], images, labels, authors=True, eps=0.1, steps=1)
    assert one["ES:D"] == 0 and (False, 0) in settings and not any(start for start, _ in settings)
    settings.clear()
    corrected = figures_of([linear()], images, labels, eps=0.1, steps=1)
    assert corrected["ES:D"] > 0.05
    assert sorted(settings) == [(False, 1)] * 8 + [(True, 1)]          # ES:D and ES:R are one run


# ---- the entry


def test_the_entry_has_the_documented_keys_and_the_seed_decides():
    images, labels = noisy_classes(classes=25, per_class=4)
    options = {"protocol": "ers", "steps": 1, "eps": 0.02}
    first, again, other = (evaluate_robustness(network(), images, labels, seed=seed, **options)
                           for seed in (0, 0, 1))
    (entry,) = first["robust"]
    assert set(entry) == ATTACK | {"rule", "amp", "limited", "seconds", "n_queries", "R@1_clean",
                                   "ERS", *FIGURES}
    assert (entry["protocol"], entry["objective"], entry["rule"]) == ("ers", "ers", "member_1")
    assert entry["step"] == pytest.approx(0.0075) and entry["steps"] == 1
    assert entry["n_queries"] == 100 and entry["limited"] is False
    assert entry["R@1_clean"] == pytest.approx(first["clean"]["R@1"]) and entry["R@1_clean"] > 0
    assert entry["ERS"] == pytest.approx(ers(entry))
    assert without_seconds(first) == without_seconds(again)
    assert all(entry[name] != other["robust"][0][name] for name in ("CA+", "QA+", "TMA", "ES:D"))
    (slips,) = evaluate_robustness(network(), images, labels, objective="ers-authors",
                                   **options)["robust"]
    assert slips["objective"] == "ers-authors" and slips["ES:D"] == 0 < entry["ES:D"]


def test_modes_gradients_and_random_generators_are_as_before():
    images, labels = noisy_classes(classes=25, per_class=4)
    model = network().train()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(8)

    def condition():
        return ([module.training for module in model.modules()],
                [p.requires_grad for p in model.parameters()],
                [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
                {name: value.tolist() for name, value in model.state_dict().items()},
                torch.get_rng_state().tolist())

    before, pixels = condition(), images.clone()
    evaluate_robustness(model, images, labels, protocol="ers", steps=1)
    assert condition() == before and torch.equal(images, pixels)


def test_fewer_than_a_hundred_images_and_a_gallery_are_refused():
    images, labels = tiny(99)
    with pytest.raises(UserError, match="100 images.* 99"):
        evaluate_robustness(linear(), images, labels, protocol="ers", steps=1)
    images, labels = tiny()
    retrieval = retrieval_of([linear()], images, labels, gallery_labels=labels,
                             gallery_batches=tensor_batches(images))
    with pytest.raises(UserError, match="among themselves"):
        ers_entry(retrieval, Attack("ers", steps=0))


# ---- settings and tables


def test_the_attack_has_the_settings_of_the_paper():
    attack = Attack("ers")
    assert (attack.attack, attack.objective, attack.steps) == ("pgd", "ers", 32)
    assert (attack.eps, attack.step_size) == pytest.approx((8 / 255, 3 / 255))
    assert attack.random_start is False
    assert Attack("ers", eps=0.04).step_size == pytest.approx(0.015)
    assert Attack("ers", step_size=0.5, steps=3).step_size == 0.5
    (slips,) = evaluator.attacks_of(evaluator.parse_args(
        "run --protocol ers --ers-variant authors".split()), 9)
    assert (slips.objective, slips.steps, slips.seed) == ("ers-authors", 32, 9)


@pytest.mark.parametrize("protocol, options", [
    ("ers", {"attack": "cw"}), ("ers", {"attack": "min-eps"}), ("ers", {"objective": "shift"}),
    ("ers", {"objective": "neighbour"}), ("clustering", {"objective": "ers"}),
    ("template", {"objective": "ers-authors"})])
def test_attacks_and_objectives_of_other_protocols_are_refused(protocol, options):
    with pytest.raises(UserError, match=f"not part of --protocol {protocol}"):
        Attack(protocol, **options)


def test_an_ensemble_is_one_row_with_its_own_clean_recall():
    clean = {"by_rule": {rule: {"R@1": 0.5, "NMI": 0.8} for rule in ("vote", "mean", "member_1")}}
    entry = {"rule": "distance", "R@1_clean": 0.625, "CA+": 12.34, "TMA": 0.4567, "ERS": 33.51}
    rows = common.results_table({"clean": clean, "robust": [entry]}, "hm")
    assert rows == [{"name": "hm distance", "clean": {"R@1": 0.625}, "attacked": entry}]
    _, heads, line = (line.split() for line in common.format_table(rows).splitlines())
    assert heads == ["|", "R@1", "|", "CA+", "TMA", "ERS"]
    assert line == ["hm", "distance", "|", "62.5", "|", "12.3", "0.46", "33.5"]
    single = {"by_rule": {"member_1": {"R@1": 0.5}}}
    (row,) = common.results_table(
        {"clean": single, "robust": [{**entry, "rule": "member_1"}]}, "hm")
    assert row["name"] == "hm" and row["clean"] == {"R@1": 0.5} and row["attacked"]["ERS"] == 33.51


def test_figures_stand_in_tables_on_their_own_scales():
    assert common.ERS_FIGURES == (*FIGURES, "ERS")
    for name in common.ERS_FIGURES:
        assert common.cell(name, 1.2345) == ("1.23" if name in ("TMA", "ES:D") else "1.2")
    assert common.cell("R@1", 0.12345) == "12.3"
