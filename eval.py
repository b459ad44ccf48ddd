# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26"]
# ///
"""How robust is an embedding model? Attacks runs of these scripts, or any model of your own.

    python eval.py runs/eat-cub-mobilenetv2-s0              # all it needs is in the checkpoint
    python eval.py runs/* --protocol template --eps 0.05    # one table over all runs
    python eval.py runs/eat-glyphs-* --table results/eat-glyphs    # mean and std over seeds
    from eval import evaluate_robustness                    # your own model: README

Protocols: "clustering" attacks every image and compares attacked images (Ke, arXiv 2501.01025);
"template" attacks queries against a clean gallery (Algorithm 1 of Panum et al., arXiv 2102.07265).
A run's folder gets its new entries in results.json; one that is there already is read back.
"""

import argparse
import glob
import json
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError

# ---- any model

def evaluate_robustness(embed, images_or_loader, labels=None, *, protocol="clustering",
                        attack="pgd", objective="shift", eps=8 / 255, step_size=None, steps=10,
                        restarts=1, random_start=True, ks=(1, 2, 4, 8), batch_size=128, seed=0,
                        device=None):
    """Clean and attacked retrieval of an embedding model: {"clean", "robust", "warnings"}.

    embed: a module or callable from images (B, 3, H, W) in [0, 1] to embeddings (B, D), or a list
    of them (an ensemble: attacked together, scored by every inference rule). Its own normalisation
    belongs inside. Rows that are not unit vectors are normalised, with a warning.
    images_or_loader: (n, 3, H, W) with labels (n,), or a loader of (images, labels), which is read
    once and kept in memory.
    objective "shift" moves an image away from its clean embedding; "neighbour" (template only) a
    rightly answered query away from its nearest neighbour, Algorithm 1 of Panum et al.; with
    another objective the template protocol attacks every query. eps, step_size (None: eps / 4) in
    pixel values. restarts keep the highest objective per image. Scores are in [0, 1].
    Modes, gradients and the state of the random generators are afterwards as before.
    Raises ValueError when images are outside [0, 1] or arguments do not fit together.
    """
    settings = common.Attack(protocol, attack, objective, eps,
                             eps / 4 if step_size is None else step_size, steps, restarts,
                             random_start, seed)
    models = list(embed) if isinstance(embed, (list, tuple, nn.ModuleList)) else [embed]
    modules = [model for model in models if isinstance(model, nn.Module)]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    if not models or batch_size < 1 or min(ks, default=0) < 1:
        raise ValueError("evaluate_robustness needs a model, batch_size >= 1 and ks >= 1")
    with torch.random.fork_rng(devices=cuda), common.frozen(*modules):
        images, labels = _images_and_labels(images_or_loader, labels)
        if device is None:
            parameters = (parameter for module in modules for parameter in module.parameters())
            device = next(parameters, images).device
        alerts, with_unit_rows = [], []
        for i, model in enumerate(models):
            with torch.no_grad():
                norms = _checked(model(images[:2].to(device)), 2).norm(dim=1)
            if (norms - 1).abs().max() > 1e-3:
                alerts.append(f"the outputs of model {i + 1} are not unit vectors (first norm "
                              f"{norms[0]:.3g}): they were normalised")
            with_unit_rows.append(lambda x, model=model: F.normalize(model(x), dim=1))
        rows = torch.arange(len(images)).split(batch_size)

        def batches():
            return ((images[batch].to(device), None, batch) for batch in rows)

        clean, robust, more = common.evaluate(with_unit_rows, batches, labels.to(device),
                                              [settings], ks=ks, seed=seed)
    for entry in robust:
        entry["amp"] = any(getattr(model, "amp", False) for model in models)
    return {"clean": clean, "robust": robust, "warnings": alerts + more}


def _images_and_labels(images, labels):
    """One tensor of images in [0, 1] and int64 labels, out of either form; checked."""
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(images, torch.Tensor):
        if labels is not None:
            raise ValueError("labels come with a tensor of images; a loader yields its own")
        batches = list(images)
        if not batches:
            raise ValueError("the loader is empty: it must yield (images, labels)")
        images, labels = zip(*batches)
        images, labels = torch.cat(images), torch.cat([torch.as_tensor(part) for part in labels])
    if labels is None:
        raise ValueError("a tensor of images needs labels (n,): only a loader yields its own")
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1] and labels whole numbers, found "
                         f"{images.dtype} and {labels.dtype}")
    labels = labels.to(torch.int64)
    if images.dim() != 4 or labels.shape != images.shape[:1] or len(labels) < 2:
        raise ValueError(f"expected images (n, 3, H, W) and labels (n,) with n >= 2, found "
                         f"{tuple(images.shape)} and {tuple(labels.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-5 and high <= 1 + 1e-5):
        raise ValueError(f"images must be in [0, 1], found {low:.3g} to {high:.3g}: eps counts "
                         f"pixel values, so normalise inside the model, for example "
                         f"lambda x: net((x - mean) / std)")
    return images.float().clamp(0, 1), labels


def _checked(embeddings, count):
    if not (isinstance(embeddings, torch.Tensor) and embeddings.dim() == 2
            and len(embeddings) == count):
        found = tuple(getattr(embeddings, "shape", ())) or type(embeddings).__name__
        raise ValueError(f"embed must return embeddings (B, D): found {found} for B = {count}")
    return embeddings


# ---- command line

def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run's folder, a checkpoint, or a quoted pattern of them")
    attack = parser.add_argument_group("attack")
    attack.add_argument("--protocol", choices=common.PROTOCOLS, default="clustering")
    attack.add_argument("--attack", choices=("pgd", "fgsm"), default="pgd")
    attack.add_argument("--objective", choices=("shift", "neighbour"), default=None,
                        help="what is maximised (default: shift; neighbour for template)")
    attack.add_argument("--eps", type=common.fraction, default=None, metavar="8/255",
                        help="radius, pixel values (default: 8/255; 0.01 for template)")
    attack.add_argument("--step-size", type=common.fraction, default=None, metavar="2/255",
                        help="(default: eps / 4; 2 eps / steps for template)")
    attack.add_argument("--attack-steps", type=common.number(int, 0), default=None, metavar="N",
                        help="(default: 10; 5 for template)")
    attack.add_argument("--restarts", type=common.number(int, 1), default=1,
                        help="keep the best of so many, image by image")
    attack.add_argument("--random-start", action=argparse.BooleanOptionalAction, default=True,
                        help="start uniformly in the ball")
    attack.add_argument("--seed", type=common.number(int, 0, 2**32 - 1), default=None,
                        help="of the attack and of k-means (default: the run's)")
    data = parser.add_argument_group("data and machine")
    data.add_argument("--data-root", default=None, help="(default: the run's)")
    data.add_argument("--cache-gb", type=common.number(float, 0), default=4.0,
                      help="decode images once when they fit in this memory")
    data.add_argument("--limit-queries", type=common.number(int, 0), default=0, metavar="N",
                      help="a fixed class-balanced subset of N images (0: all), marked as limited")
    data.add_argument("--batch-size", type=common.number(int, 1), default=128)
    data.add_argument("--workers", type=common.number(int, 0, 256), default=2)
    data.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    data.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False,
                      help="bfloat16 backbone; the rows say so")
    data.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=False)
    output = parser.add_argument_group("output")
    output.add_argument("--json", default=None, metavar="FILE", help="write all of it here too")
    output.add_argument("--table", default=None, metavar="NAME",
                        help="write NAME.json and NAME.md: mean and standard deviation over seeds")
    output.add_argument("--into", default=None, metavar="FILE",
                        help="put the table of --table into this Markdown file, between the line "
                             "<!-- NAME.md --> (NAME as given there) and <!-- end -->")
    output.add_argument("--rules", nargs="+", type=inference_rule, default=None, metavar="RULE",
                        help="show these inference rules of ensembles alone: vote, member_mean, "
                             "concat, mean, member_1 ..., and no undefended rows")
    output.add_argument("--overwrite", action="store_true",
                        help="attack again where results.json has the entry")
    output.add_argument("--dry-run", action="store_true", help="one batch; writes nothing")
    args = parser.parse_args(argv)
    if args.into and not args.table:
        parser.error("--into FILE needs --table NAME")
    return args


def inference_rule(text):
    if not re.fullmatch("vote|member_mean|concat|mean|member_[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of vote, member_mean, concat, mean, "
                                         f"member_1, member_2 ...")
    return text


# ---- evaluation

def main(args):
    for flag, target in (("--json", args.json), ("--table", args.table)):
        if target and (not Path(target).absolute().parent.is_dir() or Path(target).is_dir()):
            raise UserError(f"{flag} {target}: not a file in a folder that exists; create it")
    if args.into:
        insert_table(Path(args.into), args.table, None)                   # both marks are there
    named = (run for pattern in args.runs for run in sorted(glob.glob(pattern)) or [pattern])
    runs = [run for run in dict.fromkeys(map(os.path.normpath, named)) if has_checkpoint(run)]
    checkpoints = [common.load_checkpoint(run) for run in runs]           # all, before any work
    if not runs:
        raise UserError("no run has a checkpoint yet: wait for its first epoch")
    device = common.pick_device(args.device, args.deterministic)
    rows, report, attack = [], [], None
    for run, checkpoint in zip(runs, checkpoints):
        flags = argparse.Namespace(**checkpoint["args"])
        attack = common.Attack(args.protocol, args.attack, args.objective, args.eps,
                               args.step_size, args.attack_steps, args.restarts, args.random_start,
                               flags.seed if args.seed is None else args.seed)
        results = stored_results(run, checkpoint)
        entries = known_entries(results["robust"], attack, args) if results else []
        if entries and not args.overwrite and not args.dry_run:
            clean = results["clean"]
            if (entries[0]["n_queries"], args.amp, attack.seed) != \
                    (clean["n_queries"], False, results["seed"]):
                # the stored clean scores are others: only the attacked ones are shown again
                clean = {**clean, "by_rule": {rule: {} for rule in clean["by_rule"]}}
            outcome = {"clean": clean, "robust": entries, "warnings": results["warnings"]}
        else:
            outcome = evaluate_run(checkpoint, flags, attack, args, device)
            if results is not None and not args.dry_run:
                same = common.entries_of(results["robust"], attack,
                                         outcome["clean"]["n_queries"], args.amp)
                results["robust"] = [entry for entry in results["robust"]
                                     if entry not in same] + outcome["robust"]
                common.write_atomic(Path(run) / "results.json",
                                    json.dumps(results, indent=1).encode())
        label = Path(run).stem if Path(run).is_file() else Path(run).resolve().name
        own = common.results_table(outcome, label, args.rules)
        undefended = None if args.rules else (results or {}).get("undefended")
        known = known_entries(undefended["robust"], attack, args) if undefended else []
        if known:
            name = f"{label} undefended" if undefended["epochs"] else f"{label} not trained"
            own += common.results_table({**undefended, "robust": known}, name)
        rows += own
        report.append({"run": label, "flags": checkpoint["args"], "rows": own, **outcome})
    if not rows:
        raise UserError(f"--rules {' '.join(args.rules)}: no run has them; drop --rules to see all")
    limited = f", a fixed subset of {args.limit_queries} images" if args.limit_queries else ""
    print(f"{attack}{limited}{', bfloat16' if args.amp else ''}; scores in %")
    print(common.format_table(rows))
    for outcome in report:
        for alert in outcome["warnings"]:
            print(f"warning: {outcome['run']}: {alert}")
    if args.dry_run:
        return
    if args.json:
        content = [{name: outcome[name] for name in ("run", "clean", "robust", "warnings")}
                   for outcome in report]
        common.write_atomic(Path(args.json), json.dumps(content, indent=1).encode())
    if args.table:
        content = table_content(report, attack)
        common.write_atomic(Path(args.table + ".json"), json.dumps(content, indent=1).encode())
        common.write_atomic(Path(args.table + ".md"), table_markdown(content).encode())
    if args.into:
        insert_table(Path(args.into), args.table, table_markdown(content))


def insert_table(path, name, table):
    """Replace what stands between the marks of this table in a Markdown file; None: check only."""
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --into {path} ({error}): give a Markdown file") from error
    start = f"<!-- {name}.md -->\n"
    before, found, rest = text.partition(start)
    old, closed, after = rest.partition("<!-- end -->")
    if not (found and closed) or "<!--" in old:
        raise UserError(f"{path} has no line {start.strip()} with <!-- end --> below it: add both")
    if table is not None:
        common.write_atomic(path, f"{before}{start}{table}{closed}{after}".encode())


def table_content(report, attack):
    """What --table stores: a row per configuration and rule, mean and std over its seeds; and the
    flags of every configuration's first run."""
    groups, configurations = {}, {}
    for outcome in report:
        flags, seed = outcome["flags"], f"-s{outcome['flags']['seed']}"
        config = json.dumps({name: value for name, value in flags.items()
                             if name not in ("seed", *common.MOVABLE_FLAGS, *common.CALL_FLAGS)})
        configuration = outcome["run"].removesuffix(seed)
        configurations.setdefault(configuration, {
            name: Path(value).name if name in ("data_root", "weights", "out") else value
            for name, value in outcome["flags"].items()})
        for row in outcome["rows"]:
            name = row["name"].replace(outcome["run"], configuration)
            groups.setdefault((config, name), []).append((flags["seed"], row))
    rows = [{"name": name, "seeds": [seed for seed, _ in found],
             **{side: spread([row[side] for _, row in found]) for side in ("clean", "attacked")}}
            for (_, name), found in groups.items()]
    return {"command": shlex.join(["python", "eval.py", *sys.argv[1:]]), "attack": attack.entry(),
            "title": str(attack), "flags": configurations, "versions": common.versions(),
            "warnings": [f"{outcome['run']}: {alert}" for outcome in report
                         for alert in outcome["warnings"]], "rows": rows}


def spread(scores):
    """{metric: [mean, std]} of one row's seeds; std is None for one seed."""
    return {name: [statistics.mean(score[name] for score in scores),
                   statistics.stdev(score[name] for score in scores) if len(scores) > 1 else None]
            for name, value in scores[0].items()
            if isinstance(value, float) and all(name in score for score in scores)}


def table_markdown(content):
    """The Markdown of a --table file, made from its JSON alone."""
    columns = [(side, name) for side in ("clean", "attacked") for name in content["rows"][0][side]
               if name in ("mAP@R", "NMI", "AMI", "F1") or name in ("R@1", "R@8", "R@10")]
    lines = ["| " + " | ".join(["in %", *(f"{side} {name}" for side, name in columns)]) + " |",
             "|---" + "|---:" * len(columns) + "|"]
    most = max(len(row["seeds"]) for row in content["rows"])
    for row in content["rows"]:
        fewer = "" if len(row["seeds"]) == most else f" (seeds: {len(row['seeds'])})"
        cells = [row["name"] + fewer]
        for side, name in columns:
            mean, std = row[side].get(name, [None, None])
            cells.append("-" if mean is None else f"{100 * mean:.1f}"
                         + ("" if std is None else f" ± {100 * std:.1f}"))
        lines.append("| " + " | ".join(cells) + " |")
    chance = content["rows"][0]["clean"].get("NMI_chance")
    title = (f"{content['title']}; {most} seed{'s' if most > 1 else ''}"
             f"{', mean ± std' if most > 1 else ''}"
             f"{f'; NMI by chance {100 * chance[0]:.1f}' if chance else ''}. "
             f"Made by `{content['command']}`.")
    return "\n".join([title, "", *lines, *(f"\nWarning: {alert}" for alert in content["warnings"])]
                     ) + "\n"


def has_checkpoint(run):
    """False, said in a line, for a run's folder that has not saved its first epoch."""
    if (Path(run) / "args.json").exists() and not (Path(run) / "last.pt").exists():
        print(f"{run}: no checkpoint yet, left out")
        return False
    return True


def stored_results(run, checkpoint):
    """A finished run's results.json; None for a bare checkpoint or an unfinished run."""
    if not Path(run).is_dir():
        return None
    if checkpoint["epoch"] < checkpoint["args"]["epochs"]:
        print(f"{run}: {checkpoint['epoch']} of {checkpoint['args']['epochs']} epochs are done; "
              f"nothing is stored")
        return None
    path = Path(run) / "results.json"
    return common.read_json(path) if path.exists() else None


def known_entries(robust, attack, args):
    """Stored entries with just these parameters, one per inference rule."""
    limit = args.limit_queries
    return [entry for entry in common.entries_of(robust, attack, amp=args.amp)
            if (entry["n_queries"] == limit if entry["limited"]
                else not limit or entry["n_queries"] <= limit)]


def evaluate_run(checkpoint, flags, attack, args, device):
    """{"clean", "robust", "warnings"} of a run's members on the images it reports on."""
    if args.data_root is not None:
        flags.data_root = args.data_root
    flags.limit_queries = max(args.batch_size, 2) if args.dry_run else args.limit_queries
    train, test = common.load_run_data(flags)
    if not args.dry_run:
        common.cache_images([test, test.gallery], args.cache_gb, args.workers)
    members = common.build_members(checkpoint, device)
    for member in members:
        member.amp = args.amp
    passes = len(test) * len(members) * (2 + 2 * attack.steps * attack.restarts)
    print(f"{flags.dataset}: {len(test)} images, {len(members)} networks, {attack}: "
          f"{passes:,} passes", flush=True)
    clean, robust, alerts = common.evaluate_set(
        members, test, [attack], batch_size=args.batch_size, workers=args.workers, device=device,
        ks=common.KS.get(flags.dataset, (1, 2, 4, 8)), seed=attack.seed)
    return {"clean": clean, "robust": robust, "warnings": alerts}


if __name__ == "__main__":
    common.run_script(parse_args, main)
