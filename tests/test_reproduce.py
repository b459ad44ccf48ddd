"""results/reproduce.py and results/cub2010.py: commands that parse, names that agree, published
figures that are read, and a budget that is kept."""

import functools
import importlib.util
import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
from test_readme import SCRIPTS

import eval as evaluator

ROOT = Path(__file__).resolve().parent.parent
TABLES = {"eat": "1 2 3 4", "panum": "1 2 3 4 5 6 7 E F", "hm": "1 2 3 4 5 6 7 8 9 10 11"}
FIGURES = {"eat": "1 2 3 4", "panum": "1 2 3 4", "hm": "1 2 3 4 5 6 7 8"}
PAPER = sorted(path for path in (ROOT / "results/paper").glob("*.csv")
               if path.stem not in ("zhou-patel-eta", "zhou-patel-map"))     # those are of glyphs


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reproduce, cub2010 = load("reproduce"), load("cub2010")


@functools.cache
def parsed(command):
    python, script, *flags = shlex.split(command)
    assert python == "python"
    return script, SCRIPTS[script].parse_args(flags)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                      # --resume looks for a run's folder


# ---- reproduce.py

def test_every_table_and_figure_of_the_papers_is_there():
    listed = [(item.paper, item.kind, item.number) for item in reproduce.ITEMS]
    expected = [(paper, kind, number) for kind, numbers in (("table", TABLES), ("figure", FIGURES))
                for paper, own in numbers.items() for number in own.split()]
    assert sorted(listed) == sorted(expected)


@pytest.mark.parametrize("item", reproduce.ITEMS, ids=lambda item: "-".join(item[:3]))
def test_its_commands_parse_and_its_evaluation_reads_what_they_train(item):
    commands = [line for line in item.lines() if not line.startswith("# ")]
    outs = []
    for command in commands:
        script, args = parsed(command)
        if script != "eval.py":
            outs.append(args.out)
            assert args.seed == 0 and args.resume and not args.overwrite
            continue
        assert args.runs == [out.removesuffix("0") + "*" for out in outs]
        for target in filter(None, (args.table, args.figures)):
            assert target.startswith(f"results/{item.paper}-{item.kind}{item.number}-")
        if args.beside:
            rows = evaluator.published_figures(ROOT / args.beside)
            names = [Path(out).name.removesuffix("-s0") for out in outs]
            assert any(name in rows or f"{name} vote" in rows for name in names)
        outs = []
    assert bool(commands) == bool(item.datasets) == bool(item.commands)
    assert len(set(commands)) == len(commands)
    missing = {"cub", "cars", "sop", "inshop"} & set(item.datasets.split())
    assert any("not run: data not at hand" in line for line in item.status()) == bool(missing)
    assert not item.ours or any((ROOT / "results" / name).exists() for name in item.ours.split()) \
        or "cub2010" in item.ours                    # made by results/cub2010.py


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_published_row_is_a_row_of_some_table(path):
    rows, used = evaluator.published_figures(path), set()
    for item in reproduce.ITEMS:
        for line in item.lines():
            if f"--beside results/paper/{path.name}" in line:
                shown = parsed(line)[1]
                assert {column.split()[-1] for row in rows.values() for column in row} & \
                    {*shown.metrics}
                used |= {Path(run).name.removesuffix("-s*") for run in shown.runs}
    for name, row in rows.items():
        assert name.removesuffix(" vote").removeprefix("matched-") in used
        assert name.startswith(("eat-", "ensemble-", "matched-e")) == name.endswith(" vote")
        assert all(re.fullmatch(r"-|collapse|\d+(\.\d+)?( ± \d\.\d)?", cell)
                   for cell in row.values())
        if name.startswith("matched-"):
            assert row == rows[name.removeprefix("matched-")]


def test_what_is_printed(monkeypatch, capsys):
    def shown(*flags):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
        reproduce.main()
        return capsys.readouterr().out.splitlines()

    assert len(shown()) == len(reproduce.ITEMS)
    assert len(shown("--paper", "eat")) == 8 and "--paper eat --table 4: " in shown()[3]
    lines = shown("--paper", "eat", "--table", "4", "--seeds", "0", "1")
    assert sum(" --seed 1 " in line for line in lines) == 7 and lines[0].startswith("# eat, table")
    assert lines[-1] == "# not run: data not at hand (inshop)"
    assert shown("--paper", "hm", "--figure", "3")[-1] == "# nothing to run"
    for flags in (["--table", "1"], ["--paper", "eat", "--table", "5"], ["--paper", "other"],
                  ["--paper", "eat", "--table", "1", "--figure", "9"]):
        with pytest.raises(SystemExit) as stopped:
            shown(*flags)
        assert stopped.value.code == 2


# ---- cub2010.py

@pytest.mark.parametrize("recipe", ["", "--matched"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_commands_for_cub2010_parse(recipe, device, capsys):
    args = cub2010.parse_args(["--print", "--device", device, "--seeds", "0", "1", *recipe.split()])
    cub2010.main(args)
    found = [parsed(line) for line in capsys.readouterr().out.splitlines()]
    runs = [own for script, own in found if script != "eval.py"]
    methods = list(cub2010.METHODS)[:None if device == "cuda" else -1]
    assert [own.out for own in runs] == [
        f"runs/{'matched-' if recipe else ''}{method}-cub2010-mobilenetv2-s{seed}"
        for seed in (0, 1) for method in methods]
    assert {(own.dataset, own.data_root, own.weights, own.arch, own.epochs, own.image_size)
            for own in runs} == {("cub2010", "data", "mobilenet_v2_imagenet_features.pth",
                                  "mobilenetv2", args.epochs, 224 if device == "cuda" else 64)}
    same = {(own.eps, own.step_size, own.attack_steps, own.embedding_dim, own.batch_size, own.crop)
            for own in runs}
    assert not recipe or same == {(8 / 255, 2 / 255, 10 if device == "cuda" else 4, 128,
                                   120 if device == "cuda" else 60, "resized")}
    tables = [own for _, own in found if getattr(own, "table", None)]
    assert [own.table for own in tables] == [f"results/{args.name}{end}" for end in args.tables]
    assert all(own.runs == [run.out for run in runs] for own in tables)
    assert [own.beside for own in tables] == [cub2010.PAPER] + [None] * (len(tables) - 1)
    rows = evaluator.published_figures(ROOT / cub2010.PAPER)
    names = {Path(own.out).name[:-3] for own in runs}
    assert len({f"{name}{rule}" for name in names for rule in ("", " vote")} & set(rows)) == 9


@pytest.mark.parametrize("method", cub2010.METHODS)
def test_a_run_is_named_as_its_script_names_it(method):
    command = f"python {cub2010.METHODS[method][0]} --dataset cub2010 --arch mobilenetv2"
    assert parsed(command)[1].out == f"runs/{method}-cub2010-mobilenetv2-s0"


def test_commands_that_are_over_their_time_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(cub2010, "ROOT", tmp_path)
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "sleep.py").write_text("import time; print('started', flush=True); time.sleep(60)")
    (tmp_path / "good.py").write_text("print('good')")
    (tmp_path / "bad.py").write_text("raise SystemExit('bad: why')")
    started = time.monotonic()
    assert cub2010.run_command("sleep.py", started + 2) is False and time.monotonic() < started + 20
    assert cub2010.run_command("good.py", started) is False                     # not started
    with pytest.raises(SystemExit, match="bad.py failed: runs/cub2010.log"):
        cub2010.run_command("bad.py")
    assert cub2010.run_once("good.py", "runs/run", None)
    assert not cub2010.run_once("good.py", "runs/run", started)  # no results.json: not complete
    (tmp_path / "runs/run/results.json").write_text("{}")
    assert cub2010.run_once("good.py", "runs/run", started)
    assert (tmp_path / "runs/cub2010.log").read_text().count("good\n") == 1


def test_tables_are_of_what_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(cub2010, "ROOT", tmp_path)
    (tmp_path / "results/paper").mkdir(parents=True)
    (tmp_path / cub2010.PAPER).write_text((ROOT / cub2010.PAPER).read_text())
    left, ran, said = 6, [], []

    def run_command(command, ends=None):
        ran.append(command)
        return ends is None or len([own for own in ran if "--table" not in own]) <= left

    monkeypatch.setattr(cub2010, "run_command", run_command)
    monkeypatch.setattr(cub2010, "say_what_it_is", lambda args, table, runs: said.append(table))
    monkeypatch.setattr(cub2010, "write_costs", lambda args, runs: said.append(list(runs.values())))
    args = cub2010.parse_args(["--device", "cpu", "--budget", "1", "--methods", "natural", "at"])
    cub2010.main(args)                     # two trained, attacked, one more attack on both, no time
    assert said == ["cub2010", "cub2010-weak", ["natural", "at"]]
    assert [len(evaluator.parse_args(shlex.split(own)[1:]).runs)
            for own in ran if "--table" in own] == [2, 2]
    left = 9
    ran.clear()
    cub2010.main(args)                               # results.json is missing: all once more
    assert said[3:] == ["cub2010", "cub2010-weak", "cub2010-worst",
                        "cub2010-weak-worst", ["natural", "at"]]


def test_a_table_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cub2010, "ROOT", tmp_path)
    args = cub2010.parse_args(["--device", "cpu", "--matched", "--data-root", "elsewhere",
                               "--into", "page.md"])
    run = cub2010.run_of(args, "at", 0)
    (tmp_path / run).mkdir(parents=True)
    (tmp_path / "results").mkdir()
    stored = json.loads((ROOT / "results/glyphs-hm.json").read_text())
    (tmp_path / "results/matched-cub2010.json").write_text(json.dumps(stored))
    (tmp_path / "page.md").write_text("<!-- results/matched-cub2010.md -->\nold\n<!-- end -->\n")
    cub2010.say_what_it_is(args, "matched-cub2010", {run: "at"})
    content = json.loads((tmp_path / "results/matched-cub2010.json").read_text())
    markdown = (tmp_path / "results/matched-cub2010.md").read_text()
    assert evaluator.table_markdown(content) == markdown and markdown in \
        (tmp_path / "page.md").read_text()
    assert "64 px, 4 epochs, one recipe for all, radius 8/255, T = 4 attack steps" in markdown
    assert "2990 and 3043" in markdown and "on a CPU" in markdown
    assert content["title"].endswith(stored["title"]) and "/else" not in json.dumps(content)
    monkeypatch.setattr(sys, "argv", ["cub2010.py"])
    again = cub2010.parse_args(shlex.split(content["command"])[2:])
    assert (again.matched, again.methods, again.epochs) == (True, ["at"], 4)


def test_a_cost_table_has_the_measured_seconds_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(cub2010, "ROOT", tmp_path)
    args = cub2010.parse_args(["--device", "cpu", "--into", "page.md"])
    runs = {cub2010.run_of(args, method, 0): method for method in ("at", "eat")}
    env = {"device": "cpu", "threads": 2, "device_name": "some"}
    for run, dim, untrained in zip(runs, (128, 512), (0.2, 0.25)):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "log.jsonl").write_text("".join(
            json.dumps({"seconds": seconds}) + "\n" for seconds in (30.0, 10.0, 20.0)))
        start = {"epochs": 0, "clean": {"R@1": untrained}, "robust": [
            {"protocol": "template", "R@1": 0.01}, {"protocol": "clustering", "R@1": 0.03}]}
        (tmp_path / run / "results.json").write_text(json.dumps(
            {"peak_gb": 1.25, "env": env, "undefended": start, "embedding_dim": dim}))
    (tmp_path / "results").mkdir()
    rows = [{"name": name, "clean": {"R@1": [0.5, None]}, "attacked": {"R@1": [0.25, None]}}
            for name in ("at-cub2010-mobilenetv2", "eat-cub2010-mobilenetv2 member_1",
                         "eat-cub2010-mobilenetv2 vote")]
    (tmp_path / "results/cub2010.json").write_text(json.dumps({"command": "the command",
                                                               "rows": rows}))
    rows = [{"name": "eat-cub2010-mobilenetv2 vote", "attacked": {}},
            {"name": "eat-cub2010-mobilenetv2 distance", "attacked": {"ERS": [12.5, None]}}]
    (tmp_path / "results/cub2010-ers.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "page.md").write_text("<!-- results/cub2010-cost.md -->\nold\n<!-- end -->\n")
    cub2010.write_costs(args, runs)
    content = json.loads((tmp_path / "results/cub2010-cost.json").read_text())
    markdown = (tmp_path / "results/cub2010-cost.md").read_text()
    assert cub2010.cost_markdown(content) == markdown
    assert markdown in (tmp_path / "page.md").read_text()
    assert "| at | 1 T + 3 | 3 | 20 | 1.25 | 50.0 | 25.0 |" in markdown
    assert "| eat | 3 T + 7 | 3 | 20 | 1.25 | 50.0 | 25.0 |" in markdown
    assert "2 CPU cores" in markdown
    assert "| not trained, embedding 128 | - | - | - | - | 20.0 | 3.0 |" in markdown
    assert "| not trained, embedding 512 | - | - | - | - | 25.0 | 3.0 |" in markdown
    assert [row["training_seconds"] for row in content["rows"]] == [60, 60]
    assert [row["ERS"] for row in content["rows"]] == [None, 12.5]
    assert (tmp_path / "results/cub2010-cost.png").stat().st_size > 1000


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*-cost.json")),
                         ids=lambda path: path.stem)
def test_every_cost_table_is_its_json(path):
    content = json.loads(path.read_text())
    assert cub2010.cost_markdown(content) == path.with_suffix(".md").read_text()
    assert (path.parent / content["table"]).exists()


def test_seconds_and_passes_are_added_up_over_the_epochs_without_and_with_the_attack(tmp_path,
                                                                                     monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    counter = load("count_passes")
    monkeypatch.setattr(counter, "ROOT", tmp_path)
    monkeypatch.setattr(counter, "count", lambda command, epochs: (
        (10, [5.0]) if "--epochs 1" in epochs else (30, [1.0, 3.0])))
    (tmp_path / "results").mkdir()
    counter.main()
    rows = (tmp_path / "results/matched-passes.csv").read_text().splitlines()
    assert rows[0] == "row,passes,seconds"
    assert f"matched-at-glyphs-convnet,{10 + 15 * 20},{1 + 15 * 3}" in rows     # radius 0 at first
    assert f"matched-est-glyphs-convnet distance,{9 * 10 + 7 * 20},{9 * 1 + 7 * 3}" in rows
