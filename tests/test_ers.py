"""The Empirical Robustness Score of eval.py against loops over images, queries and candidates.

`Naive` attacks one image at a time and counts ranks one candidate at a time; its models are linear
maps of 2 x 2 images, normalised. Its only loan from eval.py is what each image moves towards.
"""

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import ATTACK, network, noisy_classes, retrieval_of, seeded, without_seconds

import common
import eval as evaluator
from common import UserError
from eval import attack_of, ers, ers_figures, ers_targets, evaluate_robustness, recall_of

FIGURES = ("CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT")
RANKS = FIGURES[:4]
RECALLS = ("ES:R", "LTM", "GTM")


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


def figures_of(models, images, labels, **options):
    return ers_figures(retrieval_of(models, images, labels), attack_of("ers", **options))


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

    def attacked(self, i, value, start=None, steps=None, first=None):
        """The embeddings of image i after sign steps up the value of its embeddings."""
        clean, eps = self.images[i], self.attack.eps
        x = clean if start is None else start
        for step in range(self.attack.steps if steps is None else steps):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((value if step or not first else first)(
                [model(x[None])[0] for model in self.models]), x)
            x = x.detach() + self.attack.step * slope.sign()
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
            return lambda e: sum((own - other[i] + offset).norm()
                                 for own, other in zip(e, self.clean))

        # the authors' targets are off, and they measure before the last step
        shifted = [self.attacked(i, away(i, 1e-6 * authors), begin[i], self.attack.steps,
                                 away(i, 9e-7 * authors)) for i in self.all]
        measured = [self.attacked(i, away(i, 1e-6), None, self.attack.steps - 1, away(i, 9e-7))
                    for i in self.all] if authors else shifted
        t = self.target["random"].tolist()

        def cosine(e, j):
            return sum((own * other[j]).sum() for own, other in zip(e, self.clean)) / len(e)

        matched = [self.attacked(i, lambda e: cosine(e, t[i])) for i in self.all]
        u = self.target["wrong" if authors else "rival"].tolist()
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


@pytest.mark.parametrize("row, figures, score", [
    # Zhou & Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", CVPR 2022,
    # the table that compares defenses: ten figures and ERS as published
    ("CUB, undefended", (0, 100, 0, 99.9, 0.883, 1.762, 0, 0, 14.1, 0), 3.8),
    ("CUB, HM&ICS 8", (12.9, 40.9, 14.7, 33.7, 0.806, 0.487, 17.1, 13.2, 26.3, 2.3), 33.5),
    ("CARS, ACT 8", (19.3, 33.1, 20.3, 32.3, 0.413, 0.760, 18.4, 15.0, 28.6, 1.2), 39.8),
    ("SOP, HM 8", (29.9, 4.7, 31.6, 3.6, 0.455, 0.283, 39.3, 40.9, 38.8, 43.0), 61.7)])
def test_the_score_of_published_figures_is_the_published_score(row, figures, score):
    assert ers(dict(zip(FIGURES, figures))) == pytest.approx(score, abs=0.15)


@pytest.mark.parametrize("models, count, options", [
    ([linear()], 204, {"eps": 0.1, "steps": 2, "seed": 3}),
    ([linear(1), linear(2, dim=4)], 120, {"eps": 0.06, "steps": 2})])
def test_every_figure_equals_a_loop_over_images_and_the_mean_of_members(models, count, options):
    images, labels = tiny(count)
    found = figures_of(models, images, labels, **options)
    assert tuple(found) == FIGURES
    assert_close(found, Naive(models, images, labels, attack_of("ers", **options)).figures())
    assert len(models) > 1 or all(5 < found[name] < 75 for name in (*RECALLS, "GTT"))


def test_a_collapsed_model_finds_nothing_and_has_finite_figures():
    images, labels = tiny()
    collapsed = lambda x: F.normalize(1 + 0 * x.flatten(1), dim=1)              # noqa: E731
    found = figures_of([collapsed], images, labels, steps=2)
    assert all(math.isfinite(value) for value in found.values())
    assert [found[name] for name in (*RECALLS, *RANKS, "ES:D")] == [0] * 8
    assert found["TMA"] == pytest.approx(1) and math.isfinite(ers(found))


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


@pytest.mark.parametrize("count, near, members", [(199, 1, 1), (204, 2, 2), (305, 3, 1)])
def test_targets_are_what_a_loop_over_images_finds(count, near, members):
    images, labels = tiny(count)
    models = [linear(i) for i in range(members)]
    clean, mine, slips = [model(images) for model in models], labels.tolist(), 0
    target = {name: rows.tolist() for name, rows in
              ers_targets(retrieval_of(models, images, labels), 0).items()}
    places = {name: set() for name in ("near query", "near candidate")}
    for i in range(count):
        d = sum((own - own[i]).norm(dim=1) for own in clean).tolist()    # a sum orders as a mean
        order = sorted((j for j in range(count) if j != i), key=d.__getitem__)
        assert target["top"][i] == order[0]
        assert all(target[name][i] != i for name in target if name != "wrong")
        assert target["rival"][i] == next(j for j in order if mine[j] != mine[i])
        for name in places:
            assert target[name][i] in order[:near]
            places[name].add(order.index(target[name][i]))
        # the authors' slip: the nearest of a class other than the top's, as a place among those
        apart = [j for j in range(count) if mine[j] != mine[order[0]]]
        found = next(j for j in order if j in apart)
        assert target["wrong"][i] == apart.index(found)
        slips += target["wrong"][i] != found
    assert all(places[name] == set(range(near)) for name in places) and slips > count / 4


# ---- the slips of the authors' code

def test_the_variant_of_the_authors_equals_a_loop_with_their_slips():
    # own clean copy among the candidates, shares of n, GTM's wrong image, LTM's own clean copy
    images, labels = tiny(140)
    options = {"eps": 0.05, "steps": 2, "objective": "ers-authors"}
    found = figures_of([linear()], images, labels, **options)
    wanted = Naive([linear()], images, labels, attack_of("ers", **options), True).figures()
    assert_close(found, wanted, (*RANKS, "TMA", "LTM", "GTM"))
    # the slope of ES's first step is near to rounding noise
    assert found["ES:D"] == pytest.approx(wanted["ES:D"], rel=0.05)
    assert found["ES:R"] == pytest.approx(wanted["ES:R"], abs=3)
    corrected = figures_of([linear()], images, labels, eps=0.05, steps=2)
    assert all(abs(found[name] - corrected[name]) > 0.1 for name in (*RANKS, "LTM", "GTM"))
    assert found["TMA"] == corrected["TMA"]


def test_the_authors_shift_starts_at_the_image_with_a_target_that_is_off(monkeypatch):
    # 1e-7 is added for the first step, and torch's pairwise_distance always takes 1e-6
    images, labels = tiny()
    calls, pgd = [], common.pgd

    def recorded(objective, images, eps, step, steps, *rest, start=None):
        begin = images if start is None else start
        calls.append((steps, rest, float(objective(images).mean()), torch.equal(begin, images)))
        return pgd(objective, images, eps, step, steps, *rest, start=start)

    monkeypatch.setattr(evaluator, "pgd", recorded)
    figures_of([linear()], images, labels, objective="ers-authors", eps=0.1, steps=3)
    shifts = [call for call in calls if 0 < call[2] < 1e-5]
    assert [(steps, at_image) for steps, _, _, at_image in shifts] == [
        (1, True), (2, False), (1, True), (1, False)]
    assert [rest for steps, rest, _, at_image in shifts if at_image] == [(False,)] * 2
    assert [value / 6 ** 0.5 for _, _, value, _ in shifts] == pytest.approx(
        [9e-7, 1e-6, 9e-7, 1e-6], rel=0.03)
    calls.clear()
    figures_of([linear()], images, labels, eps=0.1, steps=3)
    assert [rest for _, rest, _, _ in calls if rest] == [(True,)] + [(False,)] * 8


def test_a_record_of_ers_has_one_rule_and_the_seed_decides():
    images, labels = noisy_classes(classes=25, per_class=4)
    options = {"protocol": "ers", "steps": 1, "eps": 0.02}
    models = [network(), network(1)]
    first, again, other = (evaluate_robustness(models, images, labels, seed=seed, **options)
                           for seed in (0, 0, 1))
    (record,) = first["robust"]
    assert set(record) == ATTACK | {"rule", "scores", "limited", "seconds", "n_queries", "R@1",
                                    "ERS", *FIGURES}
    assert (record["protocol"], record["objective"], record["rule"]) == ("ers", "ers", "distance")
    assert set(record["scores"]) == {"distance"} and record["step"] == pytest.approx(0.0075)
    assert record["ERS"] == pytest.approx(ers(record)) and 0 < record["R@1"] < 1
    assert record["R@1"] == pytest.approx(first["clean"]["scores"]["concat"]["R@1"], abs=0.1)
    json.dumps(first, allow_nan=False)
    assert without_seconds(first) == without_seconds(again)
    assert all(record[name] != other["robust"][0][name] for name in ("CA+", "QA+", "TMA", "ES:D"))
    slips = evaluate_robustness(models, images, labels, objective="ers-authors", **options)
    assert slips["robust"][0]["ES:D"] == 0 < record["ES:D"]


def test_fewer_than_a_hundred_images_and_a_gallery_are_refused():
    images, labels = tiny(99)
    with pytest.raises(UserError, match="100 images.* 99"):
        evaluate_robustness(linear(), images, labels, protocol="ers", steps=1)
    images, labels = tiny()
    with pytest.raises(UserError, match="look each other up"):
        ers_figures(retrieval_of([linear()], images, labels, images, labels), attack_of("ers"))
