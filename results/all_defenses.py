# SPDX-License-Identifier: MIT
"""Every defense on glyphs, three seeds each, in one table under every protocol.

    python results/all_defenses.py                  # each method with its own recipe
    python results/all_defenses.py --matched        # the same epochs, batches and attack for all
    python results/all_defenses.py --print          # only show the commands

Trains what is missing (runs/), attacks what is missing (results.json of each run) and writes
results/all-defenses-glyphs.{md,json} or results/matched-defenses-glyphs.{md,json,png}. Interrupt it
and start it again at any time: epochs, and attacks that are stored, are not repeated.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFENSES = {                                    # name of the run: what trains it
    "natural": "baselines.py --method natural",
    "at": "baselines.py --method at",
    "mixup": "baselines.py --method mixup",
    "iat": "baselines.py --method iat",
    "trades": "baselines.py --method trades",
    "ensemble": "baselines.py --method ensemble",
    "eat": "eat.py",
    "eat-nosplit": "eat.py --no-split",
    "panum-rate0": "panum_at.py --attack-rate 0",
    "panum": "panum_at.py",
    "panum-triplet-rate0": "panum_at.py --loss triplet --attack-rate 0",
    "panum-triplet": "panum_at.py --loss triplet",
    "hm-softhard-softhard": "hardness_manipulation.py --destination softhard",
    "est": "baselines.py --method est",
    "act": "baselines.py --method act",
    "hm-softhard-lga-ics": "hardness_manipulation.py --ics",
}
# Matched: the same network, embedding, epochs, images per step and attack; results/count_passes.py
# counts what that costs. The learning rate stays the method's own; triplets get BENIGN epochs
# without an attack first.
MATCHED = ("--arch convnet --embedding-dim 64 --epochs 16 --batch-size 30 --eps 8/255 "
           "--step-size 2/255 --attack-steps 4 --plain-epochs 0")
BENIGN = 8
TRIPLETS = ("est", "act", "panum", "panum-triplet", "hm-softhard-lga-ics")
EVALUATION = "--protocol all --eps 8/255 --attack-steps 10 --limit-queries 200 --workers 0"
SQUARE = ("hm-softhard-softhard", "est", "act", "hm-softhard-lga-ics")   # --crop square
CHECKS = "--checks --eps 8/255 --attack-steps 10 --limit-queries 200 --workers 0"
TABLE = "--rules vote concat mean member_1 distance --table"


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matched", action="store_true", help="one recipe for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--print", action="store_true", help="show the commands and run none")
    args = parser.parse_args()
    prefix, table = ("matched-", "matched-defenses-glyphs") if args.matched else \
        ("", "all-defenses-glyphs")
    jobs = []                                                # each: its commands, one by one
    for seed in args.seeds:
        for name, command in DEFENSES.items():
            run = f"runs/{prefix}{name}-glyphs-convnet-s{seed}"
            train = f"{command} --seed {seed} --out {run} --resume"
            if args.matched:
                train += f" {MATCHED}" + f" --benign-epochs {BENIGN}" * (name in TRIPLETS)
            jobs.append([train, f"eval.py {run} {EVALUATION}"])
            if seed == args.seeds[0] and not args.matched and (args.print or not checked(run)):
                control = "hm-softhard-softhard" if name in SQUARE else "natural"
                jobs[-1].append(f"eval.py {run} {CHECKS}" + (name != control) *
                                f" --transfer-from runs/{control}-glyphs-convnet-s{seed}")
    patterns = " ".join(f"'runs/{prefix}{name}-glyphs-convnet-s*'" for name in DEFENSES)
    last = f"eval.py {patterns} {EVALUATION} {TABLE} results/{table}"
    last += " --beside results/matched-passes.csv" if args.matched else " --into README.md"
    if args.print:
        print(*(f"python {command}" for job in [*jobs, [last]] for command in job), sep="\n")
        return
    (ROOT / "runs").mkdir(exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda job: [run_command(command) for command in job], jobs):
            pass
    run_command(last)
    if args.matched:
        draw_costs(ROOT / "results" / table)


def checked(run):
    """Whether this run has its checks; what they warn of stands in the table."""
    path = ROOT / run / "results.json"
    return path.exists() and bool(json.loads(path.read_text()).get("checks"))


def draw_costs(table):
    """Recall@1 and ERS of the defenses against seconds of training, out of the table's JSON."""
    import matplotlib
    matplotlib.use("Agg")                                    # files alone, no window
    from matplotlib import pyplot
    rows = [row for row in json.loads(table.with_suffix(".json").read_text())["rows"]
            if "ERS" in row["attacked"]]                     # a single network's, or "distance"
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, side, score, scale in zip(panels, ("clean", "attacked"), ("R@1", "ERS"), (100, 1)):
        for row in rows:
            mean, deviation = row[side][score]
            seconds = float(row["beside"]["seconds"])
            panel.errorbar(seconds, scale * mean, scale * deviation, fmt="o", color="C0")
            name = row["name"].removeprefix("matched-").replace("-glyphs-convnet", "")
            panel.annotate(name.removesuffix(" distance"), (seconds, scale * mean), xytext=(4, 4),
                           textcoords="offset points", fontsize=8)
        panel.set(xscale="log", xlabel="seconds of training",
                  ylabel="clean Recall@1 in %" if side == "clean" else score)
        panel.margins(x=0.2, y=0.15)
    figure.savefig(table.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def run_command(command):
    """Run one of our scripts at the root; what it prints goes to runs/all_defenses.log."""
    print(f"python {command}\n", end="", flush=True)         # one write: lines stay whole
    with open(ROOT / "runs" / "all_defenses.log", "a") as log:
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=log,
                              stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1",
                                               "OMP_WAIT_POLICY": "passive"})
    if done.returncode:
        raise SystemExit(f"python {command} failed: runs/all_defenses.log ends with the reason")


if __name__ == "__main__":
    main()
