"""The checks of eval.py: for each of them a model or an attack that passes, and one that fails.

`verdicts` stops at the last check that is asked for. An untrained network on noisy_classes is a
healthy model; the same one behind a rounded input is gradient masking as it is met in papers.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import Recorder, network, noisy_classes, retrieval_of, seeded
from torch.utils.data import DataLoader, TensorDataset

import eval as evaluator
from common import UserError
from eval import aim, attack_of, chance_level, check_robustness, checks, recall_under, tolerance

IMAGES, LABELS = noisy_classes(classes=10, per_class=6, spread=0.2)
NET = network(dim=16)
TEMPLATE = {"protocol": "template", "objective": "neighbour", "eps": 0.1, "steps": 5,
            "step_size": 0.04}
CHEAP = ["input unchanged", "finite", "deterministic", "batch dependence", "unit norm", "collapse",
         "singletons"]
NAMES = [*CHEAP, "zero gradients", "8 bit", "random noise", "steps x 2", "steps x 5",
         "10 restarts", "FGSM", "Square", "transfer", "eps sweep"]


def quantised(images):
    return NET(torch.round(8 * images) / 8)


def verdicts(model, *names, images=IMAGES, labels=LABELS, against="sum", **options):
    """[whether it passed] of these checks."""
    models = model if isinstance(model, list) else [model]
    attack = attack_of(against=against, **{**TEMPLATE, **options})
    retrieval, found = retrieval_of([evaluator.unit(own) for own in models], images, labels), {}
    for name, passed, _ in checks(retrieval, attack, models):
        found[name] = passed
        if set(names) <= set(found):
            return [found[name] for name in names]
    raise AssertionError(f"{names} are not among {list(found)}")


def failed(found):
    return {own["name"] for own in found if not own["passed"]}


def test_a_healthy_model_passes_every_check():
    found = check_robustness(NET, IMAGES, LABELS, transfer_from=quantised, **TEMPLATE)
    assert [own["name"] for own in found] == NAMES and not failed(found)
    json.dumps(found)
    text = {own["name"]: own["text"] for own in found}
    assert text["zero gradients"] == "0 % of the images have no gradient at the first step"
    assert text["10 restarts"].startswith("Recall@1 ") and text["eps sweep"].count(" -> ") == 7


def test_a_quantised_input_is_found_to_be_gradient_masking():
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=40)
    found = check_robustness(quantised, data, transfer_from=[NET], **TEMPLATE)
    assert {"zero gradients", "random noise", "transfer", "Square", "eps sweep"} <= failed(found)
    assert not {*CHEAP} & failed(found)
    text = {own["name"]: own["text"] for own in found}
    assert text["zero gradients"].startswith("100 % of the images have no gradient at the first "
                                             "step: gradients mislead (gradient masking)")


def test_an_attack_of_too_few_or_too_small_steps_is_found_out():
    model = Recorder(NET)
    assert verdicts(model, "zero gradients", "random noise", "steps x 5", "FGSM", "Square",
                    steps=1, step_size=0.01) == [True, False, False, False, False]
    change = [float((x - IMAGES).abs().max()) for x in model.seen if len(x) == 60]
    assert len(change) > 200 and max(change) <= 0.1 + 1e-5


def test_an_untouched_network_on_noise_sits_at_chance_and_passes():
    labels, images = torch.arange(100) % 10, torch.rand(100, 3, 8, 8, generator=seeded(0))
    found = check_robustness(NET, images, labels, eps=0.1, steps=4)
    assert not failed(found)                     # nothing is left to attack: noise does as much
    retrieval = retrieval_of([NET], images, labels)
    chance, clean = chance_level(retrieval, False), recall_under(retrieval, attack_of("template",
                                                                                     eps=0))
    assert chance == pytest.approx(9 / 99) and abs(clean - chance) <= tolerance(chance, 100)
    assert tolerance(0.5, 100) == pytest.approx(0.1) and tolerance(0.01, 10_000) == 0.02


@pytest.mark.parametrize("model, check", [
    (lambda x: NET(x.mul_(0.9).div_(0.9)), "input unchanged"),
    (lambda x: NET(x) + float("nan"), "finite"),
    (lambda x: F.normalize(F.dropout(NET(x), 0.1), dim=1), "deterministic"),
    (lambda x: F.normalize(NET(x) - NET(x).mean(0) / 2, dim=1), "batch dependence"),
    (lambda x: 3 * NET(x), "unit norm"), (lambda x: F.normalize(NET(x) + 20, dim=1), "collapse")])
def test_a_model_that_is_not_as_it_should_be_is_reported_and_that_alone(model, check):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outcome = dict(zip(CHEAP, verdicts(model, *CHEAP)))
    for name in ("unit norm", "collapse") if check == "finite" else ():      # NaN has no length
        del outcome[name]
    assert [name for name, passed in outcome.items() if not passed] == [check]


def sine(frequency):
    """A model with many local maxima and the same image for all of a class; a grey level counts."""
    images = (255 * noisy_classes(classes=10, per_class=6, spread=0)[0]).round() / 255
    return lambda x: NET((frequency * x).sin()), {"images": images, "objective": "shift"}


@pytest.mark.parametrize("frequency, eps, passes", [(2000, 0.4, False), (200, 4, True)])
def test_an_attack_smaller_than_a_grey_level_does_not_survive_8_bit(frequency, eps, passes):
    model, options = sine(frequency)
    assert verdicts(model, "8 bit", eps=eps / 255, step_size=eps / 1000, **options) == [passes]


def test_a_score_that_hangs_on_the_start_is_reported():
    model, options = sine(30)
    assert verdicts(model, "10 restarts", eps=8 / 255, step_size=2 / 255, steps=1, **options) == \
        [False]


def test_a_model_that_repairs_what_is_far_from_known_images_fails_the_sweep():
    def purified(x):
        apart, nearest = (x[:, None, 0, 0] - IMAGES[:, 0, 0]).abs().amax(2).min(1)
        return NET(torch.where((apart > 20 / 255).view(-1, 1, 1, 1), IMAGES[nearest], x))

    assert verdicts(purified, "eps sweep", eps=0.05) == [False]
    assert verdicts(NET, "eps sweep", eps=0.05) == [True]


@pytest.mark.parametrize("more", [{}, {"objective": "impostor", "against": "vote"}])
def test_what_the_attack_has_won_already_is_not_masked(more):
    models, images = [network(seed) for seed in range(3)], noisy_classes(10, 6, spread=0.5)[0]
    assert verdicts(models, "zero gradients", images=images, **more) == [True]
    retrieval = retrieval_of(models, images, LABELS)
    x = images.clone().requires_grad_()
    value, _ = aim(retrieval, attack_of(**{**TEMPLATE, **more}))
    moved = value([model(x) for model in models], torch.arange(60))
    (gradient,) = torch.autograd.grad(moved.sum(), x)
    assert not gradient.flatten(1).any(1).all()  # the objective itself is flat at some of them


def test_chance_is_the_share_of_the_own_class_among_the_candidates():
    labels, names = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1])
    images = torch.rand(6, 3, 8, 8, generator=seeded(0))
    assert chance_level(retrieval_of([NET], images, labels), False) == \
        pytest.approx((3 * 2 / 5 + 2 * 1 / 5 + 0) / 6)
    assert chance_level(retrieval_of([NET], images, labels, images[:4], names), False) == \
        pytest.approx((3 * 1 / 4 + 2 * 3 / 4 + 0) / 6)
    # of two classes, all images of one go to the other
    assert chance_level(retrieval_of([NET], images, torch.tensor([0, 0, 1, 1, 1, 1])), True) == 1


def test_queries_with_a_gallery_are_checked_with_the_template_protocol():
    with pytest.raises(UserError, match="need --protocol template"):
        next(checks(retrieval_of([NET], IMAGES, LABELS, IMAGES, LABELS), attack_of("clustering"),
                    [NET]))
