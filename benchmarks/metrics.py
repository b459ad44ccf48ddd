# SPDX-License-Identifier: MIT
"""Recall@1, mAP@R and NMI against pytorch-metric-learning: time and peak memory.

    python benchmarks/metrics.py                      # CUB and SOP size, minutes
    python benchmarks/metrics.py --sizes cub --runs 5
    python benchmarks/metrics.py --device cuda

Every measurement is a process of its own, so that its peak memory (of the process, on a GPU of the
tensors there) is its own; the two libraries take turns. Embeddings are random class centres plus
noise. pytorch-metric-learning gets k="max_bin_count", the setting that needs least, and, where
faiss is not installed, its CustomKNN in batches of 1,000 and for NMI scikit-learn's k-means, which
starts and stops as ours does (k-means++ up to 1,000 clusters, else random rows; 20 iterations).
"""

import argparse
import json
import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

SIZES = {"cub": (5924, 512, 100), "sop": (60502, 128, 11316), "tiny": (400, 16, 20)}
NOISE = {"cub": 3.5, "sop": 1.5, "tiny": 1.5}                # Recall@1 about 0.6, 0.6, 0.4
TASKS = {"retrieval": "Recall@1 and mAP@R", "clustering": "NMI"}
PEER = "pytorch-metric-learning"


def embeddings_of(size, device):
    """Unit rows around random centres, and their labels; every class has two images or more."""
    count, dim, classes = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    noise = torch.randn(count, dim, generator=generator) / dim**0.5
    return F.normalize(centres[labels] + NOISE[size] * noise, dim=1).to(device), labels.to(device)


def ours(task, embeddings, labels):
    if task == "retrieval":
        hits, precision = common.ranking_scores(embeddings, labels, (1,))    # metrics_by_rule
        return {"R@1": float(hits.float().mean()), "mAP@R": precision}
    return {"NMI": common.nmi(labels, common.kmeans(embeddings, len(labels.unique()), seed=0))}


def theirs(task, embeddings, labels):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    def kmeans(points, clusters):
        from sklearn.cluster import KMeans

        start = "k-means++" if clusters <= 1000 else "random"
        fitted = KMeans(clusters, init=start, n_init=1, max_iter=20, random_state=0).fit(
            points.cpu().numpy())
        return torch.from_numpy(fitted.labels_).long().to(points.device)

    own = {} if with_faiss() else {
        "knn_func": CustomKNN(LpDistance(normalize_embeddings=False), batch_size=1000),
        "kmeans_func": kmeans}
    wanted = {"retrieval": {"R@1": "precision_at_1", "mAP@R": "mean_average_precision_at_r"},
              "clustering": {"NMI": "NMI"}}[task]
    calculator = AccuracyCalculator(include=tuple(wanted.values()), k="max_bin_count",
                                    device=embeddings.device, **own)
    scores = calculator.get_accuracy(embeddings, labels)
    return {name: float(scores[key]) for name, key in wanted.items()}


def with_faiss():
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def measure(library, task, size, device):
    """One call, after a small one that loads what is loaded once."""
    device = common.pick_device(device)
    call = ours if library == "ours" else theirs
    call(task, *embeddings_of("tiny", device))
    embeddings, labels = embeddings_of(size, device)
    before = common.peak_gb(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    scores = call(task, embeddings, labels)                  # floats: the GPU has finished
    return {"seconds": time.perf_counter() - started, "peak_gb": common.peak_gb(device),
            "before_gb": before, "scores": scores}


def in_own_process(function, *arguments):
    """A fresh interpreter; this one stays small, because a child's peak starts at its parent's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["cub", "sop"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="400 images, one run in this process")
    parser.add_argument("--json", default=None, metavar="FILE",
                        help="default: results/benchmarks-metrics-DEVICE.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.runs = ["tiny"], 1
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" \
        else args.device
    rows = []
    print(f"{'':26}seconds {'peak GB':>15}")
    print(f"{'':22}ours   peer   ours   peer   time  memory  scores: ours, {PEER}")
    for size in args.sizes:
        for task in TASKS:
            runs = {"ours": [], PEER: []}
            for _ in range(args.runs):
                for library, done in runs.items():
                    call = measure if args.quick else lambda *job: in_own_process(measure, *job)
                    done.append(call(library, task, size, kind))
            own, peer = ({key: median(run[key] for run in done)
                          for key in ("seconds", "peak_gb", "before_gb")} for done in runs.values())
            scores = [done[0]["scores"] for done in runs.values()]
            count, dim, classes = SIZES[size]
            row = {"size": size, "images": count, "dim": dim, "classes": classes, "task": task,
                   "ours": own | {"scores": scores[0]}, "peer": peer | {"scores": scores[1]},
                   "time_ratio": median(a["seconds"] / b["seconds"]
                                        for a, b in zip(*runs.values())),
                   "memory_ratio": own["peak_gb"] / peer["peak_gb"]}
            rows.append(row)
            shown = "  ".join(f"{name} {value:.4f}, {scores[1][name]:.4f}"
                              for name, value in scores[0].items())
            print(f"{size:5}{task:12}{own['seconds']:9.2f}{peer['seconds']:7.2f}"
                  f"{own['peak_gb']:7.2f}{peer['peak_gb']:7.2f}{row['time_ratio']:7.2f}"
                  f"{row['memory_ratio']:8.2f}  {shown}", flush=True)
    device = torch.device(kind)
    cores = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{cores} CPU core{'s' * (cores > 1)}"
    search = "faiss" if with_faiss() else "CustomKNN, scikit-learn k-means"
    words = sys.argv[1:] if argv is None else argv
    result = {"benchmark": "metrics",
              "command": shlex.join(["python", "benchmarks/metrics.py", *words]),
              "machine": name, "peer": f"{PEER} with {search}",
              "runs": args.runs, **common.provenance(device), "rows": rows}
    file = Path(args.json or ROOT / "results" / f"benchmarks-metrics-{device.type}.json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}; {PEER} with {search}; {file}")
    return result


if __name__ == "__main__":
    main()
