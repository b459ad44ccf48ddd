"""results/claims.py: verdicts are computed from the tables, and published figures from the CSV."""

import functools
import json
import re
import shutil
from pathlib import Path

import claims
import pytest
from claims import Claim, Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"

ALL = [claim for _, own in claims.sections() for claim in own]
# What no stored table has.
NOT_STORED = {"eta32-act", "hm-softhard-semihard", "hm-softhard--0.1", "hm-softhard--0.2",
              "hm-softhard-g-b", "hm-softhard-g-square", "hm-softhard-g-sqrt"}


def test_the_page_is_made_of_the_tables():
    assert claims.text() == (RESULTS / "claims.md").read_text()


def test_only_what_is_known_to_be_missing_is_missing():
    for compared in (compared for claim in ALL for compared in claim.comparisons):
        for table, row, attack in compared[:2]:
            if claims.figure(table, row, attack, compared.metric) is None:
                clusters = row.endswith(" vote") and compared.metric in claims.CLUSTERS
                run = claims.full_name(table, row) in str(claims.content(table)["rows"])
                assert row in NOT_STORED or clusters or compared.metric == "all_fail" or \
                    table.startswith("arena-") and not run


def own_tables(tmp_path, monkeypatch, table, change):
    """claims.py reads a copy of results/ with one table changed."""
    copy = shutil.copytree(RESULTS, tmp_path / "results")
    content = json.loads((copy / f"{table}.json").read_text())
    change(content)
    (copy / f"{table}.json").write_text(json.dumps(content))
    monkeypatch.setattr(claims, "RESULTS", copy)
    monkeypatch.setattr(claims, "content", functools.cache(claims.content.__wrapped__))


@pytest.mark.parametrize("claim", ALL, ids=range(len(ALL)))
def test_a_number_that_changes_in_a_table_changes_the_verdict(claim, tmp_path, monkeypatch):
    def words():
        lines = claims.section("", [claim])
        return [line.split(" | ")[-1][:-2] for line in lines if line.startswith("| ")][1:]

    before = words()
    place = next((i for i, word in enumerate(before) if ":" not in word), None)
    if place is None:
        return                                               # nothing stored to change
    (table, row, attack), _, metric = claim.comparisons[place][:3]

    def change(content):
        for entry in content["rows"]:
            side = entry["clean" if attack == claims.CLEAN else "attacked"]
            if entry["name"] == claims.full_name(table, row) and metric in side and \
                    attack in (claims.CLEAN, entry.get("attack", "")):
                side[metric][0] = -1e3 if before[place].startswith("holds") else 1e3

    own_tables(tmp_path, monkeypatch, table, change)
    assert words()[place].startswith("fails" if before[place].startswith("holds") else "holds")


def test_one_seed_and_est_as_it_was_are_open(tmp_path, monkeypatch):
    est = Claim("", "", claims.above("glyphs-hm", [claims.ONLY], "act", ["est"], "ERS"))
    assert claims.section("", [est])[-2].endswith("| open: EST's former attack |")
    own_tables(tmp_path, monkeypatch, "glyphs-hm", lambda content: content["warnings"].clear())
    assert claims.section("", [est])[-2].endswith("| holds |")         # a table made anew
    grid = Claim("", "", claims.above("glyphs-hm-map", [claims.ONLY], "hm-random-semihard",
                                      ["hm-random-random"], "ERS"))
    assert claims.section("", [grid])[-2].endswith("| open: fewer than 3 seeds |")


def cell(mean, std, seeds=3, values=""):
    return Figure(mean, std, seeds, dict(enumerate(map(float, values))))


@pytest.mark.parametrize("higher, lower, word", [
    (cell(0.50, 0.01), cell(0.40, 0.02), "holds"), (cell(0.40, 0.01), cell(0.50, 0.02), "fails"),
    (cell(0.50, 0.05), cell(0.40, 0.06), "open"), (cell(0.0, 0.0), cell(0.0, 0.0), "open"),
    (cell(0.9, None, 1), cell(0.1, 0.01), "open: fewer than 3 seeds"),
    (None, cell(0.1, 0.01), "open: no stored table has it"),
    (cell(0.5, 0.1, 3, "654"), cell(0.2, 0.1, 3, "321"), "holds, in every seed"),
    (cell(0.5, 0.1, 3, "654"), cell(0.2, 0.1, 3, "105"), "holds")])
def test_a_comparison_needs_three_seeds_and_more_than_both_deviations(higher, lower, word):
    assert claims.judge(higher, lower) == word


def test_the_verdict_of_a_claim_says_when_its_comparisons_differ():
    for text, word in (("holds/holds, in every seed", "holds"), ("open/open: no table", "open"),
                       ("holds/open", "holds in part"), ("fails/open", "fails in part"),
                       ("holds/open/fails", "mixed")):
        assert claims.verdict(text.split("/")) == word


def test_published_figures_are_those_of_the_csv(tmp_path, monkeypatch):
    gains = claims.split_gains()
    assert [round(gain, 2) for gain in gains] == [5.23, 14.42, 11.93, 4.95]
    assert round(sum(gains) / 4, 2) == 9.13
    assert list(claims.broken_orders()) == ["SOP with 8 steps (19.0, 49.5, 61.7, 61.2)",
                                            "SOP with 32 steps (31.7, 50.8, 61.8, 61.6)"]
    assert claims.best_at_8() == "hm-random-lga-ics with 40.2"
    with pytest.raises(SystemExit, match="panum-cub.csv has no nobody, clean R@1"):
        claims.paper("panum-cub", "nobody", "clean R@1")
    shutil.copytree(RESULTS / "paper", tmp_path / "paper")
    for path in (tmp_path / "paper").glob("*.csv"):                    # none of them is typed
        head, *lines = path.read_text().splitlines()
        more = [re.sub(r"(?<=[, ])\d+\.\d+", lambda found: f"{float(found[0]) + 1:.2f}", line)
                for line in lines]
        path.write_text("\n".join([head, *more]))
    before = [claim.paper for claim in ALL if re.search(r"\d\.\d", claim.paper)]
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(claims, "published", claims.published.__wrapped__)
    after = [claim.paper for own in (claims.eat(), claims.panum(), claims.hm()) for claim in own]
    assert len(before) >= 20 and not {*before} & {*after}


def test_our_ers_stands_beside_no_figure_of_the_paper():
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        if "ers-authors" not in content.get("command", ""):
            assert all("paper ERS" not in row.get("beside", {}) for row in content.get("rows", ()))
