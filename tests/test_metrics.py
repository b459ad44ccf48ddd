"""Retrieval, clustering and voting against brute force, scikit-learn, PML and hand-made cases."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_losses import seeded, unit_rows

import common
from common import ami, kmeans, map_at_r, nmi, pairwise_f1, ranking_scores, recall_at_k

SEEDS = (0, 1, 2)
KS = (1, 2, 4, 8)
FORMS = pytest.mark.parametrize("form", ["leave-one-out", "same images", "another set"])


def random_labels(rows, classes, seed):
    return torch.randint(0, classes, (rows,), generator=seeded(seed))


def whole_numbers(rows, dim, seed):
    """Rows of 0, 1 and 2: sums of products are exact, and so are ties."""
    return random_labels(rows * dim, 3, seed).view(rows, dim).double()


def gallery_of(form, queries, labels, draw, seed):
    """The gallery arguments of a form; draw(rows, seed): embeddings of the tested kind."""
    if form == "leave-one-out":
        return {}
    if form == "same images":
        return {"gallery": torch.where(random_labels(len(queries), 2, seed)[:, None] > 0, queries,
                                       draw(len(queries), seed + 20))}
    # The queries are in the other set, too, under another label: nothing may be masked.
    other = draw(30, seed + 20)
    return {"gallery": torch.cat([queries, other]),
            "gallery_labels": torch.cat([(labels + 1) % 9, random_labels(30, 9, seed + 30)])}


# ---- Recall@K and mAP@R
KINDS = {
    "random": lambda rows, seed: unit_rows(rows, 8, seed),
    "float32": lambda rows, seed: unit_rows(rows, 16, seed).float(),
    "any norm": lambda rows, seed: unit_rows(rows, 4, seed) * (
        0.5 + torch.rand(rows, 1, generator=seeded(seed), dtype=torch.float64)),
    "exact ties": lambda rows, seed: torch.eye(6)[random_labels(rows, 6, seed)],
    "duplicates": lambda rows, seed: unit_rows(25, 128, 0).float()[random_labels(rows, 25, seed)],
    "ties and nan": lambda rows, seed: whole_numbers(rows, 4, seed).where(
        random_labels(rows, 40, seed + 7)[:, None] > 0, torch.nan),
}


def ranking(i, query, label, gallery, names, leave_out):
    """Candidates from near to far as (label is right, label), and R; a tie or NaN is a loss."""
    ranked, relevant = [], 0
    for j, candidate in enumerate(gallery.tolist()):
        if leave_out and i == j:
            continue
        right, distance = int(names[j]) == label, math.dist(query, candidate)
        relevant += right
        if math.isnan(distance):
            if right:
                continue                                   # never found
            distance = -math.inf
        ranked.append((distance, right, int(names[j])))    # False sorts before True
    return [(right, name) for _, right, name in sorted(ranked)], relevant


def brute_force(embeddings, labels, gallery=None, gallery_labels=None):
    """(hits (n, len(KS)), mAP@R) by their definitions, one query at a time."""
    names = labels if gallery_labels is None else gallery_labels
    gallery, hits, precisions = embeddings if gallery is None else gallery, [], []
    for i, query in enumerate(embeddings.tolist()):
        order, r = ranking(i, query, int(labels[i]), gallery, names, gallery_labels is None)
        order = [right for right, _ in order]
        hits.append([any(order[:k]) for k in KS])
        if r > 0:
            at = [sum(order[:j + 1]) / (j + 1) for j in range(min(r, len(order))) if order[j]]
            precisions.append(sum(at) / r)
    return torch.tensor(hits), sum(precisions) / max(1, len(precisions))


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_equals_brute_force(kind, form, seed):
    queries, labels = KINDS[kind](60, seed + 10), random_labels(60, 9, seed)
    gallery = gallery_of(form, queries, labels, KINDS[kind], seed)
    expected, mean_ap = brute_force(queries, labels, **gallery)
    assert 0 < mean_ap < 1
    hits, _ = ranking_scores(queries, labels, KS, **gallery)
    assert torch.equal(hits, expected)
    precision = map_at_r(queries, labels, **gallery)
    recall = dict(zip(KS, expected.double().mean(0).tolist()))
    assert recall_at_k(queries, labels, **gallery) == pytest.approx(recall, abs=1e-12)
    with torch.autocast("cpu", torch.bfloat16):            # a caller's own: no rounding here
        again = map_at_r(queries, labels, **gallery)
    for value in (precision, again):
        assert value == pytest.approx(mean_ap, abs=1e-9) and type(value) is float


@FORMS
def test_similarities_are_exact_on_integers(form):
    queries, labels = whole_numbers(40, 3, 0), random_labels(40, 9, 1)
    gallery = gallery_of(form, queries, labels, lambda rows, seed: whole_numbers(rows, 3, seed), 2)
    other = gallery.get("gallery", queries)
    names = gallery.get("gallery_labels", labels)
    same = labels[:, None] == names
    expected = queries @ other.T - other.square().sum(1) / 2
    lowered = torch.nextafter(expected, torch.tensor(-torch.inf, dtype=torch.float64))
    expected = torch.where(same, lowered, expected)
    if form != "another set":
        expected.fill_diagonal_(-torch.inf)
    ((rows, *chunk),) = common.similarities(queries, labels, **gallery)
    best = expected.masked_fill(~same, -torch.inf).amax(1)
    torch.testing.assert_close(chunk, [expected[rows], best[rows]], rtol=0, atol=0)
    assert sorted(rows.tolist()) == [*range(40)]


@pytest.mark.parametrize("columns", [2816, 2817, 3000, 200])
def test_the_highest_are_those_of_topk(columns):
    for low in (-torch.inf, torch.inf):                    # as of the query itself and of NaN
        rows = random_labels(30 * columns, 4 * columns, 0).view(30, columns).float()
        rows[:, ::9], rows[:, -1] = low, 5.0 * columns     # ties, and one in the last block
        value, column = common.highest(rows, 11)
        assert torch.equal(value, rows.topk(11).values) and torch.equal(
            value, rows.gather(1, column))
        assert all(len(set(line)) == 11 for line in column.tolist())


def test_a_query_scores_the_same_in_whatever_chunk_it_is():
    queries = random_labels(2200 * 4, 40, 0).view(2200, 4).float()      # exact, too
    gallery, names = queries.repeat(4, 1).flip(0) + 1, random_labels(8800, 50, 1)
    labels = random_labels(2200, 50, 2)
    hits, _ = ranking_scores(queries, labels, KS, gallery, names, precision=False)
    for part in (slice(0, 40), slice(1000, 1040), slice(2160, 2200)):   # a chunk has 1024
        alone, _ = ranking_scores(queries[part], labels[part], KS, gallery, names)
        assert torch.equal(hits[part], alone) and 0 < alone.sum() < alone.numel()
    alone = unit_rows(4200, 2, 0).float()                  # the query itself is in no chunk
    assert recall_at_k(alone, torch.arange(4200), (1,)) == {1: 0.0}


def test_hand_made_rankings():
    labels = torch.tensor([0, 0, 1, 1])
    clean = torch.eye(4)
    attacked = clean[[1, 0, 2, 3]]            # rows 0 and 1 now lie on each other's clean image
    assert recall_at_k(attacked, labels, (1,), clean) == {1: 0.5}      # 2 and 3 find ties at sqrt 2
    assert recall_at_k(clean, labels, (1,), clean, labels) == {1: 1.0}   # as another set: its copy
    # Five points on an arc. Neighbours, + if relevant: 0: 1- 2+ 3+ 4-    1: 0- 2- 3- 4+
    #                         2: 1- 0+ 3+ 4- (0 ties with 3)    3: 2+ 4- 1- 0+    4: 3- 2- 1+ 0-
    angles = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    arc, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 1, 0, 0, 1])
    recall = recall_at_k(arc, labels, (1, 2, 3, 4))
    assert recall == pytest.approx({1: 1 / 5, 2: 3 / 5, 3: 4 / 5, 4: 1.0})
    # AP@R, R = 2 for class 0 and 1 for class 1: (0 + 1/2)/2, 0, (0 + 1/2)/2, (1 + 0)/2, 0
    assert map_at_r(arc, labels) == pytest.approx((0.25 + 0 + 0.25 + 0.5 + 0) / 5)


@pytest.mark.parametrize("seed", SEEDS)
def test_retrieval_agrees_with_pml(seed):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    labels = random_labels(200, 15, seed)
    embeddings = F.normalize(unit_rows(15, 8, seed)[labels] + 0.8 * unit_rows(200, 8, 10 + seed))
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count",
        device=torch.device("cpu"), knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        kmeans_func=lambda *_: None)
    theirs = calculator.get_accuracy(embeddings, labels)
    assert 0.2 < theirs["precision_at_1"] < 0.98           # a setting where both can be wrong
    assert recall_at_k(embeddings, labels, (1,))[1] == pytest.approx(theirs["precision_at_1"])
    mean_ap = theirs["mean_average_precision_at_r"]
    assert map_at_r(embeddings, labels) == pytest.approx(mean_ap, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [7, 50, 257, 1001])
def test_a_collapsed_model_scores_zero_in_any_order_of_the_labels(dtype, rows):
    index, ks = torch.arange(rows), (1, 2) if rows == 7 else KS     # of 7 at least 3 are irrelevant
    orders = [index * 2 // rows, (index * 2 // rows).flip(0), index % 2, index // 2,
              (index % 2)[torch.randperm(rows, generator=seeded(0))]]
    # a matrix product rounds identical rows alike for some values and sizes only
    for dim, seed in [(64, 0), (128, 1), (130, 2), (130, 3)] if rows < 1000 else [(130, 0)]:
        collapsed = unit_rows(1, dim, 10 * rows + seed).to(dtype).expand(rows, dim).contiguous()
        for labels in orders:
            other_set = {"gallery": collapsed.repeat(2, 1),
                         "gallery_labels": torch.cat([labels, labels.flip(0)])}
            for gallery in ({}, {"gallery": collapsed.clone()}, other_set):
                assert recall_at_k(collapsed, labels, ks, **gallery) == dict.fromkeys(ks, 0.0)
            assert map_at_r(collapsed, labels) == 0


def test_singletons_few_candidates_and_nothing_but_nan():
    embeddings, labels = torch.eye(3)[[0, 0, 1, 1, 2]], torch.tensor([0, 0, 1, 1, 2])
    for gallery in ({}, {"gallery": embeddings[:4], "gallery_labels": labels[:4]}):
        recall = recall_at_k(embeddings, labels, (1, 4, 5, 50), **gallery)
        assert recall == pytest.approx(dict.fromkeys((1, 4, 5, 50), 0.8))  # a singleton: a miss
        assert map_at_r(embeddings, labels, **gallery) == 1.0              # here it is left out
    assert recall_at_k(embeddings, torch.arange(5), (1, 4)) == {1: 0.0, 4: 0.0}
    assert map_at_r(embeddings, torch.arange(5)) == 0                      # nothing to average
    labels = torch.tensor([0] * 8 + [1])                   # one class outnumbers the other
    nothing, one_hot = torch.full((9, 2), torch.nan), torch.eye(2)[labels]
    for gallery in ({}, {"gallery": one_hot}, {"gallery": one_hot, "gallery_labels": labels}):
        assert recall_at_k(nothing, labels, (1, 8), **gallery)[1] == 0
        assert map_at_r(nothing, labels, **gallery) == 0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_kmeans_recovers_separated_blobs_and_is_a_function_of_its_seed(seed, dtype):
    rows, truth = blobs(6, 25, 8, seed)
    assert same_partition(kmeans(rows.to(dtype), 6, seed), truth)
    rows = unit_rows(300, 4, 0)
    ids = kmeans(rows, 12, seed)
    torch.manual_seed(seed)
    assert torch.equal(ids, kmeans(rows, 12, seed))
    assert not torch.equal(ids, kmeans(rows, 12, seed + 1))


@pytest.mark.parametrize("spread", [0.02, 0.8])
def test_kmeans_inertia_is_that_of_scikit_learn_with_plain_kmeans_plus_plus(spread):
    cluster = pytest.importorskip("sklearn.cluster")
    rows, _ = blobs(12, 20, 12, seed=0, spread=spread)
    ours = theirs = 0.0
    for seed in range(20):                    # one start may be unlucky, twenty are not
        ours += inertia(rows, kmeans(rows, 12, seed))
        # its default draws several candidates per centre; k-means++ as published draws one
        start, _ = cluster.kmeans_plusplus(rows.numpy(), 12, random_state=seed, n_local_trials=1)
        theirs += cluster.KMeans(12, init=start, n_init=1, max_iter=20).fit(rows.numpy()).inertia_
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("rows, distinct, clusters", [
    (40, 40, 40), (1001, 1001, 1001), (60, 1, 10), (60, 5, 10), (1400, 700, 1001), (3, 3, 10)])
def test_kmeans_with_as_many_clusters_as_rows_or_more_splits_no_duplicates(rows, distinct,
                                                                           clusters):
    which = torch.arange(rows) % distinct                  # above 1,000 clusters: random rows
    ids = kmeans((which.double()[:, None] + 1).repeat(1, 2), clusters, 0)
    assert ids.shape == (rows,) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < clusters
    groups = {which[ids == cluster].unique().numel() for cluster in ids.unique()}
    assert groups == {1} or clusters == 1001 != rows       # there some rows are nobody's centre


# ---- clustering scores
def sklearn_f1(labels, clusters):
    metrics = pytest.importorskip("sklearn.metrics.cluster")
    (_, false_positive), (false_negative, true_positive) = metrics.pair_confusion_matrix(
        labels.numpy(), clusters.numpy())
    return 2 * true_positive / (2 * true_positive + false_positive + false_negative)


def noisy(truth, clusters, share, seed):
    """Another naming of truth, with this share of the images put anywhere."""
    anywhere = random_labels(len(truth), clusters, seed)
    wrong = torch.rand(len(truth), generator=seeded(seed + 1)) < share
    return torch.randperm(clusters, generator=seeded(seed + 2))[torch.where(wrong, anywhere, truth)]


ZEROS, FIVES, EACH = torch.zeros(60, dtype=torch.int64), torch.arange(60) % 5, torch.arange(60)
CLUSTERINGS = {
    "random": (random_labels(200, 8, 0), random_labels(200, 12, 1)),
    "more clusters than needed": (torch.arange(200) // 20, torch.arange(200) // 7),
    "gaps in the ids": (3 * random_labels(90, 5, 2), 7 * random_labels(90, 4, 3)),
    "perfect up to names": (FIVES, 4 - FIVES),
    "one cluster": (FIVES, ZEROS), "one class": (ZEROS, FIVES),
    "one class, one cluster": (ZEROS, ZEROS), "every image its own cluster": (FIVES, EACH),
    "every image its own class": (EACH, FIVES),
    **{f"noisy {rows} {classes} {seed}": (
        random_labels(rows, classes, seed),
        noisy(random_labels(rows, classes, seed), classes, 0.3, seed + 10))
       for rows, classes in ((30, 3), (500, 40), (3000, 100)) for seed in SEEDS},
}


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_nmi_ami_and_f1_equal_scikit_learn(name):
    metrics = pytest.importorskip("sklearn.metrics")
    labels, clusters = CLUSTERINGS[name]
    arrays = labels.numpy(), clusters.numpy()
    ours = nmi(labels, clusters), ami(labels, clusters), pairwise_f1(labels, clusters)
    assert all(type(value) is float for value in ours)
    expected = metrics.normalized_mutual_info_score(*arrays, average_method="arithmetic")
    assert ours[0] == pytest.approx(expected, abs=1e-10) and 0 <= ours[0] <= 1
    expected = metrics.adjusted_mutual_info_score(*arrays, average_method="arithmetic")
    assert ours[1] == pytest.approx(expected, abs=1e-8)
    assert ours[2] == pytest.approx(sklearn_f1(labels, clusters), abs=1e-12)


def test_clustering_scores_by_hand():
    labels, clusters = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    # pairs together: classes 3 + 1, clusters 1 + 3, in both 1 + 1
    assert pairwise_f1(labels, clusters) == pytest.approx(2 * 2 / (4 + 4))
    assert nmi(EACH, EACH) == pytest.approx(1) and ami(EACH, EACH) == pytest.approx(1)
    assert pairwise_f1(EACH, EACH) == 0                    # no pair anywhere


# ---- voting over neighbour lists
A, B, C, D = range(4)


@pytest.mark.parametrize("members, winner", [
    ([A, B, B, C, C], B), ([A, C, C, B, B], C), ([A, B, C], A), ([C, B, A], C), ([A, B, B], B),
    ([B, A, B], B), ([B, A, A, B], B), ([D, C, B, A, A], A), ([D], D)])
def test_the_plurality_wins_and_a_tie_goes_to_the_first_voter(members, winner):
    votes = torch.tensor(members)
    assert common.vote_labels(votes) == winner
    around = torch.full((len(members), 2, 3), D)           # every place is voted on by itself
    around[:, 1, 2] = votes
    assert common.vote_labels(around).tolist() == [[D] * 3, [D, D, winner]]


@FORMS
@pytest.mark.parametrize("members", [1, 3, 5])
def test_the_vote_on_neighbour_lists_equals_a_naive_loop(form, members):
    labels = random_labels(40, 9, 0)
    queries = [unit_rows(40, 5, seed) + 0.4 * F.one_hot(labels, 9)[:, :5]
               for seed in range(members)]
    spaces = [gallery_of(form, own, labels, lambda rows, seed: unit_rows(rows, 5, seed), seed)
              for seed, own in enumerate(queries)]
    names = spaces[0].get("gallery_labels", labels)
    spaces = [space | {"gallery_labels": names} if "gallery_labels" in space else space
              for space in spaces]
    hits, precisions = [], []
    for i in range(40):
        lists = [ranking(i, own[i].tolist(), int(labels[i]), space.get("gallery", own), names,
                         form != "another set") for own, space in zip(queries, spaces)]
        r, columns = lists[0][1], zip(*[[name for _, name in order] for order, _ in lists])
        right = [max(column, key=column.count) == labels[i] for column in columns]
        hits.append([any(right[:k]) for k in (1, 2, 4, 8)])
        if r:
            precisions.append(sum(sum(right[:j + 1]) / (j + 1) for j in range(r) if right[j]) / r)
    galleries = None if form == "leave-one-out" else [space["gallery"] for space in spaces]
    found, precision = common.vote_ranking(queries, labels, (1, 2, 4, 8), galleries,
                                           spaces[0].get("gallery_labels"))
    assert torch.equal(found, torch.tensor(hits))
    assert float(precision.sum()) == pytest.approx(sum(precisions)) and 0 < precision.mean() < 1
    if members == 1:                                       # and one member votes like itself
        alone = ranking_scores(queries[0], labels, (1, 2, 4, 8), **spaces[0])
        assert torch.equal(alone[0], found) and torch.allclose(alone[1], precision)


# ---- voting over clusterings
def naive_vote(members, clusters, match):
    """METHODS.md's rule, with its own NMI; match(overlap Counter) -> {cluster: its new name}."""
    metrics = pytest.importorskip("sklearn.metrics")
    agreement = [sum(metrics.normalized_mutual_info_score(a, b) for b in members) for a in members]
    first = agreement.index(max(agreement))
    reference, renamed = members[first], [members[first].tolist()]
    for member in [*members[:first], *members[first + 1:]]:
        names = match(Counter(zip(member.tolist(), reference.tolist())), clusters)
        renamed.append([names[cluster] for cluster in member.tolist()])
    return [max(column, key=column.count) for column in zip(*renamed)]     # ties: the reference


def greedy(overlap, clusters):
    names = {}
    for (cluster, name), _ in sorted(overlap.items(), key=lambda cell: (-cell[1], cell[0])):
        if cluster not in names and name not in names.values():
            names[cluster] = name
    left = [name for name in range(clusters) if name not in names.values()]
    return names | dict(zip([c for c in range(clusters) if c not in names], left))


def optimal(overlap, clusters):
    optimize = pytest.importorskip("scipy.optimize")
    matrix = [[overlap[row, column] for column in range(clusters)] for row in range(clusters)]
    return dict(zip(*optimize.linear_sum_assignment(matrix, maximize=True)))


@pytest.mark.parametrize("count, clusters, share, match", [
    (60, 12, 0.3, greedy), (30, 12, 0.9, greedy), (40, 40, 0.5, greedy), (300, 7, 1.0, greedy),
    (600, 12, 0.3, optimal), (2000, 30, 0.5, optimal), (100, 4, 0.5, optimal)])
@pytest.mark.parametrize("members", [3, 4, 5])
def test_the_vote_on_clusters_equals_its_rule_and_the_optimal_renaming(count, clusters, share,
                                                                       match, members):
    for seed in range(4):
        truth = torch.randperm(count, generator=seeded(seed)) % clusters
        assignments = torch.stack([noisy(truth, clusters, share, 100 * seed + member)
                                   for member in range(members)])
        voted = common.vote_clusters(assignments, clusters)
        assert voted.dtype == torch.int64
        assert voted.tolist() == naive_vote(assignments, clusters, match)


def test_the_largest_overlap_is_renamed_first():
    reference = torch.tensor([0] * 8 + [1] * 4 + [2] * 4)
    other = torch.tensor([0] * 5 + [1] * 3 + [0] * 4 + [2] * 4)   # 0 meets 0 in 5 images, 1 in 4
    third = torch.tensor([2] * 8 + [0] * 4 + [1] * 4)             # the reference, renamed
    voted = common.vote_clusters(torch.stack([other, reference, third]), 3)
    assert torch.equal(voted, reference)                          # not `third`: the first of equals
    # Two members tie wherever they differ, and the reference has the say.
    pair = torch.stack([reference, other])
    assert any(torch.equal(common.vote_clusters(pair, 3), member) for member in pair)


@pytest.mark.parametrize("count, clusters", [(60, 12), (6000, 1001)])
@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_members_that_agree_up_to_names_give_their_partition(count, clusters, members):
    truth = torch.arange(count) * 7 % clusters
    assignments = torch.stack([noisy(truth, clusters, 0, seed) for seed in range(members)])
    assert same_partition(common.vote_clusters(assignments, clusters), truth)
    for odd in range(members if members > 2 else 0):       # one bad member is outvoted, wherever
        spoiled = assignments.clone()
        spoiled[odd] = random_labels(count, clusters, 9)
        assert same_partition(common.vote_clusters(spoiled, clusters), truth)


@pytest.mark.parametrize("count, clusters", [(500, 5), (500, 50), (1500, 50), (1000, 250)])
@pytest.mark.parametrize("members", [3, 5])
def test_the_vote_is_never_a_point_of_nmi_below_the_mean_of_its_members(count, clusters, members):
    gains, truth = [], torch.arange(count) % clusters
    for share in (0.1, 0.3, 0.5, 0.7):
        for seed in SEEDS:
            assignments = torch.stack([noisy(truth, clusters, share, 50 * seed + member)
                                       for member in range(members)])
            scores = [nmi(truth, member) for member in assignments]
            gains.append(nmi(truth, common.vote_clusters(assignments, clusters))
                         - sum(scores) / len(scores))
    assert min(gains) > -0.01 and max(gains) > 0.03        # and it is good for something
