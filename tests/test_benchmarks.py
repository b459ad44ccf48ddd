# SPDX-License-Identifier: MIT
"""The benchmarks run, write what they promise, and compare equal results. Nothing is timed here."""

import argparse
import json
import math
import os
import platform
import resource
import sys
from pathlib import Path

import pytest
import torch

import baselines
import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench  # noqa: E402
import loading  # noqa: E402
import metrics  # noqa: E402
import summary  # noqa: E402
import train_step  # noqa: E402
import worst  # noqa: E402

# Images through a network in a step on b images: forward, with input gradient, with full gradient.
# T attack steps, N networks, h images that panum_at.py attacks; pairs (hm, act) are b / 2 triplets.
COST = {
    "eat": lambda b, T, N, h: (N * b, N * T * b, 2 * (N - 1) * b),
    "panum": lambda b, T, N, h: (b, T * h, b + h),
    "hm": lambda b, T, N, h: (b, T * (3 * b // 2), 3 * b // 2),
    "est": lambda b, T, N, h: (b, T * b, b), "fast": lambda b, T, N, h: (0, T * b, b),
    "act": lambda b, T, N, h: (b, T * b, 3 * b // 2),
    **dict.fromkeys(("at", "iat", "trades"), lambda b, T, N, h: (b, T * b, 2 * b)),
    **dict.fromkeys(("natural", "mixup"), lambda b, T, N, h: (0, 0, b)),
}


def run(benchmark, tmp_path, *words):
    """The JSON that a quick run writes; it is also what main returns."""
    file = tmp_path / "result.json"
    result = benchmark.main(["--quick", *words, "--json", str(file)])
    written, pages = json.loads(file.read_text()), summary.RESULTS.glob("benchmarks-*.json")
    assert written == json.loads(json.dumps(result))
    assert written["machine"] == "1 CPU core" and written["threads"] == 1
    assert written["command"].startswith(f"python benchmarks/{written['benchmark']}.py --quick")
    stored = [page for page in (json.loads(path.read_text()) for path in pages)
              if page["benchmark"] == written["benchmark"]][0]
    assert stored.keys() == written.keys() and stored["rows"][0].keys() == written["rows"][0].keys()
    return written


def test_a_step_makes_the_passes_of_the_cost_model(tmp_path):
    before = torch.autograd.grad, train_step.baselines.frozen
    rows = run(train_step, tmp_path, "--defenses", *train_step.DEFENSES, "--batch-size", "8",
               "--attack-steps", "2")["rows"]
    assert {row["defense"] for row in rows} == COST.keys()
    for row in rows:
        networks, images = (3, 12) if row["defense"] == "eat" else (1, 8)
        assert (row["networks"], row["images"], row["attack_steps"]) == (networks, images, 2)
        attacked = row["passes"]["input"] // 2
        assert tuple(row["passes"].values()) == COST[row["defense"]](images, 2, networks, attacked)
        assert attacked > 0 or row["defense"] in ("natural", "mixup")
        assert all(0 < row[name] < math.inf for name in (
            "images_per_second", "step_ms", "bare_ms", "field_ms", "efficiency", "speedup"))
    assert before == (torch.autograd.grad, train_step.baselines.frozen)


@pytest.mark.parametrize("defense", ["eat", "at", "hm"])
def test_a_step_is_the_one_of_the_script(defense, tmp_path):
    loading.draw_photos(tmp_path / "data", 40, 40, 40)       # one batch, of pairs of 20 classes
    args = train_step.script_args(
        defense, argparse.Namespace(arch="convnet", image_size=32), "--dataset=folder",
        f"--data-root={tmp_path / 'data'}", f"--out={tmp_path / 'run'}", "--epochs=1",
        "--attack-steps=1", "--batch-size=80", "--device=cpu")
    train_step.SCRIPTS.get(defense, train_step.baselines).main(args)
    photos, device = common.load_run_data(args)[0], torch.device("cpu")
    common.cache_images([photos], args.cache_gb, 1)
    networks, step = train_step.start(defense, args, photos.labels, device)
    common.seed_torch(args.seed, 0, common.TRAIN)
    (batch,) = loading.load(defense, args, photos, device)
    step(*batch)
    for network, state in zip(networks, common.load_checkpoint(tmp_path / "run")["members"]):
        torch.testing.assert_close(dict(network.state_dict()), dict(state), rtol=0, atol=0)


def test_both_libraries_find_the_same_scores(tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("sklearn")
    retrieval, clustering = run(metrics, tmp_path)["rows"]
    assert min(row["time_ratio"] * row["memory_ratio"] for row in (retrieval, clustering)) > 0
    assert 0.1 < retrieval["ours"]["scores"]["R@1"] < 0.9    # neither trivial nor hopeless
    assert retrieval["ours"]["scores"] == pytest.approx(retrieval["peer"]["scores"], abs=1e-6)
    # Either starts its own k-means.
    assert abs(clustering["ours"]["scores"]["NMI"] - clustering["peer"]["scores"]["NMI"]) < 0.15


def test_loading(tmp_path):
    assert bench.call(False, os.getpid) != os.getpid()       # a process of its own
    result = run(loading, tmp_path, "--defenses", "eat", "--attack-steps", "1")
    assert min(result[f"{name}_images_per_second"] for name in ("first", "later", "uncached")) > 0
    (row,) = result["rows"]
    assert min(row["ratio"], row["real_ms"], row["fixed_ms"]) > 0 and 0 < row["blocked"] < 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt belongs to glibc")
def test_on_a_cpu_freed_memory_is_not_given_back():
    common.pick_device("cpu")
    taken = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)                                    # 64 MiB: else 16,384 pages
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(taken) < 2**10


def test_the_page_is_made_of_the_stored_figures():
    assert summary.text() == (summary.RESULTS / "benchmarks.md").read_text()
    rows = [{"defense": "eat", "speedup": 2.0}, {"defense": "eat", "speedup": 1.89}]
    assert summary.target(rows[:1], *summary.TARGETS["train_step"][2])[0].endswith("way: met")
    assert summary.target(rows[1:], *summary.TARGETS["train_step"][2])[0].endswith(
        "way: missed by eat (1.89)")


def test_the_worst_of_survivors_is_that_of_all_parts(tmp_path):
    baselines.main(baselines.parse_args([
        "--epochs=1", "--limit-queries=20", "--val-classes=40", f"--out={tmp_path / 'run'}"]))
    (row,) = run(worst, tmp_path, str(tmp_path / "run"), "--eps", "0.01")["rows"]
    assert row["equal"] and row["share"] == 6 * row["ratio"] > 0 and row["parts"] == 7
