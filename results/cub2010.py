# SPDX-License-Identifier: MIT
"""Every defense on CUB-200 (2010) with MobileNetV2, beside Tables 1 and 3 of the EAT paper.

    python results/cub2010.py                       # each method with its own recipe
    python results/cub2010.py --matched             # one recipe for all
    python results/cub2010.py --budget 25           # stop after 25 minutes; call again to go on
    python results/cub2010.py --print               # only show the commands

Trains what is missing (runs/), one run after the other, the most telling ones first, then attacks
all of them harder, and writes of what is complete results/cub2010.{md,json}, a smaller radius as
cub2010-weak, the worst case as cub2010-worst (smaller radii: cub2010-weak-worst, -weakest-worst),
ERS as cub2010-ers, attacked queries as cub2010-template, the cost of training as
cub2010-cost.{md,json,png} and the sweeps as cub2010-figures/ (with --matched: matched-cub2010 ...).
When the minutes of --budget are over it starts nothing new and stops a run at its last epoch. With
a GPU: 224 pixels. Without: 64 pixels, few epochs and attack steps, small subsets; on 2 CPU cores
fifteen methods took 119 minutes to train (results/cub2010-cost.json), the attacks not included.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluator  # noqa: E402

# Name of the run: what trains it, and forward passes of an image in an epoch, T + constant. For
# est, act and hm an epoch has every image as an anchor, with its partner.
METHODS = {
    "natural": ("baselines.py --method natural", 0, 1),
    "at": ("baselines.py --method at", 1, 3),
    "eat": ("eat.py", 3, 7),
    "eat-nosplit": ("eat.py --no-split", 3, 9),
    "ensemble": ("baselines.py --method ensemble", 3, 9),
    "trades": ("baselines.py --method trades", 1, 3),
    "trades-lambda1": ("baselines.py --method trades --trades-lambda 1", 1, 3),
    "mixup": ("baselines.py --method mixup", 0, 1),
    "iat": ("baselines.py --method iat", 1, 3),
    "panum": ("panum_at.py", 0.5, 2.5),
    "panum-triplet": ("panum_at.py --loss triplet", 0.5, 2.5),
    "est": ("baselines.py --method est", 2, 4),
    "act": ("baselines.py --method act", 2, 5),
    "hm-softhard-lga": ("hardness_manipulation.py", 3, 5),
    "hm-softhard-lga-ics": ("hardness_manipulation.py --ics", 3, 7),
    "at-beta0": ("baselines.py --method at --beta 0", 1, 3),
}
ENSEMBLES = ("eat", "eat-nosplit", "ensemble")
PAPER = "results/paper/eat-cub2010.csv"
INTERVAL = "--metrics R@1 R@1_low R@1_high"
# Defaults, flags of training, {end of a table's name: (attack, columns)}, flags of the figures.
PRESETS = {
    "cuda": (dict(image_size=224, epochs=20, attack_steps=None, methods=list(METHODS)), "", {
        "": ("", f"{INTERVAL} NMI F1"),
        "-ers": ("--protocol ers --limit-queries 1000", "--metrics R@1 ERS"),
        "-worst": ("--protocol all --eps 8/255 --attack-steps 10 --limit-queries 1000", ""),
    }, ("--sweep-eps --sweep-steps --limit-queries 1000", "--per-member --limit-queries 1000")),
    # Smaller batches make more of few epochs; the paper says nothing of a warm-up.
    "cpu": (dict(image_size=64, epochs=4, attack_steps=4, methods=list(METHODS)[:-1]),
            "--batch-size 60 --warmup-epochs 0 --limit-queries 1000", {
        "": ("--limit-queries 1000", f"{INTERVAL} NMI F1"),
        "-weak": ("--eps 2/255 --limit-queries 1000", INTERVAL),
        "-worst": ("--objective shift worst --limit-queries 200", f"{INTERVAL} R@1_free bound"),
        "-weak-worst": ("--eps 2/255 --objective shift worst --limit-queries 200",
                        f"{INTERVAL} R@1_free bound"),
        "-weakest-worst": ("--eps 0.5/255 --objective shift worst --limit-queries 200",
                           f"{INTERVAL} R@1_free bound"),
        "-ers": ("--protocol ers --attack-steps 10 --limit-queries 200", "--metrics R@1 ERS"),
        "-template": ("--protocol template --eps 8/255 --step-size 2/255 --attack-steps 10 "
                      "--limit-queries 1000", f"{INTERVAL} mAP@R"),
    }, ("--sweep-eps 0.5/255 1/255 2/255 4/255 8/255 --sweep-steps 1 5 20 "
        "--limit-queries 1000", "--eps 2/255 --per-member --limit-queries 1000")),
}
# The learning rate stays the method's own.
MATCHED = "--embedding-dim 128 --crop resized --eps 8/255 --step-size 2/255"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matched", action="store_true",
                        help="the same embedding, views, batches and attack for all: 8/255, 10 "
                             "steps of 2/255")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--epochs", type=int, help="of every method (20; on a CPU 4)")
    parser.add_argument("--attack-steps", type=int, metavar="T",
                        help="in training (the method's own; on a CPU 4)")
    parser.add_argument("--budget", type=float, metavar="MINUTES")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--weights", default="mobilenet_v2_imagenet_features.pth")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", action="store_true", help="bfloat16 in training")
    parser.add_argument("--into", metavar="FILE",
                        help="put the tables into this Markdown, too, where it has their lines")
    parser.add_argument("--print", action="store_true", help="show the commands and run none")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    defaults, args.train, args.tables, args.figures = PRESETS["cuda" if on_gpu else "cpu"]
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.matched:
        args.attack_steps = args.attack_steps or 10
        args.train = f"{'' if '--batch-size' in args.train else '--batch-size 120 '}{args.train}"
    args.name = "matched-cub2010" if args.matched else "cub2010"
    return args


def main(args):
    ends = time.monotonic() + 60 * args.budget if args.budget is not None else None
    runs = {run_of(args, method, seed): method for seed in args.seeds for method in args.methods}
    if args.print:
        shown = [command for table in args.tables for run in runs
                 for command in run_commands(args, table, run, runs[run])]
        shown += [table_command(args, table, runs) for table in args.tables]
        print(*(f"python {command}" for command in [*shown, *figure_commands(args, runs)]),
              sep="\n")
        return
    (ROOT / "runs").mkdir(exist_ok=True)
    for table in args.tables:                                # the first one trains
        done = {run: method for run, method in runs.items()
                if all(run_once(command, run, ends)
                       for command in run_commands(args, table, run, method))}
        print(f"results/{args.name}{table}: {len(done)} of {len(runs)} runs are complete")
        if done:
            run_command(table_command(args, table, done))    # reads what is stored
            say_what_it_is(args, args.name + table, done)
        if not table:
            runs = done
    if runs:
        write_costs(args, runs)
    for command in figure_commands(args, runs):
        run_command(command, ends)
    # It shows photos, which are not ours to pass on.
    (ROOT / f"results/{args.name}-figures/retrieval.png").unlink(missing_ok=True)


def run_of(args, method, seed):
    return f"runs/{'matched-' * args.matched}{method}-cub2010-mobilenetv2-s{seed}"


def run_commands(args, table, run, method):
    """What a run needs for one of the tables: training for the first, and the attack."""
    if table == "":
        yield " ".join(filter(None, [
            METHODS[method][0], "--dataset cub2010 --arch mobilenetv2",
            shlex.join(["--data-root", args.data_root, "--weights", args.weights]),
            f"--image-size {args.image_size} --epochs {args.epochs}", args.train,
            MATCHED if args.matched else "",
            f"--attack-steps {args.attack_steps}" if args.attack_steps else "",
            "--amp" if args.amp else "",
            f"--seed {run.rpartition('-s')[2]} --device {args.device} --out {run} --resume"]))
    yield " ".join(filter(None, ["eval.py", run, args.tables[table][0], f"--device {args.device}"]))


def table_command(args, table, runs):
    attack, columns = args.tables[table]
    published = (ROOT / PAPER).read_text()
    beside = any(f"\n{run.split('/')[1].rpartition('-s')[0]}" in published for run in runs)
    return " ".join(filter(None, [
        "eval.py", *runs, attack, f"--device {args.device} --rules vote concat member_1 distance",
        columns, f"--beside {PAPER}" if beside and not table else "",
        f"--table results/{args.name}{table}"]))


def figure_commands(args, runs):
    sweeps, members = args.figures
    for flags, wanted in ((members, [run for run in runs if runs[run] in ENSEMBLES]),
                          (f"{sweeps} --rules vote", runs)):
        if wanted:
            yield " ".join(["eval.py", *wanted, flags, f"--device {args.device} --figures "
                                                       f"results/{args.name}-figures"])


def run_once(command, run, ends):
    """run_command, unless an earlier call has ended it on this run."""
    ended = ROOT / "runs" / "cub2010-ended.txt"
    known = ended.read_text().splitlines() if ended.exists() else []
    if command in known and (ROOT / run / "results.json").exists():
        return True
    if run_command(command, ends):
        ended.write_text("\n".join([*known, command, ""]))
        return True
    return False


def run_command(command, ends=None):
    """Run one of our scripts at the root until it is done, or the time: False. What it prints goes
    to runs/cub2010.log."""
    left = None if ends is None else ends - time.monotonic()
    if left is not None and left <= 0:
        return False
    print(f"python {command}", flush=True)
    with open(ROOT / "runs" / "cub2010.log", "a") as log:
        process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=log,
                                   stderr=log)
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.terminate()                              # checkpoints are whole at any instant
            process.wait()
            return False
        except KeyboardInterrupt:
            process.wait()                                   # it was interrupted, too
            raise SystemExit(130) from None
    if code:
        raise SystemExit(f"python {command} failed: runs/cub2010.log ends with the reason")
    return True


def say_what_it_is(args, table, runs):
    """Put what the runs share and cost into a table's title, and the command that made it."""
    path = ROOT / "results" / table
    content = json.loads(path.with_suffix(".json").read_text())
    on_cpu = args.tables is PRESETS["cpu"][2]
    title = ["CUB-200 (2010)" + ", on a CPU, to see the direction alone" * on_cpu,
             f"{args.image_size} px, {args.epochs} epochs",
             "one recipe for all, radius 8/255" if args.matched else "each with its own recipe"]
    title += [f"T = {args.attack_steps} attack steps"] if args.attack_steps else []
    title += [args.train.partition(" --limit")[0]] if args.train else []
    title = [f"{', '.join(title)} (the paper: 224 px, 200 epochs, 2944 and 3089 images where "
             f"classes 1-100 and 101-200 hold 2990 and 3043, embedding unstated, here 128"
             f"{'' if args.matched else ', est, act and hm 512'})"]
    content |= {"title": "; ".join([*title, content["title"]]), "evaluation": content["command"],
                "command": shlex.join(["python", "results/cub2010.py", *own_flags(args, runs)])}
    markdown = evaluator.table_markdown(content)
    path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    path.with_suffix(".md").write_text(markdown)
    insert(args, table, markdown)


def insert(args, table, markdown):
    """Put a table into the page of --into, if the page has a place for it."""
    if args.into and f"<!-- results/{table}.md -->" in (ROOT / args.into).read_text():
        evaluator.insert_table(ROOT / args.into, f"results/{table}", markdown)


def write_costs(args, runs):
    """results/NAME-cost.{json,md,png}: what a method's training takes, beside what it reaches."""
    table = json.loads((ROOT / "results" / f"{args.name}.json").read_text())
    ers = ROOT / "results" / f"{args.name}-ers.json"
    ers = {row["name"].split()[0]: row["attacked"]["ERS"][0]
           for row in (json.loads(ers.read_text())["rows"] if ers.exists() else [])
           if "ERS" in row["attacked"]}
    content = {"command": table["command"], "table": f"{args.name}.json", "starts": {}, "rows": []}
    for method in dict.fromkeys(runs.values()):
        own = [ROOT / run for run in runs if runs[run] == method]
        logs = [[json.loads(line) for line in open(run / "log.jsonl")] for run in own]
        done = [json.loads((run / "results.json").read_text()) for run in own]
        _, times, rest = METHODS[method]
        name = own[0].name.rpartition("-s")[0]
        score = next(row for row in table["rows"]
                     if row["name"] == name + " vote" * (method in ENSEMBLES))
        content["rows"].append({
            "method": method, "epochs": len(logs[0]), "env": done[0]["env"],
            "passes": f"{times:g} T + {rest:g}" if times else f"{rest:g}",
            "epoch_seconds": statistics.median(line["seconds"] for log in logs for line in log),
            "training_seconds": statistics.mean(sum(line["seconds"] for line in log)
                                                for log in logs),
            "peak_gb": max(run["peak_gb"] for run in done),
            "clean": score["clean"]["R@1"][0], "attacked": score["attacked"]["R@1"][0],
            "ERS": ers.get(name)})
        start = done[0].get("undefended")                    # the network before any training
        attacked = [entry["R@1"] for entry in (start or {"robust": []})["robust"]
                    if entry["protocol"] == "clustering"]
        if attacked and start["epochs"] == 0:
            content["starts"][str(done[0]["embedding_dim"])] = {
                "clean": start["clean"]["R@1"], "attacked": attacked[0]}
    path = ROOT / "results" / f"{args.name}-cost"
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(cost_markdown(content))
    insert(args, path.name, cost_markdown(content))
    draw_costs(content, path.with_suffix(".png"))


def cost_markdown(content):
    """The Markdown of a cost table, made from its JSON alone."""
    env = content["rows"][0]["env"]
    machine = env["device_name"] if env["device"] == "cuda" else f"{env['threads']} CPU cores"
    lines = [f"Training on {machine}, what it costs and the Recall@1 that it reaches "
             f"({content['table']}; ensembles vote). Passes: forward and back of an image in an "
             f"epoch, T attack steps. Made by `{content['command']}`.", "",
             "| | passes | epochs | seconds per epoch | peak GB | clean R@1 | attacked R@1 |",
             "|---" + "|---:" * 6 + "|"]
    lines += [f"| {row['method']} | {row['passes']} | {row['epochs']} | {row['epoch_seconds']:.0f} "
              f"| {row['peak_gb']:.2f} | {100 * row['clean']:.1f} | {100 * row['attacked']:.1f} |"
              for row in content["rows"]]
    lines += [f"| not trained, embedding {dim} |{' - |' * 4} {100 * start['clean']:.1f} | "
              f"{100 * start['attacked']:.1f} |" for dim, start in content["starts"].items()]
    return "\n".join(lines) + "\n"


def draw_costs(content, path):
    """Recall@1 and ERS against seconds of training, a point a method."""
    import matplotlib
    matplotlib.use("Agg")                                    # files alone, no window
    from matplotlib import pyplot
    sides = {"clean": ("clean Recall@1 in %", 100), "attacked": ("attacked Recall@1 in %", 100)}
    if any(row["ERS"] is not None for row in content["rows"]):
        sides["ERS"] = "ERS", 1
    figure, panels = pyplot.subplots(1, len(sides), figsize=(4.5 * len(sides), 4.2),
                                     layout="constrained")
    for panel, (side, (label, scale)) in zip(panels, sides.items()):
        shown = sorted((row for row in content["rows"] if row[side] is not None),
                       key=lambda row: row["training_seconds"])
        for place, row in enumerate(shown):                  # neighbours' names to four sides
            point = row["training_seconds"], scale * row[side]
            right, up = place % 4 in (0, 3), place % 2 == 0
            panel.plot(*point, "o", markersize=4, color="C0")
            panel.annotate(row["method"], point, xytext=(4 if right else -4, 3 if up else -9),
                           textcoords="offset points", ha="left" if right else "right", fontsize=7)
        for dim, start in content["starts"].items() if side != "ERS" else ():
            panel.axhline(scale * start[side], color="0.6", linestyle=":")
            panel.annotate(f"not trained, {dim}", (1, scale * start[side]), xytext=(-2, 2),
                           xycoords=panel.get_yaxis_transform(), textcoords="offset points",
                           ha="right", fontsize=8, color="0.4")
        panel.set(xscale="log", xlabel="seconds of training", ylabel=label)
        panel.margins(x=0.3, y=0.12)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def own_flags(args, runs):
    """The flags of a call that makes what `runs` are shown in."""
    words = ["--matched"] * args.matched + ["--methods", *dict.fromkeys(runs.values()),
                                            "--seeds", *args.seeds]
    words += ["--image-size", args.image_size, "--epochs", args.epochs]
    words += ["--attack-steps", args.attack_steps] if args.attack_steps else []
    return [*map(str, words), *["--amp"] * args.amp, "--device",
            "cuda" if args.tables is PRESETS["cuda"][2] else "cpu"]


if __name__ == "__main__":
    main(parse_args())
