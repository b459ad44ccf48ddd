"""eval.py without a run, with --save-embeddings, and where it is interrupted."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import test_scripts
import torch
from test_scripts import HERE, RULES, contents, evaluate, must_not_run, stored, without_seconds

import common
import eval as evaluator

pictures, fails = test_scripts.pictures, test_scripts.fails
finished_run, finished = test_scripts.finished_run, test_scripts.finished
TEMPLATE = ("--protocol", "template", *HERE)


def model(dim=8):
    torch.manual_seed(3)
    return common.build_model("convnet", dim)


@pytest.fixture
def network(pictures, tmp_path):
    """network(content): the flags that evaluate a file with this content instead of a run."""
    def make(content):
        torch.save(content, tmp_path / "mine.pth")
        return ["--arch", "convnet", "--embedding-dim", "8", "--weights", tmp_path / "mine.pth",
                "--image-size", "32", "--dataset", "folder", "--data-root", pictures, *HERE]
    return make


def report(tmp_path, *arguments):
    """What --json writes of one run."""
    evaluate(*arguments, "--json", tmp_path / "report.json")
    (outcome,) = json.loads((tmp_path / "report.json").read_text())
    return outcome


def photos(pictures, limit=None):
    test = common.load_dataset("folder", pictures, image_size=32)[1]
    test = common.balanced_subset(test, limit) if limit else test
    return test, torch.stack([image for image, _ in test])


# ---- without a run

@pytest.mark.parametrize("protocol, objective, wrap", [
    ("clustering", "shift", dict), ("template", "neighbour", lambda state: {"state_dict": state})])
def test_a_network_without_a_run_scores_as_with_evaluate_robustness(protocol, objective, wrap,
                                                                    network, pictures, tmp_path):
    outcome = report(tmp_path, *network(wrap(model().state_dict())), "--protocol", protocol,
                     "--eps", "0.02", "--step-size", "0.01", "--seed", "5", "--table",
                     tmp_path / "table")
    test, images = photos(pictures)
    images = images.to(memory_format=common.CHANNELS_LAST)     # random starts follow the layout
    expected = evaluator.evaluate_robustness(
        model(), images, test.labels, protocol=protocol, objective=objective, eps=0.02,
        step_size=0.01, steps=1, seed=5)
    assert without_seconds(outcome) == without_seconds(expected) and len(expected["robust"]) == 1
    table = json.loads((tmp_path / "table.json").read_text())
    own = table["flags"][table["rows"][0]["name"]]
    assert outcome["run"] == "convnet mine" == table["rows"][0]["name"]
    assert (own["weights"], own["pool"], own["image_size"]) == ("mine.pth", "avg", 32)
    assert set(contents(tmp_path)) == {"mine.pth", "report.json", "table.json", "table.md"}


def test_an_embedding_layer_that_is_not_in_the_file_is_drawn_with_a_warning(network, tmp_path,
                                                                            capsys):
    command = network(model().backbone.state_dict())
    first, again, other = (report(tmp_path, *command, "--seed", seed) for seed in (0, 0, 1))
    assert without_seconds(first) == without_seconds(again)
    assert first["clean"] != other["clean"]
    assert first["warnings"][0].startswith("the embedding layer is random: ")
    assert capsys.readouterr().out.count("warning: convnet mine: the embedding layer is random") > 2


def test_ers_and_embeddings_of_generated_images_need_no_file(tmp_path):
    flags = ["--dataset", "gaussian", "--arch", "convnet", *HERE, "--limit-queries", "100"]
    assert "ERS" in report(tmp_path, *flags, "--protocol", "ers")["robust"][0]
    evaluate(*flags, "--save-embeddings", tmp_path / "some.npz")
    assert np.load(tmp_path / "some.npz")["paths"][0].startswith("gaussian/mean-")


@pytest.mark.parametrize("content, words", [
    (lambda run: model(16).state_dict(), "--embedding-dim"),
    (lambda run: common.build_model("resnet18", 8).state_dict(), "weights of convnet"),
    (lambda run: {"head.weight": torch.zeros(8, 128)}, "missing"),
    (lambda run: {1: 2}, "named tensors"), (lambda run: torch.load(run / "last.pt"), "eval.py RUN")
], ids=["dim", "arch", "part", "numbers", "run"])
def test_a_file_that_does_not_fit_is_one_line(content, words, network, finished_run, tmp_path,
                                              fails):
    fails(2, ["mine.pth", words], evaluator, *network(content(finished_run)), "--json",
          tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("bad, words", [
    ("RUN --arch convnet", ["--arch", "RUN"]), ("RUN --embedding-dim 128", ["--embedding-dim"]),
    ("", ["--weights"]), ("--data-root .", ["--weights"]),
    ("RUN --save-embeddings no/a.npz", ["--save-embeddings no/a.npz"]),
    ("RUN RUN2 --save-embeddings a.npz", ["2 runs"]),
    ("RUN --attack pgd fgsm --save-embeddings a.npz --protocol template", ["one attack", "FGSM"]),
    ("RUN --protocol ers --save-embeddings a.npz", ["ers"])])
def test_flags_that_do_not_fit_are_one_line(bad, words, finished, tmp_path, monkeypatch, fails):
    shutil.copytree(shutil.copytree(finished, tmp_path / "RUN"), tmp_path / "RUN2")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    fails(2, words, evaluator, *bad.split())
    assert contents(tmp_path) == before


# ---- --save-embeddings

@pytest.mark.parametrize("options", [
    "", "--protocol template", "--protocol template --attack cw",
    "--protocol template --min-eps --limit-queries 12"])
def test_saved_embeddings_are_the_networks_and_have_the_printed_recall(options, finished, pictures,
                                                                       tmp_path):
    outcome = report(tmp_path, finished, *HERE, *options.split(), "--save-embeddings",
                     tmp_path / "some.npz")
    saved = np.load(tmp_path / "some.npz")
    assert set(saved) == {"clean", "attacked", "labels", "paths", "classes", "attack"}
    test, images = photos(pictures, 12 if "limit" in options else None)
    assert [str(pictures / path) for path in saved["paths"]] == test.paths
    assert saved["classes"].tolist() == test.classes == ["class3", "class4", "class5"]
    assert saved["labels"].tolist() == test.labels.tolist()
    clean, attacked = torch.from_numpy(saved["clean"]), torch.from_numpy(saved["attacked"])
    expected = common.embed(common.load_model(finished), [(images, None, None)])
    torch.testing.assert_close(clean, torch.stack(expected))
    assert json.loads(str(saved["attack"])).items() <= outcome["robust"][0].items()
    for i, own in enumerate(attacked):
        entry = next(entry for entry in outcome["robust"] if entry["rule"] == f"member_{i + 1}")
        recall = common.recall_at_k(own, test.labels, (1, 2), clean[i] if options else None)
        assert recall == {1: entry["R@1"], 2: entry["R@2"]}


@pytest.mark.parametrize("protocol", ["clustering", "template"])
def test_a_gallery_is_saved_too(protocol, network, pictures, tmp_path, monkeypatch):
    monkeypatch.delitem(common.EXPECTED, "inshop")
    splits = [("train" if label < 3 else "query" if i < 3 else "gallery", label, i)
              for label in range(6) for i in range(8)]
    lines = ["48", "image_name item_id evaluation_status",
             *(f"img/class{label}/{i}.png id_{label} {split}" for split, label, i in splits)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines))
    (tmp_path / "img").symlink_to(pictures)
    outcome = report(tmp_path, *network(model().state_dict()), "--dataset", "inshop", "--data-root",
                     tmp_path, "--inshop-protocol", "gallery", "--protocol", protocol,
                     "--save-embeddings", tmp_path / "some.npz")
    saved = {name: values for name, values in np.load(tmp_path / "some.npz").items()}
    assert saved["paths"].tolist()[:2] == ["img/class3/0.png", "img/class3/1.png"]
    assert saved["gallery_paths"].tolist()[-1] == "img/class5/7.png"
    assert ("gallery_attacked" in saved) == (protocol == "clustering")
    met = torch.from_numpy(saved.get("gallery_attacked", saved["gallery"]))[0]
    labels, names = (torch.from_numpy(saved[name]) for name in ("labels", "gallery_labels"))
    recall = common.recall_at_k(torch.from_numpy(saved["attacked"])[0], labels, (1,), met, names)
    assert recall[1] == outcome["robust"][0]["R@1"]


def test_embeddings_of_a_stored_attack_are_made_again_and_its_entries_stay(finished, tmp_path,
                                                                           capsys):
    evaluate(finished, *TEMPLATE)
    before = contents(finished)
    evaluate(finished, *TEMPLATE, "--save-embeddings", tmp_path / "some.npz")
    assert "attacked again for --save-embeddings" in capsys.readouterr().out
    assert contents(finished) == before and np.load(tmp_path / "some.npz")["clean"].shape[0] == 2


# ---- attack by attack

@pytest.fixture
def attacked(monkeypatch):
    """The radii of the attacks that are made. attacked.before[eps](): called before that attack."""
    made, whole = Mock(before={}, eps=[]), evaluator.attack_entries

    def watched(retrieval, attack, proxies):
        made.before.get(attack.eps, bool)()
        made.eps.append(attack.eps)
        return whole(retrieval, attack, proxies)

    monkeypatch.setattr(evaluator, "attack_entries", watched)
    return made


@pytest.mark.parametrize("limit", ["0", "12"])
def test_an_interrupt_keeps_the_attacks_that_are_finished(limit, finished, attacked, monkeypatch,
                                                          capsys):
    several = [finished, *TEMPLATE, "--limit-queries", limit, "--eps", "0.01", "0.02", "0.03"]
    before, attacked.before[0.02] = stored(finished)["robust"], Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*several)
    kept = stored(finished)["robust"]
    assert kept[:6] == before and {(entry["eps"], entry["rule"]) for entry in kept[6:]} == {
        (0.01, rule) for rule in RULES}
    assert all(("clean" in entry) == (limit != "0") for entry in kept[6:])
    attacked.before.clear()
    evaluate(*several)
    assert attacked.eps == [0.01, 0.02, 0.03]
    table = capsys.readouterr().out.splitlines()[-20:-2]       # two warnings follow
    assert stored(finished)["robust"][:12] == kept and len(stored(finished)["robust"]) == 24
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    evaluate(*several)
    assert capsys.readouterr().out.splitlines()[-20:-2] == table


def test_entries_that_another_process_adds_meanwhile_stay(finished, attacked):
    attacked.before[0.01] = lambda: evaluate(finished, *TEMPLATE, "--eps", "0.05")
    evaluate(finished, *TEMPLATE, "--eps", "0.01", "0.02")
    assert [entry["eps"] for entry in stored(finished)["robust"][6::6]] == [0.05, 0.01, 0.02]


def test_a_dry_run_stores_nothing(finished, attacked, network, tmp_path):
    command, before = network(model().state_dict()), contents(tmp_path)
    evaluate(finished, *TEMPLATE, "--eps", "0.01", "0.02", "--dry-run")
    evaluate(*command, "--eps", "0.03", "--dry-run", "--json", tmp_path / "a.json",
             "--save-embeddings", tmp_path / "a.npz")
    assert attacked.eps == [0.01, 0.02, 0.03] and contents(tmp_path) == before


def test_every_attack_says_how_long_the_rest_takes(finished, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "attack_entries",
                        lambda *made: [{**common.attack_entries(*made[:2])[0], "seconds": 1200.0}])
    evaluate(finished, *TEMPLATE, "--eps", "0.01", "0.02", "0.03", "--rules", "vote")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attack ")]
    assert lines[0].startswith("attack 1 of 3, about ") and lines[0].endswith(" s left")
    # a pass takes 1200 s of 1 + 3, then 2400 s of 1 + 6; an attack has 3
    assert lines[1:] == ["attack 2 of 3, about 30 min left", "attack 3 of 3, about 17 min left"]
    evaluate(finished, *TEMPLATE, "--attack", "cw", "--rules", "vote")
    assert "attack 1 of 1, at most " in capsys.readouterr().out
    assert [evaluator.duration(seconds) for seconds in (0.4, 89, 90, 5399, 5400, 36000)] == [
        "0 s", "89 s", "2 min", "90 min", "2 h", "10 h"]
