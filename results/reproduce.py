# SPDX-License-Identifier: MIT
"""The commands behind every table and figure of the three papers, with the papers' own recipes.

    python results/reproduce.py                                  # what there is
    python results/reproduce.py --paper eat --table 4            # the commands of one of them
    python results/reproduce.py --paper panum --table F --dataset cub --seeds 0 1 2
    python results/reproduce.py --paper eat --table 4 | bash     # run them, or go on with them

One training command for each row, into runs/paper-..., then our table beside the paper's figures
(results/paper/; those that are lost or cannot be compared, as Zhou & Patel's mAP, are not there) or
our picture. Lines that begin with # say how long the trainings may take, and which files show it in
small: with other data or fewer epochs, and not always every row. Papers: eat, Ke (arXiv
2501.01025); panum, Panum et al. (arXiv 2102.07265), with its appendices E and F; hm, Zhou & Patel
(CVPR 2022), Tables 7 to 11 of which are the supplement's.

Hours are passes x images x epochs x ms of a pass. A pass is an image that goes forward through a
network and back. The ms are assumed, for one GPU and 224 pixels: --ms takes yours. Attacks on the
finished networks come on top.
"""

import argparse
import functools
import importlib
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                # the scripts name their runs
DATASETS = ("cub2010", "cub", "cars", "sop", "inshop", "gaussian")
PUBLISHED = {"eat": "eat", "panum": "panum", "hm": "zhou-patel"}       # results/paper/NAME-DATASET
IMAGES = {"cub2010": 2990, "cub": 5864, "cars": 8054, "sop": 59551, "inshop": 25882,
          "gaussian": 508}                                   # for training
MS = {"mobilenetv2": 1.0, "bninception": 1.2, "resnet18": 0.8, "resnet50": 2.5}


class Item(NamedTuple):
    """A table or figure: its training commands without data set and seed, flags of table.py or
    figures.py, and the attacks on its runs. saved: the picture shows embeddings. A figure with
    --metrics is drawn from its table."""
    paper: str
    kind: str
    number: str
    title: str
    commands: list = []
    shown: str = ""
    attack: str = ""
    datasets: str = ""
    ours: str = ""                                           # files of results/ with a smaller one
    note: str = ""
    saved: bool = False
    beside: bool = True                                      # there are published figures

    def runs(self, dataset):
        """{command of a run, its seed still to be filled in: the run's folder without a seed}."""
        found = {}
        for command in self.commands:
            command = f"{command} --dataset {dataset} --seed {{seed}}"
            found[command] = folder_of(command.format(seed=0)).removesuffix("0")
        return found

    def hours(self, datasets=DATASETS, ms=None):
        """Of all trainings with one seed."""
        commands = [command.format(seed=0) for dataset in self.datasets.split()
                    if dataset in datasets for command in self.runs(dataset)]
        return sum(training_hours(command, ms) for command in commands)

    def lines(self, seeds=(0,), datasets=DATASETS, ms=None):
        """What a shell runs, and comments."""
        lines = ["set -e"] if self.commands else []
        lines += [f"# {self.paper}, {self.kind} {self.number}: {self.title}"]
        lines += [f"# {self.note}"] if self.note else []
        if self.commands:
            lines.append(f"# about {len(seeds) * self.hours(datasets, ms):.3g} hours of training: "
                         f"passes x images x epochs x {self.assumed(ms)} ms of a pass")
        for dataset in self.datasets.split():
            if dataset not in datasets:
                continue
            runs = self.runs(dataset)
            lines += [f"python {command.format(seed=seed)} --out {run}{seed}"
                      for command, run in runs.items() for seed in seeds]
            if self.attack is not None:
                lines += self.shows(dataset, list(runs.values()), seeds)
        return [*lines, *(f"# {words}" for words in self.status())]

    def assumed(self, ms=None):
        archs = {parsed(f"{command} --dataset {self.datasets.split()[0]}")[1].arch
                 for command in self.commands}
        return f"{ms:g}" if ms else f"an assumed {max(MS[arch] for arch in archs)}"

    def shows(self, dataset, runs, seeds):
        """The commands that attack the runs, and write the table or draw the picture."""
        target = f"results/{self.paper}-{self.kind}{self.number}-{dataset}"
        patterns = " ".join(f"'{run}*'" for run in runs)
        if self.saved:
            files = [f"{run}{seeds[0]}.npz" for run in runs]
            return [*(f"python eval.py {run}{seeds[0]} {self.attack}--save-embeddings {file}"
                      for run, file in zip(runs, files)),
                    f"python results/figures.py {target} --saved {' '.join(files)}"]
        if self.kind == "figure" and not self.shown.startswith("--metrics"):
            return [f"python results/figures.py {target} {self.shown}-- {patterns} {self.attack}"]
        csv = f"results/paper/{PUBLISHED[self.paper]}-{dataset}.csv"
        names = {line.partition(",")[0].removesuffix(" vote")
                 for line in (ROOT / csv).read_text().splitlines()}
        beside = self.beside and {Path(run).name[len("paper-"):-len("-s")] for run in runs} & names
        lines = [f"python results/table.py {target} {self.shown} "
                 f"{f'--beside {csv} ' * bool(beside)}-- {patterns} {self.attack}"]
        if self.kind == "figure":
            lines.append(f"python results/figures.py {target} --table {target}.json")
        return lines

    def status(self):
        """What there is of it in results/."""
        measured = [name for name in self.ours.split() if (ROOT / "results" / name).exists()]
        if measured:
            yield f"in small: {', '.join(f'results/{name}' for name in measured)}"
        if not self.commands:
            yield "nothing to run"
        elif self.datasets != "gaussian":
            yield f"no results with this recipe yet ({', '.join(self.datasets.split())})"


@functools.cache
def parsed(command):
    """(the script as a module, its arguments) of a training command."""
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    return module, module.parse_args(flags)


def folder_of(command):
    """The folder of the run that a training command makes: as its script names it, with what the
    name leaves out."""
    module, args = parsed(command)
    name = module.run_name(args)
    if name.startswith(("est", "act")) and args.attack_steps != 8:
        name += f"-eta{args.attack_steps}"
    name = f"curves-{name}" if args.eval_every else f"hardness-{name}" if not args.lr else name
    return f"runs/paper-{name}-{args.dataset}-{args.arch}-s{args.seed}"


def passes(command):
    """Passes per training image (hm, est, act: per anchor) in an epoch with an attack."""
    module, args = parsed(command)
    steps = args.attack_steps
    if module.__name__ == "eat":
        return args.members * (steps + 1) + 2 * (args.members - args.split)
    if module.__name__ == "panum_at":
        pairs = 2 if (args.loss, args.perturb) == ("contrastive", "anchor") else 1
        return 2 + pairs * args.attack_rate * (steps + 1)
    if module.__name__ == "hardness_manipulation":
        return 5 if args.source == args.destination else 3 * steps + 5 + 2 * bool(args.ics)
    return args.members * {"natural": 1, "mixup": 1, "est": 2 * steps + 4, "act": 2 * steps + 5
                           }.get(args.method, steps + 3)


def training_hours(command, ms=None):
    """Of one training, from the cost model at the top of this file."""
    args = parsed(command)[1]
    seconds = passes(command) * IMAGES[args.dataset] * args.epochs * (ms or MS[args.arch]) / 1000
    return seconds / 3600


# ---- EAT. What attacks an ensemble, lambda of TRADES ...: README, "Fidelity".

def proxy_anchor(arch, *methods):
    return [f"{'' if method.startswith('eat') else 'baselines.py --method '}{method} --arch {arch}"
            for method in methods]


def picture(number, title, name, commands, attack, **more):
    ours = f"arena-grocery-figures/{Path(name).name} "
    ours += f"glyphs-{name} cub2010-figures/{Path(name).name}" if Path(name).parent.name else ""
    return Item("eat", "figure", number, title, commands, "" if more else "--rules vote ", attack,
                "cub2010", ours, **more)


DEFENSES = ("natural", "at", "mixup", "iat", "trades", "trades --trades-lambda 1", "eat.py")
SCORES = "--rules vote --metrics R@1 {} NMI F1"
OF_EAT = proxy_anchor("mobilenetv2", *DEFENSES)
RADII = "--eps 8/255 12/255 16/255 20/255 24/255 28/255 32/255"
EAT = [
    Item("eat", "table", "1", "defenses, MobileNetV2", OF_EAT, SCORES.format("R@2 R@4 R@8"), "",
         "cub2010 cars", "cub2010.md matched-cub2010.md glyphs-baselines.md",
         note="TRADES: lambda is unstated; 6 and 1"),
    Item("eat", "table", "2", "defenses, BN-Inception",
         proxy_anchor("bninception --weights bn_inception-52deb4733.pth", *DEFENSES),
         SCORES.format("R@2 R@4"), "", "cub2010"),
    Item("eat", "table", "3", "what the split and the shared attack add",
         proxy_anchor("mobilenetv2", "at --members 3", "eat.py --no-split", "eat.py"),
         SCORES.format("R@8"), "", "cub2010", "cub2010.md matched-cub2010.md glyphs-ablation.md"),
    Item("eat", "table", "4", "defenses, In-Shop", OF_EAT, SCORES.format("R@10 R@20"), "",
         "inshop"),
    picture("1", "AT and Mix-Up, embeddings before and after the attack by t-SNE", "embeddings.png",
            proxy_anchor("mobilenetv2", "at", "mixup"), "", saved=True),
    picture("2", "Recall@1 and F1 over the steps of the attack", "sweeps-figures/sweep-steps.png",
            OF_EAT, "--attack-steps 1 2 5 10 20 50"),
    picture("3", "Recall@1 and F1 over the radius", "sweeps-figures/sweep-eps.png", OF_EAT, RADII),
    picture("4", "the members beside the other defenses", "members-figures/per-member.png", OF_EAT,
            "-- 'runs/paper-eat-cub2010-mobilenetv2-s*' --against member_1 member_2 member_3"),
]


# ---- Panum et al.: seeds of the attack, as in the paper

def robust(*flags, losses=("contrastive", "triplet"), more=""):
    return [f"panum_at.py --loss {loss} {flag} --arch resnet50{more}"
            for loss in losses for flag in flags]


NATURAL, RATES = "--attack-rate 0", [f"--attack-rate {rate}" for rate in (0.1, 0.25, 0.5, 0.75, 1)]
TARGETS = [f"--perturb {image}" for image in ("positive", "negative", "anchor")]
ALL = "cub cars sop"
TEMPLATE = "--protocol template --attack {} --eps {} --seed 0 1 2 3 4"
PGD, BOTH = TEMPLATE.format("pgd", "0.01"), "--metrics R@1 mAP@R"
BEST = "published: the best rate, contrastive, CUB 18.7; SOP 48.7, loss not named; the rest is lost"
LOST = "the paper's figures are lost"


def curves(loss):
    return [f"{command} --eval-every 5" for target in TARGETS
            for command in robust(target, losses=[loss])]


PANUM = [
    Item("panum", "table", "1", "natural networks, PGD", robust(NATURAL), BOTH,
         TEMPLATE.format("pgd", "0.01 0.05 0.1"), ALL, "glyphs-panum-attacks.md"),
    Item("panum", "table", "2", "robust networks, PGD", robust(NATURAL, *RATES), BOTH, PGD, ALL,
         "glyphs-panum-rates.md", BEST),
    Item("panum", "table", "3", "robust networks, FGSM", robust(*RATES), BOTH,
         TEMPLATE.format("fgsm", "0.01"), ALL, "glyphs-panum-attacks.md", LOST, beside=False),
    Item("panum", "table", "4", "robust networks, C&W", robust(*RATES), BOTH,
         TEMPLATE.format("cw", "0.01"), ALL, "glyphs-panum-cw.md", LOST, beside=False),
    Item("panum", "table", "5", "attack rates, attacked", robust(*RATES), BOTH, PGD, ALL,
         "glyphs-panum-rates.md", LOST, beside=False),
    Item("panum", "table", "6", "attack rates, clean", robust(*RATES), BOTH, PGD, ALL,
         "glyphs-panum-rates.md", LOST, beside=False),
    Item("panum", "table", "7", "natural networks, FGSM and C&W", robust(NATURAL), BOTH,
         TEMPLATE.format("fgsm cw", "0.01 0.05 0.1"), ALL,
         "glyphs-panum-attacks.md glyphs-panum-cw.md", LOST, beside=False),
    Item("panum", "table", "E", "two Gaussians", robust(
        NATURAL, "--attack-rate 0.5", losses=["contrastive"], more=" --image-size 224 --lr 1e-5"),
         BOTH, PGD, "gaussian", "gaussian.md"),
    Item("panum", "table", "F", "which image is attacked", robust(*TARGETS), BOTH, PGD, ALL,
         "glyphs-panum-targets.md", "published: contrastive, CUB; the rest is lost"),
    Item("panum", "figure", "1", "queries and their neighbours, natural beside robust networks",
         robust(NATURAL, "--attack-rate 0.5"), "", "--protocol template ", "cub", saved=True),
    Item("panum", "figure", "2", "two Gaussians before and after the attack", robust(
        NATURAL, "--attack-rate 0.5", losses=["contrastive"], more=" --image-size 224 --lr 1e-5"),
         "", "--protocol template ", "gaussian", "gaussian-figures/embeddings.png", saved=True),
    Item("panum", "figure", "3", "loss, Recall@1 and mAP@R by epoch, contrastive",
         curves("contrastive"), "", "--protocol template", ALL,
         "glyphs-panum-figures/training.png"),
    Item("panum", "figure", "4", "loss, Recall@1 and mAP@R by epoch, triplet",
         curves("triplet"), "", "--protocol template", ALL, "glyphs-panum-figures/training.png"),
]


# ---- Zhou & Patel: ERS as in the authors' code, the only one to stand beside theirs

ETAS = (2, 4, 8, 16, 32)
SAMPLERS = ("random", "semihard", "softhard", "distance", "hardest")
ERS = "--protocol ers --objective ers-authors"
SHORT = "--metrics R@1 ERS", ERS
LONG = "--metrics R@1 R@2 NMI CA+ CA- QA+ QA- TMA ES:D ES:R LTM GTM GTT ERS", ERS


def hm(*flags, etas=(8,), source="softhard", destination="lga"):
    return [" ".join([f"hardness_manipulation.py --source {source} --destination {destination}",
                      *flags, f"--arch resnet18 --attack-steps {eta}"]) for eta in etas]


def older(method, source="random", etas=(8,)):
    return [f"baselines.py --method {method} --source {source} --arch resnet18 --attack-steps {eta}"
            for eta in etas]


PLAIN = hm(source="random", destination="random")
ACT = older("act", etas=ETAS) + older("act", "softhard", ETAS)
MAP = [command for source in SAMPLERS for destination in SAMPLERS
       for command in hm(source=source, destination=destination)]
STEPS = PLAIN + ACT + hm(etas=ETAS, source="random", destination="semihard") \
    + hm(etas=ETAS, destination="semihard")
GRADUAL = [*hm(destination="semihard"), *hm(destination="g-b"),
           *hm(destination="0"), *hm(destination="-0.2"), *hm(destination="-0.1", etas=ETAS),
           *hm(etas=ETAS)]
SLOPES = ACT + hm(etas=ETAS, destination="semihard") + hm(etas=ETAS) \
    + hm(destination="-0.1", etas=ETAS)
ICS = [command for source in ("random", "softhard") for destination in ("semihard", "lga")
       for flags in ([], ["--ics"]) for command in hm(*flags, source=source,
                                                      destination=destination)]
ICS += hm("--ics 1") + hm("--ics", etas=(2, 4, 16, 32))
MAIN = [*PLAIN, *older("est", etas=(8, 32)), *older("act", etas=(8, 32)), *hm(etas=(8, 32)),
        *hm("--ics", etas=(8, 32))]
HARDNESS = [f"{command} --lr 0 --epochs 20" for sampler in SAMPLERS
            for command in hm(source=sampler, destination=sampler)]
PLOT = "robustness and Recall@1 over the training cost, eta + 1 passes"
HM = [
    Item("hm", "table", "1", "hardness of five samplers", HARDNESS, "", None, "cub",
         note="mean: H_source in log.jsonl (-0.164 -0.126 -0.085 0.043 0.044); the variance is not "
              "logged"),
    Item("hm", "table", "2", "every source with every destination", MAP, *SHORT, "cub",
         "glyphs-hm-map.md"),
    Item("hm", "table", "3", "HM and ACT over eta", STEPS, *SHORT, "cub", "glyphs-hm-eta.md"),
    Item("hm", "table", "4", "gradual adversary", GRADUAL, *SHORT, "cub", "glyphs-hm-eta.md"),
    Item("hm", "table", "5", "intra-class structure", ICS, *SHORT, "cub", "glyphs-hm.md"),
    Item("hm", "table", "6", "defenses", MAIN, *LONG, ALL, "glyphs-hm.md"),
    Item("hm", "table", "7", "g_LGA with u = 0.2 and 2.2", hm(), *LONG, "cub",
         note="u = 2.2 (published: 34.8, 36.1) is not a flag"),
    Item("hm", "table", "8", "ICS with lambda 0.5 on SOP", hm("--ics 0.5", etas=(8, 32)),
         *LONG, "sop"),
    Item("hm", "table", "9", "other gradual adversaries",
         hm(destination="g-sqrt") + hm() + hm(destination="g-square"), *LONG, "cub"),
    Item("hm", "table", "10", "ICS with margin 0 and 0.2", hm("--ics"), *LONG, "cub",
         note="margin 0.2 (published: 35.8, 33.6) is not a flag"),
    Item("hm", "table", "11", "Table 2 with every attack", MAP, *LONG, "cub", "glyphs-hm-map.md"),
    Item("hm", "figure", "1", f"{PLOT}: ACT and HM[S,g_LGA]&ICS", ACT + hm("--ics", etas=ETAS),
         *SHORT, "cub", "glyphs-hm-eta.md"),
    *(Item("hm", "figure", number, f"{what}, a drawing") for number, what in zip(
        "2345", ("boundary cases of HM", "HM", "gradual adversary", "intra-class structure"))),
    Item("hm", "figure", "6", f"{PLOT}: HM[R,M] and HM[S,M] in Table 3", STEPS, *SHORT, "cub",
         "glyphs-hm-eta.md"),
    Item("hm", "figure", "7", f"{PLOT}: HM[S,g_LGA] in Table 4", SLOPES, *SHORT, "cub",
         "glyphs-hm-eta.md"),
    Item("hm", "figure", "8", f"{PLOT}: HM[S,g_LGA]&ICS in Table 5",
         ACT + hm(etas=ETAS) + hm("--ics", etas=ETAS), *SHORT, "cub", "glyphs-hm-eta.md"),
]
ITEMS = EAT + PANUM + HM


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", choices=tuple(PUBLISHED))
    parser.add_argument("--table", metavar="N", help="a number; panum: E and F, too")
    parser.add_argument("--figure", metavar="N")
    parser.add_argument("--dataset", choices=DATASETS, metavar="NAME", help="this one alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED",
                        help="of the training (the papers: one)")
    parser.add_argument("--ms", type=float, metavar="MS",
                        help="of a pass on your machine, for the hours (default: "
                             f"{', '.join(f'{arch} {ms}' for arch, ms in MS.items())})")
    args = parser.parse_args(argv)
    args.wanted = [item for item in ITEMS if item.paper == args.paper and (item.kind, item.number)
                   in (("table", args.table), ("figure", args.figure))]
    if len(args.wanted) < (args.table is not None) + (args.figure is not None):
        parser.error("name a --paper, and a --table or a --figure of it: without them all are "
                     "listed")
    args.datasets = (args.dataset,) if args.dataset else DATASETS
    if any(not {*args.datasets} & {*item.datasets.split()} for item in args.wanted
           if item.commands):
        parser.error(f"it is not of {args.dataset}: drop --dataset")
    return args


def main(args):
    for item in args.wanted:
        print(*item.lines(args.seeds, args.datasets, args.ms), sep="\n")
    if args.table is args.figure is None:
        for item in ITEMS:
            if args.paper in (None, item.paper):
                hours = [f"{item.hours(args.datasets, args.ms):.3g} h"] if item.commands else []
                print(f"--paper {item.paper} --{item.kind} {item.number}: "
                      f"{'; '.join([item.title, *hours, *item.status()])}")


if __name__ == "__main__":
    main(parse_args())
