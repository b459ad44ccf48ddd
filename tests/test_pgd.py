"""The one attack, `pgd`, against closed forms, torchattacks and a naive loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import frozen, pgd, shift_objective

SEEDS = (0, 1, 2)
EPS, STEP = 8 / 255, 2 / 255


def random_images(count=4, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)


def small_classifier(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 5)
    return nn.Sequential(*layers).double()


def batchnorm_network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).double()


def cross_entropy(model, labels):
    return lambda x: F.cross_entropy(model(x), labels, reduction="none")


def total(x):
    return x.sum((1, 2, 3))


def projection(x, images, eps=EPS):
    return torch.maximum(torch.minimum(x, images + eps), images - eps).clamp(0, 1)


def naive_pgd(objective, images, start, eps, step_size, steps):
    x = start
    for _ in range(steps):
        x = x.clone().requires_grad_()
        objective(x).sum().backward()
        x = projection(x.detach() + step_size * x.grad.sign(), images, eps)
    return x.detach()


# ---- closed forms and oracles
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_pgd_reaches_the_optimum_of_a_linear_objective(random_start, seed):
    torch.manual_seed(seed)
    w, x = torch.randn(3, 6, 6, dtype=torch.float64), random_images(seed=seed)
    adversarial = pgd(lambda z: total(z * w), x, EPS, STEP, 10, random_start)
    torch.testing.assert_close(adversarial, (x + EPS * w.sign()).clamp(0, 1))


@pytest.mark.parametrize("step, steps", [(STEP, 1), (STEP, 3), (STEP, 10), (EPS, 1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_pgd_equals_torchattacks_for_cross_entropy_and_one_step_of_eps_is_fgsm(step, steps, seed):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = small_classifier(seed), random_images(8, seed), torch.arange(8) % 5
    oracle = torchattacks.FGSM(model, eps=EPS) if step == EPS else torchattacks.PGD(
        model, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    ours = pgd(cross_entropy(model, y), x, EPS, step, steps, random_start=False)
    assert not torch.equal(ours, x)
    torch.testing.assert_close(ours, oracle(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reach", [1, 5], ids=["start in the ball", "start outside"])
@pytest.mark.parametrize("seed", SEEDS)
def test_pgd_from_a_given_start_equals_a_naive_loop(reach, seed):
    model, x, y = small_classifier(seed), random_images(8, seed), torch.arange(8) % 5
    start = x + reach * EPS * (2 * random_images(8, seed + 50) - 1)
    kept, objective = (x.clone(), start.clone()), cross_entropy(model, y)
    for steps in (0, 1, 7):          # without a step: the projected start, with no noise on top
        ours = pgd(objective, x, EPS, STEP, steps, start=start)
        theirs = naive_pgd(objective, x, projection(start, x), EPS, STEP, steps)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.equal(x, kept[0]) and torch.equal(start, kept[1])     # they are not written to


def test_a_tuple_objective_moves_all_three_images():
    torch.manual_seed(0)
    w, x = torch.randn(3, 3, 6, 6, dtype=torch.float64), random_images(6)

    def objective(stacked):                                            # [a; p; n] -> (T,)
        a, p, n = stacked.chunk(3)
        return total(a * w[0] + p * w[1] - n * w[2])

    signs = torch.cat([w[:1], w[1:2], -w[2:]]).sign().repeat_interleave(2, dim=0)
    moved = pgd(objective, x, EPS, STEP, 10, random_start=False)
    torch.testing.assert_close(moved, (x + EPS * signs).clamp(0, 1))


def test_the_shift_objective_is_one_minus_the_cosine_summed_over_the_models():
    models, x = [small_classifier(0), small_classifier(1)], random_images()
    spheres = [lambda z, model=model: F.normalize(model(z), dim=1) for model in models]
    references = [sphere(x) for sphere in spheres]                     # with a graph: detached
    moved = random_images(seed=5)
    expected = sum(1 - F.cosine_similarity(sphere(moved), reference, dim=1)
                   for sphere, reference in zip(spheres, references))
    objective = shift_objective(spheres, references)
    torch.testing.assert_close(objective(moved), expected)
    objective(moved).sum().backward()
    own = [parameter.grad for parameter in models[0].parameters()]
    fixed = F.cosine_similarity(spheres[0](moved), references[0].detach(), dim=1)
    for grad, wanted in zip(own, torch.autograd.grad(-fixed.sum(), models[0].parameters())):
        torch.testing.assert_close(grad, wanted)


# ---- ball, box, start
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_size", [STEP, 0.5])
def test_the_ball_and_the_box_are_respected(random_start, dtype, step_size):
    model, y = small_classifier().to(dtype), torch.arange(8) % 5
    x = random_images(8).to(dtype).round(decimals=1)                   # some are exactly 0 or 1
    adversarial = pgd(cross_entropy(model, y), x, EPS, step_size, 5, random_start)
    assert adversarial.shape == x.shape and adversarial.dtype == dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (adversarial - x).abs().max() <= EPS + 1e-6


def test_the_random_start_fills_the_ball_evenly_and_follows_the_torch_seed():
    x, starts = torch.full((16, 3, 16, 16), 0.5, dtype=torch.float64), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        starts.append(pgd(total, x, EPS, STEP, 0))
    shift = (starts[0] - x) / EPS
    assert shift.abs().max() <= 1 + 1e-12
    assert abs(shift.mean()) < 0.03 and abs(shift.square().mean() - 1 / 3) < 0.02
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert torch.equal(pgd(total, x, EPS, STEP, 0, random_start=False), x)


def test_an_image_without_gradient_stays_as_it_is_to_the_bit():
    weight, x = torch.tensor([0.0, 1.0]), random_images(2).float()
    moved = pgd(lambda z: weight * total(z), x, EPS, STEP, 5, random_start=False)
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])


# ---- what the attack leaves behind
@pytest.mark.parametrize("context", [True, False], ids=["frozen", "as it is"])
def test_the_attack_leaves_parameters_gradients_statistics_and_modes_alone(context):
    model, x, y = batchnorm_network().train(), random_images(), torch.arange(4)
    F.cross_entropy(model(x), y).backward()                            # gradients are there
    model[4].weight.grad = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if context:
        with frozen(model):
            pgd(cross_entropy(model, y), x, EPS, STEP, 3)
    else:                            # the caller's mode: live statistics are then the caller's, too
        pgd(cross_entropy(model, y), x, EPS, STEP, 3)
    state = model.state_dict()
    moved = {name for name in before if not torch.equal(state[name], before[name])}
    assert moved == (set() if context else
                     {"1.running_mean", "1.running_var", "1.num_batches_tracked"})
    for parameter, grad in zip(model.parameters(), grads):
        assert parameter.requires_grad
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert all(module.training for module in model.modules())


def test_pgd_works_inside_no_grad_and_returns_detached_images():
    model, x, y = small_classifier(), random_images().requires_grad_(), torch.arange(4)
    for steps in (0, 3):
        outside = pgd(cross_entropy(model, y), x, EPS, STEP, steps, random_start=False)
        with torch.no_grad():
            inside = pgd(cross_entropy(model, y), x, EPS, STEP, steps, random_start=False)
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled() and torch.equal(inside, outside)
        assert not outside.requires_grad and outside.grad_fn is None
    assert x.grad is None
