# SPDX-License-Identifier: MIT
"""A table of runs: mean and standard deviation over training seeds, as NAME.json and NAME.md.

    python results/table.py results/at -- 'runs/at-*' 'runs/eat-glyphs-*' --eps 2/255 8/255
    python results/table.py results/at --metrics R@1 R@1_low R@1_high --rules vote -- 'runs/*'
    python results/table.py results/at --metrics R@1 eps50_255 -- 'runs/at-*' --objective worst \\
        -- --objective joint --eps 1/255 2/255 4/255 8/255 16/255

Behind the first `--` stand runs and flags of eval.py, behind another one the flags of a further
evaluation of the same runs; eval.py attacks what is not stored. With eps50_255 among the metrics a
list of radii becomes one column: the radius, in 1/255, that halves Recall@1. R@1_low and R@1_high
are a 95 % interval over the test classes. The JSON has the scores of every seed, the flags of every
run, the warnings, the command and the commit.
"""

import argparse
import csv
import itertools
import json
import re
import shlex
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import eval as evaluator  # noqa: E402
from common import UserError  # noqa: E402

# Zhou & Patel's figures, on their own scales: percent, TMA a cosine, ES:D a distance.
ERS = ("CA+", "CA-", "QA+", "QA-", "TMA", "ES:D", "ES:R", "LTM", "GTM", "GTT", "ERS")
HISTORY = ("R@1_free", "bound", "min_eps_255")               # of tables that eval.py once wrote
SHOWN = ("mAP@R", "NMI", "AMI", "F1", "R@1", "R@8", "R@10", "R@1_label_free", "eps50_255",
         "success", *HISTORY, *ERS)                          # without --metrics
INTERVAL = ("R@1_low", "R@1_high")
METRICS = (*SHOWN, "R@2", "R@4", "R@20", "R@100", "R@1000", "all_fail", *INTERVAL)
MOVABLE = ("seed", *common.MOVABLE)                          # not of a configuration
FILES = ("data_root", "weights", "out", "teacher")           # stored by their last name


# ---- scores

def words(record):
    """Protocol, objective, attack and radius of a record, to be read."""
    name = {"pgd": f"PGD-{record['steps']}", "fgsm": "FGSM", "cw": f"C&W-{record['steps']}",
            "square": f"Square-{record['steps']}"}.get(record["attack"], record["attack"])
    objective = {"ers": "ERS", "ers-authors": "ERS(authors)"}.get(record["objective"],
                                                                  record["objective"])
    objective += f" against {record['against']}" if record["against"] != "sum" else ""
    name, radius = (f"curve of {name}", "up to") if "curve" in record else (name, "eps")
    return record["protocol"], objective, name, f"{radius} {record['eps_255']:.3g}/255"


def with_eps50(records, clean):
    """The records; those that differ in the radius alone are replaced by one with their eps50."""
    curves = {}
    for record in records:
        key = [record.get(name) for name in (*common.Attack._fields, "gallery_from")
               if name not in ("eps", "step")]
        curves.setdefault(tuple(key), []).append(record)
    for curve in curves.values():
        yield curve[0] if len(curve) == 1 else {
            **max(curve, key=lambda record: record["eps"]), "curve": True, "scores": {
                rule: {"eps50_255": evaluator.eps50(curve, clean, rule),
                       "eps50_from": min(record["eps_255"] for record in curve),
                       **{f"R@1 at {record['eps_255']:.3g}/255": record["scores"][rule]["R@1"]
                          for record in curve}} for rule in curve[0]["scores"]}}


def scores_of(record, rule, labels=None):
    """The scores of a record under a rule; with labels, the interval of its Recall@1, too."""
    shared = {} if "curve" in record else {"all_fail": record.get("all_fail")}
    scores = {**record["scores"][rule], **shared}
    members = [name for name in record["scores"] if re.fullmatch(r"member_\d+", name)]
    hits = [record["scores"][name]["hits"] for name in
            (members if rule == "member_mean" else [rule]) if "hits" in record["scores"][name]]
    if labels is not None and hits:
        hit = np.mean([common.unpack(bits, len(labels)) for bits in hits], axis=0)
        scores |= recall_interval(hit, labels)
    return scores


def labels_of(outcome):
    """The labels (n,) of the images that a run was evaluated on."""
    flags = argparse.Namespace(**outcome["flags"])
    flags.limit_queries = outcome["clean"]["n_queries"]
    return common.load_run_data(flags)[1].labels.numpy()


def recall_interval(hit, labels, draws=1000):
    """The 95 % interval of Recall@1 over classes: {"R@1_low": share, "R@1_high": share}.

    hit (n,): the queries that are right at rank 1 (or their mean over members), labels (n,). As
    many classes as there are, drawn with replacement, all queries of each, 1,000 times: percentiles
    2.5 and 97.5. The candidates stay. The same classes are drawn for every network.
    """
    index = np.unique(labels, return_inverse=True)[1]
    right, size = np.bincount(index, weights=hit), np.bincount(index)
    times = common.random_stream(0, 0, common.CLASSES).multinomial(
        len(size), np.full(len(size), 1 / len(size)), size=draws)                   # (draws, C)
    low, high = np.quantile(times @ right / (times @ size), (0.025, 0.975))
    return {"R@1_low": float(low), "R@1_high": float(high)}


def spread(scores):
    """{metric: [mean, std]} over the seeds of one row; std is None for one seed."""
    return {name: [statistics.mean(score[name] for score in scores),
                   statistics.stdev(score[name] for score in scores) if len(scores) > 1 else None]
            for name, value in scores[0].items()
            if isinstance(value, float) and all(isinstance(score.get(name), float)
                                                for score in scores)}


# ---- from a report to a table

def configuration_of(run):
    """The name of a run's folder without its seed."""
    return re.sub(r"-s\d+$", "", run)


def title_of(attacks):
    """What all attacks share in words, and what is left to say of each: (title, {words: rest})."""
    shared = [len(set(column)) == 1 for column in zip(*attacks)]
    protocol, objective, *rest = attacks[0]
    title = f"{protocol}: {objective} {', '.join(rest)}" if all(shared) else ": ".join(filter(
        None, [protocol if shared[0] else "every protocol",
               ", ".join(word for word, same in zip(attacks[0][1:], shared[1:]) if same)]))
    return title, {attack: " ".join(word for word, same in zip(attack, shared) if not same)
                   for attack in attacks}


def published_figures(paths):
    """{name of a row: {column: text}} of CSV files, as --beside takes them."""
    figures = {}
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            head, *lines = [line for line in csv.reader(file) if line]
        for name, *cells in lines:
            figures.setdefault(name, {}).update(zip(head[1:], cells))
    return figures


def names_of(row):
    """What a CSV file may call a row: a rule, "matched-" or "paper-" may be left out."""
    names = [row.partition(" ")[0], row]
    return [re.sub("^(matched|paper)-", "", name) for name in names] + names


def rows_of(report, rules=None, metrics=()):
    """A row per configuration, rule and attack: mean and std of its clean and attacked scores over
    the training seeds, and the score of every seed (the mean over the seeds of the attack)."""
    met = {}                          # {(flags, row, attack): {seed: {its: (clean, attacked)}}}
    for outcome in report:
        clean, records = outcome["clean"], outcome["records"]
        key = json.dumps({name: configuration_of(value) if name == "teacher" and value else value
                          for name, value in outcome["flags"].items() if name not in MOVABLE})
        labels = labels_of(outcome) if {*INTERVAL} & {*metrics} else None
        single, name = "vote" not in clean["scores"], configuration_of(outcome["run"])
        for record in with_eps50(records, clean) if "eps50_255" in metrics else records:
            for rule in record["scores"]:
                if single or not rules or rule in rules:
                    after = scores_of(record, rule, labels)
                    before = {"R@1": after.pop("R@1")} if rule == "distance" else {}
                    if rule in clean["scores"] or single:
                        before = scores_of(clean, rule if rule in clean["scores"] else "member_1",
                                           labels) | {"NMI_chance": clean["NMI_chance"]}
                    row = met.setdefault((key, name if single else f"{name} {rule}",
                                          words(record)), {})
                    pairs = row.setdefault(outcome["flags"]["seed"], {})
                    if record["seed"] in pairs:
                        raise UserError(f"{name}: two runs or attacks differ in what no column says"
                                        f" (folder, step, restarts, gallery): make a table of each")
                    pairs[record["seed"]] = before, after
    for (_, name, attack), seeds in met.items():
        own = [spread([after for _, after in pairs.values()]) for pairs in seeds.values()]
        sides = {"clean": [next(iter(pairs.values()))[0] for pairs in seeds.values()],
                 "attacked": [{metric: mean for metric, (mean, _) in one.items()} for one in own]}
        row = {"name": name, "attack": attack, "seeds": list(seeds),
               "attack_seeds": max(map(len, seeds.values())),
               **{side: spread(scores) for side, scores in sides.items()}}
        row["values"] = {side: {metric: [score[metric] for score in scores] for metric in row[side]}
                         for side, scores in sides.items()}
        if row["attack_seeds"] > 1:
            row["attack_std"] = {metric: statistics.mean(one[metric][1] for one in own)
                                 for metric in row["attacked"]}
        yield row


def table_content(report, command, rules=None, metrics=None, beside=None):
    """What NAME.json stores: the rows, what made them, and the published figures beside them."""
    rows = list(rows_of(report, rules, metrics or ()))
    if not rows:
        raise UserError(f"no run has the rules {' '.join(rules or [])}: drop --rules to see all")
    title, rest = title_of(list(dict.fromkeys(row["attack"] for row in rows)))
    records = [record for outcome in report for record in outcome["records"]]
    limits = [record["n_queries"] for record in records if record["limited"]]
    for row in rows:
        row["attack"] = rest[row["attack"]]
        found = {column: text for name in names_of(row["name"]) for column, text in
                 (beside or {}).get(name, {}).items()}
        if beside:
            row["beside"] = {column: text for column, text in found.items()
                             if not metrics or column.split()[-1] not in {*METRICS} - {*metrics}}
    if beside and not any(row["beside"] for row in rows):
        raise UserError(f"--beside names none of these rows: it has {', '.join(list(beside)[:3])} "
                        f"..., the table {', '.join(row['name'] for row in rows[:3])} ...")
    flags = {}
    for outcome in report:
        flags.setdefault(configuration_of(outcome["run"]), {
            name: Path(value).name if name in FILES and value else value
            for name, value in outcome["flags"].items()})
    source = common.provenance(torch.device("cpu"))
    return {"command": command,
            "commit": f"{str(source['commit'])[:7]}{'-dirty' * bool(source['dirty'])}",
            "title": title + (f", a fixed subset of {limits[0]} images" if limits else ""),
            "metrics": metrics, "flags": flags, "versions": source["versions"],
            "warnings": [f"{outcome['run']}: {alert}" for outcome in report
                         for alert in outcome["warnings"]], "rows": rows}


# ---- Markdown

def metric_name(metric):
    """The head of its column."""
    metric, _, of = metric.partition("_")
    return {"min": "eps/255", "bound": "bound R@1"}.get(metric, metric) \
        if of in ("", "eps_255", "255") \
        else f"{metric} {'label-free' if of in ('free', 'label_free') else of}"


def cell(metric, value):
    """A score in percent; radii in 1/255, the figures of ERS as they are."""
    if metric in ("min_eps_255", "eps50_255", "TMA", "ES:D"):
        return f"{value:.2f}"
    return f"{value:.1f}" if metric in ERS else f"{100 * value:.1f}"


def table_markdown(content):
    """The Markdown of a table, made from its JSON alone: a line per configuration and rule, its
    attacks side by side."""
    rows, wanted = content["rows"], content.get("metrics")
    sides = dict.fromkeys([("clean", ""), *(("attacked", row.get("attack", "")) for row in rows)])
    columns = [(side, attack, metric) for side, attack in sides for metric in dict.fromkeys(
        metric for row in rows if side == "clean" or row.get("attack", "") == attack
        for metric in row[side]) if metric in (wanted or SHOWN)]
    heads = [" ".join(filter(None, [attack or side, metric_name(metric)]))
             for side, attack, metric in columns]
    published = list(dict.fromkeys(column for row in rows for column in row.get("beside", {})))
    lines = ["| " + " | ".join(["in %", *heads, *published]) + " |",
             "|---" + "|---:" * (len(columns) + len(published)) + "|"]
    most = max(len(row["seeds"]) for row in rows)
    repeated = max(row.get("attack_seeds", 1) for row in rows)
    in_line, met = {}, Counter()                     # the rows of a line, one per attack
    for row in rows:
        row_key = (row["name"], row.get("attack", ""), *row["seeds"])
        in_line.setdefault((row["name"], met[row_key], *row["seeds"]), []).append(row)
        met[row_key] += 1
    for (name, _, *seeds), attacks in in_line.items():
        cells = [name + warning_mark(content, name, seeds)
                 + ("" if len(seeds) == most else f" (seeds: {len(seeds)})")]
        for side, attack, metric in columns:
            row = next((row for row in attacks
                        if side == "clean" or row.get("attack", "") == attack), {side: {}})
            mean, std = row[side].get(metric, [None, None])
            if side == "attacked" and len(seeds) == 1:
                std = row.get("attack_std", {}).get(metric)
            text = "-" if mean is None else cell(metric, mean) + (
                "" if std is None else f" ± {cell(metric, std)}")
            first = row[side].get("eps50_from", [0])[0]
            if metric == "eps50_255" and mean is not None and mean < first:
                text = f"< {first:g}"                # nothing was measured below the first radius
            cells.append(text)
        cells += [attacks[0].get("beside", {}).get(column, "-") for column in published]
        lines.append("| " + " | ".join(cells) + " |")
    chance = rows[0]["clean"].get("NMI_chance") if "NMI" in (wanted or SHOWN) else None
    title = (f"{content['title']}; {most} seed{'s' if most > 1 else ''}"
             f"{f', {repeated} of the attack on each' if repeated > 1 else ''}"
             f"{', mean ± std' if max(most, repeated) > 1 else ''}"
             f"{f'; NMI by chance {100 * chance[0]:.1f}' if chance else ''}. "
             f"Made at {content['commit']} by `{content['command']}`.")
    return "\n".join([title, "", *lines, *(f"\nWarning [{number}]: {alert}" for number, alert in
                                           enumerate(content["warnings"], 1))]) + "\n"


def warning_mark(content, name, seeds):
    """" [1, 2]" for a row whose runs have these warnings; "" without one."""
    numbers = [number for number, alert in enumerate(content["warnings"], 1)
               for run in content.get("flags", {})
               if re.match(rf"{re.escape(run)}( |$)", name)
               and alert.startswith((f"{run}: ", *(f"{run}-s{seed}: " for seed in seeds)))]
    return f" [{', '.join(map(str, numbers))}]" if numbers else ""


# ---- command line

def parse_args(argv=None):
    """Our flags; `evaluations` holds eval.py's, a Namespace for every `--`."""
    argv = sys.argv[1:] if argv is None else argv
    parts = [list(part) for dashes, part in itertools.groupby(argv, "--".__eq__) if not dashes]
    parser = common.Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="NAME.json and NAME.md are written")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC",
                        help=f"columns, of {', '.join(METRICS)}")
    parser.add_argument("--rules", nargs="+", metavar="RULE",
                        help="inference rules of ensembles: vote, concat, member_1 ... (all)")
    parser.add_argument("--beside", nargs="+", default=[], metavar="CSV",
                        help="columns to put beside: a line per row of the table, its name first")
    args = parser.parse_args(parts[0] if parts else [])
    if len(parts) < 2:
        parser.error("name the runs and the attack behind --, as for eval.py")
    args.command = shlex.join(["python", "results/table.py", *argv])
    args.evaluations = evaluations(parts[1:])
    return args


def evaluations(parts):
    """eval.py's Namespaces of [[RUN ... FLAGS], [FLAGS], ...]; without a RUN: the first ones'."""
    first = evaluator.parse_args(parts[0])
    return [first, *(evaluator.parse_args(first.runs * flags[0].startswith("-") + flags)
                     for flags in parts[1:])]


def reported(evaluations):
    """The report of eval.py; of several evaluations, the records of a run one by one, no twins."""
    report = {}
    outcomes = [(own, evaluator.main(own)) for own in evaluations]
    if any(len({one["run"] for one in ones}) < len(ones) for _, ones in outcomes):
        raise UserError("two runs have folders of one name: rename one, tables name runs by it")
    for args, outcome in ((own, one) for own, ones in outcomes for one in ones):
        known = report.setdefault(outcome["run"], {**outcome, "records": [], "warnings": []})
        if known["clean"]["n_queries"] != outcome["clean"]["n_queries"]:
            raise UserError("a table is of one set of images: repeat --limit-queries")
        known["flags"] |= {"data_root": args.data_root} if args.data_root else {}
        for name in ("records", "warnings"):
            known[name] += [item for item in outcome[name] if item not in known[name]]
    return list(report.values())


def main(args):
    for path in (Path(args.name).absolute().parent, *map(Path, args.beside)):
        if not path.exists():
            raise UserError(f"there is no {path}: create the folder, or correct the name")
    content = table_content(reported(args.evaluations), args.command, args.rules, args.metrics,
                            published_figures(args.beside))
    common.write_atomic(f"{args.name}.json", content)
    common.write_atomic(f"{args.name}.md", table_markdown(content).encode())


if __name__ == "__main__":
    common.run_script(parse_args, main)
