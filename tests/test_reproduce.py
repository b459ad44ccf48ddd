"""results/reproduce.py: commands that parse, runs that keep apart, published figures, hours."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import figures
import pytest
import reproduce
import table

ROOT = Path(__file__).resolve().parent.parent

TABLES = {"eat": "1 2 3 4", "panum": "1 2 3 4 5 6 7 E F", "hm": "1 2 3 4 5 6 7 8 9 10 11"}
FIGURES = {"eat": "1 2 3 4", "panum": "1 2 3 4", "hm": "1 2 3 4 5 6 7 8"}
PAPER = sorted(path for path in (ROOT / "results/paper").glob("*.csv")
               if path.stem not in ("zhou-patel-eta", "zhou-patel-map"))     # those are of glyphs


@functools.cache
def parsed(command):                                         # by the script's own parser
    python, script, *flags = shlex.split(command)
    assert python == "python"
    return script, importlib.import_module(Path(script).stem).parse_args(flags)


def commands(item, seeds=(0,)):
    return [line for line in item.lines(seeds) if line.startswith("python ")]


def test_every_table_and_figure_of_the_papers_is_there():
    for kind, numbers in (("table", TABLES), ("figure", FIGURES)):
        for paper, expected in numbers.items():
            assert [item.number for item in reproduce.ITEMS
                    if (item.paper, item.kind) == (paper, kind)] == expected.split()


@pytest.mark.parametrize("item", reproduce.ITEMS, ids=lambda item: "-".join(item[:3]))
def test_its_commands_parse_and_its_evaluation_reads_what_they_train(item):
    outs, shown = [], []
    for command in commands(item):
        script, args = parsed(command)
        if script == "results/figures.py" and args.table:                # of the table before
            assert args.table == [f"{shown[-1]}.json"] and args.folder == shown[-1]
        elif script.startswith("results/"):
            shown.append(getattr(args, "name", None) or args.folder)
            assert shown[-1].startswith(f"results/{item.paper}-{item.kind}{item.number}-")
            runs = args.evaluations[0].runs if args.evaluations else \
                [path.replace("0.npz", "*") for path in args.saved]
            assert runs == [out[:-1] + "*" for out in outs]
            assert all({*more.runs} <= {*runs} for more in args.evaluations)
            if item.paper == "hm":                               # may stand beside the paper's ERS
                assert args.evaluations[0].objective == ["ers-authors"]
            outs = []
        elif script == "eval.py":
            assert args.runs[0] in outs and args.save_embeddings == args.runs[0] + ".npz"
        else:
            assert args.seed == 0 and args.out.startswith("runs/paper-")
            outs.append(args.out)
    tables = 0 if item.attack is None else len(item.datasets.split())
    assert len(shown) == len({*shown}) == tables
    assert bool(commands(item)) == bool(item.datasets) == bool(item.commands)
    assert not item.commands or item.lines()[0] == "set -e" and item.hours() > 0
    assert all((ROOT / "results" / name).exists() for name in item.ours.split()
               if "cub2010" not in name)


def test_a_folder_has_one_training_command_alone():
    trained = {}
    for item in reproduce.ITEMS:
        for command in (command for command in commands(item, (0, 1)) if " --out " in command):
            args = parsed(command)[1]
            assert trained.setdefault(args.out, args) == args
            assert args.out.endswith(f"-s{args.seed}")


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_published_row_is_a_row_of_some_table_and_ers_is_the_mean_of_ten(path):
    rows, used = table.published_figures([path]), set()
    for item in reproduce.ITEMS:
        for line in item.lines():
            if f"--beside results/paper/{path.name}" in line:
                used |= {Path(run).name.removeprefix("paper-").removesuffix("-s*")
                         for run in parsed(line)[1].evaluations[0].runs}
    for name, row in rows.items():
        assert name.removesuffix(" vote") in used
        assert all(re.fullmatch(r"-|collapse|\d+(\.\d+)?( ± \d\.\d)?", cell)
                   for cell in row.values())
        if row.get("paper GTT", "-") != "-":
            of = {metric: float(row[f"paper {metric}"]) for metric in table.ERS}
            ten = 2 * of["CA+"] - of["CA-"] + 2 * of["QA+"] - of["QA-"] + 400 - 100 * of["TMA"] \
                - 50 * of["ES:D"] + sum(of[metric] for metric in table.ERS[6:10])
            assert ten / 10 == pytest.approx(of["ERS"], abs=0.11), name


@pytest.mark.parametrize("command, passes", [       # as results/compare.py counts them on glyphs
    ("baselines.py --method at --members 3", 21), ("eat.py", 19), ("panum_at.py", 4.5),
    ("panum_at.py --perturb anchor", 7), ("baselines.py --method act", 13),
    ("hardness_manipulation.py --ics", 19), ("hardness_manipulation.py --destination softhard", 5)])
def test_hours_are_passes_times_images_times_epochs(command, passes):
    command += " --attack-steps 4 --dataset cub2010"
    assert reproduce.passes(command) == passes
    hours = passes * 2990 * reproduce.parsed(command)[1].epochs * 1e-6
    assert reproduce.training_hours(command, 3.6) == pytest.approx(hours)


def test_training_costs_are_a_point_for_every_eta():
    rows = [{"name": name, "values": {"clean": {"R@1": [0.5]}, "attacked": {"ERS": [ers]}}}
            for name, ers in (("act-cub", 30.0), ("act-eta2-cub", 10.0), ("hm-cub", 40.0))]
    flags = {own["name"]: {"attack_steps": 2 if "eta2" in own["name"] else 8} for own in rows}
    assert figures.training_costs({"rows": rows, "flags": flags}) == {
        "act-cub": [{"eta + 1": [3, 9], "R@1": [0.5, 0.5], "ERS": [0.1, 0.3]}]}


def test_what_is_printed(capsys):
    def shown(*flags):
        reproduce.main(reproduce.parse_args(flags))
        return capsys.readouterr().out.splitlines()

    assert len(shown()) == len(reproduce.ITEMS)
    lines = shown("--paper", "eat", "--table", "4", "--seeds", "0", "1", "--ms", "2")
    assert sum(" --seed 1 " in line for line in lines) == 7 and lines[1].startswith("# eat, table")
    assert " hours of training: passes x images x epochs x 2 ms of a pass" in lines[2]
    lines = shown("--paper", "panum", "--table", "F", "--dataset", "cub")
    assert not any("sop" in line for line in lines[:-1])
    for flags in ("--table 1", "--paper eat --table 5", "--paper eat --table 1 --figure 9",
                  "--paper eat --table 4 --dataset cub"):
        with pytest.raises(SystemExit, match="2"):
            shown(*flags.split())
