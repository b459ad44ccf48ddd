# SPDX-License-Identifier: MIT
"""What the benchmarks share: flags, clock, a process of its own, and the JSON with the machine.
Importing it puts the repository on the import path."""

import json
import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import summary
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


def base_parser(description, **defaults):
    """The flags of every benchmark, and one for each default."""
    parser = common.Parser(description)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--json", metavar="FILE",
                        help="default: results/benchmarks-SETTINGS.json; with --quick none")
    return parser


def clock(device):
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device, function, *arguments):
    """(seconds, what the call returns)."""
    started = clock(device)
    value = function(*arguments)
    return clock(device) - started, value


def turns(device, rounds, first, second):
    """Two calls take turns, after a warm-up: ms of the first and of the second, second / first."""
    pairs = [(timed(device, first)[0], timed(device, second)[0]) for _ in range(rounds + 1)][1:]
    times = [1000 * median(seconds) for seconds in zip(*pairs)]
    return *times, median(theirs / own for own, theirs in pairs)


def call(quick, function, *arguments):
    """Call it; unless quick, in a fresh interpreter, so that its peak memory is its own."""
    if quick:
        return function(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def finish(args, argv, benchmark, names, rows, **numbers):
    """Store and print the result: the flags in names, numbers, command, machine, versions, commit.
    rows: an iterable; a row is on the screen as soon as it is measured."""
    measured = []
    for row in rows:
        print(row, flush=True)
        measured.append(row)
    device, cores = common.pick_device(args.device), torch.get_num_threads()
    words = ["python", f"benchmarks/{benchmark}.py", *(sys.argv[1:] if argv is None else argv)]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{cores} CPU core{'s' * (cores > 1)}"
    result = {"benchmark": benchmark, "command": shlex.join(words), "machine": machine, **numbers,
              **{name: getattr(args, name) for name in names}, **common.provenance(device),
              "rows": measured}
    network = f"{args.arch}-{args.image_size}-" if "arch" in args else ""
    amp = "-amp" * ("--amp" in numbers.get("flags", []))
    file = f"benchmarks-{benchmark.replace('_', '-')}-{network}{device.type}{amp}.json"
    if args.json or not args.quick:
        Path(args.json or ROOT / "results" / file).write_text(json.dumps(result, indent=1) + "\n")
    title, lines = summary.section(result)
    print("\n".join(["", f"{title}, on {machine}", "", *lines]))
    return result
