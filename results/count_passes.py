# SPDX-License-Identifier: MIT
"""What the matched table states of cost: passes per training image, and seconds of training.

    python results/count_passes.py              # minutes; writes results/matched-passes.csv

Counts the images that a network is given in one epoch without and one with the attack, by running
both, and adds them and their seconds up over the epochs of `results/all_defenses.py --matched`. A
pass is a forward pass, with or without a gradient; ensembles count those of every member. Seconds
want an idle machine and all of its cores.
"""

import csv
import importlib
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from all_defenses import BENIGN, DEFENSES, MATCHED, TRIPLETS  # noqa: E402

import common  # noqa: E402


class Trained(Exception):
    """Training is over; the closing evaluation is not counted."""


def count(command, epochs):
    """Passes per training image of a whole run of so many epochs, and the seconds of each."""
    script, *flags = shlex.split(command)
    module, given = importlib.import_module(script[:-3]), [0]

    def note(network, images):
        if isinstance(network, common.EmbeddingModel):
            given[0] += len(images[0])

    def end(*_):
        raise Trained

    closing = common.closing_evaluation
    with tempfile.TemporaryDirectory() as out:
        args = module.parse_args([*flags, *shlex.split(epochs), "--out", out, "--overwrite"])
        images = len(common.load_run_data(args)[0])
        hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
        common.closing_evaluation = end
        try:
            module.main(args)
        except Trained:
            log = (Path(out) / "log.jsonl").read_text().splitlines()
            return given[0] / images, [json.loads(line)["seconds"] for line in log]
        finally:
            hook.remove()
            common.closing_evaluation = closing


def main():
    settings = shlex.split(MATCHED)
    total = int(settings[settings.index("--epochs") + 1])
    rows = []
    for name, command in DEFENSES.items():
        benign = BENIGN if name in TRIPLETS else 0
        one = f"{command} {MATCHED} --workers 0" + " --benign-epochs 0" * (name in TRIPLETS)
        # With a ramp of one epoch the first epoch has radius 0.
        quiet, _ = count(one, "--epochs 1 --eps-ramp-epochs 1")
        both, times = count(one, "--epochs 2 --eps-ramp-epochs 1")
        passes = (benign + 1) * quiet + (total - benign - 1) * (both - quiet)
        seconds = (benign + 1) * times[0] + (total - benign - 1) * times[1]
        for rule in ("", " vote", " concat", " mean", " member_1", " distance"):
            rows.append([f"matched-{name}-glyphs-convnet{rule}", f"{passes:.0f}",
                         f"{seconds:.0f}"])
    with open(ROOT / "results" / "matched-passes.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["row", "passes", "seconds"], *rows])


if __name__ == "__main__":
    main()
