# SPDX-License-Identifier: MIT
"""The arena: every defense on one data set, trained alike, attacked alike, in tables.

    python results/compare.py                          # glyphs
    python results/compare.py --dataset grocery -- --data-root data/grocery
    python results/compare.py --dataset cub2010 --defenses natural at fast --seeds 0 \\
        -- --data-root data --weights mobilenet_v2_imagenet_features.pth
    python results/compare.py --print                  # only show the commands

Trains what is missing (runs/), attacks what is missing (results.json of each run), counts what the
training costs, and writes results/arena-DATASET.{json,md} (the papers' attacks, eps50, costs),
-worst (the worst case at three radii, with and without labels), -papers (all scores of two papers)
and -ers (Zhou & Patel's ten figures, of the first seed alone, because they take half of the time).
The same command continues where it was stopped: epochs, and attacks that are stored, are not
repeated. Flags behind -- go to every training.

All networks of a data set have one architecture, batch, radius and reach; epochs are such that
every network gets about 107 passes a training image. fare's come on top of its teacher's, which is
the run of natural. Epochs of pairs (est, act, hm) count twice, because every image brings another.
The learning rate is the method's own. A pass is an image that goes forward through a network, with
or without a gradient; those of all members count. Seconds are those of two epochs, one without and
one with the attack, times the epochs: all are measured one after the other by one thread, because
runs that share a machine slow each other down.
"""

import argparse
import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Name of the run: what trains it, epochs, what epochs without attack and with a growing radius.
DEFENSES = {
    "natural": ("baselines.py --method natural", 107),
    "at": ("baselines.py --method at", 16, "0 5"),
    "at-x3": ("baselines.py --method at --members 3", 16, "0 5"),
    "mixup": ("baselines.py --method mixup", 107),
    "iat": ("baselines.py --method iat", 16, "0 5"),
    "trades": ("baselines.py --method trades", 16, "0 5"),
    "eat": ("eat.py", 17, "0 5"),
    "eat-nosplit": ("eat.py --no-split", 16, "0 5"),
    "eat-label": ("eat.py --attack-loss label", 20, "0 6"),
    "panum-rate0": ("panum_at.py --attack-rate 0", 54),
    "panum": ("panum_at.py", 33, "16 8"),
    "panum-triplet-rate0": ("panum_at.py --loss triplet --attack-rate 0", 54),
    "panum-triplet": ("panum_at.py --loss triplet", 33, "16 8"),
    "est": ("baselines.py --method est", 13, "6 3"),
    "est-softhard": ("baselines.py --method est --source softhard", 13, "6 3"),
    "act": ("baselines.py --method act", 12, "6 3"),
    "act-softhard": ("baselines.py --method act --source softhard", 12, "6 3"),
    "hm-softhard-softhard": ("hardness_manipulation.py --destination softhard", 21),
    "hm-softhard-lga": ("hardness_manipulation.py", 10, "5 2"),
    "hm-softhard-lga-ics": ("hardness_manipulation.py --ics", 9, "4 2"),
    "fast": ("baselines.py --method fast", 54, "0 40"),
    "fast-x3": ("baselines.py --method fast --members 3", 54, "0 40"),
    "fare": ("baselines.py --method fare --teacher {natural}", 16, "0 5"),
}
RADII = "--eps 0.25/255 0.5/255 1/255 2/255 4/255 8/255 16/255 --attack-steps 10"
LIMIT = "--limit-queries 300 --workers 0"
# The tables: {end of the name: (metrics, [attacks])}.
STRENGTH = "--eps 2/255 4/255 8/255 --attack-steps 10"
PAPERS = ["--eps 8/255 --attack-steps 10", "--protocol template"]
TABLES = {
    "": ("R@1 eps50_255", [*PAPERS, f"--objective joint --against vote {RADII}",
                           f"--protocol template --objective impostor {RADII}"]),
    "-worst": ("R@1 R@1_label_free", [f"--objective worst {STRENGTH}",
                                      f"--protocol template --objective worst {STRENGTH}"]),
    "-papers": ("R@1 mAP@R NMI AMI F1", PAPERS),
    "-ers": ("CA+ CA- QA+ QA- TMA ES:D ES:R LTM GTM GTT ERS",
             ["--protocol ers --objective ers ers-authors"]),
}
ATTACK = "--eps 8/255 --step-size 4/255 --attack-steps 4"
SMALL = "--arch convnet --image-size 32 --embedding-dim 64 --crop resized --batch-size 30"
# On photos the methods' own learning rates and batches of generated data, which glyphs take alone.
RATES = {"panum": "--lr 5e-4 --images-per-class 4", "panum-rate0": "--lr 5e-4 --images-per-class 4",
         "fast": "--lr 4e-3", "fast-x3": "--lr 4e-3"}
TRIPLETS = "est", "act", "hm", "panum-triplet"                  # what their names begin with
DATASETS = {
    "glyphs": f"--dataset glyphs {SMALL}",
    "grocery": f"--dataset folder --data-root data/grocery {SMALL}",
    "cub2010": "--dataset cub2010 --arch mobilenetv2 --image-size 64 --embedding-dim 128 "
               "--crop resized --batch-size 120 --lr 1e-4",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="glyphs")
    parser.add_argument("--defenses", nargs="+", choices=DEFENSES, default=[*DEFENSES],
                        metavar="NAME", help=f"of {', '.join(DEFENSES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--print", action="store_true", help="show the commands and run none")
    parser.add_argument("train", nargs="*", metavar="-- FLAGS", help="of every training")
    return parser.parse_args(argv)


def commands(args):
    """[[what a run needs, one by one], ...] and what is left when all runs are there."""
    jobs = []
    for seed, defense in itertools.product(args.seeds, args.defenses):
        run = f"{folder(args, defense)}{seed}"
        attacks = dict.fromkeys(attack for end, (_, attacks) in TABLES.items() for attack in attacks
                                if end != "-ers" or seed == args.seeds[0])
        jobs.append([f"{training(args, defense, seed)} --seed {seed} --out {run}",
                     *(f"eval.py {run} {attack} {LIMIT}" for attack in attacks)])
    name, last = f"results/arena-{args.dataset}", []
    for end, (metrics, attacks) in TABLES.items():
        runs = " ".join(f"'{folder(args, defense)}{args.seeds[0] if end == '-ers' else '*'}'"
                        for defense in args.defenses)
        beside = f" --beside {name}-costs.csv" * (end in ("", "-worst"))
        last.append(f"results/table.py {name}{end} --metrics {metrics} --rules vote concat mean "
                    f"member_1 distance{beside} -- {runs} "
                    + " -- ".join(f"{attack} {LIMIT}" for attack in attacks))
    return jobs, last


def folder(args, defense):
    """A run's folder without its seed."""
    arch = "mobilenetv2" if args.dataset == "cub2010" else "convnet"
    return f"runs/arena-{defense}-{args.dataset}-{arch}-s"


def training(args, defense, seed):
    """What trains a run, without --seed and --out."""
    (command, epochs, *ramp), given = DEFENSES[defense], [*args.train]
    if "--teacher" in command and "--weights" in given:      # it starts at the teacher's
        place = given.index("--weights")
        del given[place:place + 2]
    words = [command.format(natural=f"{folder(args, 'natural')}{seed}"), DATASETS[args.dataset],
             LIMIT, f"--epochs {epochs}"]
    words += [ATTACK] if not defense.startswith("fast") else ["--eps 8/255"]
    words += [f"--eps-ramp {ramp[0]}"] if ramp else []
    if args.dataset != "cub2010":
        low = defense.startswith(TRIPLETS)
        words.append(RATES.get(defense, f"--lr {'1e-3' if low else '2e-3'}"))
    return " ".join([*words, shlex.join(given)]).strip()


# ---- what a training costs

def costs_of(command):
    """[(passes per training image, seconds)] of two epochs, the second one with the attack."""
    import torch

    import common
    script, *flags = shlex.split(command)
    module, passed, epochs = importlib.import_module(script.removesuffix(".py")), [0], []

    def note(network, images):
        if isinstance(network, common.EmbeddingModel):
            passed[0] += len(images[0])

    def saved(run):
        epochs.append((passed[0] / len(run.train), run.state["log"][-1]["seconds"]))
        passed[0] = 0

    os.chdir(ROOT)                                           # as the commands' own paths say
    torch.set_num_threads(1)
    whole = common.Run._save, common.Run.finish
    common.Run._save, common.Run.finish = saved, lambda run, *protocols: None
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            module.main(module.parse_args([*flags, "--epochs", "2", "--eps-ramp", "1", "0",
                                           "--out", f"{out}/run"]))
    finally:
        common.Run._save, common.Run.finish = whole
        hook.remove()
    return epochs


def count_costs(args):
    """Write what stands beside the first table: passes per training image, seconds."""
    rows, seed = [], args.seeds[0]
    for defense in args.defenses:
        flags = json.loads((ROOT / f"{folder(args, defense)}{seed}" / "args.json").read_text())
        quiet, attacked = costs_of(f"{training(args, defense, seed)} --seed {seed}")
        benign = flags["eps_ramp"][0] + bool(flags["eps_ramp"][1])           # a ramp begins at 0
        passes, seconds = (benign * first + (flags["epochs"] - benign) * second
                           for first, second in zip(quiet, attacked))
        rows.append([Path(folder(args, defense)).name.removesuffix("-s"), f"{passes:.0f}",
                     f"{seconds:.0f}"])
    with open(ROOT / f"results/arena-{args.dataset}-costs.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["row", "passes", "seconds"], *rows])


# ---- running

def run_command(command):
    """Run one of our scripts at the root; what it prints goes to runs/.compare.log."""
    print(f"python {command}\n", end="", flush=True)         # one write: lines stay whole
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}   # more round differently
    with open(ROOT / "runs" / ".compare.log", "a") as log:
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=log,
                              stderr=log, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"python {command} failed: runs/.compare.log ends with the reason")


def main(args):
    jobs, last = commands(args)
    if args.print:
        print(*(f"python {command}" for job in [*jobs, last] for command in job), sep="\n")
        return
    (ROOT / "runs").mkdir(exist_ok=True)
    started, lock, done = time.monotonic(), threading.Lock(), [0]
    trained = {job[0].split(" --out ")[1]: threading.Event() for job in jobs}

    def work(job):
        for teacher in (name for name in shlex.split(job[0]) if name in trained):
            if f"--teacher {teacher}" in job[0]:
                trained[teacher].wait()
        try:
            for command in job:
                run_command(command)
                trained[job[0].split(" --out ")[1]].set()
        finally:                                             # who waits for it fails, too
            trained[job[0].split(" --out ")[1]].set()
        with lock:
            done[0] += 1
            minutes = (time.monotonic() - started) / 60
            print(f"{done[0]} of {len(jobs)} runs after {minutes:.0f} minutes, about "
                  f"{minutes / done[0] * (len(jobs) - done[0]):.0f} are left", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(work, jobs))
        finally:
            pool.shutdown(cancel_futures=True)               # a failure, or Ctrl-C, starts no more
    count_costs(args)
    for command in last:
        run_command(command)


if __name__ == "__main__":
    main(parse_args())
