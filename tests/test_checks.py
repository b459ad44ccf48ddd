"""The checks of eval.py: for each of them a model or an attack that passes, and one that fails.

`verdicts` stops at the last check that is asked for. An untrained network on noisy_classes is a
healthy model; the same one behind a rounded input is gradient masking as it is met in papers.
"""

import itertools
import json
import re
import shutil

import pytest
import test_scripts
import torch
import torch.nn.functional as F
from test_attacks import Counted, retrieval_of
from test_evaluation import Recorder, network, noisy_classes, seeded, tensor_batches
from test_scripts import contents, evaluate, stored
from torch.utils.data import DataLoader, TensorDataset

import common
import eval as evaluator
from common import Attack, Retrieval, UserError
from eval import chance_level, check_robustness, checks, tolerance

pictures, finished_run, finished, fails = (test_scripts.pictures, test_scripts.finished_run,
                                           test_scripts.finished, test_scripts.fails)
IMAGES, LABELS = noisy_classes(classes=10, per_class=6, spread=0.2)
NET = network(dim=16)
TEMPLATE = {"protocol": "template", "objective": "neighbour", "eps": 0.1, "steps": 5,
            "step_size": 0.04}
NAMES = ["deterministic", "unit norm", "collapse", "zero gradients", "ball and range", "8 bit",
         "random noise", "transfer", "steps x 2", "steps x 5", "FGSM", "restarts", "Square",
         "eps sweep falls", "eps sweep ends at chance"]


def quantised(images):
    return NET(torch.round(8 * images) / 8)


def verdicts(model, *names, images=IMAGES, labels=LABELS, source=None, **attack):
    """{name: (passed, text)} of these checks."""
    retrieval = retrieval_of(model if isinstance(model, list) else [model], images, labels)
    source = source and (retrieval_of([source], images, labels), None)
    found = {}
    for own in checks(retrieval, Attack(**{**TEMPLATE, **attack}),
                      source=source):
        found[own["name"]] = own["passed"], own["text"]
        if set(names) <= set(found):
            return [found[name][0] for name in names]
    raise AssertionError(f"{names} are not among {list(found)}")


def failed(found):
    return {own["name"] for own in found if not own["passed"]}


# ---- whole models

def test_a_healthy_model_passes_every_check():
    found = check_robustness(NET, IMAGES, LABELS, transfer_from=quantised, **TEMPLATE)
    assert [own["name"] for own in found] == NAMES and not failed(found)
    json.dumps(found)
    text = {own["name"]: own["text"] for own in found}
    assert text["zero gradients"] == "0 % of the images have no gradient at the first step"
    assert text["restarts"].startswith("Recall@1 ") and text["restarts"].count(" -> ") == 2


def test_a_quantised_input_is_found_to_be_gradient_masking():
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=40)
    found = check_robustness(quantised, data, transfer_from=[NET], **TEMPLATE)
    assert {"zero gradients", "random noise", "transfer", "Square",
            "eps sweep ends at chance"} <= failed(found)
    text = {own["name"]: own["text"] for own in found}
    assert text["zero gradients"].startswith("100 % of the images have no gradient at the first "
                                             "step: the attack cannot see through this network")
    assert not {"deterministic", "unit norm", "collapse", "ball and range"} & failed(found)


def test_an_attack_of_too_few_steps_is_found_out():
    assert verdicts(NET, "zero gradients", "random noise", "steps x 5", "FGSM", "Square",
                    steps=1, step_size=0.01) == [True, False, False, False, False]


def test_an_untouched_network_on_noise_sits_at_chance_and_passes():
    labels = torch.arange(100) % 10
    images = torch.rand(100, 3, 8, 8, generator=seeded(0))
    found = check_robustness(NET, images, labels, eps=0.1, steps=4)
    assert not failed(found)                     # nothing is left to attack: noise does as much
    retrieval = retrieval_of([NET], images, labels)
    clean, chance = evaluator.headline(retrieval, retrieval.clean, None), chance_level(retrieval)
    assert chance == pytest.approx(9 / 99) and abs(clean - chance) <= tolerance(chance, 100)
    assert tolerance(0.5, 100) == pytest.approx(0.1) and tolerance(0.01, 10_000) == 0.02


# ---- one check each

def test_live_dropout_is_not_deterministic_but_a_dropout_module_in_training_mode_is():
    assert verdicts(lambda x: F.normalize(F.dropout(NET(x), 0.1), dim=1),
                    "deterministic") == [False]
    module = torch.nn.Sequential(network(), torch.nn.Dropout(0.5)).train()
    found = check_robustness(module, IMAGES, LABELS, eps=0.1, steps=1)
    assert "deterministic" not in failed(found) and "unit norm" not in failed(found)
    assert module.training and module[1].training and module[0][0].weight.requires_grad


def test_outputs_that_are_not_unit_vectors_are_reported_before_they_are_normalised():
    assert verdicts(lambda x: 3 * NET(x), "unit norm") == [False]
    found = checks(retrieval_of([NET], IMAGES, LABELS), Attack(), outputs=[lambda x: 3 * NET(x)])
    text = next(own["text"] for own in found if not own["passed"])
    assert text.startswith("embeddings have lengths from 3 to 3: ")


def test_a_collapsed_model_is_reported():
    assert verdicts(lambda x: F.normalize(NET(x) + 20, dim=1), "unit norm", "collapse") == \
        [True, False]


def test_images_out_of_the_ball_or_the_range_are_reported(monkeypatch):
    pgd = common.pgd
    for cheat in (lambda x: x + 0.01, lambda x: 1 + 2e-6 + 0 * x):
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "pgd", lambda objective, images, eps, size, steps, *start,
                          cheat=cheat, **more: (cheat if steps else lambda x: x)(
                              pgd(objective, images, eps, size, steps, *start, **more)))
            assert verdicts(NET, "ball and range", eps=1.0, step_size=1.0) == [False]
    assert verdicts(NET, "ball and range", eps=1.0, step_size=1.0) == [True]


def sine(frequency):
    """A model with many local maxima and the same image for all of a class; a grey level counts."""
    images = (255 * noisy_classes(classes=10, per_class=6, spread=0)[0]).round() / 255
    return lambda x: NET((frequency * x).sin()), {"images": images, "objective": "shift"}


@pytest.mark.parametrize("frequency, eps, passes", [(2000, 0.4, False), (200, 4, True)])
def test_an_attack_smaller_than_a_grey_level_does_not_survive_8_bit(frequency, eps, passes):
    model, options = sine(frequency)
    assert verdicts(model, "8 bit", eps=eps / 255, step_size=eps / 1000, **options) == [passes]


def test_rounded_images_and_those_with_noise_are_in_the_ball():
    model, eps, seen = Recorder(NET), 5.5 / 255, {}
    found = checks(retrieval_of([model], IMAGES, LABELS), Attack("template", "pgd", "shift", eps))
    for own in itertools.islice(found, 7):
        seen[own["name"]] = model.seen           # the last: what is scored
        model.seen = []
    (*_, rounded), (*draws, noisy) = seen["8 bit"], seen["random noise"]
    assert torch.equal((255 * rounded).round() / 255, rounded) and len(draws) == 20
    for x in (rounded, noisy, *draws):
        assert 4.5 / 255 < (x - IMAGES).abs().max() <= eps + 1e-5 and 0 <= x.min() <= x.max() <= 1


def test_a_score_that_hangs_on_the_start_is_reported():
    model, options = sine(30)
    assert verdicts(model, "restarts", eps=8 / 255, step_size=2 / 255, steps=1, **options) == \
        [False]


def test_a_model_that_repairs_what_is_far_from_known_images_fails_the_sweep():
    def purified(x):
        apart, nearest = (x[:, None, 0, 0] - IMAGES[:, 0, 0]).abs().amax(2).min(1)
        return NET(torch.where((apart > 20 / 255).view(-1, 1, 1, 1), IMAGES[nearest], x))

    assert verdicts(purified, "eps sweep falls", "eps sweep ends at chance", eps=0.05) == \
        [False, False]


@pytest.mark.parametrize("more", [{}, {"objective": "impostor", "against": "vote"}])
def test_what_the_attack_has_won_already_is_not_masked(more):
    models, images = [network(seed) for seed in range(3)], noisy_classes(10, 6, spread=0.5)[0]
    assert verdicts(models, "zero gradients", images=images, **more) == [True]
    retrieval = retrieval_of(models, images, LABELS)
    make, _ = evaluator.plan(retrieval, Attack(**{**TEMPLATE, **more}))[0]
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(make(torch.arange(60))(x).sum(), x)
    assert not gradient.flatten(1).any(1).all()  # the objective itself is flat at some of them


# ---- tolerance, chance, cost

def test_chance_is_the_share_of_the_own_class_among_the_candidates():
    labels, names = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1])
    images = torch.rand(6, 3, 8, 8, generator=seeded(0))
    assert chance_level(retrieval_of([NET], images, labels)) == \
        pytest.approx((3 * 2 / 5 + 2 * 1 / 5 + 0) / 6)
    assert chance_level(retrieval_of([NET], images, labels, images[:4], names)) == \
        pytest.approx((3 * 1 / 4 + 2 * 3 / 4 + 0) / 6)


def test_chance_among_images_that_went_to_other_classes():
    def moved(*sizes):
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        images = torch.rand(len(labels), 3, 8, 8, generator=seeded(0))
        return chance_level(retrieval_of([NET], images, labels), moved=True)

    assert moved(2, 5) == 1                      # of two classes, all of one go to the other
    labels, hits = torch.arange(60) // 15, []
    for seed in range(200):                      # where each went, and whom it meets there
        goal = labels[evaluator.random_others(labels, labels, seed)]
        for i in range(0, 60, 15):
            there = goal == goal[i]
            there[i] = False
            hits.append(float((labels[there] == labels[i]).double().mean()))
    assert moved(15, 15, 15, 15) == pytest.approx(sum(hits) / len(hits), abs=0.02)


def test_no_check_takes_more_passes_than_are_announced():
    model = Counted(NET)
    retrieval, attack = retrieval_of([model], IMAGES, LABELS), Attack("template", steps=2)
    model.passes = 0
    assert len(list(checks(retrieval, attack))) == len(NAMES) - 1
    assert 0.9 * evaluator.passes_of_checks(attack) <= model.passes
    assert model.passes <= evaluator.passes_of_checks(attack)


# ---- runs

def scripted(monkeypatch, **outcome):
    """Replace the checks by these: name = (passed, text)."""
    monkeypatch.setattr(evaluator, "checks", lambda *_: (
        {"name": name, "passed": passed, "text": text}
        for name, (passed, text) in outcome.items()))


def check(run, *more):
    evaluate(run, "--checks", "--attack-steps", "1", "--workers", "0", *more)


def test_the_checks_of_a_run_are_printed_and_stored(finished, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "SWEEP", (128,))
    other = shutil.copytree(finished, finished.parent / "other")
    before = stored(finished)
    check(finished, "--transfer-from", other)
    lines, results = capsys.readouterr().out.splitlines(), stored(finished)
    (entry,) = results["checks"]
    assert [own["name"] for own in entry["checks"]] == NAMES
    assert entry["n_queries"] == 24 and entry["steps"] == 1 and entry["objective"] == "shift"
    for own in entry["checks"]:
        assert f"{'pass' if own['passed'] else 'WARNING'}  {own['name']}: {own['text']}" in lines
    assert any("24 images: at most " in line and line.endswith(" passes") for line in lines)
    alerts = [f"check: {own['name']}: {own['text']} ({entry['attack_words']})"
              for own in entry["checks"] if not own["passed"]]
    assert results["warnings"] == before["warnings"] + alerts
    assert [line for line in lines if line.startswith("warning: finished: check: ")] == \
        [f"warning: finished: {alert}" for alert in alerts]
    assert {**results, "checks": 0, "warnings": 0, "robust": 0} == \
        {**before, "checks": 0, "warnings": 0, "robust": 0}


def test_what_is_measured_together_with_its_checks_is_stored_too(finished, monkeypatch):
    monkeypatch.setattr(evaluator, "SWEEP", (128,))
    check(finished, "--eps", "3/255")
    results = stored(finished)
    assert any(entry["eps"] == 3 / 255 for entry in results["robust"]) and results["checks"]


def test_a_later_check_of_the_same_attack_replaces_the_earlier_one(finished, capsys, monkeypatch):
    own = stored(finished)["warnings"]
    words = "(clustering: shift PGD-1, eps 8/255)"
    for outcome, flags, count, alerts in (
            ({"a": (False, "bad"), "b": (False, "odd")}, (), 1,
             [f"check: a: bad {words}", f"check: b: odd {words}"]),
            ({"a": (False, "bad")}, ("--seed", "7"), 2,
             [f"check: a: bad {words}", f"check: b: odd {words}"]),
            ({"a": (True, "good")}, (), 2, [f"check: a: bad {words}", f"check: b: odd {words}"]),
            ({"a": (True, "good")}, ("--seed", "7"), 2, [f"check: b: odd {words}"]),
            ({"b": (True, "even")}, (), 2, [])):
        scripted(monkeypatch, **outcome)
        check(finished, *flags)
        assert len(stored(finished)["checks"]) == count
        assert stored(finished)["warnings"] == own + alerts
        assert capsys.readouterr().out.count("warning: finished: check: ") == len(alerts)


def test_warnings_of_checks_stand_in_later_tables_of_the_run(finished, tmp_path, monkeypatch):
    other = shutil.copytree(finished, tmp_path / "other")
    scripted(monkeypatch, masking=(False, "cannot see"))
    check(finished)
    evaluate(other, finished, "--attack-steps", "2", "--workers", "0", "--table",
             tmp_path / "table")
    table = (tmp_path / "table.md").read_text()
    assert evaluator.table_markdown(json.loads((tmp_path / "table.json").read_text())) == table
    number = re.search(r"\nWarning (\[\d\]): finished: check: masking: cannot see \(clust", table)
    assert f"{number.group(1)[1:-1]}] |" in re.search("\n(. finished vote.*)", table).group(1)
    assert "check" not in table.split("Warning")[1] and "| other vote [1, 2] |" in table


def test_rows_name_their_warnings_by_number():
    rows = [{"name": name, "seeds": [0, 2][:seeds], "clean": {"R@1": [0.5, None]},
             "attacked": {"R@1": [0.25, None]}}
            for name, seeds in (("eat vote", 2), ("eat mean", 2), ("eat undefended", 2),
                                ("eat-nosplit", 2), ("lone", 1), ("quiet", 2))]
    content = {"rows": rows, "title": "t", "command": "c", "flags": dict.fromkeys(
        ("eat", "eat-nosplit", "lone", "quiet")), "warnings": [
            "eat-s0: a", "eat-nosplit-s2: b", "eat-s2: c", "lone: d", "eat-s1: another seed"]}
    table = evaluator.table_markdown(content)
    assert [line.split(" | ")[0] for line in table.splitlines()[4:10]] == [
        "| eat vote [1, 3]", "| eat mean [1, 3]", "| eat undefended", "| eat-nosplit [2]",
        "| lone [4] (seeds: 1)", "| quiet"]
    assert table.endswith("\n\nWarning [4]: lone: d\n\nWarning [5]: eat-s1: another seed\n")


def test_a_bare_checkpoint_and_a_dry_run_store_nothing(finished, tmp_path, capsys, monkeypatch):
    scripted(monkeypatch, masking=(False, "cannot see"))
    before = contents(tmp_path)
    check(finished, "--dry-run")
    check(finished / "last.pt")
    check(finished, "--dry-run", "--transfer-from", finished)
    assert contents(tmp_path) == before
    output = capsys.readouterr().out
    assert output.count(": check: masking: cannot see (") == 3
    assert output.count("nothing to transfer from itself") == 1


@pytest.mark.parametrize("bad", [
    "--protocol ers", "--protocol template --attack cw", "--protocol template --min-eps",
    "--attack pgd fgsm", "--attack fgsm", "--attack square", "--attack strong", "--eps 0.01 0.02",
    "--seed 0 1", "--objective shift nearest", "--objective joint", "--objective worst",
    "--attacker-share 50"])
def test_what_cannot_be_checked_is_one_line(bad, finished, fails):
    before = contents(finished)
    fails(2, ["--checks", "one PGD attack", "found "], evaluator, finished, "--checks",
          *bad.split())
    assert contents(finished) == before


def test_a_transfer_needs_checks_and_the_same_data(finished, tmp_path, fails):
    before = contents(finished)
    fails(2, ["--transfer-from", "--checks"], evaluator, finished, "--transfer-from", finished)
    fails(2, ["--transfer-from", "of a RUN"], evaluator, "--arch", "convnet", "--weights", "none",
          "--dataset", "gaussian", "--checks", "--transfer-from", finished)
    fails(2, ["nowhere"], evaluator, finished, "--checks", "--transfer-from", "nowhere")
    for flag, value in (("dataset", "cub"), ("image_size", 64), ("val_classes", 1)):
        other = torch.load(finished / "last.pt")
        other["args"][flag] = value
        torch.save(other, tmp_path / "other.pt")
        fails(2, ["other.pt", "other data"], evaluator, finished, "--checks", "--transfer-from",
              tmp_path / "other.pt")
    assert contents(finished) == before


def test_queries_with_a_gallery_are_checked_with_the_template_protocol():
    retrieval = Retrieval([NET], tensor_batches(IMAGES), LABELS, gallery_labels=LABELS,
                          gallery_batches=tensor_batches(IMAGES))
    with pytest.raises(UserError, match="template"):
        next(checks(retrieval, Attack()))
    found = itertools.islice(checks(retrieval, Attack(**TEMPLATE)), 8)
    assert [own["name"] for own in found] == [name for name in NAMES if name != "transfer"][:8]
