"""results/table.py prints every stored table to the byte, and adds up what eval.py reports."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import table

import common
import eval as evaluator

ROOT = Path(__file__).resolve().parent.parent

STORED = sorted(path for path in (ROOT / "results").glob("*.json")
                if "rows" in json.loads(path.read_text()) and "benchmarks" not in path.name)


# ---- the stored tables

@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_table_is_its_json(path):
    content = json.loads(path.read_text())
    markdown = path.with_suffix(".md").read_text()
    assert table.table_markdown(content) == markdown
    assert f". Made at {content['commit']} by `{content['command']}`." in markdown
    assert not re.search(r"/(home|root|work|tmp)/", path.read_text())
    for row in content["rows"]:                # what an older rule measured is out or marked
        if row["name"].endswith(" vote") and "values" not in row:    # tables made since have them
            assert not {"NMI", "AMI", "F1"} & {*row["clean"], *row["attacked"]}
    for line in markdown.splitlines():
        name = line[2:].partition(" |")[0] if line.startswith("| ") else ""
        if re.match(r"(\S+-)?est(-\S+)?( |$)", name) and "values" not in content["rows"][0]:
            assert re.search(r"\[[\d, ]+\]$", name), line


def test_there_are_tables():
    assert len(STORED) >= 33


# ---- hand-made reports

def record_of(scores, **numbers):
    attack = common.Attack(**numbers)._asdict()
    return {**attack, "eps_255": 255 * attack["eps"], "n_queries": 8, "limited": True,
            "rule": next(iter(scores)), "seconds": 1.0, "scores": scores}


def outcome_of(run, seed, recall, records, rules=("member_1",)):
    clean = {rule: {"R@1": recall, "NMI": 0.5, "hits": "f0"} for rule in rules}
    return {"run": run, "flags": {"seed": seed, "dataset": "glyphs", "lr": 0.1, "out": f"x/{run}",
                                  "workers": seed, "data_root": "some/where", "weights": "none"},
            "clean": {"rule": rules[0], "scores": clean, "NMI_chance": 0.25, "n_queries": 8},
            "records": records, "warnings": [f"warned {seed}"] if seed else []}


def at_radii(recalls, **more):
    return [record_of({"member_1": {"R@1": recall, "NMI": 0.1, "hits": "f0"}}, eps=eps / 255,
                      step=eps / 1020, **more) for eps, recall in recalls.items()]


def content_of(report, *flags, **more):
    return table.table_content(report, " ".join(["python", *flags]), **more)


def test_rows_are_means_over_seeds_and_every_seed_is_kept():
    report = [outcome_of(f"at-s{seed}", seed, recall, at_radii({2: low, 4: low / 2}))
              for seed, recall, low in ((0, 0.9, 0.6), (1, 0.7, 0.2), (2, 0.8, 0.4))]
    report.append(outcome_of("other-s0", 0, 0.5, at_radii({2: 0.3, 4: 0.1})))
    content = json.loads(json.dumps(content_of(report, "the", "command")))
    rows = content["rows"]
    assert [(row["name"], row["attack"], row["seeds"]) for row in rows] == [
        ("at", "eps 2/255", [0, 1, 2]), ("at", "eps 4/255", [0, 1, 2]),
        ("other", "eps 2/255", [0]), ("other", "eps 4/255", [0])]
    assert rows[0]["values"]["attacked"]["R@1"] == [0.6, 0.2, 0.4]
    assert rows[0]["attacked"]["R@1"] == pytest.approx([0.4, 0.2])
    assert rows[0]["clean"]["R@1"] == pytest.approx([0.8, statistics.stdev([0.9, 0.7, 0.8])])
    assert rows[2]["attacked"]["R@1"] == [0.3, None]
    assert content["flags"].keys() == {"at", "other"} and content["flags"]["at"]["seed"] == 0
    assert content["flags"]["at"]["out"] == "at-s0"              # of paths the last part alone
    assert content["flags"]["at"]["data_root"] == "where"
    markdown = table.table_markdown(content)
    assert markdown.startswith("clustering: shift, PGD-10, a fixed subset of 8 images; 3 seeds, "
                               "mean ± std; NMI by chance 25.0. Made at ")
    assert "by `python the command`" in markdown
    assert "| in % | clean R@1 | clean NMI | eps 2/255 R@1 | eps 2/255 NMI |" in markdown
    assert re.search(r"^\| at \[1, 2\] \|.* 40\.0 ± 20\.0 ", markdown, re.M)
    assert re.search(r"^\| other \(seeds: 1\) \|", markdown, re.M)
    assert markdown.endswith("Warning [1]: at-s1: warned 1\n\nWarning [2]: at-s2: warned 2\n")


def test_other_flags_are_another_row():
    report = [outcome_of("at-s0", 0, 0.9, at_radii({2: 0.5})),
              outcome_of("at-s1", 1, 0.9, at_radii({2: 0.5}))]
    report[1]["flags"]["lr"] = 0.2
    assert [row["seeds"] for row in content_of(report)["rows"]] == [[0], [1]]


def test_seeds_of_the_attack_are_averaged_in_every_run():
    records = [at_radii({2: recall}, seed=seed)[0] for seed, recall in ((0, 0.2), (1, 0.4))]
    (row,) = content_of([outcome_of("at-s0", 0, 0.9, records)])["rows"]
    assert row["attack_seeds"] == 2 and row["attacked"]["R@1"] == [pytest.approx(0.3), None]
    assert row["attack_std"]["R@1"] == pytest.approx(statistics.stdev([0.2, 0.4]))


def test_what_no_column_tells_apart_is_no_seed_of_one_attack(monkeypatch):
    records = [at_radii({2: recall}, **more)[0] for recall, more in (
        (0.2, {}), (0.4, {"restarts": 2}))]
    with pytest.raises(common.UserError, match="table of each"):
        content_of([outcome_of("at-s0", 0, 0.9, records)])
    monkeypatch.setattr(table.evaluator, "main",
                        lambda args: [outcome_of("at-s0", 0, 0.9, records[:1])] * 2)
    with pytest.raises(common.UserError, match="one name"):
        table.reported(table.evaluations([["a", "b"]]))


def test_rules_are_chosen_and_ers_stands_in_the_line_of_a_single_network():
    rules = ("vote", "member_1", "member_2", "member_mean")
    scores = {rule: {"R@1": 0.25, "hits": "c0"} for rule in rules[:3]}
    scores["member_mean"] = {"R@1": 0.25}
    ers = {"distance": {"ERS": 30.0, "CA+": 1.0, "R@1": 0.75}}
    numbers = dict(protocol="ers", objective="ers", steps=32)
    report = [outcome_of("eat-s0", 0, 0.5, [record_of(scores), record_of(ers, **numbers)], rules),
              outcome_of("at-s0", 0, 0.75, [*at_radii({8: 0.1}), record_of(ers, **numbers)])]
    rows = content_of(report, rules=["vote", "distance"])["rows"]
    assert [row["name"] for row in rows] == ["eat vote", "eat distance", "at", "at"]
    assert rows[1]["clean"] == {"R@1": [0.75, None]} and rows[1]["attacked"]["ERS"] == [30.0, None]
    markdown = table.table_markdown(content_of(report, rules=["vote", "distance"],
                                               metrics=["R@1", "ERS"]))
    assert "| ers ERS PGD-32 ERS |" in markdown
    assert "| at | 75.0 | 10.0 | 30.0 |" in markdown
    assert "| eat vote | 50.0 | 25.0 | - |" in markdown
    with pytest.raises(common.UserError, match="drop --rules"):
        content_of(report[:1], rules=["concat"])


def test_radii_become_one_eps50():
    records = at_radii({8: 0.7}) + at_radii({2: 0.6, 4: 0.2, 16: 0.0}, objective="joint")
    report = [outcome_of("at-s0", 0, 0.8, records)]
    shift, joint = content_of(report, metrics=["R@1", "eps50_255"])["rows"]
    assert shift["attacked"]["R@1"][0] == 0.7 and "eps50_255" not in shift["attacked"]
    assert joint["attack"] == "joint curve of PGD-10 up to 16/255"
    assert joint["attacked"]["eps50_255"][0] == pytest.approx(3.0)        # 0.4 between 0.6 and 0.2
    assert joint["attacked"]["R@1 at 4/255"][0] == 0.2
    assert len(content_of(report)["rows"]) == 4                           # not asked for


def test_an_interval_is_that_of_a_naive_bootstrap():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)
    hit = rng.random(200) < 0.1 + 0.12 * labels
    found = table.recall_interval(hit, labels)
    drawn = [np.concatenate([hit[labels == label] for label in rng.integers(0, 6, 6)]).mean()
             for _ in range(4000)]
    assert [found["R@1_low"], found["R@1_high"]] == pytest.approx(
        np.quantile(drawn, (0.025, 0.975)), abs=0.02)
    assert found == table.recall_interval(hit, labels)                    # the same classes again
    assert table.recall_interval(np.ones(200), labels) == {"R@1_low": 1.0, "R@1_high": 1.0}


def test_intervals_are_of_the_stored_hits(monkeypatch):
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    bits = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
    record = record_of({"member_1": {"R@1": 0.5, "hits": np.packbits(bits).tobytes().hex()}})
    monkeypatch.setattr(table, "labels_of", lambda outcome: labels)
    (row,) = content_of([outcome_of("at-s0", 0, 0.5, [record])], metrics=["R@1_low", "R@1_high"]
                        )["rows"]
    expected = table.recall_interval(bits, labels)
    assert {name: row["attacked"][name][0] for name in expected} == expected
    assert 0 < row["attacked"]["R@1_low"][0] < 0.5 < row["attacked"]["R@1_high"][0]
    assert row["clean"]["R@1_high"][0] > 0.5                              # hits "f0": half of them


def test_published_columns_stand_beside(tmp_path):
    (tmp_path / "a.csv").write_text("row,paper R@1,paper NMI\nat-glyphs,12.5,3\neat-x vote,1,2\n")
    (tmp_path / "b.csv").write_text("row,passes\npaper-at-glyphs,16\n")
    beside = table.published_figures([tmp_path / "a.csv", tmp_path / "b.csv"])
    report = [outcome_of("paper-at-glyphs-s0", 0, 0.9, at_radii({2: 0.5}))]
    (row,) = content_of(report, metrics=["R@1"], beside=beside)["rows"]
    assert row["beside"] == {"paper R@1": "12.5", "passes": "16"}         # NMI was not asked for
    assert "| in % | clean R@1 | attacked R@1 | paper R@1 | passes |" in table.table_markdown(
        content_of(report, metrics=["R@1"], beside=beside))
    with pytest.raises(common.UserError, match="--beside names none"):
        content_of([outcome_of("at-s0", 0, 0.9, at_radii({2: 0.5}))], beside=beside)


@pytest.mark.parametrize("others, title, rest", [
    ({}, "clustering: shift PGD-10, eps 8/255", ""), (dict(steps=5), "clustering: shift, eps 8/255",
                                                       "PGD-10"),
    (dict(protocol="template"), "every protocol: shift, PGD-10, eps 8/255", "clustering")])
def test_a_title_says_what_all_attacks_share(others, title, rest):
    first, other = (table.words(record_of({"member_1": {}}, **more)) for more in ({}, others))
    found, words = table.title_of(list(dict.fromkeys([first, other])))
    assert (found, words[first]) == (title, rest)


@pytest.mark.parametrize("numbers, words", [
    ({}, ("clustering", "shift", "PGD-10", "eps 8/255")),
    (dict(attack="fgsm", against="member_1"),
     ("clustering", "shift against member_1", "FGSM", "eps 8/255")),
    (dict(protocol="template", attack="cw", steps=50, eps=0.01),
     ("template", "shift", "C&W-50", "eps 2.55/255")),
    (dict(protocol="ers", objective="ers-authors"),
     ("ers", "ERS(authors)", "PGD-10", "eps 8/255"))])
def test_an_attack_in_words(numbers, words):
    assert table.words(record_of({"member_1": {}}, **numbers)) == words


# ---- the command line

def test_further_evaluations_are_of_the_same_runs_and_twins_count_once(monkeypatch):
    args = table.parse_args("results/x --metrics R@1 -- runs/a runs/b --eps 2/255 -- --eps 4/255 "
                            "-- runs/c --eps 8/255".split())
    assert [own.runs for own in args.evaluations] == [["runs/a", "runs/b"]] * 2 + [["runs/c"]]
    assert args.command.startswith("python results/table.py results/x --metrics R@1 -- runs/a")
    one, two = at_radii({2: 0.5, 4: 0.25})
    reports = iter([[outcome_of("a", 1, 0.9, [one])], [outcome_of("a", 1, 0.9, [one, two])],
                    [outcome_of("c", 1, 0.9, [two])]])
    monkeypatch.setattr(evaluator, "main", lambda args: next(reports))
    a, c = table.reported(args.evaluations)
    assert a["records"] == [one, two] and c["records"] == [two] and a["warnings"] == ["warned 1"]


@pytest.mark.parametrize("bad", ["results/x", "results/x --metrics nothing -- runs/a",
                                 "results/x -- runs/a --eps 8", "-- runs/a"])
def test_bad_flags_are_one_line(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        table.parse_args(bad.split())
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_missing_folder_or_csv_is_one_line(tmp_path):
    for flags in ([f"{tmp_path}/no/x"], [f"{tmp_path}/x", "--beside", f"{tmp_path}/no.csv"]):
        with pytest.raises(common.UserError, match="there is no"):
            table.main(table.parse_args([*flags, "--", "runs/a"]))


def test_a_table_is_written_with_command_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "main",
                        lambda args: [outcome_of("at-s0", 0, 0.9, at_radii({2: 0.5}))])
    monkeypatch.chdir(tmp_path)
    table.main(table.parse_args(["mine", "--", "runs/at-s0"]))
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["command"] == "python results/table.py mine -- runs/at-s0"
    assert re.fullmatch(r"[0-9a-f]{7}(-dirty)?|None", content["commit"])
    assert table.table_markdown(content) == (tmp_path / "mine.md").read_text()
