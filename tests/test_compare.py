"""results/compare.py: commands that parse and agree, a run that goes on, counted passes."""

import csv
import importlib
import json
import shlex
from pathlib import Path

import compare
import pytest

import common

ROOT = Path(__file__).resolve().parent.parent

DATASETS = pytest.mark.parametrize("dataset", compare.DATASETS)
RECIPES = pytest.mark.parametrize("recipe", ["", "--matched"])


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
@RECIPES
def test_its_commands_parse_and_the_tables_read_what_is_trained(dataset, recipe):
    args, jobs, last = planned("--dataset", dataset, "--checks", "--seeds", "0", "1",
                               *recipe.split())
    trained = [job[0][1] for job in jobs]
    assert len({own.out for own in trained}) == len(jobs) == 2 * len(compare.DEFENSES)
    for own, job in zip(trained, jobs):
        assert own.dataset == dataset and f"-{dataset}-{own.arch}-s{own.seed}" in own.out
        attacks = [evaluation for script, evaluation in job[1:] if not evaluation.checks]
        assert all(evaluation.runs == [own.out] for evaluation in attacks)
        assert len(job) - 1 - len(attacks) == (own.seed == 0)
        for _, checked in job[len(attacks) + 1:]:
            assert checked.transfer_from in {other.out for other in trained} | {None}
    patterns = [own.out[:-1] + "*" for own in trained if own.seed == 0]
    for script, shown in last:
        assert shown.evaluations[0].runs == patterns
        if script == "results/table.py":                     # reads what the jobs have measured
            measured = [vars(evaluation) for _, evaluation in jobs[0][1:]]
            for evaluation in shown.evaluations:
                assert {**vars(evaluation), "runs": jobs[0][1][1].runs} in measured
    tables = [shown.name for script, shown in last if script == "results/table.py"]
    name = f"results/{'matched' if recipe else 'all'}-defenses-{dataset}"
    assert tables == [name + end for end in compare.DATASETS[dataset]["tables"]]
    assert f"{name}-passes.csv" in last[0][1].beside


@DATASETS
def test_a_matched_recipe_is_the_same_for_all_and_reaches_the_edge(dataset):
    _, jobs, _ = planned("--dataset", dataset, "--matched")
    trained = [job[0][1] for job in jobs]
    for name in ("eps", "step_size", "attack_steps", "epochs", "batch_size", "embedding_dim",
                 "arch", "image_size"):
        assert len({getattr(own, name) for own in trained}) == 1, name
    own = trained[0]
    assert own.eps == pytest.approx(8 / 255)
    assert own.step_size * own.attack_steps >= 2 * own.eps * (1 - 1e-9)


@pytest.mark.parametrize("defense", compare.DEFENSES)
def test_a_run_is_named_as_its_script_names_it(defense):
    script, args = parsed(compare.DEFENSES[defense])
    assert importlib.import_module(Path(script).stem).run_name(args) == defense


def test_flags_behind_the_dashes_go_to_every_training(capsys):
    args = compare.parse_args(["--defenses", "at", "eat", "--seeds", "0", "--print", "--",
                               "--epochs", "3", "--data-root", "a b"])
    compare.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python ") for line in lines)
    trained = [parsed(line.removeprefix("python "))[1] for line in lines if " --out " in line]
    assert [(own.epochs, own.data_root) for own in trained] == [(3, "a b")] * 2


def test_the_same_command_goes_on(tmp_path, monkeypatch):
    """It runs all commands again: what is trained, attacked and stored is read back by them."""
    ran = []
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "count_passes", lambda args: ran.append("count"))
    monkeypatch.setattr(compare, "run_command", lambda command, one_thread: ran.append(command))
    args = compare.parse_args(["--defenses", "at", "--seeds", "0", "--jobs", "1"])
    compare.main(args)
    (job,), last = compare.commands(args)
    assert ran == [*job, "count", *last] and " --out runs/at-glyphs-convnet-s0" in job[0]


def test_a_command_that_fails_ends_it_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "good.py").write_text("import os; print('threads', os.environ['OMP_NUM_THREADS'])")
    (tmp_path / "bad.py").write_text("raise SystemExit('bad: why')")
    compare.run_command("good.py", True)
    with pytest.raises(SystemExit, match="bad.py failed: runs/.compare.log"):
        compare.run_command("bad.py", True)
    assert (tmp_path / "runs/.compare.log").read_text() == "threads 1\nbad: why\n"


@pytest.mark.parametrize("command, quiet, attacked", [
    ("baselines.py --method natural", 1, 1), ("baselines.py --method at", 2, 7)])
def test_passes_are_counted(command, quiet, attacked, monkeypatch):
    """AT: a reference, four attack steps, the clean and the attacked images; see DESIGN's costs."""
    finish = common.Run.finish
    tiny = f"{command} --attack-steps 4 --batch-size 30"
    first = compare.passes_of(tiny, 1)
    both = compare.passes_of(tiny, 2)
    assert first >= quiet                                    # the log embeds one batch more
    assert both - first == pytest.approx(attacked, abs=0.03)
    assert common.Run.finish is finish


def test_passes_and_seconds_stand_in_a_file_beside_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "passes_of", lambda command, epochs: 10 if epochs == 1 else 30)
    (tmp_path / "results").mkdir()
    args = compare.parse_args(["--matched", "--defenses", "at", "est", "--seeds", "0", "1"])
    for defense, ramp in (("at", [0, 4]), ("est", [8, 4])):
        for seed in (0, 1):
            run = tmp_path / f"{compare.pattern(args, defense)}{seed}"
            run.mkdir(parents=True)
            (run / "log.jsonl").write_text('{"seconds": 1.5}\n' * (4 + 2 * seed))
            (run / "results.json").write_text('{"peak_gb": 1.25}')
            (run / "args.json").write_text(json.dumps(
                {"eps_ramp": ramp, "epochs": 16, "attack_steps": 4}))
    compare.count_passes(args)
    with open(tmp_path / "results/matched-defenses-glyphs-passes.csv") as file:
        rows = list(csv.reader(file))
    assert rows == [["row", "passes", "seconds", "peak GB"],
                    ["matched-at-glyphs-convnet", str(10 + 15 * 20), "8", "1.25"],
                    ["matched-est-glyphs-convnet", str(9 * 10 + 7 * 20), "8", "1.25"]]
