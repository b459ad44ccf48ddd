# SPDX-License-Identifier: MIT
"""The pictures of the papers, out of stored scores and saved embeddings; nothing is attacked here.

    python results/figures.py results/eat-figures -- 'runs/at-*' 'runs/eat-glyphs-*' \\
        --eps 2/255 4/255 8/255 -- --attack-steps 1 5 20 -- --against sum member_1 member_2
    python results/figures.py results/eat-figures --saved natural.npz eat.npz
    python results/figures.py results/arena --table results/arena-glyphs-worst.json \\
        results/arena-grocery-worst.json

Behind `--` as for table.py: several --eps give sweep-eps (EAT, Figure 3), several --attack-steps
sweep-steps (Figure 2), --against member_1 ... per-member (Figure 4), runs with --eval-every give
training (Panum et al., Figures 3 and 4); lines and bars are means, with the range over seeds, and
their numbers are written, too. --saved takes files of `eval.py --save-embeddings`: embeddings (EAT,
Figure 1; two dimensions: Panum et al., Figure 2), shift, and for each a sheet of queries with their
nearest neighbours (Figure 1; --limit-queries 500 saves all of their images). --table draws what a
defense costs and what it reaches, tables side by side; where the rows of one differ in the steps of
their training, over these (Zhou & Patel, Figures 1, 6 to 8).
"""

import glob
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import table  # noqa: E402

import common  # noqa: E402
import eval as evaluator  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKS = "os^vDP*X"
STYLES = [(line, *style) for line in ("-", "--", ":") for style in zip(COLOURS, MARKS)]
METRICS = {"R@1": "attacked Recall@1 (%)", "F1": "attacked F1 (%)"}
LOGGED = {"loss": "loss of attacked images", "clean_R@1": "clean Recall@1 (%)",
          "robust_R@1": "attacked Recall@1 (%)", "clean_mAP@R": "clean mAP@R (%)",
          "robust_mAP@R": "attacked mAP@R (%)"}
AXES = {"eps_255": "eps (1/255)", "eta + 1": "training cost, eta + 1 passes"}
REACHED = {"ERS": "ERS", "R@1": "clean Recall@1 (%)"}


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise common.UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")                                    # files alone, no window
    import matplotlib.pyplot as plt
    return plt


def plain(text):
    """A name as it stands: matplotlib would read what is between two $ as mathematics."""
    return str(text).replace("$", r"\$")


# ---- numbers of a report

def sweep_curves(report, x, rules=None, metrics=tuple(METRICS)):
    """{name: a dict per run} of the attacks that differ in x alone ("eps_255", "steps"): its
    values, the metrics there, mean over the seeds of the attack, the clean Recall@1, and eps50."""
    curves = {}
    for outcome in report:
        clean, same = outcome["clean"], {}
        for record in outcome["records"]:
            _, objective, attack, radius = table.words(record)
            rest = attack if x == "eps_255" else f"{attack.partition('-')[0]}, {radius}"
            at = same.setdefault(f"{objective} {rest}", {})
            at.setdefault(round(record[x], 6), []).append(record)
        for words, at in same.items():
            if len(at) == 1:
                continue                                     # a point of another sweep
            radii = sum(at.values(), []) if x == "eps_255" else None
            at = {0: [clean], **at} if radii else at
            shown = [rule for rule in clean["scores"] if len(clean["scores"]) == 1
                     or rule in (rules or [clean["rule"]])]
            for rule in shown:
                name = table.configuration_of(outcome["run"])
                curve = {"seed": outcome["flags"]["seed"], x: sorted(at),
                         "clean_R@1": clean["scores"][rule]["R@1"]}
                for metric in metrics:
                    points = [[record["scores"][rule].get(metric) for record in at[value]]
                              for value in sorted(at)]
                    if None not in itertools.chain(*points):
                        curve[metric] = [sum(point) / len(point) for point in points]
                if radii:
                    curve["eps50"] = evaluator.eps50(radii, clean, rule)
                name += f": {words}" if len(clean["scores"]) == 1 else f" {rule}: {words}"
                curves.setdefault(name, []).append(curve)
    return curves


def member_scores(report):
    """{configuration: [{"seed", rule: {"clean", "shared", "alone"}} per run]}: Recall@1 of the vote
    and of every member under the attack on all members, and of the members attacked alone."""
    def numbers(record):
        return [record[name] for name in ("protocol", "objective", "attack", "eps", "steps")]

    wanted = next(numbers(record) for outcome in report for record in outcome["records"]
                  if record["against"].startswith("member_"))
    scores = {}
    for outcome in report:
        bars = {rule: {"clean": scores["R@1"]} for rule, scores in
                outcome["clean"]["scores"].items() if re.fullmatch(r"vote|member_\d+", rule)}
        for record in outcome["records"]:
            side, rules = ("shared", bars) if record["against"] == "sum" else \
                ("alone", {record["against"]} & {*bars})
            for rule in rules if numbers(record) == wanted else ():
                bars[rule].setdefault(side, record["scores"][rule]["R@1"])
        scores.setdefault(table.configuration_of(outcome["run"]), []).append(
            {"seed": outcome["flags"]["seed"], **bars})
    return scores


def training_curves(folders):
    """{configuration: [{"epoch": [...], what log.jsonl has of LOGGED: [...]} per run]}."""
    curves = {}
    for folder in folders:
        lines = [{"loss": line.get("adversarial", line.get("clean")), **line}
                 for line in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
                 if "robust_R@1" in line]
        if lines:
            curves.setdefault(table.configuration_of(Path(folder).name), []).append(
                {name: [line[name] for line in lines] for name in ("epoch", *LOGGED)})
    return curves


def training_costs(content):
    """{defense: [{"eta + 1": [...], "R@1": [...], "ERS": [...]} per seed]} of the rows of a table
    that differ in eta, the steps of the training attack."""
    rows, curves = {}, {}
    for row in content["rows"]:
        steps = content["flags"].get(row["name"], {}).get("attack_steps")
        if steps is not None and "ERS" in row.get("values", {}).get("attacked", {}):
            rows.setdefault(re.sub(r"-eta\d+", "", row["name"]), {})[steps + 1] = row["values"]
    for name, at in rows.items():
        count = min(len(own["attacked"]["ERS"]) for own in at.values())
        curves[name] = [{"eta + 1": sorted(at),
                         "R@1": [at[cost]["clean"]["R@1"][seed] for cost in sorted(at)],
                         "ERS": [at[cost]["attacked"]["ERS"][seed] / 100 for cost in sorted(at)]}
                        for seed in range(count)]
    return {name: seeds for name, seeds in curves.items() if len(seeds[0]["eta + 1"]) > 1}


# ---- curves and bars

def draw_curves(plt, curves, x, metrics):
    """A line per name, mean and range over its seeds. curves: {name: [{x: [...], metric: [...]}
    per seed]}; metrics: {metric: what its axis says}, those that every curve has are drawn."""
    metrics = {metric: words for metric, words in metrics.items()
               if all(metric in seed for seeds in curves.values() for seed in seeds)}
    height = 3.8 + 0.2 * math.ceil(len(curves) / len(metrics))            # with its legend
    figure, axes = plt.subplots(1, len(metrics), figsize=(2 + 4.5 * len(metrics), height),
                                sharex=True, squeeze=False, layout="constrained")
    for (name, seeds), (line, colour, mark) in zip(curves.items(), itertools.cycle(STYLES)):
        at = min((seed[x] for seed in seeds), key=len)
        if "eps50" in seeds[0]:
            half = sorted(math.inf if seed["eps50"] is None else seed["eps50"] for seed in seeds)
            half = half[len(half) // 2]
            name += f", eps50 {half:.1f}" if math.isfinite(half) else f", eps50 > {at[-1]:g}"
        for axis, metric in zip(axes[0], metrics):
            scores = (1 if metric == "loss" else 100) * np.array(
                [seed[metric][:len(at)] for seed in seeds])
            axis.plot(at, scores.mean(0), line, color=colour, label=plain(name), marker=mark,
                      markersize=4)
            axis.fill_between(at, scores.min(0), scores.max(0), color=colour, alpha=0.2)
    for axis, (metric, words) in zip(axes[0], metrics.items()):
        axis.set(xlabel=AXES.get(x, x), ylabel=words,
                 **({} if metric == "loss" else {"ylim": (0, 100)}))
        if x == "steps":
            axis.set_xscale("log")
            axis.set_xticks(at, at)
            axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(metrics), fontsize="small")
    return figure


def draw_members(plt, scores):
    """member_scores as bars side by side: every defense, of ensembles the vote and each member."""
    bars = [(f"{name} {rule}" if len(seeds[0]) > 2 else name, [seed[rule] for seed in seeds])
            for name, seeds in scores.items() for rule in list(seeds[0])[1:]]
    figure, axis = plt.subplots(figsize=(3 + 0.6 * len(bars), 4.5), layout="constrained")
    for side, place, colour, hatch, words in (
            ("shared", -0.2, COLOURS[0], "", "one attack on all members"),
            ("alone", 0.2, COLOURS[1], "//", "attacked alone")):
        shown = {i + place: 100 * np.array([seed[side] for seed in seeds])
                 for i, (_, seeds) in enumerate(bars) if side in seeds[0]}
        mean = np.array([heights.mean() for heights in shown.values()])
        spread = [mean - [heights.min() for heights in shown.values()],
                  [heights.max() for heights in shown.values()] - mean]
        axis.bar(list(shown), mean, 0.4, color=colour, hatch=hatch, label=words,
                 edgecolor="white", capsize=3, yerr=spread)
    axis.plot([100 * np.mean([seed["clean"] for seed in seeds]) for _, seeds in bars], "k_",
              markersize=16, label="clean")
    axis.set_xticks(range(len(bars)), [plain(name) for name, _ in bars], rotation=40, ha="right",
                    fontsize="small")
    axis.set(ylabel="Recall@1 (%)", ylim=(0, 100))
    axis.legend(fontsize="small")
    return figure


def draw_costs(plt, contents):
    """Attacked Recall@1 of a table's rows (of ensembles by vote) over its column "seconds", under
    the table's first attack; a panel a table, {its name: its content}. The names stand in a column
    beside the panel, in the order of the points, so that none covers another."""
    figure, axes = plt.subplots(1, len(contents), figsize=(7 * len(contents), 5), squeeze=False,
                                layout="constrained")
    for axis, (title, content) in zip(axes[0], contents.items()):
        shown = {}                                           # the first attack of every defense
        for row in content["rows"]:
            name, _, rule = row["name"].partition(" ")
            if rule in ("", "vote") and "R@1" in row["attacked"] \
                    and "seconds" in row.get("beside", {}):
                shown.setdefault(name, (float(row["beside"]["seconds"]), *row["attacked"]["R@1"],
                                        row["attack"]))
        ranked = sorted(shown.items(), key=lambda own: own[1][1])
        for height, (name, (seconds, mean, std, _)) in zip(np.linspace(0, 1, len(ranked)), ranked):
            axis.errorbar(seconds, 100 * mean, 100 * (std or 0), fmt="o", color=COLOURS[0],
                          markersize=5)
            name = re.sub(r"^(matched|arena)-|-(glyphs|grocery|cub2010)-\w+$", "", name)
            axis.annotate(plain(name), (seconds, 100 * mean), xytext=(1.04, height), fontsize=8,
                          textcoords="axes fraction", va="center", annotation_clip=False,
                          arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5})
        axis.set(xscale="log", xlabel="seconds of training", title=title,
                 ylabel=f"Recall@1 (%): {ranked[0][1][3] if ranked else ''}")
    return figure


# ---- pictures of embeddings

def view_of(path):
    """What a file of --save-embeddings shows: the embeddings of an ensemble are concatenated."""
    try:
        with np.load(path) as saved:
            view = {name: saved[name] for name in saved.files}
    except (OSError, ValueError) as error:
        raise common.UserError(f"cannot read --saved {path}: give a file of eval.py "
                               f"--save-embeddings") from error
    for name in {"clean", "attacked", "gallery", "gallery_attacked"} & {*view}:
        view[name] = np.concatenate(list(view[name]), axis=1) / math.sqrt(len(view[name]))
    attack = json.loads(str(view["attack"]))
    view["attack"] = common.Attack(**{name: attack[name] for name in common.Attack._fields})
    return {**view, "name": Path(path).stem, "shift": 1 - (view["clean"] * view["attacked"]).sum(1)}


def spread_rows(labels, count):
    """At most `count` rows: the first image of every class, then the second of every class ...;
    with fewer rows than classes, the first of classes that are equally far apart."""
    by_class = np.argsort(labels, kind="stable")
    turn = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    order = by_class[np.argsort(turn, kind="stable")][:max(count, len(np.unique(labels)))]
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def in_plane(clean, attacked):
    """(how, points (2 n, 2)): clean and attacked embeddings (n, D) in one map."""
    both = np.concatenate([clean, attacked])
    if both.shape[1] == 2:
        return "", both
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise common.UserError("t-SNE needs scikit-learn: pip install scikit-learn") from None
    tsne = TSNE(perplexity=min(30, (len(both) - 1) / 3), init="random",      # PCA of a collapsed
                random_state=0)                                              # network is NaN
    return ", t-SNE", tsne.fit_transform(both)


def draw_embeddings(plt, views):
    """Up to eight classes before and after the attack, a row of two panels for every view, by
    t-SNE. Two dimensions stand as they are, with a line from every attacked query to its nearest
    clean neighbour."""
    figure, axes = plt.subplots(len(views), 2, figsize=(8, 3.5 * len(views)), squeeze=False,
                                layout="constrained")
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    for view, pair in zip(views, axes):
        rows = (view["labels"] < len(COLOURS)).nonzero()[0]
        rows = rows[spread_rows(view["labels"][rows], 600)]
        how, points = in_plane(view["clean"][rows], view["attacked"][rows])
        low, high = (points if how else circle).min(0), (points if how else circle).max(0)
        (left, bottom), half = (low + high) / 2, 0.55 * (high - low).max()
        if not how:
            near = view["clean"][nearest(view["attacked"], view["clean"], 1)[rows, 0]]
            ends = np.stack([points[len(rows):], near])
            pair[1].plot(ends[..., 0], ends[..., 1], color="0.6", linewidth=0.5)
        for axis, part, title in zip(pair, np.split(points, 2), (
                f"{view['name']}\nclean{how}", f"{view['attack']}\nattacked{how}")):
            if not how:
                axis.plot(*circle.T, color="0.8", zorder=0)
            for label, (name, colour, mark) in enumerate(zip(view["classes"], COLOURS, MARKS)):
                axis.scatter(*part[view["labels"][rows] == label].T, s=22, color=colour,
                             marker=mark, alpha=0.6, linewidth=0, label=plain(name))
            axis.set(aspect="equal", xlim=(left - half, left + half), xticks=[],
                     ylim=(bottom - half, bottom + half), yticks=[])
            axis.set_title(plain(title), fontsize="small")
        pair[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_shift(plt, views):
    """How many queries move how far."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    bins = np.linspace(0, max(1e-6, *(view["shift"].max() for view in views)), 41)
    for view, (line, colour, _) in zip(views, itertools.cycle(STYLES)):
        share = np.full(len(view["shift"]), 100 / len(view["shift"]))
        axis.hist(view["shift"], bins, weights=share, color=colour, histtype="step", linestyle=line,
                  linewidth=1.5, label=plain(f"{view['name']}: {view['attack']}, median "
                                             f"{np.median(view['shift']):.2g}"))
    axis.set(xlabel="shift, 1 - cos(attacked, clean)", ylabel="queries (%)")
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def nearest(queries, candidates, depth, own=True):
    """The nearest `depth` candidates (n, depth) of every query; own: row i is no candidate of i."""
    similarity = queries @ candidates.T
    if own:
        np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :depth]


def draw_retrieval(plt, view):
    """Six queries that are right before the attack, with their three nearest candidates before and
    after it: a solid blue frame around the right class, a dashed orange one around another."""
    clustering = view["attack"].protocol == "clustering"     # candidates are attacked as well
    before = nearest(view["clean"], view["clean"], 3)
    after = nearest(view["attacked"], view["attacked" if clustering else "clean"], 3)
    labels, place = view["labels"], {row: i for i, row in enumerate(view["rows"].tolist())}
    right = [row for row in place if labels[before[row, 0]] == labels[row]
             and {*before[row], *after[row]} <= {*place}]
    if not right:
        return None
    rows = np.array(right)[spread_rows(labels[right], 6)]
    figure, axes = plt.subplots(len(rows), 9, squeeze=False, layout="constrained",
                                figsize=(12.2, 1.35 * len(rows) + 0.8))
    kept = {"clean": view["images_clean"], "attacked": view["images_attacked"]}
    for number, (row, line) in enumerate(zip(rows, axes)):
        query, attacked = (kept[side][place[row]] for side in kept)
        change = (attacked - query) / max(2 * view["attack"].eps, 1e-6) + 0.5
        near = [(f"nearest {j + 1}", kept["clean"][place[i]], i) for j, i in
                enumerate(before[row])]
        far = [(f"nearest {j + 1}{', attacked' * clustering}",
                kept["attacked" if clustering else "clean"][place[i]], i)
               for j, i in enumerate(after[row])]
        line[0].set_ylabel(plain(view["classes"][labels[row]][:18]), fontsize="x-small")
        for axis, (title, image, i) in zip(line, [
                ("query", query, None), *near, ("attacked query", attacked, None),
                (f"change, ±{view['attack'].eps * 255:.3g}/255", change, None), *far]):
            axis.imshow(image.transpose(1, 2, 0).clip(0, 1))
            axis.set(xticks=[], yticks=[])
            axis.set_title("" if number else title, fontsize="x-small")
            if i is not None:
                colour, mark, style = (COLOURS[0], "\u2713", "-") if labels[i] == labels[row] \
                    else (COLOURS[1], "\u2717", (0, (2, 1)))
                for spine in axis.spines.values():
                    spine.set(color=colour, linewidth=3, linestyle=style, capstyle="butt")
                axis.text(0.05, 0.95, mark, weight="bold", va="top", color=colour,
                          transform=axis.transAxes,
                          bbox={"facecolor": "white", "linewidth": 0, "pad": 1})
    figure.suptitle(plain(f"{view['name']}; {view['attack']}"), fontsize="medium")
    figure.supxlabel("\u2713 solid frame: the query's class      \u2717 dashed frame: another class"
                     "      change: magnified, eps fills the range", fontsize="small")
    return figure


# ---- command line

def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parts = [list(part) for dashes, part in itertools.groupby(argv, "--".__eq__) if not dashes]
    parser = common.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--saved", nargs="+", default=[], metavar="NPZ",
                        help="files of eval.py --save-embeddings, one a run")
    parser.add_argument("--table", nargs="+", default=[], metavar="JSON",
                        help="tables of results/table.py")
    parser.add_argument("--rules", nargs="+", metavar="RULE",
                        help="inference rules of ensembles in the curves (default: vote)")
    args = parser.parse_args(parts[0] if parts else [])
    if not (args.saved or args.table or parts[1:]):
        parser.error("nothing to draw: give --saved, --table, or runs and their attack behind --")
    args.evaluations = table.evaluations(parts[1:]) if parts[1:] else []
    return args


def main(args):
    folder, plt, figures, numbers = Path(args.folder), pyplot(), {}, {}
    if args.evaluations:
        report = table.reported(args.evaluations)
        for name, x in (("sweep-eps", "eps_255"), ("sweep-steps", "steps")):
            numbers[name] = sweep_curves(report, x, args.rules)
            if numbers[name]:
                figures[name] = draw_curves(plt, numbers[name], x, METRICS)
        if any(record["against"].startswith("member_") for run in report
               for record in run["records"]):
            numbers["per-member"] = member_scores(report)
            figures["per-member"] = draw_members(plt, numbers["per-member"])
        numbers["training"] = training_curves(
            run for pattern in args.evaluations[0].runs for run in sorted(glob.glob(pattern)))
        if numbers["training"]:
            figures["training"] = draw_curves(plt, numbers["training"], "epoch", LOGGED)
    views = [view_of(path) for path in args.saved]
    if views:
        figures |= {"embeddings": draw_embeddings(plt, views), "shift": draw_shift(plt, views)}
        figures |= {f"retrieval-{view['name']}" if len(views) > 1 else "retrieval":
                    draw_retrieval(plt, view) for view in views if "gallery" not in view}
    contents = {Path(path).stem: common.read_json(path) for path in args.table}
    if contents:
        numbers["training-cost"] = training_costs([*contents.values()][0])
        if numbers["training-cost"]:
            figures["training-cost"] = draw_curves(plt, numbers["training-cost"], "eta + 1",
                                                   REACHED)
        else:
            figures["cost"] = draw_costs(plt, contents)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in numbers.items():
        if content:
            common.write_atomic(folder / f"{name}.json", content)
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120)
            print(f"wrote {folder / name}.png")
    plt.close("all")


if __name__ == "__main__":
    common.run_script(parse_args, main)
