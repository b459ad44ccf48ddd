"""results/claims.md is what results/claims.py makes of the tables, by rules checked here."""

import importlib.util
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", RESULTS / "claims.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_tables(claims):
    assert claims.text() == (RESULTS / "claims.md").read_text()


@pytest.mark.parametrize("higher, lower, word", [
    ((0.50, 0.01), (0.40, 0.02), "holds"), ((0.40, 0.01), (0.50, 0.02), "fails"),
    ((0.50, 0.05), (0.40, 0.06), "open"), ((0.40, 0.05), (0.50, 0.06), "open"),
    ((0.0, 0.0), (0.0, 0.0), "open"), ((0.9, None), (0.1, None), "open")])
def test_a_comparison_needs_more_than_both_deviations(claims, higher, lower, word):
    assert claims.judge(higher, lower) == word


@pytest.mark.parametrize("judgements, word", [
    (["holds", "holds"], "holds"), (["fails"], "fails"), (["open", "open"], "open"),
    (["holds", "open"], "holds in part"), (["fails", "open"], "fails in part"),
    (["holds", "open", "fails"], "mixed")])
def test_the_verdict_of_a_claim_says_when_its_comparisons_differ(claims, judgements, word):
    assert claims.verdict(judgements) == word


def test_a_cell_that_is_not_there_is_an_error(claims):
    with pytest.raises(SystemExit, match="has 0 cells nobody-glyphs-convnet, clean, R@1"):
        claims.figure("glyphs-hm", "nobody", "clean", "R@1")
