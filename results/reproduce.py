# SPDX-License-Identifier: MIT
"""The commands behind every table and figure of the three papers, with the papers' own recipes.

    python results/reproduce.py                                  # what there is
    python results/reproduce.py --paper eat --table 4            # the commands of one of them
    python results/reproduce.py --paper eat --table 4 | bash     # run them, or go on with them

One training command for each row, then the evaluation, which writes our table beside the paper's
figures (results/paper/; those that are lost or cannot be compared, as Zhou & Patel's mAP, are not
there) or draws ours. Lines that begin with # say which files show it in small: with other data or
fewer epochs, and not always every row. Papers: eat, Ke (arXiv 2501.01025); panum, Panum et al.
(arXiv 2102.07265), with its appendices E and F; hm, Zhou & Patel (CVPR 2022), Tables 7 to 11 of
which are the supplement's.
"""

import argparse
import functools
import importlib
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                # the scripts know their runs' names
AT_HAND = ("cub2010", "gaussian")
PUBLISHED = {"eat": "eat", "panum": "panum", "hm": "zhou-patel"}       # results/paper/NAME-DATASET


class Item(NamedTuple):
    """A table or figure: its training commands without data set and seed, and flags of eval.py."""
    paper: str
    kind: str
    number: str
    title: str
    commands: list = []
    evaluation: str = ""
    datasets: str = ""
    ours: str = ""                                           # files of results/ with a smaller one
    note: str = ""

    def runs(self, dataset):
        """{command of a run, its seed still to be filled in: the run's folder, any seed}."""
        found = {}
        for command in self.commands:
            command = f"{command} --dataset {dataset} --seed {{seed}}".replace("{dataset}", dataset)
            found[command] = folder_of(command.format(seed=0)).removesuffix("-s0") + "-s*"
        return found

    def lines(self, seeds=(0,)):
        """What a shell runs, and comments."""
        lines = [f"# {self.paper}, {self.kind} {self.number}: {self.title}"]
        lines += [f"# {self.note}"] if self.note else []
        for dataset in self.datasets.split():
            runs = self.runs(dataset)
            lines += [f"python {command.format(seed=seed)} --resume"
                      for command in runs for seed in seeds]
            if self.evaluation:
                flags = self.evaluation.format(
                    table=f"results/{self.paper}-{self.kind}{self.number}-{dataset}",
                    beside=f"--beside results/paper/{PUBLISHED[self.paper]}-{dataset}.csv")
                lines.append(f"python eval.py {shlex.join(runs.values())} {flags}")
        return [*lines, *(f"# {words}" for words in self.status())]

    def status(self):
        measured = [name for name in self.ours.split() if (ROOT / "results" / name).exists()]
        missing = [name for name in self.datasets.split() if name not in AT_HAND]
        if measured:
            yield f"in small: {', '.join(f'results/{name}' for name in measured)}"
        if missing:
            yield f"not run: data not at hand ({', '.join(missing)})"
        elif "bninception" in " ".join(self.commands):
            yield "not run: ImageNet weights of BN-Inception not at hand"
        elif not self.commands:
            yield "nothing to run"
        elif not measured:
            yield "not run"


@functools.cache
def folder_of(command):
    """The run that a training command makes, as its script names it."""
    script, *flags = shlex.split(command)
    return importlib.import_module(script.removesuffix(".py")).parse_args(flags).out


# ---- EAT. What attacks an ensemble, lambda of TRADES ...: README, "Fidelity".

def proxy_anchor(arch, *methods):
    return [f"{'' if method.startswith('eat') else 'baselines.py --method '}{method} --arch {arch}"
            for method in methods]


def picture(number, title, name, commands, flags):
    return Item("eat", "figure", number, title, commands, f"{flags}--figures {{table}}", "cub2010",
                f"cub2010-figures/{name}.png matched-cub2010-figures/{name}.png")


DEFENSES = ("natural", "at", "mixup", "iat", "trades", "trades --trades-lambda 1", "eat.py")
SCORES = "--rules vote --metrics R@1 {} NMI F1 {{beside}} --table {{table}}"
OF_EAT = proxy_anchor("mobilenetv2", *DEFENSES)
EAT = [
    Item("eat", "table", "1", "defenses, MobileNetV2", OF_EAT, SCORES.format("R@2 R@4 R@8"),
         "cub2010 cars", "cub2010.md matched-cub2010.md glyphs-baselines.md",
         note="TRADES: lambda is unstated; 6 and 1"),
    Item("eat", "table", "2", "defenses, BN-Inception",
         proxy_anchor("bninception --weights bn_inception-52deb4733.pth", *DEFENSES),
         SCORES.format("R@2 R@4"), "cub2010"),
    Item("eat", "table", "3", "what the split and the shared attack add",
         proxy_anchor("mobilenetv2", "ensemble", "eat.py --no-split", "eat.py"),
         SCORES.format("R@8"), "cub2010", "cub2010.md matched-cub2010.md glyphs-ablation.md"),
    Item("eat", "table", "4", "defenses, In-Shop", OF_EAT, SCORES.format("R@10 R@20"), "inshop"),
    picture("1", "embeddings before and after the attack", "embeddings",
            proxy_anchor("mobilenetv2", "natural", "eat.py"), ""),
    picture("2", "more steps of the attack", "sweep-steps", OF_EAT, "--sweep-steps --rules vote "),
    picture("3", "larger radii", "sweep-eps", OF_EAT,
            "--sweep-eps 8/255 12/255 16/255 20/255 24/255 28/255 32/255 --rules vote "),
    picture("4", "the members", "per-member", OF_EAT[-1:], "--per-member "),
]


# ---- Panum et al.: seeds of the attack, as in the paper

def robust(*flags, losses=("contrastive", "triplet"), more=""):
    return [f"panum_at.py --loss {loss} {flag} --arch resnet50{more}"
            for loss in losses for flag in flags]


NATURAL, RATES = "--attack-rate 0", [f"--attack-rate {rate}" for rate in (0.1, 0.25, 0.5, 0.75, 1)]
TARGETS = [f"--perturb {image}" for image in ("positive", "negative", "anchor")]
ALL = "cub cars sop"
TEMPLATE = "--protocol template --attack {} --eps {} --seed 0 1 2 3 4 --metrics R@1 mAP@R"
CURVES = {loss: [command for target in TARGETS for command in robust(
    target, losses=[loss], more=f" --eval-every 5 --out runs/curves-panum-{loss}-{target[10:]}"
                                "-{dataset}-resnet50-s{seed}")]
    for loss in ("contrastive", "triplet")}
BEST = "published: the best rate, contrastive, CUB 18.7; SOP 48.7, loss not named; the rest is lost"
LOST = "the paper's figures are lost"
PANUM = [
    Item("panum", "table", "1", "natural networks, PGD", robust(NATURAL),
         TEMPLATE.format("pgd", "0.01 0.05 0.1") + " {beside} --table {table}", ALL,
         "glyphs-panum-attacks.md"),
    Item("panum", "table", "2", "robust networks, PGD", robust(NATURAL, *RATES),
         TEMPLATE.format("pgd", "0.01") + " {beside} --table {table}", ALL,
         "glyphs-panum-rates.md", BEST),
    Item("panum", "table", "3", "robust networks, FGSM", robust(*RATES),
         TEMPLATE.format("fgsm", "0.01") + " --table {table}", ALL, "glyphs-panum-attacks.md",
         LOST),
    Item("panum", "table", "4", "robust networks, C&W", robust(*RATES),
         TEMPLATE.format("cw", "0.01") + " --table {table}", ALL, "glyphs-panum-cw.md", LOST),
    Item("panum", "table", "5", "attack rates, attacked", robust(*RATES),
         TEMPLATE.format("pgd", "0.01") + " --table {table}", ALL, "glyphs-panum-rates.md", LOST),
    Item("panum", "table", "6", "attack rates, clean", robust(*RATES),
         TEMPLATE.format("pgd", "0.01") + " --table {table}", ALL, "glyphs-panum-rates.md", LOST),
    Item("panum", "table", "7", "natural networks, FGSM and C&W", robust(NATURAL),
         TEMPLATE.format("fgsm cw", "0.01 0.05 0.1") + " --table {table}", ALL,
         "glyphs-panum-attacks.md glyphs-panum-cw.md", LOST),
    Item("panum", "table", "E", "two Gaussians",
         robust(NATURAL, "--attack-rate 0.5", losses=["contrastive"],
                more=" --image-size 224 --lr 1e-5 --plain-epochs 0"),
         TEMPLATE.format("pgd", "0.01") + " {beside} --table {table} --figures {table}", "gaussian",
         "gaussian.md"),
    Item("panum", "table", "F", "which image is attacked", robust(*TARGETS),
         TEMPLATE.format("pgd", "0.01") + " {beside} --table {table}", "cub",
         "glyphs-panum-targets.md"),
    Item("panum", "figure", "1", "queries and their neighbours, attacked", robust(NATURAL),
         "--protocol template --figures {table}", "cub"),
    Item("panum", "figure", "2", "how far embeddings move", robust(NATURAL, "--attack-rate 0.5"),
         "--protocol template --figures {table}", "cub"),
    Item("panum", "figure", "3", "scores by epoch, contrastive", CURVES["contrastive"],
         "--protocol template --figures {table}", "cub", "glyphs-panum-figures/training.png"),
    Item("panum", "figure", "4", "scores by epoch, triplet", CURVES["triplet"],
         "--protocol template --figures {table}", "cub", "glyphs-panum-figures/training.png"),
]


# ---- Zhou & Patel: ERS as in the authors' code, the only one to stand beside theirs

ETAS = (2, 4, 8, 16, 32)
SAMPLERS = ("random", "semihard", "softhard", "distance", "hardest")
ERS = "--protocol ers --ers-variant authors --metrics {} {{beside}} --table {{table}}"
SHORT = ERS.format("R@1 ERS")
LONG = ERS.format("R@1 R@2 NMI CA+ CA- QA+ QA- TMA ES:D ES:R LTM GTM GTT ERS")


def hm(*flags, etas=(8,), source="softhard", destination="lga"):
    return [" ".join([f"hardness_manipulation.py --source {source} --destination {destination}",
                      *flags, f"--arch resnet18 --attack-steps {eta}"]) for eta in etas]


def older(method, source="random", etas=(8,)):               # whose run names do not say eta
    name = f"{method}{'' if source == 'random' else f'-{source}'}"
    return [f"baselines.py --method {method} --source {source} --arch resnet18 --attack-steps {eta}"
            + (f" --out runs/{name}-eta{eta}-{{dataset}}-resnet18-s{{seed}}" if eta != 8 else "")
            for eta in etas]


PLAIN = hm(source="random", destination="random")
ACT = older("act", etas=ETAS) + older("act", "softhard", ETAS)
MAP = [command for source in SAMPLERS for destination in SAMPLERS
       for command in hm(source=source, destination=destination)]
STEPS = PLAIN + ACT + hm(etas=ETAS, source="random", destination="semihard") \
    + hm(etas=ETAS, destination="semihard")
GRADUAL = [*hm(destination="semihard"), *hm(destination="g-b"),
           *hm("--destination-hardness 0", destination="constant"),
           *hm("--destination-hardness -0.2", destination="constant"),
           *hm("--destination-hardness -0.1", destination="constant", etas=ETAS), *hm(etas=ETAS)]
ICS = [command for source in ("random", "softhard") for destination in ("semihard", "lga")
       for flags in ([], ["--ics"]) for command in hm(*flags, source=source,
                                                      destination=destination)]
ICS += hm("--ics 1") + hm("--ics", etas=(2, 4, 16, 32))
MAIN = [*PLAIN, *older("est", etas=(8, 32)), *older("act", etas=(8, 32)), *hm(etas=(8, 32)),
        *hm("--ics", etas=(8, 32))]
HARDNESS = [f"{command} --lr 0 --epochs 20 --out runs/hardness-{sampler}-{{dataset}}-s{{seed}}"
            for sampler in SAMPLERS for command in hm(source=sampler, destination=sampler)]
PLOT = "ERS and Recall@1 over eta + 1 passes: the columns of "
HM = [
    Item("hm", "table", "1", "hardness of five samplers", HARDNESS, "", "cub",
         note="mean: H_source in log.jsonl (-0.164 -0.126 -0.085 0.043 0.044); the variance is not "
              "logged"),
    Item("hm", "table", "2", "every source with every destination", MAP, SHORT, "cub",
         "glyphs-hm-map.md"),
    Item("hm", "table", "3", "HM and ACT over eta", STEPS, SHORT, "cub", "glyphs-hm-eta.md"),
    Item("hm", "table", "4", "gradual adversary", GRADUAL, SHORT, "cub", "glyphs-hm-eta.md"),
    Item("hm", "table", "5", "intra-class structure", ICS, SHORT, "cub", "glyphs-hm.md"),
    Item("hm", "table", "6", "defenses", MAIN, LONG, ALL, "glyphs-hm.md"),
    Item("hm", "table", "7", "g_LGA with u = 0.2 and 2.2", hm(), SHORT, "cub",
         note="u = 2.2 (published: 34.8, 36.1) is not a flag"),
    Item("hm", "table", "8", "ICS with lambda 0.5 on SOP", hm("--ics 0.5", etas=(8, 32)), SHORT,
         "sop"),
    Item("hm", "table", "9", "other gradual adversaries",
         hm(destination="g-sqrt") + hm() + hm(destination="g-square"), SHORT, "cub"),
    Item("hm", "table", "10", "ICS with margin 0 and 0.2", hm("--ics"), SHORT, "cub",
         note="margin 0.2 (published: 35.8, 33.6) is not a flag"),
    Item("hm", "table", "11", "Table 2 with every attack", MAP, LONG, "cub", "glyphs-hm-map.md"),
    Item("hm", "figure", "1", "ACT and HM[S,g_LGA]&ICS", ACT + hm("--ics", etas=ETAS), SHORT,
         "cub", "glyphs-hm-eta.md", PLOT + "Tables 3 and 5"),
    *(Item("hm", "figure", number, f"{what}, a drawing") for number, what in zip(
        "2345", ("boundary cases of HM", "HM", "gradual adversary", "intra-class structure"))),
    Item("hm", "figure", "6", "Table 3 as curves", STEPS, SHORT, "cub", "glyphs-hm-eta.md",
         PLOT + "Table 3"),
    Item("hm", "figure", "7", "Table 4 as curves", GRADUAL, SHORT, "cub", "glyphs-hm-eta.md",
         PLOT + "Table 4"),
    Item("hm", "figure", "8", "Table 5 as curves", ICS, SHORT, "cub", note=PLOT + "Table 5"),
]
ITEMS = EAT + PANUM + HM


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", choices=tuple(PUBLISHED))
    parser.add_argument("--table", metavar="N", help="a number; panum: E and F, too")
    parser.add_argument("--figure", metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED",
                        help="of the training (the papers: one)")
    args = parser.parse_args()
    of_paper = [item for item in ITEMS if args.paper in (None, item.paper)]
    if args.table is args.figure is None:
        for item in of_paper:
            print(f"--paper {item.paper} --{item.kind} {item.number}: "
                  f"{'; '.join([item.title, *item.status()])}")
        return
    wanted = [item for item in of_paper
              if (item.kind, item.number) in (("table", args.table), ("figure", args.figure))]
    if args.paper is None or len(wanted) < (args.table is not None) + (args.figure is not None):
        parser.error("name a --paper, and a --table or a --figure of it: without them all are "
                     "listed")
    for item in wanted:
        print(*item.lines(args.seeds), sep="\n")


if __name__ == "__main__":
    main()
