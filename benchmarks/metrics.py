# SPDX-License-Identifier: MIT
"""Recall@K and mAP@R, NMI, and a vote of three members: time and peak memory.

    python benchmarks/metrics.py                      # minutes
    python benchmarks/metrics.py --sizes cub --runs 5

Every measurement is a process of its own, because its peak memory shall be its own. The peer gets
the settings that need least memory, and scikit-learn's k-means, which starts and stops as ours. It
has no vote. Recall@K and mAP@R are two calls, each of which compares all images.
"""

from statistics import median

import bench
import torch
import torch.nn.functional as F

import common

# Images, dimensions, classes, noise (Recall@1 is about 0.6, 0.6, 0.6, 0.4). "large": one class has
# 5,000 images.
SIZES = {"cub": (5924, 512, 100, 3.5), "sop": (60502, 128, 11316, 1.5),
         "large": (20000, 128, 3000, 1.5), "tiny": (400, 16, 20, 1.5)}
TASKS = {"retrieval": {"R@1": "precision_at_1", "mAP@R": "mean_average_precision_at_r"},
         "clustering": {"NMI": "NMI"}, "vote": {}}           # our names, and those of the peer
ROWS = {"cub": ("retrieval", "clustering"), "sop": tuple(TASKS), "large": ("retrieval",),
        "tiny": ("retrieval", "clustering")}


def embeddings_of(size, device, seed=0):
    """Unit rows around random centres, and their labels; every class has two images or more."""
    count, dim, classes, spread = SIZES[size]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    if size == "large":
        labels[:4995] = 0                                    # and five later ones
    centres = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    noise = spread * torch.randn(count, dim, generator=generator) / dim**0.5
    return F.normalize(centres[labels] + noise, dim=1).to(device), labels.to(device)


def ours(task, embeddings, labels):
    if task == "retrieval":
        recall = common.recall_at_k(embeddings, labels, (1, 10, 100, 1000))
        return {"R@1": recall[1], "mAP@R": common.map_at_r(embeddings, labels)}
    if task == "vote":                                       # with lists of 1,000 neighbours
        members = [embeddings, *(embeddings_of("sop", embeddings.device, i)[0] for i in (1, 2))]
        hits, precision = common.vote_ranking(members, labels, (1, 10, 100, 1000))
        return {"R@1": float(hits[:, 0].double().mean()), "mAP@R": float(precision.mean())}
    return {"NMI": common.nmi(labels, common.kmeans(embeddings, len(labels.unique()), seed=0))}


def theirs(task, embeddings, labels):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN
    from sklearn.cluster import KMeans

    def kmeans(points, clusters):
        fitted = KMeans(clusters, init="k-means++" if clusters <= 1000 else "random", n_init=1,
                        max_iter=20, random_state=0).fit(points.cpu().numpy())
        return torch.from_numpy(fitted.labels_).long().to(points.device)

    knn = CustomKNN(LpDistance(normalize_embeddings=False), batch_size=1000)
    calculator = AccuracyCalculator(
        include=tuple(TASKS[task].values()), k="max_bin_count", device=embeddings.device,
        knn_func=knn, kmeans_func=kmeans)
    scores = calculator.get_accuracy(embeddings, labels)
    return {name: float(scores[key]) for name, key in TASKS[task].items()}


def measure(library, task, size, device):
    """One call, after a small one that loads what is loaded once."""
    library("retrieval", *embeddings_of("tiny", device))
    library("clustering", *embeddings_of("tiny", device))
    data, before = embeddings_of(size, device), common.peak_gb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, scores = bench.timed(device, library, task, *data)
    return {"seconds": seconds, "peak_gb": common.peak_gb(device), "before_gb": before,
            "scores": scores}


def compare(task, size, args, device):
    """One row: the medians of both libraries, which take turns."""
    libraries = (ours, theirs) if TASKS[task] else (ours,)
    runs = [[bench.call(args.quick, measure, library, task, size, device)
             for library in libraries] for _ in range(args.runs)]
    own, *others = ({**done[0], **{key: median(run[key] for run in done)
                                   for key in ("seconds", "peak_gb", "before_gb")}}
                    for done in zip(*runs))
    row = {"size": size, **dict(zip(("images", "dim", "classes"), SIZES[size])), "task": task,
           "ours": own}
    if not others:
        return row
    (peer,) = others
    return {**row, "peer": peer,
            "time_ratio": median(mine["seconds"] / other["seconds"] for mine, other in runs),
            "memory_ratio": own["peak_gb"] / peer["peak_gb"]}


def main(argv=None):
    parser = bench.base_parser(__doc__, runs=3)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["cub", "sop", "large"])
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.runs = ["tiny"], 1
    device = common.pick_device(args.device)
    rows = (compare(task, size, args, device) for size in args.sizes for task in ROWS[size])
    return bench.finish(args, argv, "metrics", ("runs",), rows,
                        peer="pytorch-metric-learning with CustomKNN, scikit-learn k-means")


if __name__ == "__main__":
    main()
