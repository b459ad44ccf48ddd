# SPDX-License-Identifier: MIT
"""Is this checkout slower than another one? Trainings and attacks of both take turns.

    git worktree add ../before acdc089
    python benchmarks/commits.py ../before

Seconds of the last of three epochs, of the closing attack, and of further attacks on the network
that was trained; ratio = this checkout / the other.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import bench

TRAININGS = {
    "natural": "baselines.py --method natural", "at": "baselines.py --method at",
    "trades": "baselines.py --method trades", "act": "baselines.py --method act",
    "eat": "eat.py", "panum": "panum_at.py", "hm": "hardness_manipulation.py"}
FLAGS = "--epochs 3 --workers 0 --attack-steps 4"
# The whole attack in every epoch, no undefended network in the closing table: as either says it.
WHOLE = {"--eps-ramp": "0 0", "--eps-ramp-epochs": "0", "--benign-epochs": "0",
         "--plain-epochs": "0"}
ATTACKS = ("--objective shift joint", "--protocol template --objective neighbour impostor")
LIMIT = "--limit-queries 300 --workers 0 --device cpu"


def seconds_of(checkout, command, attacks, threads):
    """{what: seconds} of a training in a checkout, and of attacks on its network."""
    with tempfile.TemporaryDirectory() as folder:
        def call(words):
            subprocess.run([sys.executable, *words.split()], cwd=checkout, check=True,
                           capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads})

        script = command.split()[0]
        known = subprocess.getoutput(f"cd {checkout} && {sys.executable} {script} --help")
        flags = [f"{flag} {value}" for flag, value in WHOLE.items() if f"{flag} " in known]
        call(f"{command} {FLAGS} {' '.join(flags)} --device cpu --out {folder}/run")
        lines = Path(folder, "run/log.jsonl").read_text().splitlines()
        found = {"epoch": json.loads(lines[-1])["seconds"]}
        for attack in attacks:
            call(f"eval.py {folder}/run {attack} {LIMIT}")
        results = json.loads(Path(folder, "run/results.json").read_text())
        return found | {f"{one['protocol']}: {one['objective']}, {one['n_queries']} images":
                        one["seconds"] for one in results["robust"]}


def measure(other, name, rounds, threads):
    """Rows of one training: each figure of both checkouts, and the median ratio of the rounds."""
    attacks = ATTACKS if name in ("at", "eat") else ()
    pairs = [[seconds_of(tree, TRAININGS[name], attacks, threads) for tree in (bench.ROOT, other)]
             for _ in range(rounds)]
    for what in pairs[0][0]:
        if what in pairs[0][1]:
            yield {"training": name, "what": what,
                   "seconds": median(ours[what] for ours, _ in pairs),
                   "before": median(before[what] for _, before in pairs),
                   "ratio": median(ours[what] / before[what] for ours, before in pairs)}


def main(argv=None):
    parser = bench.base_parser(__doc__, rounds=3)
    parser.add_argument("other", metavar="CHECKOUT")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=[*TRAININGS])
    args = parser.parse_args(argv)
    commit = subprocess.getoutput(f"git -C {args.other} rev-parse --short HEAD")
    args.other, threads = Path(args.other).resolve(), str(bench.torch.get_num_threads())
    rows = (row for name in args.trainings
            for row in measure(args.other, name, 1 if args.quick else args.rounds, threads))
    return bench.finish(args, argv, "commits", ("rounds",), rows, other_commit=commit)


if __name__ == "__main__":
    main()
