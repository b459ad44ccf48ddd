# SPDX-License-Identifier: MIT
"""What the benchmarks found: writes results/benchmarks.md out of results/benchmarks-*.json.

    python benchmarks/summary.py

A target is met or missed by the stored figure, never by hand.
"""

import json
import math
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"
HEAD = """# Speed and memory, measured

Written by `python benchmarks/summary.py` out of `results/benchmarks-*.json`; what the columns mean
stands in [benchmarks/README.md](../benchmarks/README.md). Ratios carry over to other machines,
absolute times do not.
"""
TITLES = {
    "train_step": "Training step: {rows[0][arch]}, {rows[0][image_size]} px, {recipe} recipe",
    "worst": "The worst case on survivors, against all parts on all queries",
    "commits": "This code against that of {other_commit}",
    "metrics": "Metrics against {peer}",
    "loading": "Loading: {arch}, {image_size} px, {workers} workers"}
RATES = ("{images} JPEGs of {photo[1]} x {photo[0]} pixels ({jpeg_kb:.0f} KB), images per second: "
         "first epoch {first_images_per_second:.0f}, later {later_images_per_second:.0f}, "
         "without the cache {uncached_images_per_second:.0f}.")
# The head of every column, and how a row fills it.
COLUMNS = {
    "train_step": {
        "defense": "`{defense}`", "images": "{images}", "attack steps": "{attack_steps}",
        "images/s": "{images_per_second:.0f}", "step ms": "{step_ms:.1f}",
        "bare passes ms": "{bare_ms:.1f}", "efficiency": "{efficiency:.2f}",
        "usual step ms": "{field_ms:.1f}", "speedup": "{speedup:.2f}", "peak GB": "{peak_gb:.2f}"},
    "worst": {
        "run": "`{run}`", "attack": "{attack}", "eps": "{eps_255:.3g}/255", "images": "{images}",
        "parts": "{parts}", "survivors s": "{seconds:.1f}", "all parts s": "{all_seconds:.1f}",
        "ratio": "{ratio:.3f}", "left": "{R@1:.3f}", "equal": "{equal}"},
    "commits": {
        "training": "`{training}`", "what": "{what}", "s": "{seconds:.3f}",
        "s before": "{before:.3f}", "now / before": "{ratio:.2f}"},
    "metrics": {
        "size": "{size}, {images} x {dim}", "task": "{task}", "ours s": "{ours[seconds]:.2f}",
        "peer s": "{peer[seconds]:.2f}", "time, ours / peer": "{time_ratio:.2f}",
        "ours peak GB": "{ours[peak_gb]:.2f}", "peer peak GB": "{peer[peak_gb]:.2f}",
        "memory, ours / peer": "{memory_ratio:.2f}", "ours": "{ours[text]}",
        "peer": "{peer[text]}"},
    "loading": {
        "defense": "`{defense}`", "batch": "{batch_size}",
        "step with real data ms": "{real_ms:.1f}", "with a fixed batch ms": "{fixed_ms:.1f}",
        "ratio": "{ratio:.2f}", "share spent waiting": "{blocked:.4f}"}}
# What is promised, which rows it holds for, their name, the figure, its lowest and highest value.
SOP = {"size": ["sop"], "task": ["retrieval"]}
ATTACKING = ["eat", "at", "fast", "iat", "trades", "est", "act", "panum", "hm"]
TARGETS = {
    "train_step": [
        ("efficiency at least 0.95", {"arch": ["mobilenetv2"], "defense": ATTACKING}, "{defense}",
         "{efficiency}", 0.95, math.inf),
        ("efficiency at least 0.90", {"images": [112, 120, 180], "defense": ATTACKING,
                                      "arch": ["convnet"]}, "{defense}", "{efficiency}", 0.9,
         math.inf),
        ("eat.py at least 2 times as fast as the usual way", {"defense": ["eat"]}, "{defense}",
         "{speedup}", 2, math.inf)],
    "commits": [("slower by a tenth at most", {}, "{training}, {what}", "{ratio}", 0, 1.1)],
    "worst": [
        ("a defended network in a quarter of the time, an undefended one in a sixth", {},
         "{run}, {attack}", "{share}", 0, 1)],
    "metrics": [
        ("Recall@1 and mAP@R at SOP size in at most half the time", SOP, "{size}", "{time_ratio}",
         0, 0.5),
        ("a fifth of the memory at SOP size", SOP, "{size}", "{memory_ratio}", 0, 0.2),
        ("peak at SOP size below 1.5 GB", SOP, "{size}", "{ours[peak_gb]}", 0, 1.5),
        ("Recall@1 and mAP@R with a class of 5,000 no slower", {"size": ["large"]}, "{size}",
         "{time_ratio}", 0, 1),
        ("k-means and NMI no slower", {"task": ["clustering"]}, "{size}", "{time_ratio}", 0, 1)],
    "loading": [("within a tenth of a fixed batch", {}, "{defense}", "{ratio}", 0, 1.1)]}


def target(rows, promise, where, name, figure, low, high):
    """One line: whether the figure of every row {column: values} is in range; no row: no line."""
    held = [row for row in rows if all(row[column] in where[column] for column in where)]
    figures = {name.format_map(row): float(figure.format_map(row)) for row in held}
    missed = [f"{row} ({value:.3g})" for row, value in figures.items() if not low <= value <= high]
    return [f"- {promise}: {'missed by ' + ', '.join(missed) if missed else 'met'}"] * bool(held)


def cell(form, row):
    """The text of a form; "-" where the row has no such figure, as one without a peer."""
    try:
        return form.format_map(row)
    except KeyError:
        return "-"


def section(result):
    """(title, lines) of one benchmark: its table, and its targets."""
    rows = json.loads(json.dumps(result["rows"]))                        # a copy, to add a text to
    for side in (row[library] for row in rows for library in ("ours", "peer") if library in row):
        side["text"] = ", ".join(f"{name} {value:.4f}" for name, value in side["scores"].items())
    name = result["benchmark"]
    table = [COLUMNS[name], ["---"] + ["---:"] * (len(COLUMNS[name]) - 1),
             *([cell(form, row) for form in COLUMNS[name].values()] for row in rows)]
    return " ".join([TITLES[name].format_map(result), *result.get("flags", [])]), [
        *([RATES.format_map(result), ""] if name == "loading" else []),
        *(f"| {' | '.join(cells)} |" for cells in table), "",
        *(line for promise in TARGETS[name] for line in target(rows, *promise))]


def text():
    """results/benchmarks.md."""
    lines = [HEAD]
    for file in sorted(RESULTS.glob("benchmarks-*.json")):
        result = json.loads(file.read_text())
        title, body = section(result)
        old = ", before what benchmarks/README.md calls new" * file.stem.endswith("-before")
        lines += [f"## {title}{old}", "", f"On {result['machine']}, torch "
                  f"{result['versions']['torch']}, commit {result['commit'][:7]}: "
                  f"`{result['command']}` ([{file.name}]({file.name})).", "", *body, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    (RESULTS / "benchmarks.md").write_text(text())
