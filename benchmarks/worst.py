# SPDX-License-Identifier: MIT
"""The template protocol's worst case on survivors, against all of its parts on all queries.

    python benchmarks/worst.py runs/eat-glyphs-convnet-s0 runs/natural-glyphs-convnet-s0

Both are timed one after the other on the networks of a run. ratio = survivors / all parts, share =
ratio / its target (1/6 for a run of natural, 1/4 otherwise); equal: whether Recall@1, with and
without labels, is the same under every inference rule.
"""

import argparse
from pathlib import Path

import bench

import common
import eval as evaluator


def measure(run, attack, eps, limit, device):
    """One row: seconds of both ways, and what they find."""
    checkpoint = common.load_checkpoint(run)
    flags = argparse.Namespace(data_root=None, limit_queries=limit, workers=0, batch_size=128)
    retrieval, members, _ = evaluator.open_run(
        checkpoint, None, argparse.Namespace(**checkpoint["args"]), flags, device)
    attack = evaluator.attack_of("template", attack, objective="worst", eps=eps,
                                 steps=10 if attack == "pgd" else None)
    parts = evaluator.worst_parts(attack, len(members))
    evaluator.measured(retrieval, parts[0])                  # a warm-up
    seconds, (worst, *_) = bench.timed(device, evaluator.measured, retrieval, attack)
    all_seconds, records = bench.timed(
        device, lambda: [evaluator.measured(retrieval, part)[0] for part in parts])
    wanted, found, ratio = evaluator.worst_case(records), worst["scores"], seconds / all_seconds
    undefended = checkpoint["method"] == "natural"
    return {"run": Path(run).name, "attack": attack.attack, "eps_255": 255 * eps,
            "images": len(retrieval.labels), "parts": len(parts), "seconds": seconds,
            "all_seconds": all_seconds, "ratio": ratio, "share": ratio * (6 if undefended else 4),
            "R@1": worst["R@1"],
            "equal": all(found[rule][name] == wanted[rule][name] for rule in found
                         for name in ("R@1", "R@1_label_free"))}


def main(argv=None):
    parser = bench.base_parser(__doc__, limit_queries=0)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--attack", nargs="+", default=["pgd"], metavar="NAME", help="pgd, strong")
    parser.add_argument("--eps", nargs="+", type=common.fraction, default=[8 / 255])
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    limit = 20 if args.quick else args.limit_queries
    rows = (measure(run, attack, eps, limit, device)
            for run in args.runs for attack in args.attack for eps in args.eps)
    return bench.finish(args, argv, "worst", ("limit_queries",), rows)


if __name__ == "__main__":
    main()
