# SPDX-License-Identifier: MIT
"""Recall@1, mAP@R and NMI against pytorch-metric-learning: time and peak memory.

    python benchmarks/metrics.py                      # CUB and SOP size, minutes
    python benchmarks/metrics.py --sizes cub --runs 5

Every measurement is a process of its own, because its peak memory shall be its own. The peer gets
the settings that need least memory, and scikit-learn's k-means, which starts and stops as ours.
"""

from statistics import median

import bench
import torch
import torch.nn.functional as F

import common

# Images, dimensions, classes, noise: Recall@1 is about 0.6, 0.6, 0.4.
SIZES = {"cub": (5924, 512, 100, 3.5), "sop": (60502, 128, 11316, 1.5), "tiny": (400, 16, 20, 1.5)}
TASKS = {"retrieval": {"R@1": "precision_at_1", "mAP@R": "mean_average_precision_at_r"},
         "clustering": {"NMI": "NMI"}}                       # our names, and those of the peer


def embeddings_of(size, device):
    """Unit rows around random centres, and their labels; every class has two images or more."""
    count, dim, classes, spread = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    noise = spread * torch.randn(count, dim, generator=generator) / dim**0.5
    return F.normalize(centres[labels] + noise, dim=1).to(device), labels.to(device)


def ours(task, embeddings, labels):
    if task == "retrieval":
        hits, precision = common.ranking_scores(embeddings, labels, (1,))    # as the evaluator does
        return {"R@1": float(hits.float().mean()), "mAP@R": precision}
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
    library(task, *embeddings_of("tiny", device))
    data, before = embeddings_of(size, device), common.peak_gb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, scores = bench.timed(device, library, task, *data)
    return {"seconds": seconds, "peak_gb": common.peak_gb(device), "before_gb": before,
            "scores": scores}


def compare(task, size, args, device):
    """One row: the medians of both libraries, which take turns."""
    runs = [[bench.call(args.quick, measure, library, task, size, device)
             for library in (ours, theirs)] for _ in range(args.runs)]
    own, peer = ({**done[0], **{key: median(run[key] for run in done)
                                for key in ("seconds", "peak_gb", "before_gb")}}
                 for done in zip(*runs))
    return {"size": size, **dict(zip(("images", "dim", "classes"), SIZES[size])), "task": task,
            "ours": own, "peer": peer,
            "time_ratio": median(mine["seconds"] / other["seconds"] for mine, other in runs),
            "memory_ratio": own["peak_gb"] / peer["peak_gb"]}


def main(argv=None):
    parser = bench.base_parser(__doc__, runs=3)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["cub", "sop"])
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.runs = ["tiny"], 1
    device = common.pick_device(args.device)
    rows = (compare(task, size, args, device) for size in args.sizes for task in TASKS)
    return bench.finish(args, argv, "metrics", ("runs",), rows,
                        peer="pytorch-metric-learning with CustomKNN, scikit-learn k-means")


if __name__ == "__main__":
    main()
