# SPDX-License-Identifier: MIT
"""What the benchmarks found: writes results/benchmarks.md out of results/benchmarks-*.json.

    python benchmarks/summary.py

A target is met or missed by the stored figure, never by hand.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"
HEAD = """# Speed and memory, measured

Written by `python benchmarks/summary.py` out of `results/benchmarks-*.json`; what the columns mean
stands in [benchmarks/README.md](../benchmarks/README.md). Ratios carry over to other machines,
absolute times do not.
"""
HELD = ("eat", "at", "panum", "hm")            # the defenses with a target


def table(head, rows):
    """Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def target(text, figures, met):
    """One line, whether met() accepts every figure {name: value}; no figures: no line."""
    missed = [f"{name} ({value:.3g})" for name, value in figures.items() if not met(value)]
    return [f"- {text}: {'missed by ' + ', '.join(missed) if missed else 'met'}"] * bool(figures)


def train_step(result):
    rows, first = result["rows"], result["rows"][0]
    held = {row["defense"]: row["efficiency"] for row in rows if row["defense"] in HELD}
    speedup = {row["defense"]: row["speedup"] for row in rows if row["defense"] == "eat"}
    title = " ".join([f"Training step: {first['arch']}, {first['image_size']} px,",
                      f"{result['recipe']} recipe", *result["flags"]])
    return title, [
        *table(["defense", "images", "attack steps", "images/s", "step ms", "bare passes ms",
                "efficiency", "usual step ms", "speedup", "peak GB"],
               [[f"`{row['defense']}`", row["images"], row["attack_steps"],
                 f"{row['images_per_second']:.0f}", f"{row['step_ms']:.1f}",
                 f"{row['bare_ms']:.1f}", f"{row['efficiency']:.2f}", f"{row['field_ms']:.1f}",
                 f"{row['speedup']:.2f}", f"{row['peak_gb']:.2f}"] for row in rows]),
        "",
        *target("efficiency at least 0.90", held, lambda value: value >= 0.9),
        *target("eat.py at least 2 times as fast as the usual way", speedup,
                lambda value: value >= 2)]


def attack(result):
    rows = result["rows"]
    return f"`pgd` against torchattacks: {rows[0]['arch']}, {rows[0]['image_size']} px", [
        *table(["steps", "images", "pgd ms", "torchattacks ms", "torchattacks / pgd",
                "equal pixels", "largest difference"],
               [[row["steps"], row["batch_size"], f"{row['pgd_ms']:.1f}",
                 f"{row['torchattacks_ms']:.1f}", f"{row['ratio']:.3f}", f"{row['equal']:.4f}",
                 f"{row['largest_difference']:.0e}"] for row in rows]),
        "",
        *target("at least as fast",
                {f"{row['steps']} steps": row["ratio"] for row in rows},
                lambda value: value >= 1)]


def metrics(result):
    sop = {row["size"]: row for row in result["rows"]
           if row["task"] == "retrieval" and row["size"] == "sop"}
    nmi = {row["size"]: row["time_ratio"] for row in result["rows"]
           if row["task"] == "clustering" and row["size"] == "cub"}
    return f"Metrics against {result['peer']}", [
        *table(["size", "task", "ours s", "peer s", "time, ours / peer", "ours peak GB",
                "peer peak GB", "memory, ours / peer", "ours", "peer"],
               [[f"{row['size']}, {row['images']} x {row['dim']}", row["task"],
                 f"{row['ours']['seconds']:.2f}", f"{row['peer']['seconds']:.2f}",
                 f"{row['time_ratio']:.2f}", f"{row['ours']['peak_gb']:.2f}",
                 f"{row['peer']['peak_gb']:.2f}", f"{row['memory_ratio']:.2f}",
                 *(", ".join(f"{name} {value:.4f}" for name, value in row[side]["scores"].items())
                   for side in ("ours", "peer"))] for row in result["rows"]]),
        "",
        *target("Recall@1 and mAP@R at SOP size in at most half the time",
                {size: row["time_ratio"] for size, row in sop.items()},
                lambda value: value <= 0.5),
        *target("a fifth of the memory at SOP size",
                {size: row["memory_ratio"] for size, row in sop.items()},
                lambda value: value <= 0.2),
        *target("peak at SOP size below 1.5 GB",
                {size: row["ours"]["peak_gb"] for size, row in sop.items()},
                lambda value: value < 1.5),
        *target("NMI at CUB size no slower", nmi, lambda value: value <= 1)]


def loading(result):
    rows = result["rows"]
    return f"Loading: {result['arch']}, {result['image_size']} px, {result['workers']} workers", [
        f"{result['images']} JPEGs of {result['photo'][1]} x {result['photo'][0]} pixels "
        f"({result['jpeg_kb']:.0f} KB), images per second: first epoch "
        f"{result['first_images_per_second']:.0f}, later {result['later_images_per_second']:.0f}, "
        f"without the cache {result['uncached_images_per_second']:.0f}.",
        "",
        *table(["defense", "batch", "step with real data ms", "with a fixed batch ms", "ratio",
                "share spent waiting"],
               [[f"`{row['defense']}`", row["batch_size"], f"{row['real_ms']:.1f}",
                 f"{row['fixed_ms']:.1f}", f"{row['ratio']:.2f}", f"{row['blocked']:.4f}"]
                for row in rows]),
        "",
        *target("within a tenth of a fixed batch", {row["defense"]: row["ratio"] for row in rows},
                lambda value: value <= 1.1)]


def text():
    """results/benchmarks.md."""
    lines, write = [HEAD], {"train_step": train_step, "attack": attack, "metrics": metrics,
                            "loading": loading}
    for file in sorted(RESULTS.glob("benchmarks-*.json")):
        result = json.loads(file.read_text())
        title, body = write[result["benchmark"]](result)
        old = ", before what benchmarks/README.md calls new" * file.stem.endswith("-before")
        lines += [f"## {title}{old}", "", f"On {result['machine']}, torch "
                  f"{result['versions']['torch']}, commit {result['commit'][:7]}: "
                  f"`{result['command']}` ([{file.name}]({file.name})).", "", *body, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    (RESULTS / "benchmarks.md").write_text(text())
