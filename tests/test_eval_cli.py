"""The command line of eval.py, on a run of two tiny networks and 48 tiny pictures."""

import json
import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import contents, stored

import common
import eat
import eval as evaluator

HERE = ("--workers", "0", "--device", "cpu")
TEMPLATE = (*HERE, "--protocol", "template", "--attack-steps", "1")
TRAIN = ("--dataset folder --arch convnet --weights none --image-size 32 --embedding-dim 8 "
         "--batch-size 6 --attack-steps 1 --members 2 --workers 0 --device cpu").split()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six classes of eight pictures, noise around a colour; the last three are reported on."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(6):
        (root / f"class{label}").mkdir()
        colour = generator.integers(60, 196, 3)
        for i in range(8):
            noise = generator.integers(-60, 60, (32, 32, 3))
            Image.fromarray((colour + noise).astype(np.uint8)).save(root / f"class{label}/{i}.png")
    return root


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """trained(seed, epochs): a run; tests copy it."""
    def make(seed=0, epochs=1):
        out = root / f"run-s{seed}-{epochs}"
        if not out.exists():
            eat.main(eat.parse_args([*TRAIN, "--seed", str(seed), "--epochs", str(epochs), "--out",
                                     str(out), "--data-root", str(pictures)]))
        return out
    root = tmp_path_factory.mktemp("runs")
    return make


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained(), tmp_path / "run")


@pytest.fixture
def attacks_made(monkeypatch):
    """The radii of the attacks that are made; at a radius that is in `stop`, an interrupt."""
    made, stop, whole = [], set(), evaluator.attacked

    def watched(retrieval, attack, *rest, **options):
        if attack.eps in stop:
            raise KeyboardInterrupt
        made.append(attack.eps)
        return whole(retrieval, attack, *rest, **options)

    monkeypatch.setattr(evaluator, "attacked", watched)
    return made, stop


def evaluate(*arguments):
    return evaluator.main(evaluator.parse_args(list(map(str, arguments))))


def evaluate_in_child(arguments):
    torch.set_num_threads(1)
    evaluate(*arguments)


def start(*arguments):
    """eval.py in a process of its own, forked from one that has imported torch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torchvision", "pytest"])
    process = server.Process(target=evaluate_in_child, args=(arguments,))
    process.start()
    return process


def timeless(records):
    return [{**record, "seconds": 0} for record in records]


def test_flags_of_several_values_are_a_product():
    args = evaluator.parse_args("run --protocol template --attack pgd cw --eps 0.01 0.05 --seed 3 4"
                                " --objective neighbour impostor --attack-steps 2".split())
    attacks = evaluator.attacks_of(args, 9)
    assert len(attacks) == 16 == len(set(attacks)) and {attack.steps for attack in attacks} == {2}
    assert attacks[5] == evaluator.attack_of("template", "pgd", objective="impostor", eps=0.01,
                                             steps=2, seed=4)
    (attack,) = evaluator.attacks_of(evaluator.parse_args(["run"]), 9)
    assert (attack.protocol, attack.objective, attack.seed) == ("clustering", "shift", 9)


def test_records_are_stored_one_by_one_and_read_back(run, attacks_made, capsys):
    made, stop = attacks_made
    several, before = [run, *TEMPLATE, "--eps", "0.01", "0.02", "0.03"], stored(run)
    stop.add(0.02)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*several)
    first = stored(run)
    assert first["robust"][:1] == before["robust"] and len(first["robust"]) == 2
    assert {**first, "robust": 0} == {**before, "robust": 0} and "clean" not in first["robust"][1]
    stop.clear()
    (entry,) = evaluate(*several)
    table = capsys.readouterr().out
    assert made == [0.01, 0.02, 0.03] and stored(run)["robust"][1:] == entry["records"]
    assert entry["records"][0] == first["robust"][1] and entry["clean"] == before["clean"]
    (again,) = evaluate(*several)
    assert made == [0.01, 0.02, 0.03] and again == entry
    shown = capsys.readouterr().out
    assert shown.endswith("\n".join(table.splitlines()[-12:]) + "\n") and "eps 5.1/255" in shown
    (entry,) = evaluate(*several, "--overwrite")
    assert made == [0.01, 0.02, 0.03] * 2 and timeless(entry["records"]) == timeless(
        again["records"]) and stored(run)["robust"][1:] == entry["records"]
    evaluate(run, *HERE)                                    # of the closing evaluation
    assert len(made) == 6
    for more in (["--seed", "1"], ["--objective", "self"], ["--restarts", "2"],
                 ["--attack-steps", "2"], ["--step-size", "0.001"]):
        evaluate(run, *TEMPLATE, *more)
    assert len(made) == 11 and len(stored(run)["robust"]) == 9
    assert capsys.readouterr().out.count("cannot cross the ball") == 1         # of --step-size


def test_the_closing_evaluation_is_what_eval_measures_and_python_too(run, pictures):
    closing = stored(run)
    (entry,) = evaluate(run, *HERE, "--overwrite")
    assert timeless(entry["records"]) == timeless(closing["robust"])
    assert entry["clean"] == closing["clean"] and entry["warnings"] == closing["warnings"]
    test = common.load_dataset("folder", pictures, image_size=32)[1]
    images = torch.stack([image for image, _ in test]).to(memory_format=torch.channels_last)
    result = evaluator.evaluate_robustness(common.load_model(run), images, test.labels)
    assert timeless(result["robust"]) == timeless(closing["robust"])


def test_unfinished_runs_and_bare_checkpoints_store_nothing(run, trained, tmp_path, capsys):
    content = torch.load(run / "last.pt")
    torch.save({**content, "args": {**content["args"], "epochs": 5}}, run / "last.pt")
    shutil.copy(run / "last.pt", tmp_path / "bare.pt")
    before = contents(tmp_path)
    first, second = evaluate(run, tmp_path / "bare.pt", *TEMPLATE)
    assert timeless(first["records"]) == timeless(second["records"])
    assert contents(tmp_path) == before and capsys.readouterr().out.count("nothing is stored") == 2


def test_a_limited_subset_has_its_own_clean_scores(run, capsys):
    whole = stored(run)["clean"]
    for _ in range(2):                                      # measured, then read back
        (entry,) = evaluate(run, *TEMPLATE, "--limit-queries", "10")
        (record,) = entry["records"]
        assert record["limited"] and record["n_queries"] == 10 == entry["clean"]["n_queries"]
        assert record["clean"] == entry["clean"] != whole == stored(run)["clean"]
        assert ", 10 images" in capsys.readouterr().out
    (entry,) = evaluate(run, *TEMPLATE, "--limit-queries", "100")
    assert entry["clean"] == whole and not entry["records"][0]["limited"]
    assert len(stored(run)["robust"]) == 3


def test_one_table_holds_all_runs_once(run, trained, tmp_path, capsys):
    shutil.copytree(trained(1), tmp_path / "rune")
    (tmp_path / "runs").mkdir()
    (tmp_path / "rune.npz").touch()                          # of --save-embeddings
    capsys.readouterr()
    report = evaluate(tmp_path / "run*", f"{run}/", *TEMPLATE, "--eps", "0.01", "0.02")
    lines = capsys.readouterr().out.splitlines()
    assert [entry["run"] for entry in report] == ["run", "rune"]
    assert {f"{tmp_path / f}: no checkpoint, left out" for f in ("runs", "rune.npz")} <= {*lines}
    title = next(i for i, line in enumerate(lines) if line.startswith(
        "protocol template, objective neighbour, attack pgd, against sum, steps 1, restarts 1"))
    rows = [line.split() for line in lines[title + 1:] if not line.startswith("warning: ")]
    assert rows[0] == ["R@1", "R@2", "R@4", "R@8", "mAP@R", "NMI", "AMI", "F1"]
    assert len(rows) == 1 + 2 * 6 * 3 == len({tuple(row[:4]) for row in rows})
    score = report[1]["records"][1]["scores"]["mean"]["R@1"]
    assert ["rune", "mean", "eps", "5.1/255", f"{100 * score:.1f}"] in [row[:5] for row in rows]


@pytest.mark.parametrize("bad, words", [
    ("--eps 8", ["8/255"]), ("--eps 8/0", ["8/0"]), ("--objective neighbour", ["clustering has"]),
    ("--attack-steps -1", ["-1"]), ("--attack cw", ["--protocol template"]),
    ("--protocol ers", ["100 images"]), ("--against member_3", ["2 in number"]),
    ("--device nope", ["--device nope"]), ("--overwrite --data-root nowhere", ["nowhere"]),
    ("--attack strong --attack-steps 9", ["frozen"]), ("--gallery-from RUN", ["template"]),
    ("--transfer-from RUN", ["--checks"]), ("--checks --transfer-from nowhere", ["nowhere"]),
    ("--checks --attack fgsm", ["PGD"]), ("--save-embeddings no/a.npz", ["no/a.npz"]),
    ("--objective joint --attack fgsm", ["pgd or strong"]), ("--against vote", ["impostor or"]),
    ("--objective worst --against mean", ["drop --against mean"]), ("--against member_0", ["sum,"]),
    ("--protocol template --attack fgsm --restarts 2", ["one start"]), ("--attack bim", ["bim"]),
    ("--save-embeddings a.npz --eps 0.1 0.2", ["one attack"]),
    ("--protocol ers --save-embeddings a.npz", ["ers"]), ("nowhere*", ["nowhere*"])])
def test_a_bad_value_is_one_line_and_nothing_is_written(bad, words, run, fails):
    before = contents(run)
    assert fails(words, evaluator, run, *HERE, *bad.split()) == 2
    assert contents(run) == before


def test_damaged_results_and_data_that_has_changed_are_refused(run, pictures, tmp_path, fails):
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copy(pictures / "class4/0.png", tmp_path / "pictures/class4/8.png")
    before = contents(run)
    assert fails(["has changed", "class4"], evaluator, run, *TEMPLATE, "--data-root",
                 tmp_path / "pictures") == 2
    assert contents(run) == before
    for damaged in ({"robust": [{}]}, {"clean": []}, {"warnings": None}):
        (run / "results.json").write_text(json.dumps({**stored(run), **damaged}))
        assert fails(["results.json"], evaluator, run, *TEMPLATE) == 2


@pytest.mark.parametrize("options", [
    "", "--protocol template --attack cw --attack-steps 3 --limit-queries 12"])
def test_saved_embeddings_have_the_printed_recall(options, run, pictures, tmp_path):
    path = tmp_path / "some.npz"
    (entry,) = evaluate(run, *HERE, *options.split(), "--save-embeddings", path)
    (record,), saved = entry["records"], np.load(path)
    assert set(saved) == {"clean", "attacked", "labels", "paths", "classes", "rows", "attack",
                          "images_clean", "images_attacked"}
    test = common.load_dataset("folder", pictures, image_size=32)[1]
    test = common.balanced_subset(test, 12) if options else test
    assert [str(pictures / name) for name in saved["paths"]] == test.paths
    assert saved["classes"].tolist() == test.classes == ["class3", "class4", "class5"]
    assert torch.equal(torch.from_numpy(saved["labels"]), test.labels)
    assert json.loads(str(saved["attack"])).items() <= record.items()
    for images, name in ("images_clean", "clean"), ("images_attacked", "attacked"):
        embeddings = common.embed(common.load_model(run), [(torch.from_numpy(saved[images]), 0, 0)])
        torch.testing.assert_close(torch.from_numpy(saved[name]), torch.stack(embeddings))
    assert np.abs(saved["images_attacked"] - saved["images_clean"]).max() <= record["eps"] + 1e-6
    clean, moved = (torch.from_numpy(saved[name])[1] for name in ("clean", "attacked"))
    recall = common.recall_at_k(moved, test.labels, (1, 2), clean if options else None)
    row = record["scores"]["member_2"]
    assert recall == {1: row["R@1"], 2: row["R@2"]}


def test_a_gallery_of_another_run_is_that_runs(run, trained, pictures):
    command = [run, *TEMPLATE, "--objective", "shift"]
    evaluate(*command)
    for _ in range(2):
        (entry,) = evaluate(*command, "--gallery-from", trained(1))
        assert entry["records"][0]["gallery_from"] == trained(1).name
    assert len(stored(run)["robust"]) == 3                  # beside that of its own gallery
    test = common.load_dataset("folder", pictures, image_size=32)[1]
    images = torch.stack([image for image, _ in test])
    own, other = (common.embed(common.load_model(path), [(images, 0, 0)])[1]
                  for path in (run, trained(1)))
    assert entry["clean"]["scores"]["member_2"]["R@2"] == common.recall_at_k(
        own, test.labels, (2,), other)[2]


def test_failed_checks_are_printed_and_kept_until_they_pass(run, trained, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "SWEEP", (128,))
    before = stored(run)
    evaluate(run, *HERE, "--checks", "--attack-steps", "0", "--transfer-from", trained(1))
    output, results = capsys.readouterr().out, stored(run)
    alerts = results["warnings"][len(before["warnings"]):]
    mark = "(clustering: shift, PGD-0, eps 8/255): "
    assert output.count("\npass  ") + len(alerts) + output.count("WARNING  collapse") >= 18 > 3
    assert "  transfer: " in output and alerts and results["warnings"][:2] == before["warnings"]
    for alert in alerts:
        name, text = alert.removeprefix("check ").split(f" {mark}")
        assert f"WARNING  {name}: {text}\n" in output and f"warning: run: {alert}\n" in output
    assert {**results, "warnings": 0, "robust": 0} == {**before, "warnings": 0, "robust": 0}
    for outcome in ([("odd", False, "bad"), ("even", True, "good")], [("odd", True, "good")]):
        monkeypatch.setattr(evaluator, "checks", lambda *_, outcome=outcome: iter(outcome))
        evaluate(run, *HERE, "--checks", "--attack-steps", "0")
        assert stored(run)["warnings"] == before["warnings"] + [
            f"check {name} {mark}{text}" for name, passed, text in outcome if not passed]


def test_two_processes_that_store_at_once_lose_nothing(run):
    radii = [[str(eps / 1000) for eps in range(first, 40, 2)] for first in (1, 2)]
    processes = [start(run, *TEMPLATE, "--eps", *own) for own in radii]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [record["eps"] for record in stored(run)["robust"][1:]]
    assert sorted(found) == sorted(float(eps) for own in radii for eps in own)
    assert sorted(path.name for path in run.iterdir()) == ["args.json", "last.pt", "log.jsonl",
                                                           "results.json"]


def test_a_killed_evaluation_that_is_run_again_has_the_same_records(run, tmp_path):
    whole = shutil.copytree(run, tmp_path / "whole")
    command = [*TEMPLATE, "--attack", "square", "--eps", *(str(eps / 1000) for eps in range(1, 9))]
    command[command.index("--attack-steps") + 1] = "80"
    process = start(run, *command)
    while len(stored(run)["robust"]) < 3 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9 and 3 <= len(stored(run)["robust"]) < 9
    (first,), (second,) = evaluate(run, *command), evaluate(whole, *command)
    assert timeless(first["records"]) == timeless(second["records"])
    assert timeless(stored(run)["robust"]) == timeless(stored(whole)["robust"])
