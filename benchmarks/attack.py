# SPDX-License-Identifier: MIT
"""`pgd` against torchattacks: the same network, images, steps and step size, the same result.

    python benchmarks/attack.py
    python benchmarks/attack.py --arch mobilenetv2 --image-size 64 --batch-size 30
    python benchmarks/attack.py --arch mobilenetv2 --image-size 224 --batch-size 120 --device cuda

torchattacks.PGD knows classifiers alone, so both maximise the cross-entropy of logits: embeddings
times random proxies. They start at the images, because a random start would differ, and take turns
in one process; both get channels_last weights and images. ratio = torchattacks / pgd, median over
the rounds. The results may differ where rounding turns the sign of a gradient near zero: `equal`
is the share of pixels that differ by less than 1e-6.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


class Classifier(nn.Module):
    """Logits (B, classes) from an embedding network."""

    def __init__(self, network, classes, scale=16):
        super().__init__()
        self.network = network
        self.proxies = nn.Parameter(torch.randn(classes, network.head.out_features))
        self.scale = scale

    def forward(self, images):
        return self.scale * self.network(images) @ F.normalize(self.proxies, dim=1).T


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(model, images, labels, eps, step_size, steps, rounds):
    """Seconds and peak memory (GPU) of either, and how far apart their results are."""
    import torchattacks

    peer = torchattacks.PGD(model, eps=eps, alpha=step_size, steps=steps, random_start=False)

    def ours():
        with common.frozen(model):
            return common.pgd(lambda x: F.cross_entropy(model(x), labels, reduction="none"), images,
                              eps, step_size, steps, random_start=False)

    calls = {"pgd": ours, "torchattacks": lambda: peer(images, labels)}
    results, seconds, peak = {}, {name: [] for name in calls}, dict.fromkeys(calls)
    for turn in range(rounds + 1):                           # the first is a warm-up
        for name, call in calls.items():
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats(images.device)
            started = clock(images.device)
            results[name] = call()
            if turn:
                seconds[name].append(clock(images.device) - started)
            if images.is_cuda:
                peak[name] = torch.cuda.max_memory_allocated(images.device) / 1e9
    apart = (results["pgd"] - results["torchattacks"]).abs()
    return {"pgd_ms": 1000 * median(seconds["pgd"]),
            "torchattacks_ms": 1000 * median(seconds["torchattacks"]),
            "ratio": median(b / a for a, b in zip(*seconds.values())),
            "pgd_peak_gb": peak["pgd"], "torchattacks_peak_gb": peak["torchattacks"],
            "equal": float((apart < 1e-6).double().mean()),
            "largest_difference": float(apart.max()),
            "moved": float((results["pgd"] - images).abs().mean())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="convnet")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--eps", type=common.fraction, default=8 / 255)
    parser.add_argument("--step-size", type=common.fraction, default=2 / 255)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="8 images, 2 rounds")
    parser.add_argument("--json", default=None, metavar="FILE",
                        help="default: results/benchmarks-attack-ARCH-SIZE-DEVICE.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch_size, args.rounds = 8, 2
    device = common.pick_device(args.device)
    torch.manual_seed(0)
    model = Classifier(common.build_model(args.arch), 100).to(device).eval()
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size)
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.randint(100, (args.batch_size,), device=device)
    rows = []
    print("steps    pgd ms  torchattacks ms  ratio  equal  largest difference")
    for steps in args.steps:
        rows.append({"arch": args.arch, "image_size": args.image_size, "steps": steps,
                     "batch_size": args.batch_size, **compare(model, images, labels, args.eps,
                                                              args.step_size, steps, args.rounds)})
        row = rows[-1]
        print(f"{steps:5} {row['pgd_ms']:9.2f} {row['torchattacks_ms']:16.2f} {row['ratio']:6.2f} "
              f"{row['equal']:6.4f} {row['largest_difference']:19.1e}", flush=True)
    cores = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{cores} CPU core{'s' * (cores > 1)}"
    words = sys.argv[1:] if argv is None else argv
    result = {"benchmark": "attack",
              "command": shlex.join(["python", "benchmarks/attack.py", *words]),
              "machine": name, "eps": args.eps, "step_size": args.step_size,
              "rounds": args.rounds, **common.provenance(device), "rows": rows}
    file = Path(args.json or ROOT / "results" / f"benchmarks-attack-{args.arch}-{args.image_size}-"
                f"{device.type}.json")
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}; {args.arch}, {args.image_size} px, {args.batch_size} images; {file}")
    return result


if __name__ == "__main__":
    main()
