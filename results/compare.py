# SPDX-License-Identifier: MIT
"""Every defense on one data set: trained, attacked, in tables under every protocol.

    python results/compare.py                          # glyphs, each method with its own recipe
    python results/compare.py --matched                # the same epochs, batches and attack for all
    python results/compare.py --dataset cub2010 --jobs 1 -- --data-root data
    python results/compare.py --print                  # only show the commands

Trains what is missing (runs/), attacks what is missing (results.json of each run), counts what the
training costs, and writes results/all-defenses-DATASET.{json,md} (matched-defenses-DATASET),
further tables and pictures. The same command continues where it was stopped: epochs, and attacks
that are stored, are not repeated. Flags behind -- go to every training, as --image-size 64 --epochs
4 where no GPU is at hand.

A pass is an image that goes forward through a network, with or without a gradient; those of all
members count. Seconds are those of the runs' logs: compare them after --jobs 1 on an idle machine.
"""

import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DEFENSES = {                                    # name of the run: what trains it
    "natural": "baselines.py --method natural",
    "at": "baselines.py --method at",
    "mixup": "baselines.py --method mixup",
    "iat": "baselines.py --method iat",
    "trades": "baselines.py --method trades",
    "at-x3": "baselines.py --method at --members 3",
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
TRIPLETS = ("est", "act", "panum", "panum-triplet", "hm-softhard-lga-ics")   # begin without attack
SQUARE = ("hm-softhard-softhard", "est", "act", "hm-softhard-lga-ics")       # --crop square
RADII = "--eps 0.5/255 1/255 2/255 4/255 8/255 16/255 --attack-steps 10"
MEMBERS = "--against sum member_1 member_2 member_3"
# arch; flags of every training; those of --matched (the learning rate stays the method's own), of
# methods with and without a start without attack; a limit of the evaluation; the tables: {end of
# the name: (flags of table.py, [attacks])}; the pictures: [attacks].
DATASETS = {
    "glyphs": {
        "arch": "convnet", "train": "",
        "matched": "--arch convnet --embedding-dim 64 --epochs 16 --batch-size 30 --eps 8/255 "
                   "--step-size 4/255 --attack-steps 4",
        "ramps": ("--eps-ramp 0 4", "--eps-ramp 8 4"), "limit": "--limit-queries 200 --workers 0",
        "tables": {"": ("--metrics R@1 R@1_label_free eps50_255 ERS", [
            "--objective shift worst --eps 8/255 --attack-steps 10",
            f"--objective joint {RADII}",
            "--protocol template --objective neighbour worst --eps 8/255 --step-size 2/255 "
            "--attack-steps 10",
            f"--protocol template --objective impostor {RADII}",
            "--protocol ers"])},
        "pictures": [f"--objective shift joint {RADII}", "--attack-steps 1 2 5 10 20 50"]},
    "cub2010": {
        "arch": "mobilenetv2", "train": "--dataset cub2010 --arch mobilenetv2 --epochs 20",
        "matched": "--embedding-dim 128 --crop resized --batch-size 120 --eps 8/255 "
                   "--step-size 2/255 --attack-steps 10",
        "ramps": ("", ""), "limit": "--limit-queries 1000",
        "tables": {
            "": ("--metrics R@1 R@1_low R@1_high NMI F1 --beside results/paper/eat-cub2010.csv",
                 ["--eps 8/255"]),
            "-worst": ("--metrics R@1 R@1_label_free eps50_255 ERS", [
                "--objective worst --eps 8/255 --attack-steps 10", f"--objective joint {RADII}",
                "--protocol template --objective neighbour worst --eps 8/255 --step-size 2/255 "
                "--attack-steps 10", "--protocol ers"])},
        "pictures": [f"--objective shift {RADII}", "--attack-steps 1 2 5 10 20 50"]},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="glyphs")
    parser.add_argument("--matched", action="store_true", help="one recipe for all")
    parser.add_argument("--defenses", nargs="+", choices=DEFENSES, default=[*DEFENSES],
                        metavar="NAME", help=f"of {', '.join(DEFENSES)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--checks", action="store_true",
                        help="eval.py --checks of the first seed, too; only warnings are stored")
    parser.add_argument("--print", action="store_true", help="show the commands and run none")
    parser.add_argument("train", nargs="*", metavar="-- FLAGS", help="of every training")
    return parser.parse_args(argv)


def commands(args):
    """[[what a run needs, one by one], ...] and what is left when all runs are there."""
    setting, name = DATASETS[args.dataset], table_of(args)
    attacks = dict.fromkeys(attack for _, attacks in setting["tables"].values()
                            for attack in attacks)
    jobs = []
    for seed in args.seeds:
        for defense in args.defenses:
            run = f"{pattern(args, defense)}{seed}"
            jobs.append([f"{training(args, defense)} --seed {seed} --out {run}",
                         *(f"eval.py {run} {attack} {setting['limit']}" for attack in attacks)])
            if args.checks and seed == args.seeds[0]:
                control = "hm-softhard-softhard" if defense in SQUARE else "natural"
                jobs[-1].append(f"eval.py {run} --checks {setting['limit']}" + (
                    f" --transfer-from {pattern(args, control)}{seed}"
                    if control in args.defenses and defense != control else ""))
    runs = " ".join(f"'{pattern(args, defense)}*'" for defense in args.defenses)
    ensembles = " ".join(f"'{pattern(args, defense)}*'" for defense in args.defenses
                         if defense in ("at-x3", "eat", "eat-nosplit"))
    last = []
    for end, (flags, attacks) in setting["tables"].items():
        flags, _, beside = flags.partition(" --beside")
        last.append(f"results/table.py results/{name}{end} {flags} --rules vote concat mean "
                    f"member_1 distance --beside results/{name}-passes.csv{beside} -- {runs} "
                    + " -- ".join(f"{attack} {setting['limit']}" for attack in attacks))
    pictures = " -- ".join(f"{attack} {setting['limit']}" for attack in setting["pictures"])
    last += [f"results/figures.py results/{name}-figures --rules vote --table results/{name}.json "
             f"-- {runs} {pictures}"]
    if ensembles:
        last[-1] += f" -- {ensembles} {MEMBERS} --eps 8/255 --attack-steps 10 {setting['limit']}"
    return jobs, last


def pattern(args, defense):
    """A run's folder without its seed."""
    arch = DATASETS[args.dataset]["arch"]
    return f"runs/{'matched-' * args.matched}{defense}-{args.dataset}-{arch}-s"


def training(args, defense):
    setting = DATASETS[args.dataset]
    words = [DEFENSES[defense], setting["train"], shlex.join(args.train)]
    if args.matched:
        words[2:2] = [setting["matched"], setting["ramps"][defense in TRIPLETS]]
    return " ".join(filter(None, words))


def table_of(args):
    """The name of the first table, which the others begin with."""
    return f"{'matched' if args.matched else 'all'}-defenses-{args.dataset}"


# ---- what a training costs

def passes_of(command, epochs):
    """Passes per training image in so many epochs, the first with a radius of 0; on glyphs."""
    import torch

    import common
    script, *flags = shlex.split(command)
    module, passed = importlib.import_module(script.removesuffix(".py")), [0]

    def note(network, images):
        if isinstance(network, common.EmbeddingModel):
            passed[0] += len(images[0])

    with tempfile.TemporaryDirectory() as out:
        args = module.parse_args([*flags, "--epochs", str(epochs), "--eps-ramp", "0", "1",
                                  "--workers", "0", "--device", "cpu", "--out", f"{out}/run"])
        images, finish = len(common.load_run_data(args)[0]), common.Run.finish
        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        common.Run.finish = lambda run, *protocols: None     # the closing evaluation is no training
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module.main(args)
        finally:
            hook.remove()
            common.Run.finish = finish
    return passed[0] / images


def count_passes(args):
    """Write what stands beside the tables: passes per training image, seconds, peak memory."""
    rows = []
    for defense in args.defenses:
        runs = [ROOT / f"{pattern(args, defense)}{seed}" for seed in args.seeds]
        logs = [[json.loads(line) for line in open(run / "log.jsonl")] for run in runs]
        peaks = [json.loads((run / "results.json").read_text())["peak_gb"] or 0 for run in runs]
        flags = json.loads((runs[0] / "args.json").read_text())
        benign, grow = flags["eps_ramp"]
        steps = f"--attack-steps {flags['attack_steps']} --batch-size 30"
        quiet = passes_of(f"{DEFENSES[defense]} {steps}", 1)
        attacked = passes_of(f"{DEFENSES[defense]} {steps}", 2) - quiet
        benign += bool(grow)                                 # a ramp begins at 0
        passes = benign * quiet + (flags["epochs"] - benign) * attacked
        seconds = statistics.mean(sum(line["seconds"] for line in log) for log in logs)
        rows.append([Path(pattern(args, defense)).name.removesuffix("-s"), f"{passes:.0f}",
                     f"{seconds:.0f}", f"{max(peaks):.2f}"])
    with open(ROOT / f"results/{table_of(args)}-passes.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["row", "passes", "seconds", "peak GB"],
                                                         *rows])


# ---- running

def run_command(command, one_thread):
    """Run one of our scripts at the root; what it prints goes to runs/.compare.log."""
    print(f"python {command}\n", end="", flush=True)         # one write: lines stay whole
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} if one_thread else {}
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
    one_thread = args.jobs > 1 or args.dataset == "glyphs"   # other numbers round differently
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(lambda job: [run_command(command, one_thread) for command in job], jobs))
        finally:
            pool.shutdown(cancel_futures=True)               # a failure, or Ctrl-C, starts no more
    count_passes(args)
    for command in last:
        run_command(command, one_thread)


if __name__ == "__main__":
    main(parse_args())
