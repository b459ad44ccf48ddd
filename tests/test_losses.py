"""Losses and triplet mining against pytorch-metric-learning, naive loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from common import contrastive_loss, mine_triplets, proxy_anchor_loss, triplet_loss

SEEDS = (0, 1, 2)
HOW = ("random", "semihard", "softhard", "distance", "hardest")


def random_rows(rows, dim, seed):
    """Raw float64 vectors (rows, dim), a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64).requires_grad_()


def unit_rows(rows, dim, seed):
    return F.normalize(random_rows(rows, dim, seed).detach(), dim=1)


def chord_rows(*distances):
    """Points on the circle at these (signed) Euclidean distances from (1, 0)."""
    angles = [2 * math.asin(distance / 2) for distance in distances]
    points = [[math.cos(angle), math.sin(angle)] for angle in angles]
    return torch.tensor(points, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def value_and_grads(loss, *leaves):
    return loss.detach(), torch.autograd.grad(loss, leaves, retain_graph=True)


# ---- Proxy Anchor

# F.softplus is linear beyond 20, which costs a gradient up to 2e-9 times the scale
CLOSE = {"rtol": 1e-7, "atol": 1e-7}

PROXY_ANCHOR_LABELS = {
    "every class present": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "absent classes": [0, 0, 3, 3, 3, 0, 3, 0, 0, 3],
    "one class only": [2] * 10,
}


@pytest.mark.parametrize("labels", PROXY_ANCHOR_LABELS.values(), ids=PROXY_ANCHOR_LABELS)
@pytest.mark.parametrize("seed", SEEDS)
def test_proxy_anchor_equals_pml_in_value_and_gradient(labels, seed):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, proxies = random_rows(10, 6, seed), random_rows(5, 6, seed + 100)
    labels = torch.tensor(labels)
    ours = value_and_grads(proxy_anchor_loss(embeddings, labels, proxies), embeddings, proxies)
    pml = losses.ProxyAnchorLoss(num_classes=5, embedding_size=6, margin=0.1, alpha=32)
    pml.proxies.data = proxies.detach().clone()
    theirs = value_and_grads(pml(embeddings, labels), embeddings, pml.proxies)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("margin, scale", [(0.1, 32.0), (0.0, 1.0), (0.3, 16.0)])
def test_proxy_anchor_with_two_classes_equals_pml(margin, scale):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, proxies = random_rows(4, 3, 0), random_rows(2, 3, 1)
    labels = torch.tensor([0, 1, 1, 0])
    loss = proxy_anchor_loss(embeddings, labels, proxies, margin=margin, scale=scale)
    pml = losses.ProxyAnchorLoss(num_classes=2, embedding_size=3, margin=margin, alpha=scale)
    pml.proxies.data = proxies.detach().clone()
    ours = value_and_grads(loss, embeddings, proxies)
    theirs = value_and_grads(pml(embeddings, labels), embeddings, pml.proxies)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_proxy_anchor_equals_the_printed_formula(seed):
    embeddings, proxies = unit_rows(8, 4, seed), unit_rows(6, 4, seed + 100)
    labels, margin, scale = torch.tensor([0, 0, 1, 1, 1, 4, 4, 0]), 0.1, 32.0
    pull = push = 0.0
    for c in range(6):
        cosines = [float(e @ proxies[c]) for e in embeddings]
        own = [math.exp(-scale * (s - margin)) for s, y in zip(cosines, labels) if y == c]
        others = [math.exp(scale * (s + margin)) for s, y in zip(cosines, labels) if y != c]
        pull += math.log(1 + sum(own))
        push += math.log(1 + sum(others))
    expected = pull / 3 + push / 6  # three classes are present, six have a proxy
    loss = proxy_anchor_loss(embeddings, labels, proxies)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_proxy_anchor_of_one_embedding_on_its_proxy_has_a_closed_form():
    embeddings = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    proxies = torch.eye(2, dtype=torch.float64)
    loss = proxy_anchor_loss(embeddings, torch.tensor([0]), proxies, margin=0.1, scale=2.0)
    pull = math.log(1 + math.exp(-2 * (1 - 0.1)))  # one class present
    push = math.log(1 + math.exp(2 * (0 + 0.1))) / 2  # class 0 has no negative: log(1 + 0)
    assert loss.item() == pytest.approx(pull + push, rel=1e-12)


def test_proxy_anchor_ignores_the_norms_of_its_inputs():
    embeddings, proxies, labels = unit_rows(6, 4, 0), unit_rows(3, 4, 1), torch.arange(6) % 3
    loss = proxy_anchor_loss(embeddings, labels, proxies)
    scaled = proxy_anchor_loss(7.0 * embeddings, labels, 0.01 * proxies)
    torch.testing.assert_close(loss, scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proxy_anchor_is_finite_at_scale_1e4(dtype):
    embeddings = random_rows(10, 6, 0).detach().to(dtype).requires_grad_()
    proxies = random_rows(5, 6, 1).detach().to(dtype).requires_grad_()
    labels = torch.tensor([0, 0, 3, 3, 3, 0, 3, 0, 0, 3])
    loss = proxy_anchor_loss(embeddings, labels, proxies, scale=1e4)
    for tensor in (loss, *torch.autograd.grad(loss, (embeddings, proxies))):
        assert torch.isfinite(tensor).all()


def test_proxy_anchor_passes_gradcheck():
    labels = torch.tensor([0, 2, 2, 0])
    leaves = random_rows(4, 3, 0), random_rows(3, 3, 1)
    assert torch.autograd.gradcheck(lambda e, p: proxy_anchor_loss(e, labels, p, scale=4.0), leaves)


# ---- triplet loss


def random_triplets(rows, dim, seed):
    """(raw leaf, its unit rows, labels, (a, p, n)) with triplets both active and inactive."""
    raw = random_rows(rows, dim, seed)
    labels = torch.arange(rows) // 2
    a = torch.arange(rows)
    n = (a + 2 + torch.randint(0, rows - 3, (rows,), generator=seeded(seed))) % rows
    n = torch.where(labels[n] == labels, (n + 2) % rows, n)
    return raw, F.normalize(raw, dim=1), labels, (a, a ^ 1, n)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
@pytest.mark.parametrize("seed", SEEDS)
def test_triplet_loss_equals_pml_in_value_and_gradient(squared, reduction, seed):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    raw, unit, labels, (a, p, n) = random_triplets(24, 5, seed)
    loss = triplet_loss(unit[a], unit[p], unit[n], margin=0.3, squared=squared, reduction=reduction)
    reducer = {"mean": reducers.MeanReducer, "nonzero": reducers.AvgNonZeroReducer}[reduction]()
    distance = distances.LpDistance(p=2, power=2 if squared else 1)
    oracle = losses.TripletMarginLoss(margin=0.3, reducer=reducer, distance=distance)
    ours = value_and_grads(loss, raw)
    theirs = value_and_grads(oracle(unit, labels, (a, p, n)), raw)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
def test_triplet_loss_equals_a_naive_loop(squared, reduction):
    _, unit, _, (a, p, n) = random_triplets(24, 5, 0)
    terms = []
    for i, j, k in zip(a, p, n):
        anchor, positive, negative = unit[i].tolist(), unit[j].tolist(), unit[k].tolist()
        near, far = math.dist(anchor, positive), math.dist(anchor, negative)
        terms.append(max(0.0, near ** (1 + squared) - far ** (1 + squared) + 0.2))
    active = sum(term > 0 for term in terms)
    assert 0 < active < len(terms)
    expected = sum(terms) / (len(terms) if reduction == "mean" else active)
    loss = triplet_loss(unit[a], unit[p], unit[n], squared=squared, reduction=reduction)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_triplet_defaults_are_margin_02_plain_distance_and_mean():
    anchor, positive = chord_rows(0.0, 0.0), chord_rows(0.5, 0.1)
    negative = chord_rows(-0.4, -1.0)
    loss = triplet_loss(anchor, positive, negative)
    assert loss.item() == pytest.approx((0.5 - 0.4 + 0.2) / 2, rel=1e-9)
    loss = triplet_loss(anchor, positive, negative, reduction="nonzero")
    assert loss.item() == pytest.approx(0.5 - 0.4 + 0.2, rel=1e-9)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
def test_triplet_loss_of_coinciding_points_is_the_margin_with_gradient_zero(squared, reduction):
    rows = [unit_rows(4, 3, 0).requires_grad_() for _ in range(3)]
    loss = triplet_loss(*rows, margin=0.2, squared=squared, reduction=reduction)
    assert loss.item() == pytest.approx(0.2, rel=1e-12)
    for grad in torch.autograd.grad(loss, rows):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
def test_triplet_loss_is_zero_with_a_graph_without_triplets_or_active_terms(reduction):
    empty = unit_rows(4, 3, 0).requires_grad_()
    loss = triplet_loss(empty[:0], empty[:0], empty[:0], reduction=reduction)
    (grad,) = torch.autograd.grad(loss, empty)
    assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))

    satisfied = chord_rows(0.0, 0.1, 1.5).requires_grad_()
    loss = triplet_loss(satisfied[:1], satisfied[1:2], satisfied[2:], reduction=reduction)
    (grad,) = torch.autograd.grad(loss, satisfied)
    assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


# ---- contrastive loss


@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
@pytest.mark.parametrize("margin", [1.0, 1.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_contrastive_loss_equals_pml_in_value_and_gradient(reduction, margin, seed):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, reducers

    raw, unit, labels, (a, p, n) = random_triplets(24, 5, seed)
    first, second = unit[torch.cat([a, a])], unit[torch.cat([p, n])]
    same = torch.arange(len(first)) < len(a)
    loss = contrastive_loss(first, second, same, margin=margin, reduction=reduction)
    reducer = {"mean": reducers.MeanReducer, "nonzero": reducers.AvgNonZeroReducer}[reduction]()
    oracle = losses.ContrastiveLoss(pos_margin=0, neg_margin=margin, reducer=reducer)
    ours = value_and_grads(loss, raw)
    theirs = value_and_grads(oracle(unit, labels, (a, p, n)), raw)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_contrastive_loss_averages_positive_and_negative_pairs_apart():
    first = chord_rows(0.0, 0.0, 0.0, 0.0, 0.0)
    second = chord_rows(0.3, 0.0, 0.4, 0.9, 1.7)
    same = torch.tensor([True, True, False, False, False])
    loss = contrastive_loss(first, second, same, reduction="mean")
    assert loss.item() == pytest.approx(0.3 / 2 + (0.6 + 0.1) / 3, rel=1e-9)
    loss = contrastive_loss(first, second, same, reduction="nonzero")
    assert loss.item() == pytest.approx(0.3 / 1 + (0.6 + 0.1) / 2, rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
def test_contrastive_loss_with_one_kind_of_pair_is_the_mean_of_that_kind(reduction):
    first, second = chord_rows(0.0, 0.0), chord_rows(0.3, 0.5)
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    assert contrastive_loss(first, second, yes, reduction=reduction).item() == pytest.approx(0.4)
    assert contrastive_loss(first, second, no, reduction=reduction).item() == pytest.approx(0.6)


@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
def test_contrastive_loss_without_terms_is_zero_with_a_graph(reduction):
    rows = chord_rows(0.0, 1.5).requires_grad_()
    no_pairs = contrastive_loss(
        rows[:0], rows[:0], torch.zeros(0, dtype=torch.bool), reduction=reduction
    )
    far_pair = contrastive_loss(rows[:1], rows[1:], torch.tensor([False]), reduction=reduction)
    for loss in (no_pairs, far_pair):
        (grad,) = torch.autograd.grad(loss, rows)
        assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reduction", ["mean", "nonzero"])
def test_contrastive_gradient_at_coinciding_points_is_zero(reduction):
    rows = [unit_rows(4, 3, 0).requires_grad_() for _ in range(2)]
    same = torch.tensor([True, True, False, False])
    loss = contrastive_loss(*rows, same, margin=1.0, reduction=reduction)
    assert loss.item() == pytest.approx(1.0, rel=1e-12)  # positive terms 0, negative terms 1
    for grad in torch.autograd.grad(loss, rows):
        assert torch.equal(grad, torch.zeros_like(grad))


# ---- mining


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", SEEDS)
def test_mined_triplets_have_the_right_labels_and_one_per_anchor(how, seed):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])  # row 5 is alone in its class
    a, p, n = mine_triplets(unit_rows(10, 4, seed), labels, how, seeded(seed))
    assert a.dtype == p.dtype == n.dtype == torch.int64
    assert a.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert (labels[a] == labels[p]).all() and (p != a).all() and (labels[a] != labels[n]).all()


@pytest.mark.parametrize("how", HOW)
def test_only_the_given_anchors_are_mined(how):
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    embeddings = unit_rows(6, 4, 0)
    a, p, n = mine_triplets(embeddings, labels, how, seeded(0), anchors=torch.tensor([0, 3, 4]))
    assert a.tolist() == [0, 3]  # row 4 has no positive
    assert (labels[a] == labels[p]).all() and (p != a).all() and (labels[a] != labels[n]).all()
    a, p, n = mine_triplets(embeddings, labels, how, seeded(0), anchors=torch.tensor([4]))
    assert len(a) == len(p) == len(n) == 0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=["one class", "singletons"])
def test_a_batch_without_triplets_gives_none(how, labels):
    triplets = mine_triplets(unit_rows(4, 3, 0), torch.tensor(labels), how, seeded(0))
    for index in triplets:
        assert index.shape == (0,) and index.dtype == torch.int64


@pytest.mark.parametrize("how", HOW)
def test_mining_is_a_function_of_the_generator(how):
    embeddings, labels = unit_rows(40, 4, 0), torch.arange(40) // 4
    torch.manual_seed(1)
    first = mine_triplets(embeddings, labels, how, seeded(5))
    torch.manual_seed(2)
    second = mine_triplets(embeddings, labels, how, seeded(5))
    other = mine_triplets(embeddings, labels, how, seeded(6))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert not torch.equal(first[1], other[1])  # 40 positives, each one of three


@pytest.mark.parametrize("how", HOW)
def test_mining_leaves_no_graph(how):
    embeddings = unit_rows(12, 4, 0).requires_grad_()
    labels = torch.arange(12) // 3
    for index in mine_triplets(embeddings, labels, how, seeded(0)):
        assert not index.requires_grad and index.device == embeddings.device
    assert embeddings.grad is None


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dim", [2, 3, 128, 512])
def test_collapsed_embeddings_still_give_valid_triplets(how, dim):
    labels = torch.arange(112) // 2
    embeddings = unit_rows(1, dim, 0).expand(112, dim).float()
    jitter = F.normalize(embeddings + 1e-4 * unit_rows(112, dim, 1).float(), dim=1)
    for rows in (embeddings, jitter):
        a, p, n = mine_triplets(rows, labels, how, seeded(0))
        assert a.tolist() == list(range(112)) and p.tolist() == [i ^ 1 for i in range(112)]
        assert (labels[n] != labels[a]).all() and (n >= 0).all()


def draws_of(anchor, embeddings, labels, how, times=40, **kwargs):
    """Sets of the positives and negatives that many seeds choose for one anchor row."""
    anchors = torch.tensor([anchor])
    drawn = [
        mine_triplets(embeddings, labels, how, seeded(seed), anchors=anchors, **kwargs)
        for seed in range(times)
    ]
    return {p.item() for _, p, _ in drawn}, {n.item() for _, _, n in drawn}


# Rows 0 (anchor) and 1 (its positive, at 0.5) are class 0; rows 2-5 are negatives.
ONE_POSITIVE = torch.tensor([0, 0, 1, 1, 1, 1])


def test_random_takes_every_positive_and_every_negative():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    positives, negatives = draws_of(0, unit_rows(7, 3, 0), labels, "random")
    assert positives == {1, 2, 3} and negatives == {4, 5, 6}


@pytest.mark.parametrize("how", ["random", "semihard", "distance", "hardest"])
def test_positives_are_uniform_among_the_other_images_of_the_class(how):
    stats = pytest.importorskip("scipy.stats")
    labels = torch.tensor([0] * 5 + [1] * 3)
    embeddings, counts = unit_rows(8, 3, 0), torch.zeros(5, 5)
    for seed in range(200):
        a, p, _ = mine_triplets(embeddings, labels, how, seeded(seed), anchors=torch.arange(5))
        counts[a, p] += 1
    for row in range(5):
        others = [counts[row, column].item() for column in range(5) if column != row]
        assert counts[row, row] == 0 and stats.chisquare(others).pvalue > 1e-4


def test_random_negatives_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    embeddings, counts = unit_rows(7, 3, 0), torch.zeros(7, 7)
    for seed in range(200):
        a, _, n = mine_triplets(embeddings, labels, "random", seeded(seed))
        counts[a, n] += 1
    for row in range(7):
        allowed = counts[row][labels != labels[row]]
        assert allowed.sum() == 200 and stats.chisquare(allowed.tolist()).pvalue > 1e-4


def test_semihard_takes_negatives_between_the_positive_and_the_margin():
    embeddings = chord_rows(0.0, 0.5, 0.4, 0.6, -0.65, 0.75)
    assert draws_of(0, embeddings, ONE_POSITIVE, "semihard") == ({1}, {3, 4})
    wide = draws_of(0, embeddings, ONE_POSITIVE, "semihard", margin=0.3)
    assert wide == ({1}, {3, 4, 5})


def test_semihard_without_a_valid_negative_takes_any():
    embeddings = chord_rows(0.0, 0.5, 0.1, -0.4, 0.9, -1.5)
    assert draws_of(0, embeddings, ONE_POSITIVE, "semihard") == ({1}, {2, 3, 4, 5})


def test_semihard_judges_a_negative_by_the_positive_that_was_drawn():
    labels = torch.tensor([0, 0, 0, 1, 1])
    embeddings = chord_rows(0.0, 0.2, 0.8, -0.3, -0.9)
    for seed in range(40):
        _, p, n = mine_triplets(
            embeddings, labels, "semihard", seeded(seed), anchors=torch.tensor([0])
        )
        assert (p.item(), n.item()) in {(1, 3), (2, 4)}


def test_softhard_takes_far_positives_and_near_negatives():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    embeddings = chord_rows(0.0, 0.2, 0.5, -0.8, 0.4, -0.7, 0.9, -1.2)
    # positives beyond the nearest negative (0.4), negatives within the farthest positive (0.8)
    assert draws_of(0, embeddings, labels, "softhard") == ({2, 3}, {4, 5})


def test_softhard_of_a_separated_class_takes_any_other_image_never_the_anchor():
    labels = torch.tensor([0, 0, 0, 1, 1])
    embeddings = chord_rows(0.0, 0.1, -0.2, 1.5, -1.6)
    assert draws_of(0, embeddings, labels, "softhard") == ({1, 2}, {3, 4})


def test_hardest_takes_the_nearest_negative_even_at_distance_zero():
    embeddings = chord_rows(0.0, 0.5, 0.4, -0.3, 0.9, -1.5)
    assert draws_of(0, embeddings, ONE_POSITIVE, "hardest") == ({1}, {3})
    embeddings = chord_rows(0.0, 0.5, 0.4, 0.0, 0.9, -1.5)
    assert draws_of(0, embeddings, ONE_POSITIVE, "hardest") == ({1}, {3})


@pytest.mark.parametrize("seed", SEEDS)
def test_hardest_equals_a_naive_loop(seed):
    embeddings, labels = unit_rows(20, 5, seed), torch.arange(20) // 4
    a, _, n = mine_triplets(embeddings, labels, "hardest", seeded(0))
    for i, k in zip(a.tolist(), n.tolist()):
        others = [j for j in range(20) if labels[j] != labels[i]]
        assert k == min(others, key=lambda j: (embeddings[i] - embeddings[j]).norm().item())


# ---- mining with given positives


def pair_rows(labels):
    """Even rows as anchors, the odd row after each as its positive."""
    anchors = torch.arange(0, len(labels), 2)
    return {"anchors": anchors, "partners": anchors + 1}


@pytest.mark.parametrize("how", ["random", "semihard", "distance", "hardest"])
@pytest.mark.parametrize("seed", SEEDS)
def test_given_positives_are_kept(how, seed):
    embeddings, labels = unit_rows(24, 4, seed), torch.arange(24) // 6
    a, p, n = mine_triplets(embeddings, labels, how, seeded(seed), **pair_rows(labels))
    assert a.tolist() == list(range(0, 24, 2)) and p.tolist() == list(range(1, 24, 2))
    assert (labels[a] != labels[n]).all()


def test_softhard_draws_its_own_positives_all_the_same():
    embeddings, labels = unit_rows(24, 4, 0), torch.arange(24) // 6
    given = mine_triplets(embeddings, labels, "softhard", seeded(0), **pair_rows(labels))
    anchors = torch.arange(0, 24, 2)
    own = mine_triplets(embeddings, labels, "softhard", seeded(0), anchors=anchors)
    assert all(torch.equal(x, y) for x, y in zip(given, own))
    assert given[1].tolist() != list(range(1, 24, 2))


@pytest.mark.parametrize("positive, negative", [(1, 3), (2, 4)])
def test_semihard_judges_a_negative_by_the_positive_that_was_given(positive, negative):
    labels = torch.tensor([0, 0, 0, 1, 1])
    embeddings = chord_rows(0.0, 0.2, 0.8, -0.3, -0.9)
    given = torch.tensor([positive])
    drawn = draws_of(0, embeddings, labels, "semihard", partners=given)
    assert drawn == ({positive}, {negative})


@pytest.mark.parametrize("how", ["random", "semihard", "distance", "hardest"])
def test_an_anchor_that_is_dropped_drops_its_positive_too(how):
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2])  # row 3 is alone in its class
    given = {"anchors": torch.tensor([3, 0, 6]), "partners": torch.tensor([1, 2, 4])}
    a, p, n = mine_triplets(unit_rows(7, 4, 0), labels, how, seeded(0), **given)
    assert a.tolist() == [0, 6] and p.tolist() == [2, 4] and (labels[a] != labels[n]).all()
    one_class = mine_triplets(unit_rows(7, 4, 0), torch.zeros(7), how, seeded(0), **given)
    assert [len(index) for index in one_class] == [0, 0, 0]


# ---- distance-weighted mining (Wu et al., ICCV 2017)


def fan(dim, distances):
    """Unit rows in R^dim: row 0 is the pole, the others lie at these distances from it."""
    rows = torch.zeros(1 + len(distances), dim, dtype=torch.float64)
    rows[0, 0] = 1
    for i, distance in enumerate(distances, start=1):
        side = F.normalize(torch.randn(dim - 1, generator=seeded(i), dtype=torch.float64), dim=0)
        rows[i, 0] = 1 - distance**2 / 2
        rows[i, 1:] = side * math.sqrt(1 - (1 - distance**2 / 2) ** 2)
    return rows


def inverse_density(distance, dim, low, high):
    """1 / q(D), with D clamped to at least `low`; 0 at and beyond `high`."""
    if high is not None and distance >= high:
        return 0.0
    distance = max(distance, 1e-4 if low is None else low)
    return distance ** (2 - dim) * (1 - distance**2 / 4) ** (-(dim - 3) / 2)


@pytest.mark.parametrize("low, high", [(0.5, 1.4), (0.5, None), (None, None), (0.8, 1.2)])
@pytest.mark.parametrize("dim", [2, 3, 4, 8])
def test_distance_weighted_draws_follow_the_inverse_density(dim, low, high):
    stats = pytest.importorskip("scipy.stats")
    distances = [0.3, 0.45, 0.7, 0.95, 1.1, 1.35, 1.6, 1.8]
    points = fan(dim, distances)
    copies = 250  # identical anchors, all of class 0: each call is 250 independent draws
    embeddings = torch.cat([points[:1].expand(copies, dim), points[1:]])
    labels = torch.cat([torch.zeros(copies, dtype=torch.int64), torch.ones(8, dtype=torch.int64)])
    counts = torch.zeros(8)
    for seed in range(8):
        a, _, n = mine_triplets(
            embeddings,
            labels,
            "distance",
            seeded(seed),
            anchors=torch.arange(copies),
            cutoffs=(low, high),
        )
        assert len(a) == copies
        counts += torch.bincount(n - copies, minlength=8)
    weights = torch.tensor([inverse_density(distance, dim, low, high) for distance in distances])
    assert (counts[weights == 0] == 0).all()
    expected = (weights / weights.sum() * counts.sum()).double()[weights > 0]
    observed = counts.double()[weights > 0]
    rare = expected < 5  # the usual condition of the chi-square test: pool the rare cells
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    if len(expected) > 1:
        expected = expected * (observed.sum() / expected.sum())
        assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


def test_distance_weights_default_to_the_cutoffs_05_and_14():
    points = fan(8, [0.3, 0.45, 1.5])
    labels = torch.tensor([0, 0, 1, 1, 1])
    embeddings = torch.cat([points[:1], points])
    _, negatives = draws_of(0, embeddings, labels, "distance")
    assert negatives == {2, 3}  # 0.3 and 0.45 weigh the same, 1.5 is excluded


def drawn_pairs(mine, embeddings, labels, copies, calls):
    """How often each of the B rows drew each other as its negative, counted over many copies."""
    rows, counts = len(labels), torch.zeros(len(labels), len(labels), dtype=torch.float64)
    embeddings, labels = embeddings.repeat(copies, 1), labels.repeat(copies)
    for call in range(calls):
        a, _, n = mine(embeddings, labels, call)
        counts.index_put_((a % rows, n % rows), counts.new_ones(len(a)), accumulate=True)
    return counts


def mine_by_distance(embeddings, labels, seed):
    return mine_triplets(embeddings, labels, "distance", seeded(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_of_a_batch_follows_its_own_inverse_density(seed):
    stats = pytest.importorskip("scipy.stats")
    embeddings, labels = unit_rows(10, 4, seed), torch.arange(10) // 2
    counts = drawn_pairs(mine_by_distance, embeddings, labels, copies=25, calls=20)
    assert (counts.sum(1) == 500).all()
    for row in range(10):
        gaps = (embeddings - embeddings[row]).norm(dim=1)
        weights = torch.tensor([inverse_density(gap.item(), 4, 0.5, 1.4) for gap in gaps])
        weights[labels == labels[row]] = 0
        assert weights.sum() > 0 and (counts[row][weights == 0] == 0).all()
        expected = (weights / weights.sum() * 500).double()[weights > 0]
        if len(expected) > 1:
            observed = counts[row][weights > 0]
            expected *= observed.sum() / expected.sum()
            assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


def test_distance_weights_agree_with_the_pml_miner():
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    stats = pytest.importorskip("scipy.stats")
    embeddings, labels = unit_rows(12, 6, 0), torch.arange(12) // 2
    miner = miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)
    torch.manual_seed(0)
    ours = drawn_pairs(mine_by_distance, embeddings, labels, copies=25, calls=20)
    theirs = drawn_pairs(lambda rows, classes, _: miner(rows, classes), embeddings, labels, 10, 4)
    compared = 0
    for row in range(12):
        seen = (ours[row] + theirs[row]) > 0
        if theirs[row].sum() > 0 and seen.sum() > 1:  # PML drops rows without a near negative
            table = torch.stack([ours[row][seen], theirs[row][seen]]).numpy()
            assert stats.chi2_contingency(table).pvalue > 1e-4
            compared += 1
    assert compared >= 6


@pytest.mark.parametrize("spread", [None, 0.05], ids=["random", "tight cone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_112_anchors_get_a_negative_at_512_dimensions(spread, dtype):
    embeddings, labels = unit_rows(112, 512, 0), torch.arange(112) // 2
    if spread is not None:
        embeddings = F.normalize(unit_rows(1, 512, 1) + spread * embeddings, dim=1)
    embeddings[7] = F.normalize(embeddings[20] + 1e-3 * unit_rows(1, 512, 2)[0], dim=0)
    a, _, n = mine_triplets(embeddings.to(dtype), labels, "distance", seeded(0))
    assert a.tolist() == list(range(112)) and (labels[n] != labels[a]).all()


def test_distance_falls_back_to_the_nearest_negative_beyond_the_upper_cutoff():
    points = fan(8, [1.7, 1.5, 1.9, 1.6])
    embeddings = torch.cat([points[:1], points])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    assert draws_of(0, embeddings, labels, "distance") == ({1}, {3})


@pytest.mark.parametrize("how", HOW)
def test_antipodal_negatives_are_no_problem(how):
    embeddings = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    for cutoffs in ((0.5, 1.4), (None, None)):
        a, p, n = mine_triplets(embeddings, labels, how, seeded(0), cutoffs=cutoffs)
        assert a.tolist() == [0, 1, 2, 3] and p.tolist() == [1, 0, 3, 2]
        assert (labels[n] != labels[a]).all()
