"""eval.py's sweeps, members attacked alone, and figures, on tiny runs."""
# ruff: noqa: F811

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import (  # noqa: F401
    HERE,
    evaluate,
    fails,
    flags,
    must_not_run,
    pictures,
    stored,
    train,
    train_baseline,
)

import common
import eval as evaluator

RADII = ("0", "64/255", "8/255")


@pytest.fixture(scope="session")
def made(pictures, tmp_path_factory):
    """Two seeds of an ensemble and a single network; not to be changed."""
    root = tmp_path_factory.mktemp("figures")
    for seed in ("0", "1"):
        train(*flags(pictures, root / f"eat-tiny-s{seed}", "--seed", seed, "--epochs", "2"))
    train_baseline("at", pictures, root / "at-tiny-s0", "--epochs", "2")
    return root


@pytest.fixture
def runs(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    return [tmp_path / "runs" / name for name in ("eat-tiny-s0", "eat-tiny-s1", "at-tiny-s0")]


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib")
    yield evaluator.pyplot()
    evaluator.pyplot().close("all")


def written(folder):
    """The names of the figures and numbers there; every figure is a picture of a sane size."""
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert 500 < picture.size[0] < 2000 and 250 < picture.size[1] < 2000
            assert len(picture.convert("RGB").getcolors(2**20)) > 20
    return {path.name for path in folder.iterdir()}


def attack_of(*arguments, **more):
    return evaluator.attacks_of(evaluator.parse_args(["run", *map(str, arguments)]), 0, **more)


# ---- sweeps

def test_a_sweep_is_stored_drawn_and_read_back(runs, tmp_path, plt, monkeypatch, capsys):
    command = [*runs, *HERE, "--sweep-eps", *RADII, "--rules", "vote", "concat"]
    evaluate(*command, "--figures", tmp_path / "first")
    assert written(tmp_path / "first") == {"embeddings.png", "shift.png", "retrieval.png",
                                           "sweep-eps.png", "sweep-eps.json"}
    curves = json.loads((tmp_path / "first" / "sweep-eps.json").read_text())
    assert [(name, [curve["seed"] for curve in own]) for name, own in curves.items()] == [
        ("eat-tiny vote: shift PGD-1", [0, 1]), ("eat-tiny concat: shift PGD-1", [0, 1]),
        ("at-tiny: shift PGD-1", [0])]
    for run, rule, curve in ((runs[1], "concat", curves["eat-tiny concat: shift PGD-1"][1]),
                             (runs[2], "member_1", curves["at-tiny: shift PGD-1"][0])):
        clean, entries = stored(run)["clean"]["by_rule"][rule], {
            entry["eps_255"]: entry for entry in stored(run)["robust"] if entry["rule"] == rule
            and entry["protocol"] == "clustering"}
        assert curve["eps_255"] == sorted(entries) == pytest.approx([0, 8, 64])
        for metric in ("R@1", "NMI"):
            assert curve[metric] == [entries[eps][metric] for eps in curve["eps_255"]]
            assert entries[0][metric] == clean[metric]             # a radius of 0 is no attack
        assert curve["clean_R@1"] == clean["R@1"]
        assert curve["eps50"] == evaluator.half_radius(
            {0: clean["R@1"], **dict(zip(curve["eps_255"], curve["R@1"]))})
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    evaluate(*command, "--figures", tmp_path / "again")
    for name in ("sweep-eps.json", "sweep-eps.png", "embeddings.png", "retrieval.png"):
        assert (tmp_path / "again" / name).read_bytes() == \
            (tmp_path / "first" / name).read_bytes()


def test_two_sweeps_share_an_attack_and_draw_each_its_own(runs, tmp_path, plt):
    evaluate(runs[2], "--workers", "0", "--protocol", "template", "--sweep-eps", "0", "0.01",
             "--sweep-steps", "1", "5", "--figures", tmp_path / "out")
    found = [(entry["eps"], entry["steps"], entry["step"]) for entry in stored(runs[2])["robust"]
             if entry["protocol"] == "template"]
    assert found == [(0, 5, 0), (0.01, 5, pytest.approx(0.004)), (0.01, 1, 0.02)]
    curves = json.loads((tmp_path / "out" / "sweep-steps.json").read_text())
    assert curves["at-tiny: neighbour PGD, eps 2.55/255"][0]["steps"] == [1, 5]
    assert list(json.loads((tmp_path / "out" / "sweep-eps.json").read_text())) == [
        "at-tiny: neighbour PGD-5"]


def test_the_values_of_the_sweeps_and_their_step_sizes():
    radii = [round(attack.eps * 255, 6) for attack in attack_of("--sweep-eps")]
    assert radii == [0, 2, 4, 8, 16, 32, 64]
    steps = attack_of("--sweep-steps")
    assert [attack.steps for attack in steps] == [1, 2, 5, 10, 20, 50]
    assert {attack.step_size for attack in steps} == {2 / 255}
    assert {attack.step_size * attack.steps / attack.eps for attack in
            attack_of("--sweep-steps", "--protocol", "template")} == {2}
    both = attack_of("--sweep-eps", "--sweep-steps", "--attack", "pgd")
    assert len(both) == 7 + 6 - 1
    (shown,) = attack_of("--sweep-eps", "--sweep-steps", swept=False)
    assert (shown.eps, shown.steps) == (8 / 255, 10)
    assert len(attack_of("--eps", "8/255", "8/255")) == 1


def test_bfloat16_is_shown_when_it_is_measured_as_when_it_is_read_back(runs, capsys):
    tables = []
    for _ in range(2):
        evaluate(runs[2], *HERE, "--amp", "--sweep-eps", "0", "8/255")
        tables.append(capsys.readouterr().out.split("scores in %")[1])
    assert tables[0] == tables[1] and " - " not in tables[0]


@pytest.mark.parametrize("radii, scores, clean, half", [
    ([0, 8], [0.8, 0.0], 0.8, 4), ([8], [0.0], 0.8, 4),            # clean is at 0
    ([2, 4, 8], [0.9, 0.7, 0.3], 1.0, 6), ([2, 4], [0.5, 0.4], 1.0, 2),
    ([2, 8, 16, 32], [0.6, 0.2, 0.9, 0.1], 0.8, 5),                # the first time
    ([0, 64], [1.0, 0.51], 1.0, None), ([0, 8], [0.0, 0.0], 0.0, 0)])
def test_eps50_is_where_recall_halves(radii, scores, clean, half):
    curve = {0: clean, **dict(zip(radii, scores))}
    assert evaluator.half_radius(curve) == pytest.approx(half)


def test_curves_show_the_mean_and_the_range_over_seeds(plt):
    curves = {"one": [{"eps_255": [0, 64], "R@1": [0.8, low], "eps50": half}
                      for low, half in ((0.0, 32.0), (0.4, None), (0.2, 40.0))],
              "two": [{"eps_255": [0, 64], "R@1": [0.8, 0.7], "eps50": None}]}
    figure = evaluator.draw_curves(plt, curves, "eps_255", {"R@1": "Recall"})
    first, _ = figure.axes[0].lines
    assert first.get_ydata() == pytest.approx([80, 20])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0 and band[band[:, 0] == 64, 1].max() == pytest.approx(40)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "one, eps50 40.0", "two, eps50 > 64"]


# ---- members alone

def test_members_attacked_alone_stand_beside_the_shared_attack(runs, tmp_path, plt, capsys,
                                                               monkeypatch):
    evaluate(*runs[:2], *HERE, "--eps", "4/255")
    before = stored(runs[0])["robust"]
    capsys.readouterr()
    command = [*runs[:2], *HERE, "--eps", "4/255", "--per-member"]
    evaluate(*command, "--table", tmp_path / "table", "--figures", tmp_path / "out")
    assert "eat-tiny-s0 member_2 alone" in capsys.readouterr().out
    after = stored(runs[0])["robust"]
    assert after[:len(before)] == before and not any("alone" in entry for entry in before)
    alone = after[len(before):]
    assert [(entry["rule"], entry["against"]) for entry in alone] == \
        [("member_1", "member_1"), ("member_2", "member_2")]
    shared = {entry["rule"]: entry for entry in before[-6:]}
    bars = json.loads((tmp_path / "out" / "per-member.json").read_text())["eat-tiny"]
    assert [seed["seed"] for seed in bars] == [0, 1]
    assert bars[0]["member_2"] == {"clean": stored(runs[0])["clean"]["by_rule"]["member_2"]["R@1"],
                                   "shared": shared["member_2"]["R@1"], "alone": alone[1]["R@1"]}
    assert bars[0]["vote"].keys() == {"clean", "shared"}
    assert "per-member.png" in written(tmp_path / "out")
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["name"], row["attacked"]["NMI"][0]) for row in table if row["attack"] == "alone"
            ][:1] == [("eat-tiny member_1",
                       pytest.approx((alone[0]["NMI"] + stored(runs[1])["robust"][-2]["NMI"]) / 2))]
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    for more in ([], ["--per-member"]):                            # neither reads the other's
        evaluate(*runs[:2], *HERE, "--eps", "4/255", *more)
        assert ("alone" in capsys.readouterr().out) == bool(more)
    found = common.entries_of(after, attack_of(*HERE, "--eps", "4/255")[0])
    assert found == before[-6:]


@pytest.mark.parametrize("options", [(), ("--protocol", "template"), (
    "--protocol", "template", "--objective", "targeted-nearest", "--min-eps", "--attack", "pgd")])
def test_a_member_alone_scores_like_a_run_of_this_member(options, runs, tmp_path):
    evaluate(runs[0], *HERE, "--per-member", *options)
    wanted = [entry for entry in stored(runs[0])["robust"] if entry.get("against") == "member_2"]
    checkpoint = torch.load(runs[0] / "last.pt")
    torch.save({**checkpoint, "members": checkpoint["members"][1:]}, tmp_path / "second.pt")
    evaluate(tmp_path / "second.pt", *HERE, *options, "--json", tmp_path / "second.json")
    found = json.loads((tmp_path / "second.json").read_text())[0]["robust"]
    for entry in [*wanted, *found]:
        for name in ("rule", "against", "alone", "seconds"):
            entry.pop(name, None)
    assert wanted == found and len(found) == 1 + ("--min-eps" in options)


# ---- pictures of an attack

@pytest.mark.parametrize("protocol, has_gallery", [("clustering", False), ("template", True)])
def test_the_sheet_shows_the_attacked_images_and_their_neighbours(protocol, has_gallery, runs, plt,
                                                                  monkeypatch):
    whole = evaluator.open_run

    def opened(*arguments):
        members, test = whole(*arguments)
        if has_gallery:
            names = [test.classes[label] for label in test.labels]
            parts = [common.ImageSet(test.paths[i::2], names[i::2], 32, classes=test.classes)
                     for i in (0, 1)]
            test, test.gallery = parts
        return members, test

    monkeypatch.setattr(evaluator, "open_run", opened)
    args = evaluator.parse_args([str(runs[0]), "--protocol", protocol, "--batch-size", "5",
                                 "--restarts", "2", *HERE])
    test, retrieval, attack, spaces = evaluator.attacked_spaces(
        common.load_checkpoint(runs[0]), args, torch.device("cpu"))
    figure = evaluator.draw_retrieval(plt, "run", test, retrieval, attack, spaces)
    candidates, rows = test.gallery or test, evaluator.spread_rows(test.labels, 6).tolist()
    assert torch.tensor([test.labels[row] for row in rows]).bincount().tolist() == [2, 2, 2]

    def embedded(image):
        return torch.cat([member(image[None])[0] for member in retrieval.models]) / 2**0.5

    for i, row in enumerate(rows):
        axes = figure.axes[9 * i:9 * i + 9]
        images = [torch.tensor(axis.images[0].get_array()).permute(2, 0, 1) for axis in axes]
        assert torch.equal(images[0], test[row][0])
        assert (images[4] - images[0]).abs().max() <= attack.eps + 1e-6
        assert torch.allclose(images[5], (images[4] - images[0]) / (2 * attack.eps) + 0.5,
                              atol=1e-4)
        assert torch.allclose(embedded(images[4]), spaces[1][0][row], atol=1e-4)
        for (own, gallery), start in zip(spaces, (1, 6)):
            gallery = own if gallery is None else gallery
            distance = (gallery - own[row]).norm(dim=1)
            if not has_gallery:
                distance[row] = math.inf
            for axis, image, j in zip(axes[start:], images[start:], distance.argsort()[:3]):
                assert torch.allclose(embedded(image), gallery[j], atol=1e-4)
                assert (image - candidates[int(j)][0]).abs().max() <= attack.eps + 1e-6
                right = bool(candidates.labels[j] == test.labels[row])
                assert axis.texts[0].get_text() == ("\u2713" if right else "\u2717")
                assert (axis.spines["top"].get_linestyle() == "-") == right


def test_rows_are_spread_over_the_classes():
    labels = torch.tensor([2, 0, 0, 0, 1, 2, 1])
    assert evaluator.spread_rows(labels, 4).tolist() == [1, 4, 0, 2]
    assert evaluator.spread_rows(labels, 99).tolist() == [1, 4, 0, 2, 6, 5, 3]
    assert labels[evaluator.spread_rows(labels, 2)].tolist() == [0, 2]


def test_embeddings_before_and_after_share_a_map(monkeypatch):
    manifold = pytest.importorskip("sklearn.manifold")
    points = np.random.default_rng(0).normal(size=(12, 8))
    used = []
    whole = manifold.TSNE
    monkeypatch.setattr(manifold, "TSNE", lambda **options: used.append(options) or
                        whole(**options))
    how, both = evaluator.in_plane(points, -points)
    assert how == ", t-SNE" and both.shape == (24, 2) and np.isfinite(both).all()
    assert used[0].items() >= {"perplexity": 23 / 3, "random_state": 0}.items()
    assert np.array_equal(evaluator.in_plane(points, -points)[1], both)
    assert np.isfinite(evaluator.in_plane(0 * points, 0 * points)[1]).all()   # collapsed
    assert evaluator.in_plane(points[:, :2], points[:, :2])[0] == ""         # it is a plane
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    how, both = evaluator.in_plane(points, -points)
    assert "PCA" in how and both[:12] == pytest.approx(-both[12:])


def test_arrows_go_from_clean_to_attacked(plt):
    start = np.random.default_rng(0).normal(size=(9, 2))
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    views = {f"run{number}": {
        "run": "run", "attack": "attack", "classes": ["a", "b"], "labels": np.arange(9) % 2,
        "clean": start, "attacked": -start, "shift": np.full(9, 2.0)}
        for number in range(9)}
    figure = evaluator.draw_shift(plt, views)
    arrows = figure.axes[0].collections[0]
    moved = np.stack([arrows.U, arrows.V], 1)
    assert np.linalg.norm(moved, axis=1) == pytest.approx(2)
    assert arrows.XY == pytest.approx(-moved / 2)
    assert len(figure.legends[0].get_texts()) == 9 == sum(len(axis.collections) == 2
                                                          for axis in figure.axes)


# ---- bad input

@pytest.mark.parametrize("bad, words", [
    ("--sweep-eps --eps 8/255", "--eps"), ("--sweep-eps 8/255", "two values"),
    ("--sweep-steps --attack-steps 3", "--attack-steps"), ("--sweep-steps 0 2", "0"),
    ("--sweep-eps --protocol template --min-eps", "--min-eps"), ("--sweep-eps 8", "8/255"),
    ("--sweep-eps --protocol ers", "--sweep-eps"), ("--per-member --protocol ers", "--per-member"),
    ("--sweep-steps --attack fgsm", "fgsm"), ("--sweep-eps --per-member", "--per-member"),
    ("--per-member --objective worst", "alone"), ("--per-member --attack curve", "alone"),
    ("--per-member --against concat", "alone"),
    ("--figures out --protocol ers", "--figures"), ("--per-member", "at-tiny-s0")])
def test_bad_combinations_are_one_line(bad, words, runs, fails, monkeypatch):
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    fails(2, [words], evaluator, *runs, *bad.split())


def test_a_sweep_without_matplotlib_is_one_line_before_any_attack(runs, tmp_path, fails,
                                                                  monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(common, "evaluate_set", must_not_run)
    fails(2, ["pip install matplotlib"], evaluator, *runs, *HERE, "--sweep-eps", "--figures",
          tmp_path / "out")
    assert not (tmp_path / "out").exists()
