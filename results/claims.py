# SPDX-License-Identifier: MIT
"""What became of the papers' claims: writes results/claims.md out of the tables in results/.

    python results/claims.py

A claim is a list of comparisons, "this figure is above that one". Its verdict is computed, never
typed: a comparison holds when the difference exceeds the two standard deviations over three seeds
together, fails when it does so in the other direction, and is open in between. It is open, too,
with fewer seeds, where no stored table has a figure, and where a row is of EST's former attack.
What the papers publish is read from results/paper/.
"""

import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS))
from table import cell, metric_name, published_figures  # noqa: E402

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
BASELINES, ABLATION = "glyphs-baselines", "glyphs-ablation"
SWEEPS, MEMBERS = "glyphs-sweeps", "glyphs-members"
RATES, TARGETS = "glyphs-panum-rates", "glyphs-panum-targets"
ATTACKS, CW = "glyphs-panum-attacks", "glyphs-panum-cw"
AT_001 = "eps 2.55/255"                                                # 0.01
CLUSTERS = ("NMI", "AMI", "F1")
CLASSIFIERS = ("at", "mixup", "iat", "trades")
LOSSES = ("panum", "panum-triplet")
SEEDS = 3                                                              # that a verdict needs


class Compared(NamedTuple):
    """That `times` the figure `lower` is below `higher`, or that `higher` is "not below" it. A
    figure is (table, row, attack)."""
    higher: tuple
    lower: tuple
    metric: str
    relation: str = "above"
    times: float = 1


class Claim(NamedTuple):
    """words: the paper's own between quotation marks, else close to them. paper: what its tables
    say themselves."""
    place: str
    words: str
    comparisons: list
    paper: str = ""


class Figure(NamedTuple):
    mean: float
    std: float
    seeds: int
    values: dict                                                       # {seed: score}, or {}
    former: bool = False                                               # EST's former attack


def above(table, attacks, higher, lowers, *metrics, **more):
    """Row `higher` is above each of the rows `lowers`, by each metric under each attack."""
    return [Compared((table, higher, attack), (table, lower, attack), metric, **more)
            for attack in attacks for metric in metrics or [METRICS.get(attack, "R@1")]
            for lower in lowers]


def falls(table, row, attack, *metrics):
    """An attack lowers a row."""
    return [Compared((table, row, CLEAN), (table, row, attack), metric)
            for metric in metrics or ["R@1"]]


def voted(table, higher, lowers, attack=ONLY):
    """Above by Recall@1 of the vote, by its clusters, and by the clusters of its members."""
    single = [lower for lower in lowers if " " not in lower]
    return (above(table, [attack], f"{higher} vote", lowers)
            + above(table, [attack], f"{higher} vote", lowers[:1], *CLUSTERS)
            + above(table, [attack], f"{higher} member_mean", single or
                    [lower.replace("vote", "member_mean") for lower in lowers], *CLUSTERS))


# ---- what the papers publish

@functools.cache
def published(name):
    return published_figures([RESULTS / "paper" / f"{name}.csv"])


def paper(name, row, column):
    """One published figure, a text, of results/paper/NAME.csv."""
    figures = published(name)
    if figures.get(row, {}).get(f"paper {column}", "-") == "-":
        raise SystemExit(f"results/paper/{name}.csv has no {row}, {column}")
    return figures[row][f"paper {column}"]


def of_eat(defense, column, data="cub2010"):
    return paper(f"eat-{data}", f"{defense.replace(' ', f'-{data}-mobilenetv2 ')}"
                 if " " in defense else f"{defense}-{data}-mobilenetv2", column)


def of_hm(defense, column="ERS", data="cub"):
    return paper(f"zhou-patel-{data}", f"{defense}-{data}-resnet18", column)


def split_gains():
    """Relative gains, in percent, of the split in the attacked columns of EAT's Table 3."""
    pairs = [(float(of_eat("eat vote", f"attacked {metric}")),
              float(of_eat("eat-nosplit vote", f"attacked {metric}")))
             for metric in ("NMI", "F1", "R@1", "R@8")]
    return [100 * (split - whole) / whole for split, whole in pairs]


def broken_orders():
    """Where EST < ACT < HM < HM&ICS by ERS does not hold in Zhou & Patel's own Table 6."""
    for data in ("cub", "cars", "sop"):
        for eta in ("", "-eta32"):
            order = [of_hm(f"{name}{eta}", data=data) for name in
                     ("est", "act", "hm-softhard-lga", "hm-softhard-lga-ics")]
            if sorted(map(float, order)) != list(map(float, order)):
                yield f"{data.upper()} with {eta[4:] or 8} steps ({', '.join(order)})"


def best_at_8():
    """"ERS row" of the highest ERS with 8 steps on CUB in Zhou & Patel's tables."""
    rows = {row: float(own["paper ERS"]) for row, own in published("zhou-patel-cub").items()
            if "eta" not in row and own["paper ERS"] != "collapse"}
    best = max(rows, key=rows.get)
    return f"{best.removesuffix('-cub-resnet18')} with {rows[best]}"


# ---- the claims

def eat():
    gains = split_gains()
    listed = ", ".join(f"{gain:.2f}" for gain in gains)
    split, whole = (of_eat(f"{name} vote", "attacked R@1") for name in ("eat", "eat-nosplit"))
    return [
        Claim("abstract, Tables 1, 2, 4", "DML models are prone to adversarial examples in "
              "clustering-based inference",
              falls(BASELINES, "natural", ONLY, "R@1", *CLUSTERS)
              + falls(MATCHED, "natural", SHIFT),
              f"CUB, Recall@1 {of_eat('natural', 'clean R@1')} falls to "
              f"{of_eat('natural', 'attacked R@1')}, NMI {of_eat('natural', 'clean NMI')} to "
              f"{of_eat('natural', 'attacked NMI')}"),
        Claim("abstract", '"existing defenses designed DML are unable to be reused" for '
              "clustering-based inference",
              [comparison for name in LOSSES
               for comparison in above(OWN, [SHIFT], f"{name}-rate0", [name])]
              + above(MATCHED, [SHIFT], "at", [*LOSSES, "act", "hm-softhard-lga-ics"]),
              "it is argued, without a table; read here as no gain over the undefended network, "
              "and less than AT keeps"),
        Claim("Table 1, its CUB half", "of the adapted defenses AT is the most robust and Mix-Up "
              "the least",
              above(BASELINES, [ONLY], "at", CLASSIFIERS[1:], "R@1", *CLUSTERS)
              + above(BASELINES, [ONLY], "iat", ["mixup"], "R@1", *CLUSTERS)
              + above(BASELINES, [ONLY], "trades", ["mixup"], "R@1", *CLUSTERS),
              f"not so elsewhere: on Cars IAT ({of_eat('iat', 'attacked R@1', 'cars')}) is above "
              f"AT ({of_eat('at', 'attacked R@1', 'cars')}), on In-Shop TRADES "
              f"({of_eat('trades', 'attacked R@1', 'inshop')}) is below the undefended network "
              f"({of_eat('natural', 'attacked R@1', 'inshop')})"),
        Claim("Tables 1, 2", "all defenses cause a little drop of all clean metrics",
              above(BASELINES, [CLEAN], "natural", CLASSIFIERS, "R@1", *CLUSTERS),
              f"not TRADES: CUB, clean Recall@1 {of_eat('trades', 'clean R@1')} against "
              f"{of_eat('natural', 'clean R@1')} undefended"),
        Claim("Tables 1, 2, 4", "the clean drop of EAT is negligible",
              above(BASELINES, [CLEAN], "eat vote", ["natural"], relation="not below")
              + above(BASELINES, [CLEAN], "eat member_mean", ["natural"], *CLUSTERS,
                      relation="not below")
              + above(MATCHED, [CLEAN], "eat vote", ["natural"], relation="not below"),
              f"CUB, Recall@8 {of_eat('natural', 'clean R@8')} falls to "
              f"{of_eat('eat vote', 'clean R@8')}, F1 {of_eat('natural', 'clean F1')} to "
              f"{of_eat('eat vote', 'clean F1')}"),
        Claim("abstract, Tables 1, 2, 4", 'EAT "greatly outperforms the adaptions of defenses '
              'designed for deep classification models"',
              voted(BASELINES, "eat", list(CLASSIFIERS))
              + above(ABLATION, [ONLY], "eat-18epochs vote", ["at"])
              + above(MATCHED, [SHIFT], "eat vote", CLASSIFIERS),
              f"CUB, attacked Recall@1 {of_eat('eat vote', 'attacked R@1')} against "
              f"{of_eat('at', 'attacked R@1')} of AT"),
        Claim("Table 3", "EAT is more robust than a naive ensemble of three",
              voted(ABLATION, "eat", ["ensemble vote"])
              + above(MATCHED, [SHIFT], "eat vote", ["ensemble vote"]),
              f"attacked Recall@1 {of_eat('eat vote', 'attacked R@1')} against "
              f"{of_eat('at-x3 vote', 'attacked R@1')}"),
        Claim("Table 3", "self-transferring (one attack on all members) adds robustness",
              voted(ABLATION, "eat-nosplit", ["ensemble vote"])
              + above(OWN, [SHIFT], "eat-nosplit vote", ["ensemble vote"])
              + above(MATCHED, [SHIFT], "eat-nosplit vote", ["ensemble vote"]),
              f"attacked Recall@1 {of_eat('eat-nosplit vote', 'attacked R@1')} against "
              f"{of_eat('at-x3 vote', 'attacked R@1')}"),
        Claim("Table 3", "the split of the data brings 9.13 % robustness",
              voted(ABLATION, "eat", ["eat-nosplit vote"])
              + above(ABLATION, [ONLY], "eat vote", ["eat-nosplit vote"], "R@8")
              + voted(ABLATION, "eat-18epochs", ["eat-nosplit vote"])
              + above(MATCHED, [SHIFT], "eat vote", ["eat-nosplit vote"]),
              f"{sum(gains) / len(gains):.2f} % is the mean of the relative gains in its four "
              f"attacked columns NMI, F1, Recall@1, Recall@8 ({listed}); Recall@1 gains "
              f"{float(split) - float(whole):.2f} points"),
        Claim("the argument for an ensemble", "an adversarial example hardly makes all members "
              "fail at once",
              [Compared((table, f"{other} vote", SHIFT), (table, "eat vote", SHIFT), "all_fail")
               for table in (OWN, MATCHED) for other in ("ensemble", "eat-nosplit")],
              "it is argued, without a table; here the share of images on which all members fail "
              "should be lower for EAT"),
        Claim("inference by voting", 'a vote is "friendly to robustness", because it has no '
              'gradient; a mean of the embeddings "might give the attacker an advantage"',
              [comparison for name in ("ensemble", "eat", "eat-nosplit")
               for comparison in above(OWN, [SHIFT], f"{name} vote",
                                       [f"{name} mean", f"{name} concat"])]),
        Claim("Figure 2", "EAT stays ahead of the other defenses when the attack takes more "
              "iterations", [comparison for attack in ("PGD-20 eps 8/255", "PGD-50 eps 8/255")
                             for comparison in above(SWEEPS, [attack], "eat vote",
                                                     ["at", "trades"], "R@1", "F1")]),
        Claim("Figure 3", "EAT stays ahead of the other defenses at larger radii",
              [comparison for attack in ("PGD-10 eps 16/255", "PGD-10 eps 32/255")
               for comparison in above(SWEEPS, [attack], "eat vote", ["at", "trades"], "R@1",
                                       "F1")]),
        Claim("Figure 4", "the members of EAT are more robust than the other defenses, and the "
              "ensemble than its members",
              [Compared((MEMBERS, f"eat member_{i}", attack), (SWEEPS, "at", "PGD-10 eps 8/255"),
                        "R@1") for attack in (ONLY, "alone") for i in (1, 2, 3)]
              + above(MEMBERS, [ONLY], "eat vote", [f"eat member_{i}" for i in (1, 2, 3)])
              + above(ABLATION, [ONLY], "eat vote", ["eat member_mean"])),
    ]


def panum():
    natural = [f"{name}-rate0" for name in LOSSES]
    eps = ("0.01", "0.05", "0.10")
    drop = [paper("panum-cub", "panum-rate0-cub-resnet50", column)
            for column in ("clean R@1", *(f"eps {radius} R@1" for radius in eps))]
    return [
        Claim("Table 1", "natural networks are not robust at eps 0.01, 0.05, 0.1",
              [comparison for row in natural for attack in
               (AT_001, "eps 12.8/255", "eps 25.5/255")
               for comparison in falls(RATES, row, attack, "R@1", "mAP@R")],
              f"CUB, contrastive, Recall@1 {', '.join(drop)} (clean and the three radii)"),
        Claim("abstract, Table 2", 'robust networks "display robustness against strong iterative '
              'attacks", at eps 0.01',
              [comparison for row in LOSSES for comparison in
               above(RATES, [AT_001], row, [f"{row}-rate0"], "R@1", "mAP@R")]),
        Claim("abstract of arXiv 2102.07265", '"5-76 fold increases in adversarial accuracy", at '
              "eps 0.01",
              [comparison for row in LOSSES for comparison in
               above(RATES, [AT_001], row, [f"{row}-rate0"], times=5)]),
        Claim("abstract, Table 6", 'performance on natural images "remains largely unaffected"',
              [comparison for row in LOSSES for comparison in
               above(RATES, [CLEAN], row, [f"{row}-rate0"], "R@1", "mAP@R",
                     relation="not below")]),
        Claim("Table 5", "every attack rate from 0.1 to 1 makes a network more robust, at eps 0.01",
              [comparison for row in LOSSES for rate in ("-rate0.1", "-rate0.25", "", "-rate0.75",
                                                         "-rate1")
               for comparison in above(RATES, [AT_001], row + rate, [f"{row}-rate0"])]),
        Claim("Table 6", "a contrastive network of a low attack rate is better on clean images "
              "than a natural one (rate 0.25 on CUB, 0.1 on Cars)",
              above(RATES, [CLEAN], "panum-rate0.25", ["panum-rate0"])
              + above(RATES, [CLEAN], "panum-rate0.1", ["panum-rate0"])),
        Claim("Appendix F", "attacking the positive protects best, in five of six cases, at eps "
              "0.01",
              [comparison for row in LOSSES for comparison in
               above(TARGETS, [AT_001], row, [f"{row}-anchor", f"{row}-negative"])],
              "the sixth is contrastive on CUB: anchor "
              f"{paper('panum-cub', 'panum-anchor-cub-resnet50', 'eps 0.01 R@1')}, positive "
              f"{paper('panum-cub', 'panum-cub-resnet50', 'eps 0.01 R@1')}"),
        Claim("Appendix E", "two Gaussians: a natural network fails under an attack that a robust "
              "one withstands, at eps 0.01",
              [comparison for arch in ("mobilenetv2", "convnet") for comparison in
               above("gaussian", [ONLY], f"panum-gaussian-{arch}",
                     [f"panum-rate0-gaussian-{arch}"])],
              f"{paper('panum-gaussian', 'panum-rate0-gaussian-resnet50', 'eps 0.01 R@1')} against "
              f"{paper('panum-gaussian', 'panum-gaussian-resnet50', 'eps 0.01 R@1')}"),
    ]


def hm():
    lga, ics, table, eta = "hm-softhard-lga", "hm-softhard-lga-ics", "glyphs-hm", "glyphs-hm-eta"
    grid = "glyphs-hm-map"
    fast = [f"{data.upper()} {of_hm(ics, data=data)} against {of_hm('act-eta32', data=data)}"
            for data in ("cub", "cars", "sop")]
    return [
        Claim("Sec. 4.3, Table 6", '"efficiently reaches the highest ERS": EST < ACT < HM < HM&ICS',
              above(table, [ONLY], ics, [lga, "act", "est"], "ERS")
              + above(table, [ONLY], lga, ["act", "est"], "ERS")
              + above(table, [ONLY], "act", ["est"], "ERS")
              + above(MATCHED, [ERS], ics, ["act", "est"]),
              f"its own table breaks this order for {'; '.join(broken_orders())}"),
        Claim("Sec. 4.3, Table 6", '"a very low decrement in R@1" beside EST and ACT',
              above(table, [CLEAN], lga, ["act", "est"])
              + above(table, [CLEAN], ics, ["act", "est"])
              + above(MATCHED, [CLEAN], ics, ["act", "est"]),
              f"not beside EST with 8 steps on SOP: {of_hm(lga, 'R@1', 'sop')} against "
              f"{of_hm('est', 'R@1', 'sop')}"),
        Claim("abstract, Figure 1", '"overwhelmingly outperforms" in training efficiency: HM with '
              "8 steps is above ACT with 32",
              [Compared((eta, "eta8-hm-softhard-lga", ONLY), (eta, f"eta{steps}-act", ONLY), "ERS")
               for steps in (8, 16, 32)],
              f"HM&ICS with 8 steps against ACT with 32: {', '.join(fast)}"),
        Claim("Sec. 4.2 I, Figure 6", '"HM[R,M] achieves the highest ERS and efficiency but with '
              'the most significant drop in R@1"',
              [Compared((eta, f"eta{steps}-hm-random-semihard", ONLY),
                        (eta, f"eta{steps}-act", ONLY), "ERS") for steps in (8, 16)]
              + above(eta, [CLEAN], "eta8-act", ["eta8-hm-random-semihard"]),
              f"with 8 steps its tables have a higher one, {best_at_8()}"),
        Claim("Table 2", "HM[R,M] and HM[S,M] are effective; most harder destinations collapse, "
              "easier ones do little",
              above(grid, [ONLY], "hm-random-semihard", ["hm-random-random"], "ERS")
              + above(grid, [ONLY], "hm-softhard-semihard",
                      ["hm-softhard-softhard", "hm-softhard-random"], "ERS")
              + [Compared((grid, f"hm-{source}-{source}", CLEAN),
                          (grid, f"hm-{source}-{harder}", CLEAN), "R@1")
                 for source, harder in (("random", "distance"), ("random", "hardest"),
                                        ("semihard", "softhard"), ("softhard", "hardest"))]),
        Claim("Sec. 4.2 II, Table 4", 'LGA has "an ERS on par with" HM[S,M], "at the lowest R@1 '
              'performance penalty among all choices"',
              above(table, [CLEAN], lga, ["hm-softhard-semihard", "hm-softhard--0.1",
                                          "hm-softhard--0.2", "hm-softhard-g-b"])
              + above(table, [ONLY], lga, ["hm-softhard-semihard"], "ERS", relation="not below")),
        Claim("Sec. 4.2 II, Table 4", 'the ERS of LGA is "marginally lower" than that of the '
              "constant -gamma/2",
              above(table, [ONLY], "hm-softhard--0.1", [lga], "ERS"),
              f"with 32 steps {of_hm(f'{lga}-eta32')} against {of_hm('hm-softhard--0.1-eta32')}"),
        Claim("supplement B.3, Table 9", "g_2 is more eager than LGA and g_1/2 more conservative",
              above(table, [ONLY], "hm-softhard-g-square", [lga], "ERS")
              + above(table, [ONLY], lga, ["hm-softhard-g-sqrt"], "ERS")
              + above(table, [CLEAN], "hm-softhard-g-sqrt", [lga])
              + above(table, [CLEAN], lga, ["hm-softhard-g-square"]),
              f"ERS {of_hm('hm-softhard-g-square')}, {of_hm(lga)}, {of_hm('hm-softhard-g-sqrt')}; "
              f"Recall@1 {of_hm('hm-softhard-g-square', 'R@1')}, {of_hm(lga, 'R@1')}, "
              f"{of_hm('hm-softhard-g-sqrt', 'R@1')}"),
        Claim("Sec. 4.2 III, Table 5", 'ICS "consistently leads to a higher efficiency in gaining '
              'higher robustness", "retaining an acceptable trade-off in R@1"',
              above(table, [ONLY], ics, [lga], "ERS", "ES:R", "LTM", "GTM")
              + above(table, [CLEAN], ics, [lga], relation="not below"),
              f"not on SOP with 8 steps: {of_hm(ics, data='sop')} with it, "
              f"{of_hm(lga, data='sop')} without"),
        Claim("Sec. 4.3", 'ICS "increases the tendency to collapse", seen as a higher TMA',
              above(table, [ONLY], ics, [lga], "TMA"),
              f"CUB, 8 steps: {of_hm(ics, 'TMA')} against {of_hm(lga, 'TMA')}"),
        Claim("supplement A.2", '"a larger eta leads to a higher robustness (ERS) and a lower R@1 '
              'performance"',
              [Compared((eta, f"eta{high}-{name}", side), (eta, f"eta{low}-{name}", side), metric)
               for name in ("est", "act", lga) for high, low, side, metric in
               ((16, 4, ONLY, "ERS"), (4, 16, CLEAN, "R@1"))],
              f"not HM&ICS on CARS: {of_hm(ics, data='cars')} with 8 steps, "
              f"{of_hm(f'{ics}-eta32', data='cars')} with 32"),
    ]


def beyond():
    """What no paper claims: other attacks, other radii."""
    read = [JOINT, IMPOSTOR]
    return [
        Claim("8/255", "what is defended keeps more than what is not, under any attack",
              [comparison for row in ("at", "trades", "eat vote", "ensemble vote")
               for comparison in above(OWN, [SHIFT, WORST, MATCHING_WORST], row, ["natural"])]),
        Claim("eps50", "EAT is above AT and the naive ensemble when attacks read labels",
              above(OWN, read, "eat vote", ["at", "ensemble vote"])
              + above(MATCHED, read, "eat vote", ["at", "ensemble vote"])),
        Claim("eps50", "an ensemble that sees all images is above AT when attacks read labels",
              above(MATCHED, read, "ensemble vote", ["at"])
              + above(MATCHED, read, "eat-nosplit vote", ["at"])),
        Claim("eps50", "a vote is above an average when each rule is attacked by itself",
              [comparison for name in ("ensemble", "eat", "eat-nosplit") for comparison in
               above(OWN, read, f"{name} vote", [f"{name} mean", f"{name} concat"])]),
        Claim("8/255, eps50", "Panum's training defends under attacks that it does not name",
              [comparison for row in LOSSES for comparison in
               above(OWN, [MATCHING_WORST, *read], row, [f"{row}-rate0"])]),
        Claim("8/255", "attacking the positive protects better than attacking the anchor",
              [comparison for row in LOSSES for comparison in
               above(TARGETS, ["eps 8/255"], row, [f"{row}-anchor"])]),
        Claim("0.01 and 8/255", "PGD harms more than FGSM and than Carlini and Wagner's attack",
              [Compared((ATTACKS, row, f"FGSM {AT_001}"), (ATTACKS, row, f"PGD-5 {AT_001}"), "R@1")
               for row in LOSSES]
              + [Compared((CW, row, weaker), (CW, row, "PGD-5"), "R@1")
                 for row in LOSSES for weaker in ("FGSM", "C&W-50")]),
        Claim("8/255", "the attack of Panum's Algorithm 1 shows what a network withstands",
              [Compared((OWN, row, MATCHING_WORST), (OWN, row, NEIGHBOUR), "R@1",
                        relation="not below") for row in LOSSES]),
        Claim("EAT's and Panum's attacks, eps50", "HM&ICS is above ACT under other protocols, too",
              above(OWN, [SHIFT, NEIGHBOUR, *read], "hm-softhard-lga-ics", ["act"])
              + above(MATCHED, [SHIFT, NEIGHBOUR, *read], "hm-softhard-lga-ics", ["act"])),
    ]


# The arena's tables: attacks as they name them. All networks have one recipe there.
HALF_JOINT = "clustering joint against vote curve of PGD-10 up to 16/255"
HALF_IMPOSTOR = "template impostor curve of PGD-10 up to 16/255"
AT_001_NEIGHBOUR = "template neighbour PGD-5 eps 2.55/255"


def arena(data):
    """Claims of the papers, and ours, in one recipe for all, on one data set."""
    table, worst = f"arena-{data}", f"arena-{data}-worst"
    ics, half = "hm-softhard-lga-ics", [HALF_JOINT, HALF_IMPOSTOR]

    def halves(higher, lowers):
        return above(table, half, higher, lowers, "eps50_255")

    def survives(higher, lowers):
        return above(worst, ["clustering eps 2/255", "template eps 2/255"], higher, lowers)

    return [
        Claim("EAT, abstract", "DML models are prone to adversarial examples",
              falls(table, "natural", SHIFT) + falls(table, "natural", AT_001_NEIGHBOUR)),
        Claim("EAT, Table 1", "AT is the most robust of the adapted defenses, Mix-Up the least",
              above(table, [SHIFT], "at", ["mixup", "iat", "trades"])),
        Claim("EAT, Tables 1 and 3", "EAT is above AT and above three AT networks that vote",
              above(table, [SHIFT], "eat vote", ["at", "at-x3 vote"])),
        Claim("EAT, Table 3", "the split adds robustness",
              above(table, [SHIFT], "eat vote", ["eat-nosplit vote"])),
        Claim("Panum et al., Table 2", "their training makes networks robust at 0.01",
              above(table, [AT_001_NEIGHBOUR], "panum-triplet", ["natural", "panum-triplet-rate0"])
              + above(table, [AT_001_NEIGHBOUR], "panum", ["panum-rate0"])),
        Claim("Zhou & Patel, Table 6", "HM[S, LGA] with ICS is above EST and ACT; here by eps50",
              halves(ics, ["est", "act"])),
        Claim("ours", "every defense but Mix-Up moves eps50",
              [comparison for name in ("at", "at-x3 vote", "eat vote", "panum-triplet", ics, "fast")
               for comparison in halves(name, ["natural"])]),
        Claim("ours", "`fast` is above AT at equal passes, by eps50 and by the worst case",
              halves("fast", ["at"]) + survives("fast", ["at"])),
        Claim("ours", "`fare`, whose teacher had passes of its own, is above AT and `fast`",
              halves("fare", ["at", "fast"]) + survives("fare", ["at", "fast"])),
        Claim("ours", "three networks that vote, AT or EAT, are above `fast`",
              halves("at-x3 vote", ["fast"]) + halves("eat vote", ["fast"])),
        Claim("ours", "EAT that attacks the loss of the labels is above EAT",
              halves("eat-label vote", ["eat vote"]) + survives("eat-label vote", ["eat vote"]))]


HEAD = """# The papers' claims, on drawings and on photos

Written by `python results/claims.py` out of the tables named here. The first sections are of
generated drawings and of tables that are older than the code; the last two are of today's, one
recipe with equal passes for all, on drawings and on photos of groceries. Networks are small. Words
between quotation marks are the paper's, the others are close to them. Each claim is tried with the
paper's attack at the paper's radius, where the claim does not say otherwise.

A comparison *holds* when the difference exceeds both standard deviations over three seeds together,
*fails* when it does so in the other direction, and is *open* in between. "Not below" holds when the
first figure is above the second, and fails when it is below. *Open* is also what has fewer than
three seeds, what no stored table has, and what compares with EST: its rows are of the weaker attack
that it had then. "In every seed" is said where a table keeps the score of every seed.

The code has changed since the older tables, and each table was made at the commit that is named
with its command. EAT and the baselines trained then with four steps of 2/255, half of the way that
a random start needs. `ensemble` is what `baselines.py --method at --members 3` trains now. Clusters
of a vote are not stored, because another rule merged them then: `member_mean` is the mean over
members. eps50 is the radius, in 1/255, at which an attack has halved Recall@1; 2.55/255 is Panum's
0.01. Our ERS is the corrected one. The paper's is not, so it stands in sentences on the paper's own
tables and beside none of ours.
"""


# ---- verdicts

@functools.cache
def content(table):
    """What results/TABLE.json holds."""
    return json.loads((RESULTS / f"{table}.json").read_text())


def figure(table, row, attack, metric):
    """One cell of results/TABLE.json, a Figure, or None where it is not stored."""
    name, side = full_name(table, row), "clean" if attack == CLEAN else "attacked"
    former = any(alert.startswith((f"{name}: ", f"{name}-s")) and "EST had then" in alert
                 for alert in content(table)["warnings"])
    found = {(*own[side][metric], len(own["seeds"]), former): own for own in content(table)["rows"]
             if own["name"] == name and attack in (CLEAN, own.get("attack", ""))
             and metric in own[side]}
    if len(found) > 1:
        raise SystemExit(f"results/{table}.json has {len(found)} cells {name}, {attack}, {metric}")
    for (mean, std, seeds, _), own in found.items():
        values = own.get("values", {}).get(side, {}).get(metric, [])
        return Figure(mean, std, seeds, dict(zip(own["seeds"], values)), former)


def full_name(table, row):
    """The name of a row in a table: runs are named METHOD-glyphs-convnet where this says METHOD."""
    method, _, rule = row.partition(" ")
    if table.startswith("arena-"):
        return f"arena-{method}-{table.split('-')[1]}-convnet {rule}".strip()
    if "gaussian" not in method and not method.startswith("eta") and "glyphs" not in method:
        method += "-glyphs-convnet"
    return "matched-" * (table == MATCHED) + f"{method} {rule}".strip()


def judge(higher, lower, times=1):
    """"holds", "open" or "fails", with a reason, of the statement that the first Figure is above
    the second one, or `times` it."""
    if higher is None or lower is None:
        return "open: no stored table has it"
    if min(higher.seeds, lower.seeds) < SEEDS:
        return f"open: fewer than {SEEDS} seeds"
    if higher.former or lower.former:
        return "open: EST's former attack"
    difference, margin = higher.mean - times * lower.mean, higher.std + times * lower.std
    if abs(difference) <= margin:
        return "open"
    pairs = [(higher.values[seed], times * lower.values[seed])
             for seed in {*higher.values} & {*lower.values}]
    every = len(pairs) >= SEEDS and all((one > other) == (difference > 0) for one, other in pairs)
    return f"{'holds' if difference > 0 else 'fails'}{', in every seed' * every}"


def verdict(judgements):
    """One word or two for a claim, out of those of its comparisons."""
    kinds = {judgement.partition(":")[0].partition(",")[0] for judgement in judgements}
    if len(kinds) == 1:
        return kinds.pop()
    return ("mixed" if {"holds", "fails"} <= kinds else
            "holds in part" if "holds" in kinds else "fails in part")


# ---- the page

def shown(figure, metric):
    """"45.6 ± 3.1" of a Figure; one seed has no deviation."""
    if figure is None:
        return "-"
    return " ± ".join(cell(metric, number) for number in figure[:2] if number is not None)


def line(compared, figures, word):
    """A row of a claim's table."""
    (table, row, _), (other_table, other, _) = compared[:2]
    times = f"{compared.times:g} times " * (compared.times != 1)
    what = f"{row} {compared.relation} {times}{other}" if row != other else row
    attacks = dict.fromkeys(attack or content(table)["title"] for table, _, attack in compared[:2])
    files = dict.fromkeys((table, other_table))
    return " | ".join([f"| {what}", f" {compared.relation} ".join(attacks),
                       metric_name(compared.metric),
                       *(shown(figure, compared.metric) for figure in figures),
                       ", ".join(f"[{name}]({name}.md)" for name in files), f"{word} |"])


def section(title, claims):
    """The Markdown of one paper's claims."""
    lines = [f"## {title}", ""]
    for claim in claims:
        judged = []
        for compared in claim.comparisons:
            figures = [figure(*side, compared.metric) for side in compared[:2]]
            judged.append((compared, figures, judge(*figures, compared.times)))
        lines += [f"### {claim.words} ({claim.place}): {verdict(word for *_, word in judged)}", "",
                  *([f"In the paper: {claim.paper}.", ""] if claim.paper else []),
                  "| claimed | attack | | | | table | |", "|---|---|---|---:|---:|---|---|",
                  *(line(*own) for own in judged), ""]
    return lines


def sections():
    return [("EAT (Ke, arXiv 2501.01025)", eat()),
            ("Robust contrastive and triplet training (Panum et al., arXiv 2102.07265)", panum()),
            ("Hardness Manipulation (Zhou & Patel, CVPR 2022)", hm()),
            ("What no paper claims: other attacks, other radii", beyond()),
            ("One recipe for all, drawings (glyphs)", arena("glyphs")),
            ("One recipe for all, photos (Grocery)", arena("grocery"))]


def commands(papers):
    """The Markdown that says which command made each table."""
    tables = dict.fromkeys(side[0] for _, claims in papers for claim in claims
                           for compared in claim.comparisons for side in compared[:2])
    lines = ["## Commands", ""]
    for table in tables:
        own = content(table)
        lines += [f"`results/{table}.json` ({own['title']}), at {own['commit']}:", "",
                  f"    {own['command']}", ""]
    return lines


def text():
    """results/claims.md."""
    papers, lines = sections(), [HEAD]
    for title, claims in papers:
        lines += section(title, claims)
    return "\n".join(lines + commands(papers))


if __name__ == "__main__":
    (RESULTS / "claims.md").write_text(text())
