"""results/compare.py: commands that parse and agree, a run that goes on, counted passes."""

import csv
import importlib
import json
import shlex
import time
from pathlib import Path

import compare
import pytest

import common

DATASETS = pytest.mark.parametrize("dataset", compare.DATASETS)


def parsed(command):
    """(script, its arguments), by the script's own parser."""
    script, *flags = shlex.split(command)
    return script, importlib.import_module(Path(script).stem).parse_args(flags)


def planned(*flags):
    args = compare.parse_args(list(flags))
    jobs, last = compare.commands(args)
    return args, [[parsed(command) for command in job] for job in jobs], \
        [parsed(command) for command in last]


@DATASETS
def test_its_commands_parse_and_the_tables_read_what_is_trained(dataset):
    _, jobs, last = planned("--dataset", dataset, "--seeds", "0", "1")
    trained = [job[0][1] for job in jobs]
    assert len({own.out for own in trained}) == len(jobs) == 2 * len(compare.DEFENSES)
    for own, job in zip(trained, jobs):
        assert own.dataset == {"grocery": "folder"}.get(dataset, dataset)
        assert f"-{dataset}-{own.arch}-s{own.seed}" in own.out and own.limit_queries == 300
        assert all(evaluation.runs == [own.out] for _, evaluation in job[1:])
        assert (job[-1][1].protocol == "ers") == (own.seed == 0)     # the first seed alone
    patterns = [own.out[:-1] + "*" for own in trained if own.seed == 0]
    for end, (script, shown) in zip(compare.TABLES, last, strict=True):
        assert script == "results/table.py" and shown.name == f"results/arena-{dataset}{end}"
        first = [own.out for own in trained if own.seed == 0]
        assert shown.evaluations[0].runs == (first if end == "-ers" else patterns)
        measured = [vars(evaluation) for _, evaluation in jobs[0][1:]]
        for evaluation in shown.evaluations:                 # reads what the jobs have measured
            assert {**vars(evaluation), "runs": jobs[0][1][1].runs} in measured
        assert shown.beside == [f"results/arena-{dataset}-costs.csv"] * (end in ("", "-worst"))


@DATASETS
def test_the_recipe_is_the_same_for_all_and_reaches_the_edge(dataset):
    _, jobs, _ = planned("--dataset", dataset, "--seeds", "3")
    trained = {job[0][1].out.split(f"-{dataset}")[0]: job[0][1] for job in jobs}
    for name in ("eps", "batch_size", "embedding_dim", "arch", "image_size", "crop", "seed"):
        assert len({getattr(own, name) for own in trained.values()}) == 1, name
    for name, own in trained.items():
        assert own.eps == pytest.approx(8 / 255)
        if "fast" in name:                                   # one step of 1.25 eps
            assert (own.attack_steps, own.step_size / own.eps) == (1, pytest.approx(1.25))
            assert own.eps_ramp == [0, 3 * own.epochs // 4]
        else:
            assert own.step_size * own.attack_steps >= 2 * own.eps * (1 - 1e-9)
    teacher = trained["runs/arena-fare"].teacher
    assert teacher == trained["runs/arena-natural"].out and teacher.endswith("s3")


@pytest.mark.parametrize("defense", set(compare.DEFENSES) - {"fare"})
def test_a_run_is_named_as_its_script_names_it(defense):
    script, args = parsed(compare.DEFENSES[defense][0])
    assert importlib.import_module(Path(script).stem).run_name(args) == defense


def test_flags_behind_the_dashes_go_to_every_training(capsys):
    args = compare.parse_args(["--defenses", "at", "eat", "--seeds", "0", "--print", "--",
                               "--epochs", "3", "--data-root", "a b"])
    compare.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python ") for line in lines)
    trained = [parsed(line.removeprefix("python "))[1] for line in lines if " --out " in line]
    assert [(own.epochs, own.data_root) for own in trained] == [(3, "a b")] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_same_command_goes_on_and_fare_waits_for_its_teacher(tmp_path, monkeypatch, fails,
                                                                 capsys):
    """It runs all commands again: what is trained, attacked and stored is read back by them."""
    ran = []

    def run_command(command):
        time.sleep(0.2 * ("--method natural" in command))
        ran.append(command)
        if fails and "--method natural" in command:
            raise SystemExit("bad")

    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "count_costs", lambda args: ran.append("count"))
    monkeypatch.setattr(compare, "run_command", run_command)
    args = compare.parse_args(["--defenses", "fare", "natural", "--seeds", "0", "--jobs", "2"])
    (student, teacher), last = compare.commands(args)
    if fails:
        with pytest.raises(SystemExit):
            compare.main(args)
        assert set(ran) <= {*student, teacher[0]}            # no deadlock, no table
        return
    compare.main(args)
    assert sorted(ran[:-1 - len(last)]) == sorted([*student, *teacher])
    assert ran[-1 - len(last):] == ["count", *last] and ran.index(teacher[0]) == 0
    assert "2 of 2 runs after 0 minutes, about 0 are left" in capsys.readouterr().out


def test_a_command_that_fails_ends_it_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "good.py").write_text("import os; print('threads', os.environ['OMP_NUM_THREADS'])")
    (tmp_path / "bad.py").write_text("raise SystemExit('bad: why')")
    compare.run_command("good.py")
    with pytest.raises(SystemExit, match="bad.py failed: runs/.compare.log"):
        compare.run_command("bad.py")
    assert (tmp_path / "runs/.compare.log").read_text() == "threads 1\nbad: why\n"


@pytest.mark.parametrize("command, quiet, attacked", [
    ("baselines.py --method natural", 1, 1), ("baselines.py --method at", 2, 7)])
def test_passes_are_counted(command, quiet, attacked):
    """AT: a reference, four attack steps, the clean and the attacked images; see DESIGN's costs."""
    finish = common.Run.finish                               # tests have one thread, too
    tiny = f"{command} --attack-steps 4 --val-classes 40 --workers 0"
    (first, seconds), (second, _) = compare.costs_of(tiny)
    assert first >= quiet and seconds > 0                    # the log embeds one batch more
    assert second == pytest.approx(attacked, abs=0.11)
    assert common.Run.finish is finish


def test_passes_and_seconds_stand_in_a_file_beside_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "costs_of", lambda command: [(10, 2.0), (20, 3.0)])
    (tmp_path / "results").mkdir()
    args = compare.parse_args(["--defenses", "at", "est", "--seeds", "0", "1"])
    for defense, ramp in (("at", [0, 4]), ("est", [8, 4])):
        run = tmp_path / f"{compare.folder(args, defense)}0"
        run.mkdir(parents=True)
        (run / "args.json").write_text(json.dumps({"eps_ramp": ramp, "epochs": 16}))
    compare.count_costs(args)
    with open(tmp_path / "results/arena-glyphs-costs.csv") as file:
        rows = list(csv.reader(file))
    assert rows == [["row", "passes", "seconds"],
                    ["arena-at-glyphs-convnet", str(10 + 15 * 20), str(2 + 15 * 3)],
                    ["arena-est-glyphs-convnet", str(9 * 10 + 7 * 20), str(9 * 2 + 7 * 3)]]
