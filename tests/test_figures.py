"""results/figures.py draws what reports and saved embeddings say; nothing is attacked."""

import json
import sys

import numpy as np
import pytest
from test_table import at_radii, outcome_of, record_of

import common
import eval as evaluator

pytest.importorskip("matplotlib")
import figures


@pytest.fixture
def plt():
    yield figures.pyplot()
    figures.pyplot().close("all")


def saved(path, protocol="clustering", dim=8, members=1, move=0.0, **more):
    """A file as eval.py --save-embeddings writes it: 24 images of 8 classes, 2 of them not kept."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 3)
    centres = rng.normal(size=(members, 8, dim))
    clean = centres[:, labels] + 0.1 * rng.normal(size=(members, 24, dim))
    attacked = (1 - move) * clean + move * np.roll(clean, 3, axis=1)
    clean, attacked = (own / np.linalg.norm(own, axis=2, keepdims=True)
                       for own in (clean, attacked))
    images = rng.random((24, 3, 16, 16)).astype(np.float32)
    rows = np.arange(24) if "rows" not in more else more["rows"]
    attack = {**common.Attack(protocol=protocol)._asdict(), "eps_255": 8.0}
    changed = (images + 8 / 255 * rng.choice([-1, 1], images.shape)).clip(0, 1).astype(np.float32)
    np.savez(path, clean=clean, attacked=attacked, labels=labels, attack=json.dumps(attack),
             classes=[f"${name} of $" for name in "abcdefgh"], paths=["x"] * 24, rows=rows,
             images_clean=images[rows], images_attacked=changed[rows])
    return path


def curve_report():
    report = []
    for seed, low in ((0, 0.2), (1, 0.4)):
        records = at_radii({2: 0.6, 8: low})
        records += [record_of({"member_1": {"R@1": 0.5 / steps, "F1": 0.1}}, steps=steps)
                    for steps in (1, 2)]
        for record in records:
            record["scores"]["member_1"].setdefault("F1", 0.3)
        report.append(outcome_of(f"at-s{seed}", seed, 0.8, records))
        report[-1]["clean"]["scores"]["member_1"]["F1"] = 0.7
    return report


# ---- numbers

def test_a_list_of_radii_is_a_curve_from_the_clean_score_and_its_eps50():
    curves = figures.sweep_curves(curve_report(), "eps_255")
    assert list(curves) == ["at: shift PGD-10"]
    first, second = curves["at: shift PGD-10"]
    assert first["eps_255"] == [0, 2, 8] and first["seed"] == 0
    assert first["R@1"] == [0.8, 0.6, 0.2] and first["F1"] == [0.7, 0.3, 0.3]
    assert (first["eps50"], second["eps50"]) == (pytest.approx(5), pytest.approx(8))


def test_a_list_of_steps_is_a_curve_without_a_clean_point():
    (curves,) = figures.sweep_curves(curve_report(), "steps").items()
    assert curves[0] == "at: shift PGD, eps 8/255"
    assert curves[1][0]["steps"] == [1, 2, 10] and curves[1][0]["R@1"] == [0.5, 0.25, 0.2]


def test_a_curve_shows_the_chosen_rules_and_the_mean_over_seeds_of_the_attack():
    rules = ("vote", "member_1", "concat")
    records = [record_of({rule: {"R@1": recall, "F1": 0.5} for rule in rules}, eps=eps / 255,
                         seed=seed) for eps, seed, recall in
               ((2, 0, 0.4), (2, 1, 0.6), (4, 0, 0.2), (4, 1, 0.0))]
    report = [outcome_of("eat-s0", 0, 0.8, records, rules)]
    for scores in report[0]["clean"]["scores"].values():
        scores["F1"] = 0.9
    curves = figures.sweep_curves(report, "eps_255", ["concat"])
    assert list(curves) == ["eat concat: shift PGD-10"]
    assert curves["eat concat: shift PGD-10"][0]["R@1"] == pytest.approx([0.8, 0.5, 0.1])
    assert list(figures.sweep_curves(report, "eps_255")) == ["eat vote: shift PGD-10"]


def test_members_stand_beside_other_defenses():
    rules = ("vote", "member_1", "member_2", "member_mean", "concat")
    both = record_of({rule: {"R@1": 0.5} for rule in rules})
    alone = [record_of({rule: {"R@1": 0.1 if rule == own else 0.7} for rule in rules},
                       against=own) for own in ("member_1", "member_2")]
    weak = record_of({rule: {"R@1": 0.9} for rule in rules}, eps=1 / 255)
    report = [outcome_of("at-s0", 0, 0.8, [weak, record_of({"member_1": {"R@1": 0.3}})][1:]),
              outcome_of("eat-s0", 0, 0.9, [weak, both, *alone], rules)]
    scores = figures.member_scores(report)
    assert scores["at"] == [{"seed": 0, "member_1": {"clean": 0.8, "shared": 0.3}}]
    assert scores["eat"][0] == {"seed": 0, "vote": {"clean": 0.9, "shared": 0.5},
                                "member_1": {"clean": 0.9, "shared": 0.5, "alone": 0.1},
                                "member_2": {"clean": 0.9, "shared": 0.5, "alone": 0.1}}


def test_members_are_bars_with_the_range_over_seeds(plt):
    scores = {"at": [{"seed": seed, "member_1": {"clean": 0.8, "shared": 0.3 + seed / 10}}
                     for seed in (0, 1)],
              "eat": [{"seed": 0, "vote": {"clean": 0.9, "shared": 0.5},
                       "member_1": {"clean": 0.9, "shared": 0.5, "alone": 0.1}}]}
    figure = figures.draw_members(plt, scores)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([35, 50, 50, 10])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [
        "at", "eat vote", "eat member_1"]


def test_training_curves_are_those_of_the_log(tmp_path, plt):
    for name, losses in (("eat-s0", {"clean": 1.0, "adversarial": 2.0}), ("hm-s0", {"loss": 3.0})):
        (tmp_path / name).mkdir()
        lines = [{"epoch": epoch, **losses, "lr": 0.1,
                  **({f"{side}_{metric}": epoch / 10 for side in ("clean", "robust")
                      for metric in ("R@1", "mAP@R")} if epoch % 2 == 0 else {})}
                 for epoch in (1, 2, 3, 4)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n"
                                                           for line in lines))
    curves = figures.training_curves([tmp_path / "eat-s0", tmp_path / "hm-s0"])
    assert curves["eat"] == [{"epoch": [2, 4], "loss": [2.0, 2.0], "clean_R@1": [0.2, 0.4],
                              "robust_R@1": [0.2, 0.4], "clean_mAP@R": [0.2, 0.4],
                              "robust_mAP@R": [0.2, 0.4]}]
    assert curves["hm"][0]["loss"] == [3.0, 3.0]
    figure = figures.draw_curves(plt, curves, "epoch", figures.LOGGED)
    assert [len(axis.lines) for axis in figure.axes] == [2] * 5
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([2, 2])    # no percent
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx([20, 40])


# ---- pictures

def test_curves_show_the_mean_and_the_range_over_seeds(plt):
    curves = {"one$": [{"eps_255": [0, 64], "R@1": [0.8, low], "F1": [0.5, 0.5], "eps50": half}
                       for low, half in ((0.0, 32.0), (0.4, None), (0.2, 40.0))],
              "two": [{"eps_255": [0, 64], "R@1": [0.8, 0.7], "eps50": None}]}
    figure = figures.draw_curves(plt, curves, "eps_255", figures.METRICS)
    assert len(figure.axes) == 1                                          # one has no F1
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([80, 20])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0 and band[band[:, 0] == 64, 1].max() == pytest.approx(40)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        r"one\$, eps50 40.0", "two, eps50 > 64"]


@pytest.mark.parametrize("protocol, other", [("clustering", "attacked"), ("template", "clean")])
def test_the_sheet_shows_the_nearest_images_before_and_after(protocol, other, plt, tmp_path):
    view = figures.view_of(saved(tmp_path / "a.npz", protocol, members=2, move=0.6))
    assert view["clean"].shape == (24, 16)
    assert np.linalg.norm(view["clean"], axis=1) == pytest.approx(np.ones(24))
    figure = figures.draw_retrieval(plt, view)
    assert len(figure.axes) == 6 * 9
    for line in np.array(figure.axes).reshape(6, 9):
        images = [np.array(axis.images[0].get_array()).transpose(2, 0, 1) for axis in line]
        (row,) = [i for i in range(24) if np.array_equal(view["images_clean"][i], images[0])]
        assert np.array_equal(images[4], view["images_attacked"][row])
        for own, among, first, side in (("clean", "clean", 1, "clean"),
                                        ("attacked", other, 6, other)):
            distance = np.linalg.norm(view[among] - view[own][row], axis=1)
            distance[row] = np.inf
            for axis, image, near in zip(line[first:], images[first:], distance.argsort()[:3]):
                assert np.array_equal(image, view[f"images_{side}"][near])
                right = view["labels"][near] == view["labels"][row]
                assert axis.texts[0].get_text() == ("\u2713" if right else "\u2717")
                assert (axis.spines["top"].get_linestyle() == "-") == right
        assert line[1].texts[0].get_text() == "\u2713"                    # right before the attack


def test_only_queries_whose_neighbours_were_saved_are_shown(plt, tmp_path):
    rows = np.arange(18)                                                  # three classes are out
    view = figures.view_of(saved(tmp_path / "a.npz", move=0.3, rows=rows))
    assert len(figures.draw_retrieval(plt, view).axes) % 9 == 0
    view["rows"] = view["rows"][:1]
    assert figures.draw_retrieval(plt, view) is None


def test_rows_are_spread_over_the_classes():
    labels = np.array([2, 0, 0, 0, 1, 2, 1])
    assert figures.spread_rows(labels, 4).tolist() == [1, 4, 0, 2]
    assert figures.spread_rows(labels, 99).tolist() == [1, 4, 0, 2, 6, 5, 3]
    assert labels[figures.spread_rows(labels, 2)].tolist() == [0, 2]


def test_embeddings_before_and_after_share_a_map(monkeypatch):
    pytest.importorskip("sklearn.manifold")
    points = np.random.default_rng(0).normal(size=(12, 8))
    how, both = figures.in_plane(points, -points)
    assert how == ", t-SNE" and both.shape == (24, 2) and np.isfinite(both).all()
    assert np.array_equal(figures.in_plane(points, -points)[1], both)
    assert np.isfinite(figures.in_plane(0 * points, 0 * points)[1]).all()  # collapsed
    assert figures.in_plane(points[:, :2], points[:, :2])[0] == ""        # it is a plane
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(common.UserError, match="pip install scikit-learn"):
        figures.in_plane(points, -points)


def test_attacked_points_in_the_plane_have_a_line_to_their_nearest_clean_neighbour(plt, tmp_path):
    view = figures.view_of(saved(tmp_path / "a.npz", "template", dim=2, move=0.5))
    clean, attacked = figures.draw_embeddings(plt, [view]).axes
    ends = [line.get_xydata() for line in attacked.lines if len(line.get_xydata()) == 2]
    assert len(ends) == 24 and len(clean.lines) == 1                      # the circle
    for start, end in ends:
        (row,) = (np.abs(view["attacked"] - start).sum(1) < 1e-9).nonzero()[0][:1]
        distance = np.linalg.norm(view["clean"] - start, axis=1)
        distance[row] = np.inf
        assert view["clean"][distance.argmin()] == pytest.approx(end)


def test_a_histogram_shows_how_far_queries_move(plt, tmp_path):
    views = [figures.view_of(saved(tmp_path / f"{move}.npz", move=move)) for move in (0.2, 0.5)]
    for view in views:
        cosine = (view["clean"] * view["attacked"]).sum(1)
        assert view["shift"] == pytest.approx(1 - cosine) and view["shift"].min() > 0
    figure = figures.draw_shift(plt, views)
    assert len(figure.axes[0].patches) == 2
    assert "0.5: clustering: shift" in figure.legends[0].get_texts()[1].get_text()


def test_costs_are_points_of_every_defense_and_no_name_covers_another(plt):
    rows = [{"name": name, "attack": "worst", "beside": {"seconds": seconds}, "attacked": attacked}
            for name, seconds, attacked in (
                ("arena-at-glyphs-convnet", "10", {"R@1": [0.25, None]}),
                ("arena-at-glyphs-convnet", "10", {"R@1": [0.1, None]}),      # a weaker attack
                ("arena-eat-glyphs-convnet concat", "20", {"R@1": [0.9, None]}),
                ("arena-eat-glyphs-convnet vote", "20", {"R@1": [0.25, 0.1]}))]
    tables = {"glyphs": {"rows": rows + [{**rows[0], "name": "other", "beside": {}}]},
              "grocery": {"rows": rows[:1]}}
    figure = figures.draw_costs(plt, tables)
    points = [{text.get_text(): tuple(text.xy) for text in axis.texts} for axis in figure.axes]
    assert points == [{"at": (10, 25), "eat": (20, 25)}, {"at": (10, 25)}]
    assert [axis.get_title() for axis in figure.axes] == ["glyphs", "grocery"]
    assert len({text.xyann[1] for text in figure.axes[0].texts}) == 2


# ---- the command line

def test_pictures_and_their_numbers_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "main", lambda args: curve_report())
    out = tmp_path / "out"
    figures.main(figures.parse_args([str(out), "--", str(tmp_path / "at-s*"), "--eps", "2/255"]))
    assert {path.name for path in out.iterdir()} == {
        "sweep-eps.png", "sweep-eps.json", "sweep-steps.png", "sweep-steps.json"}
    files = [str(saved(tmp_path / f"{name}.npz", move=0.4)) for name in ("natural", "robust")]
    figures.main(figures.parse_args([str(out), "--saved", *files]))
    assert {"embeddings.png", "shift.png", "retrieval-natural.png", "retrieval-robust.png"} <= {
        path.name for path in out.iterdir()}


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        figures.parse_args(["out"])
    assert "nothing to draw" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="--save-embeddings"):
        figures.main(figures.parse_args(["out", "--saved", str(tmp_path / "no.npz")]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(common.UserError, match="pip install matplotlib"):
        figures.main(figures.parse_args([str(tmp_path / "out"), "--saved", "x.npz"]))
