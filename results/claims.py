# SPDX-License-Identifier: MIT
"""What became of the papers' claims: writes results/claims.md out of the tables in results/.

    python results/claims.py

A claim is a list of comparisons, "this figure is above that one". Its verdict is computed, never
typed: a comparison holds when the difference exceeds the two standard deviations over seeds
together, fails when it does so in the other direction, and is open in between, or for one seed.
"""

import functools
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
import common  # noqa: E402

# Attacks as the tables name them; the older tables hold one attack and do not name it.
CLEAN, ONLY = "clean", ""
SHIFT = "clustering shift PGD-10 eps 8/255"
WORST = "clustering worst PGD-10 eps 8/255"
JOINT = "clustering joint curve of PGD-10 up to 64/255"
NEIGHBOUR = "template neighbour PGD-10 eps 8/255"
MATCHING_WORST = "template worst PGD-10 eps 8/255"
IMPOSTOR = "template impostor curve of PGD-10 up to 64/255"
ERS = "ers ERS PGD-32 eps 8/255"
METRICS = {JOINT: "eps50_255", IMPOSTOR: "eps50_255", ERS: "ERS"}      # the others: Recall@1
OWN, MATCHED = "all-defenses-glyphs", "matched-defenses-glyphs"


def above(table, attacks, higher, lowers, metric=None):
    """Comparisons: row `higher` is above each of the rows `lowers`, under each of the attacks."""
    return [((table, higher, attack), (table, lower, attack), metric or METRICS.get(attack, "R@1"))
            for attack in attacks for lower in lowers]


def falls(table, row, attack):
    """The comparison that an attack lowers a row."""
    return [((table, row, CLEAN), (table, row, attack), "R@1")]


EAT = [
    ("A network without a defense does not withstand PGD",
     falls(OWN, "natural", SHIFT) + falls(OWN, "natural", NEIGHBOUR)),
    ("Of the defenses taken from classification AT is the most robust, Mix-Up the least (Table 1)",
     above("glyphs-baselines", [ONLY], "at", ["iat", "trades", "mixup"])
     + above("glyphs-baselines", [ONLY], "iat", ["mixup"])
     + above("glyphs-baselines", [ONLY], "trades", ["mixup"])
     + above(OWN, [JOINT], "at", ["iat", "trades", "mixup"])),
    ("Every defense costs some clean performance (Table 1)",
     above("glyphs-baselines", [CLEAN], "natural", ["at", "iat", "trades", "mixup", "eat vote"])),
    ("EAT is more robust than AT, Mix-Up, IAT and TRADES (Tables 1, 2, 4)",
     above("glyphs-baselines", [ONLY], "eat vote", ["at", "mixup", "iat", "trades"])
     + above("glyphs-ablation", [ONLY], "eat-18epochs vote", ["at"])
     + above(MATCHED, [SHIFT, JOINT, IMPOSTOR], "eat vote", ["at", "mixup", "iat", "trades"])),
    ("EAT is more robust than as many networks trained one by one (Table 3)",
     above("glyphs-ablation", [ONLY], "eat vote", ["ensemble vote"])
     + above(MATCHED, [SHIFT, JOINT, IMPOSTOR], "eat vote", ["ensemble vote"])),
    ("Attacking all members at once (self-transfer) adds robustness (Table 3)",
     above("glyphs-ablation", [ONLY], "eat-nosplit vote", ["ensemble vote"])
     + above(OWN, [SHIFT, JOINT, IMPOSTOR], "eat-nosplit vote", ["ensemble vote"])
     + above(MATCHED, [SHIFT, JOINT, IMPOSTOR], "eat-nosplit vote", ["ensemble vote"])),
    ("Splitting the data adds robustness (Table 3: 9.13 %)",
     above("glyphs-ablation", [ONLY], "eat vote", ["eat-nosplit vote"])
     + above("glyphs-ablation", [ONLY], "eat-18epochs vote", ["eat-nosplit vote"])
     + above(MATCHED, [SHIFT, JOINT, IMPOSTOR], "eat vote", ["eat-nosplit vote"])),
    ("The ensemble is more robust than its members (Figure 4)",
     above("glyphs-ablation", [ONLY], "eat vote", ["eat member_mean"])
     + above("glyphs-ablation", [ONLY], "ensemble vote", ["ensemble member_mean"])
     + above(OWN, [JOINT, IMPOSTOR], "eat vote", ["eat member_1"])
     + above(OWN, [JOINT, IMPOSTOR], "eat-nosplit vote", ["eat-nosplit member_1"])),
    ("Voting is safer than averaging the embeddings",
     [comparison for defense in ("ensemble", "eat", "eat-nosplit")
      for comparison in above(OWN, [SHIFT, JOINT, IMPOSTOR], f"{defense} vote",
                              [f"{defense} mean", f"{defense} concat"])]),
    ("EAT stays ahead of AT when the attack takes more steps (Figure 2)",
     above("glyphs-sweeps", ["PGD-20 eps 8/255", "PGD-50 eps 8/255"], "eat-nosplit vote", ["at"])
     + above("glyphs-sweeps", ["PGD-20 eps 8/255", "PGD-50 eps 8/255"], "eat vote", ["at"])),
    ("EAT stays ahead of AT at larger radii (Figure 3)",
     above("glyphs-sweeps", ["PGD-10 eps 16/255", "PGD-10 eps 32/255"], "eat-nosplit vote", ["at"])
     + above("glyphs-sweeps", ["PGD-10 eps 16/255", "PGD-10 eps 32/255"], "eat vote", ["at"])
     + above(OWN, [JOINT], "eat-nosplit vote", ["at"]) + above(OWN, [JOINT], "eat vote", ["at"])),
    ("A defense made for matching (Panum et al.) leaves clustering unprotected",
     above(OWN, [SHIFT, JOINT], "panum-rate0", ["panum"])
     + above(OWN, [SHIFT, JOINT], "panum-triplet-rate0", ["panum-triplet"])
     + above(MATCHED, [SHIFT, JOINT], "at", ["panum", "panum-triplet"])),
    ("What is defended keeps more than what is not, at 8/255 and under any attack",
     [comparison for row in ("at", "trades", "eat vote", "ensemble vote")
      for comparison in above(OWN, [SHIFT, WORST, MATCHING_WORST], row, ["natural"])]),
]

PANUM = [
    ("Networks trained as usual are not robust, at an eps of 0.01",
     [comparison for row in ("panum-rate0", "panum-triplet-rate0")
      for comparison in falls("glyphs-panum-rates", row, "eps 2.55/255")]),
    ("Training on attacked tuples makes them robust",
     [comparison for row in ("panum", "panum-triplet")
      for comparison in above("glyphs-panum-rates", ["eps 2.55/255", "eps 8/255"], row,
                              [row + "-rate0"])
      + above(OWN, [MATCHING_WORST, IMPOSTOR, JOINT], row, [row + "-rate0"])]),
    ("The more tuples are attacked, the more robust (up to rate 0.75; Tables 5, 6)",
     [comparison for row in ("panum", "panum-triplet")
      for higher, lower in ((f"{row}-rate0.25", f"{row}-rate0.1"), (row, f"{row}-rate0.25"),
                            (f"{row}-rate0.75", row))
      for comparison in above("glyphs-panum-rates", ["eps 8/255"], higher, [lower])]),
    ("Robust training costs clean performance",
     [comparison for row in ("panum", "panum-triplet")
      for comparison in above("glyphs-panum-rates", [CLEAN], row + "-rate0", [row])]),
    ("Attacking the anchor protects better than attacking the positive (Appendix F)",
     above("glyphs-panum-targets", ["eps 8/255"], "panum-anchor", ["panum"])
     + above("glyphs-panum-targets", ["eps 8/255"], "panum-triplet-anchor", ["panum-triplet"])),
    ("PGD is stronger than FGSM and Carlini and Wagner's attack",
     [(("glyphs-panum-cw", row, weaker), ("glyphs-panum-cw", row, "PGD-5"), "R@1")
      for row in ("panum", "panum-triplet") for weaker in ("FGSM", "C&W-50")]),
    ("The attack of Algorithm 1 shows what a network withstands",
     [((OWN, row, MATCHING_WORST), (OWN, row, NEIGHBOUR), "R@1")
      for row in ("panum", "panum-triplet")]),
    ("Two Gaussians: a usual network fails under attack, a robust one does not (Appendix E)",
     [comparison for arch in ("mobilenetv2", "convnet")
      for comparison in above("gaussian", [ONLY], f"panum-gaussian-{arch}",
                              [f"panum-rate0-gaussian-{arch}"])]),
]

HM = [
    ("HM is more robust than EST and ACT by ERS",
     above("glyphs-hm", [ONLY], "hm-softhard-lga", ["est", "act"], "ERS")
     + above(OWN, [ERS], "hm-softhard-lga-ics", ["est", "act"])
     + above(MATCHED, [ERS], "hm-softhard-lga-ics", ["est", "act"])),
    ("HM keeps a better clean Recall@1 than EST and ACT",
     above("glyphs-hm", [CLEAN], "hm-softhard-lga", ["est", "act"])
     + above(MATCHED, [CLEAN], "hm-softhard-lga-ics", ["est", "act"])),
    ("HM is more robust than EST and ACT under the other protocols too (not in the paper)",
     above(OWN, [SHIFT, JOINT, NEIGHBOUR, IMPOSTOR], "hm-softhard-lga-ics", ["est", "act"])
     + above(MATCHED, [SHIFT, JOINT, NEIGHBOUR, IMPOSTOR], "hm-softhard-lga-ics", ["est", "act"])),
    ("ACT is more robust than EST", above("glyphs-hm", [ONLY], "act", ["est"], "ERS")
     + above(OWN, [JOINT, IMPOSTOR], "act", ["est"])),
    ("The ICS loss adds robustness",
     above("glyphs-hm", [ONLY], "hm-softhard-lga-ics", ["hm-softhard-lga"], "ERS")),
    ("More attack steps in training (eta), more robust", [
        (("glyphs-hm-eta", f"eta16-{name}", ONLY), ("glyphs-hm-eta", f"eta4-{name}", ONLY), "ERS")
        for name in ("est", "act", "hm-softhard-lga")]),
]

HEAD = """# The papers' claims, on glyphs

Written by `python results/claims.py` out of the tables named here. Generated drawings and small
networks: a claim that fails here may hold on photos. A comparison *holds* when the difference
exceeds both standard deviations over three seeds together, *fails* when it does so in the other
direction, and is *open* in between, or with one seed. eps50 is the radius, in 1/255, at which an
attack has halved Recall@1.
"""


@functools.cache
def content(table):
    """What results/TABLE.json holds."""
    return json.loads((RESULTS / f"{table}.json").read_text())


def figure(table, row, attack, metric):
    """[mean, std] of one cell of results/TABLE.json."""
    name, side = full_name(table, row), "clean" if attack == CLEAN else "attacked"
    found = {tuple(own[side][metric]) for own in content(table)["rows"] if own["name"] == name
             and attack in (CLEAN, own.get("attack", "")) and metric in own[side]}
    if len(found) != 1:
        raise SystemExit(f"results/{table}.json has {len(found)} cells {name}, {attack}, {metric}")
    return found.pop()


def full_name(table, row):
    """The name of a row in a table: runs are named METHOD-glyphs-convnet where this says METHOD."""
    method, _, rule = row.partition(" ")
    if "gaussian" not in method and not method.startswith("eta") and "glyphs" not in method:
        method += "-glyphs-convnet"
    return "matched-" * (table == MATCHED) + f"{method} {rule}".strip()


def judge(higher, lower):
    """"holds", "open" or "fails" of the statement that the first figure is above the second."""
    (mean, std), (other, other_std) = higher, lower
    if std is None or other_std is None:
        return "open"                                       # one seed shows nothing
    margin = std + other_std
    return "holds" if mean - other > margin else "fails" if other - mean > margin else "open"


def verdict(judgements):
    """One word or two for a claim, out of those of its comparisons."""
    kinds = set(judgements)
    if len(kinds) == 1:
        return kinds.pop()
    return ("mixed" if {"holds", "fails"} <= kinds else
            "holds in part" if "holds" in kinds else "fails in part")


def shown(figures, metric):
    """"45.6 ± 3.1" of a mean and its deviation, None for one seed."""
    return " ± ".join(common.cell(metric, number) for number in figures if number is not None)


def section(title, claims):
    """The Markdown of one paper's claims."""
    lines = [f"## {title}", ""]
    for claim, comparisons in claims:
        rows = []
        for higher, lower, metric in comparisons:
            figures = figure(*higher, metric), figure(*lower, metric)
            attacks = dict.fromkeys(attack or content(table)["title"]
                                    for table, _, attack in (higher, lower))
            what = f"{higher[1]} above {lower[1]}" if higher[1] != lower[1] else higher[1]
            rows.append((judge(*figures),
                         f"| {what} | {' above '.join(attacks)} | {common.metric_name(metric)} "
                         f"| {shown(figures[0], metric)} | {shown(figures[1], metric)} "
                         f"| [{higher[0]}]({higher[0]}.md) "))
        lines += [f"### {claim}: {verdict(own for own, _ in rows)}", "",
                  "| claimed | attack | | | | table | |", "|---|---|---|---:|---:|---|---|",
                  *(f"{row}| {own} |" for own, row in rows), ""]
    return lines


def commands(papers):
    """The Markdown that says which command made each table."""
    tables = dict.fromkeys(side[0] for _, claims in papers for _, comparisons in claims
                           for comparison in comparisons for side in comparison[:2])
    lines = ["## Commands", ""]
    for table in tables:
        own = content(table)
        lines += [f"`results/{table}.json` ({own['title']}):", "", f"    {own['command']}", ""]
    return lines


def text():
    """results/claims.md."""
    papers = [("EAT (Ke, arXiv 2501.01025)", EAT),
              ("Robust contrastive and triplet training (Panum et al., arXiv 2102.07265)", PANUM),
              ("Hardness Manipulation (Zhou & Patel, CVPR 2022)", HM)]
    lines = [HEAD]
    for title, claims in papers:
        lines += section(title, claims)
    return "\n".join(lines + commands(papers))


if __name__ == "__main__":
    (RESULTS / "claims.md").write_text(text())
