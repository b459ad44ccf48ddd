"""Retrieval, clustering and voting against brute force, scikit-learn, PML and hand-made cases."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import (
    CLASSES,
    ami,
    kmeans,
    map_at_r,
    metrics_by_rule,
    nmi,
    pairwise_f1,
    random_stream,
    ranking_scores,
    recall_at_k,
    recall_interval,
    top_candidates,
    vote_clusters,
    vote_recall,
)

SEEDS = (0, 1, 2)
KS = (1, 2, 4, 8)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unit_rows(rows, dim, seed):
    generator = seeded(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def random_labels(rows, classes, seed):
    return torch.randint(0, classes, (rows,), generator=seeded(seed))


def ordered_relevance(query, own_label, gallery, gallery_labels, skip):
    """Is it relevant?, for all candidates from near to far; at a tie the irrelevant come first."""
    candidates = []
    for j in range(len(gallery)):
        if j != skip:
            relevant = bool(gallery_labels[j] == own_label)
            candidates.append((math.dist(query, gallery[j]), relevant))
    return [relevant for _, relevant in sorted(candidates)]  # False sorts before True


def brute_force(embeddings, labels, ks=KS, gallery=None, gallery_labels=None):
    """(Recall@K, mAP@R) by their definitions, one query at a time."""
    leave_out = gallery_labels is None
    gallery = embeddings if gallery is None else gallery
    gallery_labels = labels if gallery_labels is None else gallery_labels
    gallery = gallery.tolist()
    hits, average_precisions = {k: 0 for k in ks}, []
    for i, query in enumerate(embeddings.tolist()):
        order = ordered_relevance(
            query, labels[i], gallery, gallery_labels, skip=i if leave_out else None
        )
        for k in ks:
            hits[k] += any(order[:k])
        r = sum(order)
        if r > 0:
            precisions = [sum(order[: j + 1]) / (j + 1) for j in range(r) if order[j]]
            average_precisions.append(sum(precisions) / r)
    recall = {k: hit / len(labels) for k, hit in hits.items()}
    return recall, sum(average_precisions) / max(1, len(average_precisions))


def assert_equals_brute_force(embeddings, labels, **gallery):
    recall, mean_ap = brute_force(embeddings, labels, **gallery)
    assert recall_at_k(embeddings, labels, KS, **gallery) == pytest.approx(recall, abs=1e-12)
    assert map_at_r(embeddings, labels, **gallery) == pytest.approx(mean_ap, abs=1e-9)


# ---- Recall@K and mAP@R


@pytest.mark.parametrize("dim", [2, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_of_random_embeddings_equals_brute_force(dim, seed):
    assert_equals_brute_force(unit_rows(90, dim, seed), random_labels(90, 12, seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_of_float32_embeddings_equals_brute_force(seed):
    assert_equals_brute_force(unit_rows(90, 16, seed).float(), random_labels(90, 12, seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_is_by_euclidean_distance_whatever_the_norms(seed):
    lengths = 0.5 + torch.rand(90, 1, generator=seeded(seed), dtype=torch.float64)
    assert_equals_brute_force(lengths * unit_rows(90, 4, seed), random_labels(90, 12, seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_against_the_same_images_masks_the_own_row(seed):
    clean = unit_rows(60, 8, seed)
    attacked = F.normalize(clean + 0.3 * unit_rows(60, 8, seed + 10), dim=1)
    assert_equals_brute_force(attacked, random_labels(60, 10, seed), gallery=clean)


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_against_another_set_masks_nothing(seed):
    queries, gallery = unit_rows(40, 8, seed), unit_rows(70, 8, seed + 10)
    gallery[:40] = queries  # would be masked if the function confused the two forms
    labels, gallery_labels = random_labels(40, 10, seed), random_labels(70, 10, seed + 10)
    gallery_labels[:40] = (labels + 1) % 10
    assert_equals_brute_force(queries, labels, gallery=gallery, gallery_labels=gallery_labels)


def test_a_query_found_in_its_template_gallery_does_not_count_but_its_class_does():
    clean = torch.eye(4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    attacked = clean[[1, 0, 2, 3]]  # rows 0 and 1 now lie on each other's clean image
    recall = recall_at_k(attacked, labels, (1,), gallery=clean)
    assert recall[1] == 0.5  # rows 2 and 3 find only ties at sqrt(2)
    recall = recall_at_k(clean, labels, (1,), gallery=clean, gallery_labels=labels)
    assert recall[1] == 1  # as another set, every query finds its copy


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_with_exact_ties_equals_pessimistic_brute_force(seed):
    few = torch.eye(6, dtype=torch.float64)  # all gaps are exactly 0 or sqrt(2)
    chosen = random_labels(60, 6, seed + 10)
    assert_equals_brute_force(few[chosen], random_labels(60, 5, seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_retrieval_with_duplicated_images_equals_pessimistic_brute_force(seed, dtype):
    rows = unit_rows(25, 128, seed).to(dtype)
    chosen = random_labels(120, 25, seed + 10)
    assert_equals_brute_force(rows[chosen], random_labels(120, 6, seed))


def test_one_hot_classes_are_perfect():
    labels = torch.arange(12) % 3
    embeddings = torch.eye(3)[labels]
    assert recall_at_k(embeddings, labels) == {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
    assert map_at_r(embeddings, labels) == 1.0


def test_swapped_one_hots_are_all_wrong():
    labels = torch.tensor([0, 0, 1, 1])
    embeddings = torch.eye(2)[torch.tensor([0, 1, 0, 1])]  # each lies on an image of another class
    assert recall_at_k(embeddings, labels, (1, 2, 3)) == {1: 0.0, 2: 0.0, 3: 1.0}
    assert map_at_r(embeddings, labels) == 0.0


def test_five_points_on_an_arc_by_hand():
    angles = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 1, 0, 0, 1])
    # neighbours, + if relevant: 0: 1- 2+ 3+ 4-    1: 0- 2- 3- 4+    2: 1- 0+ 3+ 4- (0 ties with 3)
    #                            3: 2+ 4- 1- 0+    4: 3- 2- 1+ 0-
    recall = recall_at_k(embeddings, labels, (1, 2, 3, 4))
    assert recall == pytest.approx({1: 1 / 5, 2: 3 / 5, 3: 4 / 5, 4: 1.0})
    # AP@R, R = 2 for class 0 and 1 for class 1: (0 + 1/2)/2, 0, (0 + 1/2)/2, (1 + 0)/2, 0
    assert map_at_r(embeddings, labels) == pytest.approx((0.25 + 0 + 0.25 + 0.5 + 0) / 5)


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_agrees_with_pml(seed):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    labels = random_labels(200, 15, seed)
    centres = unit_rows(15, 8, seed)
    embeddings = F.normalize(centres[labels] + 0.8 * unit_rows(200, 8, seed + 10), dim=1)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        kmeans_func=lambda *_: None,
    )
    theirs = calculator.get_accuracy(embeddings, labels)
    assert 0.2 < theirs["precision_at_1"] < 0.98  # a setting where both can be wrong
    assert recall_at_k(embeddings, labels, (1,))[1] == pytest.approx(theirs["precision_at_1"])
    mean_ap = theirs["mean_average_precision_at_r"]
    assert map_at_r(embeddings, labels) == pytest.approx(mean_ap, abs=1e-6)


LABEL_ORDERS = {
    "sorted": lambda n: torch.arange(n) * 2 // n,
    "reversed": lambda n: (torch.arange(n) * 2 // n).flip(0),
    "alternating": lambda n: torch.arange(n) % 2,
    "many classes": lambda n: torch.arange(n) // 2,
    "shuffled": lambda n: (torch.arange(n) % 2)[torch.randperm(n, generator=seeded(0))],
}


@pytest.mark.parametrize("order", LABEL_ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [7, 50, 100, 257, 1001])
def test_a_collapsed_model_scores_zero(order, dtype, rows):
    labels = LABEL_ORDERS[order](rows)
    ks = [k for k in KS if k <= (3 if rows == 7 else 8)]  # of 7 images at least 3 are irrelevant
    nothing = {k: 0.0 for k in ks}
    points = [(dim, seed) for dim in (64, 128, 130) for seed in range(4)]
    for dim, seed in points if rows <= 100 else [(128, 0), (128, 1)]:
        # a matrix product rounds identical rows alike for some values and sizes only
        collapsed = unit_rows(1, dim, 10 * rows + seed).to(dtype).expand(rows, dim).contiguous()
        template = {"gallery": collapsed.clone()}
        twice = torch.cat([labels, labels.flip(0)])
        other_set = {"gallery": collapsed.repeat(2, 1), "gallery_labels": twice}
        for gallery in ({}, template, other_set):
            assert recall_at_k(collapsed, labels, ks, **gallery) == nothing
        assert map_at_r(collapsed, labels) == map_at_r(collapsed, labels, **template) == 0


def test_the_order_of_the_images_does_not_matter():
    rows, labels = unit_rows(20, 16, 0)[random_labels(80, 20, 1)], random_labels(80, 6, 2)
    shuffle = torch.randperm(80, generator=seeded(3))
    assert recall_at_k(rows, labels) == recall_at_k(rows[shuffle], labels[shuffle])
    assert map_at_r(rows, labels) == pytest.approx(map_at_r(rows[shuffle], labels[shuffle]))


def test_a_singleton_is_a_miss_in_recall_and_left_out_of_map():
    embeddings = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2])]
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert recall_at_k(embeddings, labels, (1, 4)) == pytest.approx({1: 0.8, 4: 0.8})
    assert map_at_r(embeddings, labels) == 1.0
    only_singletons = torch.arange(5)
    assert recall_at_k(embeddings, only_singletons, (1, 4)) == {1: 0.0, 4: 0.0}
    assert not map_at_r(embeddings, only_singletons) > 0  # nothing to average: 0 or nan


@pytest.mark.parametrize("other_set", [False, True])
def test_k_beyond_the_candidates_means_all_candidates(other_set):
    embeddings, labels = unit_rows(6, 4, 0), torch.tensor([0, 0, 1, 1, 2, 3])
    gallery = {"gallery": embeddings[:3], "gallery_labels": labels[:3]} if other_set else {}
    recall = recall_at_k(embeddings, labels, (1, 5, 6, 50), **gallery)
    assert set(recall) == {1, 5, 6, 50}
    assert recall[5] == recall[6] == recall[50] == pytest.approx(4 / 6)


def test_nan_embeddings_never_score():
    labels = torch.arange(20) % 2
    nothing = torch.full((20, 2), torch.nan)
    assert recall_at_k(nothing, labels, (1, 8, 50)) == {1: 0.0, 8: 0.0, 50: 0.0}
    assert map_at_r(nothing, labels) == 0
    assert map_at_r(nothing[:4], torch.tensor([0, 0, 0, 1])) == 0  # its class outnumbers
    one_hot = torch.eye(2)[labels]
    assert recall_at_k(nothing, labels, gallery=one_hot) == {k: 0.0 for k in KS}
    assert map_at_r(nothing, labels, gallery=one_hot) == 0
    broken = one_hot.clone()
    broken[:4] = torch.nan  # four of the twenty queries; the others may suffer, never gain
    assert recall_at_k(broken, labels, (1,))[1] <= 16 / 20
    assert map_at_r(broken, labels) <= 16 / 20
    few = torch.tensor([0, 0, 1, 1])
    half = torch.eye(2)[few]
    half[0] = torch.nan  # row 1 loses its only positive
    assert recall_at_k(half, few, (1,))[1] <= 2 / 4


def test_scores_are_python_floats():
    embeddings, labels = unit_rows(10, 4, 0), torch.arange(10) % 2
    assert all(type(value) is float for value in recall_at_k(embeddings, labels).values())
    scores = map_at_r(embeddings, labels), nmi(labels, labels), ami(labels, labels)
    assert all(type(value) is float for value in (*scores, pairwise_f1(labels, labels)))


# ---- the interval over classes

def naive_interval(hit, labels, seed, draws=1000):
    """The bootstrap by its definition: the drawn classes' queries, one after the other."""
    names = labels.unique().tolist()
    times = random_stream(seed, 0, CLASSES).multinomial(
        len(names), [1 / len(names)] * len(names), size=draws)
    shares = []
    for drawn in times.tolist():
        queries = [value for name, count in zip(names, drawn)
                   for value in hit[labels == name].tolist() * count]
        shares.append(sum(queries) / len(queries))
    return np.percentile(shares, 2.5), np.percentile(shares, 97.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_interval_is_that_of_a_naive_bootstrap_over_classes(seed):
    labels = random_labels(60, 9, seed) * 5 - 3                      # uneven classes, any names
    hit = torch.rand(60, generator=seeded(seed)) < 0.3 + labels / 100
    low, high = recall_interval(hit, labels, seed).values()
    assert (low, high) == pytest.approx(naive_interval(hit, labels, seed), abs=1e-12)
    assert low < hit.double().mean() < high


def test_the_interval_is_of_classes_and_not_of_queries():
    labels = torch.arange(10).repeat_interleave(50)
    by_class, mixed = labels < 5, torch.arange(500) % 2 == 0         # both right half of the time
    assert recall_interval(by_class, labels, 0) == {"R@1_low": 0.2, "R@1_high": 0.8}
    assert recall_interval(mixed, labels, 0) == {"R@1_low": 0.5, "R@1_high": 0.5}
    one = torch.zeros(500, dtype=torch.int64)
    assert recall_interval(by_class, one, 0) == {"R@1_low": 0.5, "R@1_high": 0.5}


def test_every_rule_has_the_interval_of_its_own_hits():
    labels = random_labels(40, 8, 0)
    members = [unit_rows(40, 6, seed) for seed in SEEDS]
    scores = metrics_by_rule(members, labels, ks=(2,), clusters=8, seed=3, clustering=False)
    hits = [ranking_scores(own, labels, (1,))[0][:, 0].double() for own in members]
    for rule, hit in (("member_2", hits[1]), ("member_mean", sum(hits) / 3),
                      ("concat", ranking_scores(torch.cat(members, 1), labels, (1,))[0][:, 0])):
        expected = recall_interval(hit, labels, 3)
        assert {name: scores[rule][name] for name in expected} == pytest.approx(expected)
    assert all(score["R@1_low"] <= score["R@1_high"] for score in scores.values())
    assert [float(hit.mean()) for hit in hits] == [recall_at_k(own, labels)[1] for own in members]


# ---- k-means


def blobs(clusters, per_cluster, dim, seed, spread=0.02):
    """(rows, true blob) of well separated blobs, shuffled."""
    centres = 2.0 * torch.eye(max(clusters, dim), dim, dtype=torch.float64)[:clusters]
    truth = torch.arange(clusters).repeat_interleave(per_cluster)
    truth = truth[torch.randperm(len(truth), generator=seeded(seed))]
    return centres[truth] + spread * unit_rows(len(truth), dim, seed), truth


def inertia(rows, ids):
    """Sum of squared distances to the mean of the own cluster."""
    groups = [rows[ids == cluster] for cluster in ids.unique()]
    return sum((group - group.mean(0)).square().sum().item() for group in groups)


def same_partition(first, second):
    """Are two assignments equal up to the names of the clusters?"""
    pairs = set(zip(first.tolist(), second.tolist()))
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


@pytest.mark.parametrize("clusters", [1, 3, 10])
def test_kmeans_gives_int64_ids_in_range(clusters):
    ids = kmeans(unit_rows(50, 4, 0).float(), clusters, 0)
    assert ids.shape == (50,) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < clusters


def test_kmeans_is_a_function_of_its_seed():
    rows = unit_rows(300, 4, 0)
    torch.manual_seed(1)
    first = kmeans(rows, 12, 5)
    torch.manual_seed(2)
    assert torch.equal(first, kmeans(rows, 12, 5))
    assert not torch.equal(first, kmeans(rows, 12, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_kmeans_recovers_separated_blobs(seed, dtype):
    rows, truth = blobs(6, 25, 8, seed)
    assert same_partition(kmeans(rows.to(dtype), 6, seed), truth)


@pytest.mark.parametrize("spread", [0.02, 0.8])
def test_kmeans_inertia_is_that_of_scikit_learn_with_plain_kmeans_plus_plus(spread):
    cluster = pytest.importorskip("sklearn.cluster")
    rows, _ = blobs(12, 20, 12, seed=0, spread=spread)
    ours = theirs = 0.0
    for seed in range(20):  # one start may be unlucky, twenty are not
        ours += inertia(rows, kmeans(rows, 12, seed))
        # its default draws several candidates per centre; k-means++ as published draws one
        start, _ = cluster.kmeans_plusplus(rows.numpy(), 12, random_state=seed, n_local_trials=1)
        theirs += cluster.KMeans(12, init=start, n_init=1, max_iter=20).fit(rows.numpy()).inertia_
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("seed", SEEDS)
def test_kmeans_ends_where_every_row_is_in_its_nearest_cluster(seed):
    rows, _ = blobs(5, 20, 8, seed, spread=0.5)
    ids = kmeans(rows, 5, seed)
    centres = torch.stack([rows[ids == cluster].mean(0) for cluster in ids.unique()])
    nearest = (rows[:, None] - centres).norm(dim=2).argmin(1)
    assert torch.equal(ids.unique()[nearest], ids)


@pytest.mark.parametrize("count", [40, 1001], ids=["k-means++", "random rows"])
def test_kmeans_with_as_many_clusters_as_rows_separates_them_all(count):
    rows = torch.arange(count, dtype=torch.float64)[:, None] * torch.ones(1, 2)
    assert len(kmeans(rows, count, 0).unique()) == count


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_kmeans_with_fewer_distinct_rows_than_clusters_is_no_error(distinct):
    which = torch.arange(60) % distinct
    rows = unit_rows(distinct, 128, 0)[which]
    ids = kmeans(rows, 10, 0)
    assert ids.min() >= 0 and ids.max() < 10
    for cluster in ids.unique():
        assert len(which[ids == cluster].unique()) == 1


def test_kmeans_beyond_1000_clusters_with_duplicates_is_no_error():
    rows = unit_rows(700, 4, 0)[torch.arange(1400) % 700]
    ids = kmeans(rows, 1001, 0)
    assert ids.shape == (1400,) and ids.min() >= 0 and ids.max() < 1001


# ---- clustering scores


def sklearn_f1(labels, clusters):
    metrics = pytest.importorskip("sklearn.metrics.cluster")
    (_, false_positive), (false_negative, true_positive) = metrics.pair_confusion_matrix(
        labels.numpy(), clusters.numpy()
    )
    return 2 * true_positive / (2 * true_positive + false_positive + false_negative)


CLUSTERINGS = {
    "random": (random_labels(200, 8, 0), random_labels(200, 12, 1)),
    "more clusters than needed": (torch.arange(200) // 20, torch.arange(200) // 7),
    "gaps in the ids": (3 * random_labels(90, 5, 2), 7 * random_labels(90, 4, 3)),
    "perfect": (torch.arange(60) % 5, torch.arange(60) % 5),
    "perfect up to names": (torch.arange(60) % 5, 4 - torch.arange(60) % 5),
    "one cluster": (torch.arange(60) % 5, torch.zeros(60, dtype=torch.int64)),
    "one class": (torch.zeros(60, dtype=torch.int64), torch.arange(60) % 5),
    "one class, one cluster": (torch.zeros(60, dtype=torch.int64),) * 2,
    "every image its own cluster": (torch.arange(60) % 5, torch.arange(60)),
    "every image its own class": (torch.arange(60), torch.arange(60) % 5),
}


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_nmi_ami_and_f1_equal_scikit_learn(name):
    metrics = pytest.importorskip("sklearn.metrics")
    labels, clusters = CLUSTERINGS[name]
    arrays = labels.numpy(), clusters.numpy()
    expected = metrics.normalized_mutual_info_score(*arrays, average_method="arithmetic")
    assert nmi(labels, clusters) == pytest.approx(expected, abs=1e-10)
    expected = metrics.adjusted_mutual_info_score(*arrays, average_method="arithmetic")
    assert ami(labels, clusters) == pytest.approx(expected, abs=1e-8)
    assert pairwise_f1(labels, clusters) == pytest.approx(sklearn_f1(labels, clusters), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows, classes", [(30, 3), (500, 40), (3000, 100)])
def test_clustering_scores_of_noisy_partitions_equal_scikit_learn(seed, rows, classes):
    metrics = pytest.importorskip("sklearn.metrics")
    labels = random_labels(rows, classes, seed)
    noise = random_labels(rows, classes, seed + 10)
    clusters = torch.where(torch.rand(rows, generator=seeded(seed)) < 0.3, noise, labels)
    arrays = labels.numpy(), clusters.numpy()
    expected = metrics.normalized_mutual_info_score(*arrays)
    assert nmi(labels, clusters) == pytest.approx(expected, abs=1e-10)
    expected = metrics.adjusted_mutual_info_score(*arrays)
    assert ami(labels, clusters) == pytest.approx(expected, abs=1e-8)
    assert pairwise_f1(labels, clusters) == pytest.approx(sklearn_f1(labels, clusters), abs=1e-12)


def test_singletons_on_both_sides_are_a_perfect_nmi_and_a_finite_f1():
    each = torch.arange(30)
    assert nmi(each, each) == pytest.approx(1) and ami(each, each) == pytest.approx(1)
    assert 0 <= pairwise_f1(each, each) <= 1  # 0/0: no pair anywhere


def test_f1_by_hand():
    labels, clusters = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    # pairs together: classes 3 + 1, clusters 1 + 3, in both 1 + 1
    assert pairwise_f1(labels, clusters) == pytest.approx(2 * 2 / (4 + 4))


# ---- voting over neighbour lists

A, B, C, D = range(4)


def vote_of(*members):
    """The label that the members' nearest neighbours elect, found by asking for each label."""
    votes = torch.tensor(members).reshape(-1, 1, 1)  # (N members, one query, K = 1)
    elected = [y for y in range(4) if vote_recall(votes, torch.tensor([y]), (1,))[1] == 1]
    assert len(elected) == 1
    return elected[0]


@pytest.mark.parametrize(
    "members, winner",
    [
        ([A, B, B, C, C], B),
        ([A, C, C, B, B], C),
        ([A, B, C], A),
        ([C, B, A], C),
        ([A, B, B], B),
        ([B, A, B], B),
        ([B, A, A, B], B),
        ([D, C, B, A, A], A),
        ([D], D),
    ],
)
def test_the_plurality_wins_and_a_tie_goes_to_the_first_voter(members, winner):
    assert vote_of(*members) == winner


def test_each_position_of_the_neighbour_list_is_voted_on_by_itself():
    # one query of class A; the members' lists, nearest first
    lists = torch.tensor([[[B, A, A]], [[B, C, A]], [[A, C, A]]])
    recall = vote_recall(lists, torch.tensor([A]), (1, 2, 3))  # the elected list: B, C, A
    assert recall == {1: 0.0, 2: 0.0, 3: 1.0}
    both = torch.cat([lists, lists], dim=1)
    assert vote_recall(both, torch.tensor([A, B]), (1, 2, 3)) == {1: 0.5, 2: 0.5, 3: 1.0}


@pytest.mark.parametrize("seed", SEEDS)
def test_voting_equals_a_naive_loop(seed):
    lists, labels = torch.randint(0, 4, (5, 50, 8), generator=seeded(seed)), random_labels(50, 4, 9)
    hits = {k: 0 for k in KS}
    for i in range(50):
        elected = []
        for j in range(8):
            votes = lists[:, i, j].tolist()
            elected.append(max(votes, key=votes.count))  # max keeps the first of equals
        for k in KS:
            hits[k] += labels[i].item() in elected[:k]
    assert vote_recall(lists, labels, KS) == pytest.approx({k: hits[k] / 50 for k in KS})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_single_member_votes_like_recall_at_k(seed):
    embeddings, labels = unit_rows(60, 6, seed), random_labels(60, 8, seed)
    gaps = (embeddings[:, None] - embeddings).norm(dim=2)
    gaps.fill_diagonal_(torch.inf)
    neighbours = labels[gaps.argsort(dim=1)[:, : max(KS)]]
    assert vote_recall(neighbours[None], labels, KS) == recall_at_k(embeddings, labels, KS)


# ---- voting over clusterings


def renamed(ids, clusters, seed):
    return torch.randperm(clusters, generator=seeded(seed))[ids]


@pytest.mark.parametrize("count", [60, 5200], ids=["co-association", "aligned ids"])
@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_members_that_agree_up_to_names_give_their_partition(count, members):
    truth = torch.arange(count) * 7 % 12
    assignments = torch.stack([renamed(truth, 12, seed) for seed in range(members)])
    voted = vote_clusters(assignments, 12)
    assert voted.shape == (count,) and voted.dtype == torch.int64
    assert voted.min() >= 0 and voted.max() < 12
    assert same_partition(voted, truth)


@pytest.mark.parametrize("count", [60, 5200], ids=["co-association", "aligned ids"])
@pytest.mark.parametrize("odd_one", [0, 1, 2])
def test_two_agreeing_members_of_three_win(count, odd_one):
    truth = torch.arange(count) * 7 % 12
    members = [renamed(truth, 12, seed) for seed in range(3)]
    members[odd_one] = random_labels(count, 12, 9)
    assert same_partition(vote_clusters(torch.stack(members), 12), truth)


def noisy(truth, clusters, share, seed):
    """Another naming of truth, with this share of the images put anywhere."""
    anywhere = random_labels(len(truth), clusters, seed)
    wrong = torch.rand(len(truth), generator=seeded(seed + 1)) < share
    return renamed(torch.where(wrong, anywhere, truth), clusters, seed + 2), ~wrong


@pytest.mark.parametrize("count, clusters", [(5200, 20), (10010, 1001)], ids=["optimal", "greedy"])
@pytest.mark.parametrize("bad_one", [0, 1, 2])
def test_a_bad_member_does_not_become_the_reference_of_the_alignment(count, clusters, bad_one):
    truth = torch.arange(count) % clusters
    members, right = [], []
    for seed in range(3):
        ids, good = noisy(truth, clusters, share=0.1, seed=10 * seed)
        members.append(random_labels(count, clusters, 5) if seed == bad_one else ids)
        right += [] if seed == bad_one else [good]
    voted = vote_clusters(torch.stack(members), clusters)
    both = right[0] & right[1]
    assert both.float().mean() > 0.75
    assert same_partition(voted[both], truth[both])


@pytest.mark.parametrize("members", [3, 5])
def test_co_association_is_average_linkage_on_the_majority_relation(members):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    compared = 0
    for seed in range(60):
        truth = torch.arange(12) % 4
        noisy_members = [noisy(truth, 4, 0.3, 100 * seed + member)[0] for member in range(members)]
        assignments = torch.stack(noisy_members)
        together = (assignments[:, :, None] == assignments[:, None]).double().mean(0) > 0.5
        apart = 1 - together.double()[torch.triu_indices(12, 12, 1).unbind()]
        found = []  # a case counts only if its many ties, broken at random, do not matter
        for tie_break in range(10):
            jitter = 1e-6 * torch.rand(len(apart), generator=seeded(tie_break))
            tree = hierarchy.linkage((apart + jitter).numpy(), "average")
            found.append(torch.from_numpy(hierarchy.fcluster(tree, 4, "maxclust")))
        if all(same_partition(found[0], other) for other in found):
            assert same_partition(vote_clusters(assignments, 4), found[0])
            compared += 1
    assert compared >= 15


@pytest.mark.parametrize("bad_one", [0, 1, 2])
def test_co_association_outvotes_single_mistakes_and_a_bad_member(bad_one):
    truth = torch.arange(90) % 3
    members = [renamed(truth, 3, seed) for seed in range(4)]
    for member, row in ((1, 10), (2, 50), (3, 70)):
        members[member][row] = (members[member][row] + 1) % 3  # no two members err on one image
    members.insert(bad_one, random_labels(90, 3, 9))
    assert same_partition(vote_clusters(torch.stack(members), 3), truth)


def test_more_than_1000_clusters_are_aligned_greedily():
    truth = torch.arange(6000) % 1001
    members = [renamed(truth, 1001, seed) for seed in range(3)]
    random.Random(0).shuffle(members)
    assert same_partition(vote_clusters(torch.stack(members), 1001), truth)


def test_voting_over_clusters_is_deterministic():
    for count in (80, 5100):
        members = torch.stack([random_labels(count, 6, seed) for seed in range(3)])
        assert torch.equal(vote_clusters(members, 6), vote_clusters(members.clone(), 6))


@pytest.mark.parametrize("count, depth", [(40, 3), (1024, 1), (1087, 1), (5000, 4), (5000, 5)])
def test_the_top_candidates_are_those_of_topk(count, depth):
    similarity = torch.randn(7, count, generator=torch.Generator().manual_seed(0))
    similarity[0, 1::2] = -torch.inf
    similarity[1] = -torch.inf
    similarity[2, -1] = 9.0                                    # beyond the last whole group
    value, column = top_candidates(similarity, depth)
    assert torch.equal(value, similarity.topk(depth).values)
    assert torch.equal(similarity.gather(1, column), value)
    assert all(len(set(row)) == depth for row in column.tolist())
