"""Golden numbers: what two epochs of every method, and every attack on them, come to.

    python tests/golden.py FILE.json             # write them, or compare with those in FILE
    python tests/golden.py FILE.json --train     # parameters alone

One thread, 204 tiny pictures of six classes. Every parameter as a hash, every score as it is: a
refactoring must reproduce them to the bit on one machine. Not a test, because another processor or
another torch rounds differently.
"""

import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

RUNS = {
    "natural": "baselines --method natural", "at": "baselines --method at",
    "mixup": "baselines --method mixup",
    "mixup-embedding": "baselines --method mixup --mixup-target embedding",
    "iat": "baselines --method iat", "trades": "baselines --method trades",
    "fast": "baselines --method fast", "at-x3": "baselines --method at --members 3",
    "at-x3-split": "baselines --method at --members 3 --split",
    "natural-x2": "baselines --method natural --members 2",
    "fare": "baselines --method fare --teacher {natural}",
    "est": "baselines --method est", "act": "baselines --method act",
    "eat": "eat", "eat-nosplit": "eat --no-split", "eat-label": "eat --attack-loss label",
    "eat-batch": "eat --attack-loss batch", "panum": "panum_at --images-per-class 4",
    "panum-triplet": "panum_at --loss triplet --images-per-class 4",
    "panum-anchor": "panum_at --perturb anchor --images-per-class 4",
    "panum-negative": "panum_at --loss triplet --perturb negative --images-per-class 4",
    "panum-regularised": "panum_at --reg-weight 0.5 --images-per-class 4 --attack-rate 1",
    "hm": "hardness_manipulation", "hm-ics": "hardness_manipulation --ics",
    "hm-semihard": "hardness_manipulation --source random --destination semihard",
    "hm-constant": "hardness_manipulation --destination -0.05",
    "hm-g-b": "hardness_manipulation --destination g-b",
    "hm-plain": "hardness_manipulation --destination softhard",
}
TINY = ("--dataset folder --arch convnet --image-size 32 --embedding-dim 8 --epochs "
        "2 --batch-size 12 --lr 0.001 --eps 8/255 --step-size 4/255 --attack-steps 2 --workers 0 "
        "--device cpu")
STRENGTH = "--eps 8/255 --step-size 2/255 --attack-steps 4"
ATTACKS = [f"--objective shift {STRENGTH}", f"--protocol template {STRENGTH}",
           "--attack fgsm --eps 8/255", "--protocol template --attack fgsm --eps 8/255",
           f"--objective joint {STRENGTH}", f"--protocol template --objective impostor {STRENGTH}",
           f"--protocol template --objective impostor --restarts 2 {STRENGTH}",
           "--protocol template --attack square --attack-steps 20 --eps 4/255",
           "--protocol template --attack cw --attack-steps 5 --eps 8/255",
           "--protocol ers --attack-steps 3",
           f"--objective worst {STRENGTH}", f"--protocol template --objective worst {STRENGTH}",
           "--protocol template --attack strong --eps 4/255", "--attack strong --eps 4/255"]
SEVERAL = [f"--protocol template --objective impostor --against {what} {STRENGTH}"
           for what in ("concat", "mean", "vote", "member_2")] + [
               f"--objective joint --against vote {STRENGTH}"]


def pictures(root):
    """Six classes of 34 striped pictures with noise."""
    generator, ramp = torch.Generator().manual_seed(0), torch.arange(32) / 31
    for label in range(6):
        (root / f"class{label}").mkdir()
        stripes = torch.stack([ramp, ramp.flip(0), (ramp * (label + 2) * 4).sin().abs()])
        pattern = stripes.roll(label, 0)[:, None, :].expand(3, 32, 32)
        for i in range(34):
            image = (pattern + 0.3 * torch.rand(3, 32, 32, generator=generator)).clamp(0, 1)
            pixels = (image * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i:02d}.png")


def scores_of(record):
    """{"rule metric": score} of one record, and Recall@1 under its parts."""
    return {f"{rule} {name}": value for rule, score in record["scores"].items()
            for name, value in {**score, **(score.get("parts") or {})}.items()
            if isinstance(value, (float, int))}


def main(path, attack_too=True):
    torch.set_num_threads(1)
    evaluator, found = importlib.import_module("eval") if attack_too else None, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "pictures").mkdir()
        pictures(folder / "pictures")
        for name, command in RUNS.items():
            script, *flags = command.format(natural=folder / "natural").split()
            module, out = importlib.import_module(script), folder / name
            module.main(module.parse_args([*TINY.split(), *flags, "--data-root",
                                           str(folder / "pictures"), "--out", str(out)]))
            for i, network in enumerate(common.load_model(out)):
                for key, value in network.state_dict().items():
                    content = value.contiguous().numpy().tobytes()
                    found[f"{name}: {i} {key}"] = hashlib.sha256(content).hexdigest()[:12]
            attacks = ATTACKS + SEVERAL * (len(common.load_model(out)) > 1)
            for attack in attacks if attack_too else ():
                evaluator.main(evaluator.parse_args(
                    [str(out), *attack.split(), "--workers", "0", "--overwrite", *(
                        ["--device", "cpu"])]))
            results = json.loads((out / "results.json").read_text())
            for record in results["robust"] if attack_too else ():
                attack = " ".join(str(record[key]) for key in (
                    "protocol", "attack", "objective", "against", "steps", "restarts"))
                attack += f" {record['eps']:.6f}"
                for key, score in scores_of(record).items():
                    found[f"{name}: {attack}: {key}"] = score
    if not Path(path).exists():
        Path(path).write_text(json.dumps(found, indent=0))
        return print(f"wrote {len(found)} numbers to {path}")
    stored = {key: value for key, value in json.loads(Path(path).read_text()).items()
              if attack_too or isinstance(value, str)}
    shared = stored.keys() & found.keys()
    other = sorted(key for key in shared if stored[key] != found[key])
    print(f"{len(shared)} numbers compared, {len(other)} differ; {len(stored.keys() - shared)} only"
          f" stored, {len(found.keys() - shared)} only here")
    print(*(f"{key}: {stored[key]} -> {found[key]}" for key in other[:40]), sep="\n")
    print(*sorted(stored.keys() - shared)[:15], sep="\n")
    sys.exit(bool(other))


if __name__ == "__main__":
    main(sys.argv[1], attack_too="--train" not in sys.argv)
