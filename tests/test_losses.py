"""Losses and triplet mining against pytorch-metric-learning, naive loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from common import contrastive_loss, mine_pairs, mine_triplets, proxy_anchor_loss, triplet_loss

SEEDS = (0, 1, 2)
HOW = ("random", "semihard", "softhard", "distance", "hardest")
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "nonzero"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_rows(rows, dim, seed):
    """Raw float64 vectors (rows, dim), a leaf that wants a gradient."""
    rows = torch.randn(rows, dim, generator=seeded(seed), dtype=torch.float64)
    return rows.requires_grad_()


def unit_rows(rows, dim, seed):
    return F.normalize(random_rows(rows, dim, seed).detach(), dim=1)


def chord_rows(*distances):
    """Points on the circle at these (signed) Euclidean distances from (1, 0)."""
    angles = 2 * torch.tensor(distances, dtype=torch.float64).div(2).asin()
    return torch.stack([angles.cos(), angles.sin()], 1)


def value_and_grads(loss, *leaves):
    return loss.detach(), torch.autograd.grad(loss, leaves, retain_graph=True)


# ---- Proxy Anchor
# F.softplus is linear beyond 20, which costs a gradient up to 2e-9 times the scale
CLOSE = {"rtol": 1e-7, "atol": 1e-7}


@pytest.mark.parametrize("labels, margin, scale", [
    ([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], 0.1, 32.0),                  # every class present
    ([0, 0, 3, 3, 3, 0, 3, 0, 0, 3], 0.1, 32.0),                  # absent classes
    ([2] * 10, 0.1, 32.0),                                        # one class only
    ([0, 1, 1, 0], 0.0, 1.0), ([0, 4, 1, 1], 0.3, 16.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_proxy_anchor_equals_pml_in_value_and_gradient(labels, margin, scale, seed):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, proxies = random_rows(len(labels), 6, seed), random_rows(5, 6, seed + 100)
    labels = torch.tensor(labels)
    loss = proxy_anchor_loss(embeddings, labels, proxies, margin=margin, scale=scale)
    pml = losses.ProxyAnchorLoss(num_classes=5, embedding_size=6, margin=margin, alpha=scale)
    pml.proxies.data = proxies.detach().clone()
    ours = value_and_grads(loss, embeddings, proxies)
    theirs = value_and_grads(pml(embeddings, labels), embeddings, pml.proxies)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    if (margin, scale) == (0.1, 32.0):                            # the defaults, whatever the norms
        for default in (proxy_anchor_loss(embeddings, labels, proxies),
                        proxy_anchor_loss(7 * embeddings, labels, 0.01 * proxies)):
            torch.testing.assert_close(default, loss, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proxy_anchor_is_finite_at_scale_1e4(dtype):
    embeddings = random_rows(10, 6, 0).detach().to(dtype).requires_grad_()
    proxies = random_rows(5, 6, 1).detach().to(dtype).requires_grad_()
    labels = torch.tensor([0, 0, 3, 3, 3, 0, 3, 0, 0, 3])
    loss = proxy_anchor_loss(embeddings, labels, proxies, scale=1e4)
    for tensor in (loss, *torch.autograd.grad(loss, (embeddings, proxies))):
        assert torch.isfinite(tensor).all()


# ---- triplet and contrastive loss
def random_triplets(rows, dim, seed):
    """(raw leaf, its unit rows, labels, (a, p, n)) with triplets both active and inactive."""
    raw = random_rows(rows, dim, seed)
    labels = torch.arange(rows) // 2
    a = torch.arange(rows)
    n = (a + 2 + torch.randint(0, rows - 3, (rows,), generator=seeded(seed))) % rows
    n = torch.where(labels[n] == labels, (n + 2) % rows, n)
    return raw, F.normalize(raw, dim=1), labels, (a, a ^ 1, n)


@REDUCTIONS
@pytest.mark.parametrize("seed", SEEDS)
def test_triplet_loss_equals_pml_and_a_naive_loop(reduction, seed):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, reducers

    raw, unit, labels, (a, p, n) = random_triplets(24, 5, seed)
    loss = triplet_loss(unit[a], unit[p], unit[n], margin=0.3, reduction=reduction)
    reducer = {"mean": reducers.MeanReducer, "nonzero": reducers.AvgNonZeroReducer}[reduction]()
    oracle = losses.TripletMarginLoss(margin=0.3, reducer=reducer, distance=distances.LpDistance())
    ours = value_and_grads(loss, raw)
    theirs = value_and_grads(oracle(unit, labels, (a, p, n)), raw)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)

    rows = unit.tolist()
    terms = [max(0.0, math.dist(rows[i], rows[j]) - math.dist(rows[i], rows[k]) + 0.3)
             for i, j, k in zip(a, p, n)]
    active = sum(term > 0 for term in terms)
    assert 0 < active < len(terms)
    expected = sum(terms) / (len(terms) if reduction == "mean" else active)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    if reduction == "mean":                                            # the default
        assert torch.equal(triplet_loss(unit[a], unit[p], unit[n], 0.3), loss)


@REDUCTIONS
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


@REDUCTIONS
def test_coinciding_points_cost_the_margin_and_have_gradient_zero(reduction):
    rows = [unit_rows(4, 3, 0).requires_grad_() for _ in range(3)]
    same = torch.tensor([True, True, False, False])
    for loss, margin in ((triplet_loss(*rows, reduction=reduction), 0.2),
                         (contrastive_loss(*rows[:2], same, reduction=reduction), 1.0)):
        assert loss.item() == pytest.approx(margin, rel=1e-12)
        for grad in torch.autograd.grad(loss, rows, materialize_grads=True):
            assert torch.equal(grad, torch.zeros_like(grad))


@REDUCTIONS
def test_without_active_terms_a_loss_is_zero_and_has_a_graph(reduction):
    rows = chord_rows(0.0, 0.1, 1.5).requires_grad_()
    near, far, none = rows[:1], rows[2:], rows[:0]
    no, yes = torch.tensor([False]), torch.tensor([True])
    for loss in (triplet_loss(none, none, none, reduction=reduction),
                 triplet_loss(near, rows[1:2], far, reduction=reduction),
                 contrastive_loss(none, none, no[:0], reduction=reduction),
                 contrastive_loss(near, far, no, reduction=reduction),
                 contrastive_loss(near, near, yes, reduction=reduction)):
        (grad,) = torch.autograd.grad(loss, rows)
        assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


# ---- mining
def check_triplets(triplets, labels, anchors):
    """int64 rows: these anchors, a positive that is another row, a negative of another class."""
    a, p, n = triplets
    assert a.tolist() == anchors
    assert all(rows.dtype == torch.int64 and not rows.requires_grad for rows in triplets)
    assert (labels[a] == labels[p]).all() and (p != a).all() and (labels[a] != labels[n]).all()


@pytest.mark.parametrize("how", HOW)
def test_mined_triplets_have_the_right_labels_and_one_per_anchor(how):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])              # row 5 is alone in its class
    for seed in SEEDS:
        rows = unit_rows(10, 4, seed).requires_grad_()
        found = mine_triplets(rows, labels, how, seeded(seed))
        check_triplets(found, labels, [0, 1, 2, 3, 4, 6, 7, 8, 9])
        torch.manual_seed(seed)                             # a function of the generator alone
        assert all(map(torch.equal, found, mine_triplets(rows, labels, how, seeded(seed))))
        some = mine_triplets(rows, labels, how, seeded(seed), anchors=torch.tensor([8, 5, 0]))
        check_triplets(some, labels, [8, 0])
    for classes in ([5], [0] * 4, [0, 1, 2, 3]):                        # nobody has both
        classes = torch.tensor(classes)
        check_triplets(mine_triplets(rows[:len(classes)], classes, how), classes, [])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dim", [2, 3, 128, 512])
def test_collapsed_antipodal_and_not_finite_embeddings_give_valid_triplets(how, dim):
    labels = torch.arange(112) // 2
    collapsed = unit_rows(1, dim, 0).expand(112, dim).float()
    jitter = F.normalize(collapsed + 1e-4 * unit_rows(112, dim, 1).float(), dim=1)
    antipodal = collapsed * torch.where(labels % 2 == 0, 1, -1)[:, None]
    broken = jitter.clone()
    broken[5], broken[9, 0] = torch.nan, torch.inf
    for rows in (collapsed, jitter, antipodal, broken):
        for cutoffs in ((0.5, 1.4), (None, None)):
            found = mine_triplets(rows, labels, how, seeded(0), cutoffs=cutoffs)
            check_triplets(found, labels, list(range(112)))


def draws_of(anchor, embeddings, labels, how, times=40, **options):
    """Sets of the positives and negatives that many seeds choose for one anchor row."""
    drawn = [mine_triplets(embeddings, labels, how, seeded(seed), anchors=torch.tensor([anchor]),
                           **options) for seed in range(times)]
    return {p.item() for _, p, _ in drawn}, {n.item() for _, _, n in drawn}


@pytest.mark.parametrize("how", ["random", "semihard", "distance", "hardest"])
def test_positives_are_uniform_among_the_other_images_of_the_class(how):
    labels = torch.tensor([0] * 5 + [1] * 3)
    embeddings, positives, negatives = unit_rows(8, 3, 0), torch.zeros(8, 8), torch.zeros(8, 8)
    for seed in range(200):
        a, p, n = mine_triplets(embeddings, labels, how, seeded(seed))
        positives[a, p] += 1
        negatives[a, n] += 1
    for row in range(8):
        others = (labels == labels[row]) & (torch.arange(8) != row)
        assert_drawn_by(others, positives[row])
        if how == "random":                                             # so are its negatives
            assert_drawn_by(labels != labels[row], negatives[row])


# Row 0 is the anchor; the numbers are distances from it, their signs a side.
ONE, TWO, THREE = [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("how, labels, distances, options, positives, negatives", [
    # between the positive and the margin; without such a negative: any
    ("semihard", ONE, (0, 0.5, 0.4, 0.6, -0.65, 0.75), {}, {1}, {3, 4}),
    ("semihard", ONE, (0, 0.5, 0.4, 0.6, -0.65, 0.75), {"margin": 0.3}, {1}, {3, 4, 5}),
    ("semihard", ONE, (0, 0.5, 0.1, -0.4, 0.9, -1.5), {}, {1}, {2, 3, 4, 5}),
    # judged by the positive that is given
    ("semihard", TWO, (0, 0.2, 0.8, -0.3, -0.9), {"partners": torch.tensor([1])}, {1}, {3}),
    ("semihard", TWO, (0, 0.2, 0.8, -0.3, -0.9), {"partners": torch.tensor([2])}, {2}, {4}),
    # positives beyond the nearest negative (0.4), negatives within the farthest positive (0.8);
    # in a separated class any other image, never the anchor itself
    ("softhard", THREE, (0, 0.2, 0.5, -0.8, 0.4, -0.7, 0.9, -1.2), {}, {2, 3}, {4, 5}),
    ("softhard", TWO, (0, 0.1, -0.2, 1.5, -1.6), {}, {1, 2}, {3, 4}),
    ("hardest", ONE, (0, 0.5, 0.4, -0.3, 0.9, -1.5), {}, {1}, {3}),
    ("hardest", ONE, (0, 0.5, 0.4, 0.0, 0.9, -1.5), {}, {1}, {3})])
def test_each_sampler_takes_what_it_says(how, labels, distances, options, positives, negatives):
    drawn = draws_of(0, chord_rows(*distances), torch.tensor(labels), how, **options)
    assert drawn == (positives, negatives)


@pytest.mark.parametrize("how", HOW)
def test_pairs_keep_their_partner_and_softhard_draws_its_own(how):
    embeddings, labels = unit_rows(24, 4, 0), torch.arange(24) // 6
    torch.manual_seed(0)
    triplets = mine_pairs(embeddings, labels, how)
    check_triplets(triplets, labels, list(range(0, 24, 2)))
    assert (triplets[1].tolist() == list(range(1, 24, 2))) == (how != "softhard")
    if how != "softhard":                  # an anchor that is dropped drops its partner, too
        labels = torch.tensor([0, 0, 0, 1, 2, 2, 2])                    # row 3 is alone
        given = {"anchors": torch.tensor([3, 0, 6]), "partners": torch.tensor([1, 2, 4])}
        triplets = mine_triplets(embeddings[:7], labels, how, seeded(0), **given)
        check_triplets(triplets, labels, [0, 6])
        assert triplets[1].tolist() == [2, 4]


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


def assert_drawn_by(weights, counts):
    """Nothing of weight 0 was drawn, and the rest fits a chi-square test, rare cells pooled."""
    stats = pytest.importorskip("scipy.stats")
    weights, counts = torch.as_tensor(weights).double(), counts.double()
    assert weights.sum() > 0 and (counts[weights == 0] == 0).all()
    expected = (weights / weights.sum() * counts.sum())[weights > 0]
    observed, rare = counts[weights > 0], expected < 5
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    if len(expected) > 1:
        assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("low, high", [(0.5, 1.4), (0.5, None), (None, None), (0.8, 1.2)])
@pytest.mark.parametrize("dim", [2, 3, 4, 8])
def test_distance_weighted_draws_follow_the_inverse_density(dim, low, high):
    distances = [0.3, 0.45, 0.7, 0.95, 1.1, 1.35, 1.6, 1.8]
    points, copies = fan(dim, distances), 250      # identical anchors: each call is 250 draws
    embeddings = torch.cat([points[:1].expand(copies, dim), points[1:]])
    labels = torch.cat([torch.zeros(copies), torch.ones(8)]).long()
    counts = torch.zeros(8)
    for seed in range(8):
        a, _, n = mine_triplets(embeddings, labels, "distance", seeded(seed),
                                anchors=torch.arange(copies), cutoffs=(low, high))
        assert len(a) == copies
        counts += torch.bincount(n - copies, minlength=8)
    assert_drawn_by([inverse_density(distance, dim, low, high) for distance in distances], counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_do_not_underflow_at_512_dimensions(dtype):
    embeddings, labels = unit_rows(112, 512, 0), torch.arange(112) // 2
    embeddings[7] = F.normalize(embeddings[20] + 1e-3 * unit_rows(1, 512, 2)[0], dim=0)
    cone = F.normalize(unit_rows(1, 512, 1) + 0.05 * embeddings, dim=1)
    for rows in (embeddings, cone):
        found = mine_triplets(rows.to(dtype), labels, "distance", seeded(0))
        check_triplets(found, labels, list(range(112)))
    assert draws_of(7, embeddings.to(dtype), labels, "distance", cutoffs=(None, None))[1] == {20}


def test_distance_falls_back_to_the_nearest_negative_beyond_the_upper_cutoff():
    points = fan(8, [1.7, 1.5, 1.9, 1.6])
    assert draws_of(0, torch.cat([points[:1], points]), torch.tensor(ONE), "distance") == ({1}, {3})
