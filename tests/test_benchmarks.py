"""The benchmarks run, write what they promise, and compare equal results. Nothing is timed here."""

import json
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attack  # noqa: E402
import loading  # noqa: E402
import metrics  # noqa: E402
import summary  # noqa: E402
import train_step  # noqa: E402

SMALL_STEP = ["--quick", "--batch-size", "8", "--attack-steps", "2"]


def run(benchmark, tmp_path, *words):
    """The JSON that a quick run writes; it is also what main returns."""
    file = tmp_path / "result.json"
    result = benchmark.main([*words, "--json", str(file)])
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(result))
    assert written["machine"] == "1 CPU core" and written["threads"] == 1
    assert written["command"].startswith(f"python benchmarks/{written['benchmark']}.py")
    assert {"versions", "commit", "rows"} <= written.keys()
    return written


@pytest.mark.parametrize("defense", train_step.COST)
def test_a_step_makes_the_passes_of_the_cost_model(defense, tmp_path, capsys):
    result = run(train_step, tmp_path, "--defenses", defense, *SMALL_STEP)
    (row,) = result["rows"]
    assert row["defense"] == defense and result["flags"] == SMALL_STEP[1:]
    assert sum(row["passes"].values()) > 0 and row["attack_steps"] == 2
    assert row["networks"] == (3 if defense == "eat" else 1)
    for name in ("images_per_second", "step_ms", "bare_ms", "field_ms", "efficiency", "speedup",
                 "peak_gb"):
        assert row[name] > 0
    assert f"\n{defense} " in capsys.readouterr().out


def test_passes_of_eat_as_the_design_counts_them():
    # N references, N T of the attack, 2 per member over (N - 1) / N of the batch
    assert train_step.COST["eat"](45, 4, 3, 0) == (3 * 45, 3 * 4 * 45, 3 * 2 * 30)


def test_another_number_of_passes_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(train_step.COST, "at", lambda b, T, N, h: (b, (T - 1) * b, 2 * b))
    with pytest.raises(RuntimeError, match="a step of at sends .* through its networks"):
        run(train_step, tmp_path, "--defenses", "at", *SMALL_STEP)


def test_measuring_leaves_no_trace(tmp_path):
    before = [common.progress, common.EmbeddingModel.__call__]
    before += [getattr(train_step.baselines, name) for name in ("pgd", "frozen")]
    run(train_step, tmp_path, "--defenses", "at", *SMALL_STEP)
    assert before == [common.progress, common.EmbeddingModel.__call__,
                      *(getattr(train_step.baselines, name) for name in ("pgd", "frozen"))]


def test_the_attack_of_the_field_finds_the_same_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 1)).double()
    images = torch.rand(5, 3, 6, 6, dtype=torch.float64)
    settings = (lambda x: model(x)[:, 0], images, 8 / 255, 2 / 255, 5, False)
    theirs = train_step.field_pgd(*settings)
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())  # what it wastes
    torch.testing.assert_close(theirs, common.pgd(*settings), rtol=0, atol=1e-12)


def test_pgd_and_torchattacks_find_the_same_images(tmp_path, capsys):
    pytest.importorskip("torchattacks")
    result = run(attack, tmp_path, "--quick", "--steps", "1", "5")
    for row, steps in zip(result["rows"], (1, 5), strict=True):
        assert row["steps"] == steps and row["batch_size"] == 8
        assert row["ratio"] > 0 and row["pgd_ms"] > 0 and row["torchattacks_ms"] > 0
        assert row["equal"] > 0.999 and row["moved"] > 1 / 255
    assert "torchattacks" in capsys.readouterr().out


def test_both_libraries_find_the_same_scores(tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("sklearn")
    retrieval, clustering = run(metrics, tmp_path, "--quick")["rows"]
    assert (retrieval["task"], clustering["task"]) == ("retrieval", "clustering")
    for row in (retrieval, clustering):
        assert row["time_ratio"] > 0 and row["memory_ratio"] > 0
        assert min(row[side][name] for side in ("ours", "peer")
                   for name in ("seconds", "peak_gb", "before_gb")) > 0
    scores, theirs = retrieval["ours"]["scores"], retrieval["peer"]["scores"]
    assert 0.1 < scores["R@1"] < 0.9                         # neither trivial nor hopeless
    assert scores == pytest.approx(theirs, abs=1e-6)
    # Either starts its own k-means.
    assert abs(clustering["ours"]["scores"]["NMI"] - clustering["peer"]["scores"]["NMI"]) < 0.15
    assert "seconds" in capsys.readouterr().out


def test_a_measurement_in_its_own_process():
    assert metrics.in_own_process(os.getpid) not in (None, os.getpid())
    found = metrics.measure("ours", "retrieval", "tiny", "cpu")
    assert found["scores"].keys() == {"R@1", "mAP@R"} and found["seconds"] > 0
    assert found["peak_gb"] >= found["before_gb"] > 0


def test_loading(tmp_path, capsys):
    result = run(loading, tmp_path, "--quick", "--defenses", "eat", "natural", "--workers", "1",
                 "--attack-steps", "1")
    assert min(result[f"{name}_images_per_second"] for name in ("first", "later", "uncached")) > 0
    assert [row["defense"] for row in result["rows"]] == ["eat", "natural"]
    for row in result["rows"]:
        assert row["ratio"] > 0 and row["real_ms"] > 0 and row["fixed_ms"] > 0
        assert 0 < row["blocked"] < 1 and row["batch_size"] == 12
    assert "blocked" in capsys.readouterr().out


def test_what_a_fixed_epoch_repeats_is_the_last_real_batch(tmp_path, monkeypatch):
    seen = []
    real = loading.baselines.natural
    monkeypatch.setattr(loading.baselines, "natural",
                        lambda model, images, *rest: seen.append(images) or real(model, images,
                                                                                 *rest))
    run(loading, tmp_path, "--quick", "--defenses", "natural", "--workers", "0")
    steps = 48 // 12                                         # an epoch; they take turns, real first
    epochs = [seen[start:start + steps] for start in range(0, len(seen), steps)]
    assert len(epochs) == 4
    for real_epoch, fixed_epoch in (epochs[:2], epochs[2:]):
        assert len({id(images) for images in real_epoch}) == steps
        assert {id(images) for images in fixed_epoch} == {id(real_epoch[-1])}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt belongs to glibc")
def test_on_a_cpu_freed_memory_is_not_given_back():
    import resource

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    common.pick_device("cpu")
    taken = []
    for _ in range(6):
        before = faults()
        torch.ones(2**24)                            # 64 MiB: else 16,384 pages of 4 KiB
        taken.append(faults() - before)
    assert min(taken) < 2**10


def test_the_page_is_made_of_the_stored_figures():
    assert summary.text() == (summary.RESULTS / "benchmarks.md").read_text()


def test_a_target_is_met_or_missed_by_its_figures():
    def wanted(value):
        return value >= 0.9

    assert summary.target("fast", {"eat": 0.9, "at": 1.0}, wanted) == ["- fast: met"]
    assert summary.target("fast", {"eat": 0.9, "at": 0.89}, wanted) == [
        "- fast: missed by at (0.89)"]
    assert summary.target("fast", {}, wanted) == []
