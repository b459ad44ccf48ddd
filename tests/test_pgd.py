"""The one attack, `pgd`, against closed forms, torchattacks and a naive loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import eval_mode, pgd

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


def oscillating(target):
    """Minus the distance to a target inside the ball: large steps jump over it."""
    return lambda x: -(x - target).abs().sum((1, 2, 3))


def naive_pgd(objective, images, start, eps, step_size, steps):
    x = start
    for _ in range(steps):
        x = x.clone().requires_grad_()
        objective(x).sum().backward()
        moved = x.detach() + step_size * x.grad.sign()
        x = torch.maximum(torch.minimum(moved, images + eps), images - eps).clamp(0, 1)
    return x.detach()


# ---- closed forms and oracles


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_pgd_reaches_the_optimum_of_a_linear_objective(random_start, seed):
    torch.manual_seed(seed)
    w, x = torch.randn(3, 6, 6, dtype=torch.float64), random_images(seed=seed)
    adversarial = pgd(lambda z: (z * w).sum((1, 2, 3)), x, EPS, STEP, 10, random_start)
    torch.testing.assert_close(adversarial, (x + EPS * w.sign()).clamp(0, 1))


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_pgd_equals_torchattacks_for_cross_entropy(steps, seed):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = small_classifier(seed), random_images(8, seed), torch.arange(8) % 5
    oracle = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    ours = pgd(cross_entropy(model, y), x, EPS, STEP, steps, random_start=False)
    assert not torch.equal(ours, x)
    torch.testing.assert_close(ours, oracle(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_pgd_from_a_given_start_equals_a_naive_loop(seed):
    model, x, y = small_classifier(seed), random_images(8, seed), torch.arange(8) % 5
    start = (x + EPS * (2 * random_images(8, seed + 50) - 1)).clamp(0, 1)
    ours = pgd(cross_entropy(model, y), x, EPS, STEP, 7, start=start)
    theirs = naive_pgd(cross_entropy(model, y), x, start, EPS, STEP, 7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_one_step_of_size_eps_is_fgsm():
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = small_classifier(), random_images(8), torch.arange(8) % 5
    ours = pgd(cross_entropy(model, y), x, EPS, EPS, 1, random_start=False)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    torch.testing.assert_close(ours, (x + EPS * grad.sign()).clamp(0, 1), rtol=0, atol=1e-12)
    theirs = torchattacks.FGSM(model, eps=EPS)(x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ---- ball, box, start


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_size", [STEP, 0.5])
def test_the_ball_and_the_box_are_respected(keep, random_start, dtype, step_size):
    model, y = small_classifier().to(dtype), torch.arange(8) % 5
    x = random_images(8).to(dtype).round(decimals=1)  # some pixels are exactly 0 or 1
    adversarial = pgd(cross_entropy(model, y), x, EPS, step_size, 5, random_start, keep=keep)
    assert adversarial.shape == x.shape and adversarial.dtype == dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (adversarial - x).abs().max() <= EPS + 1e-6


def test_the_random_start_fills_the_ball_evenly():
    torch.manual_seed(0)
    x = torch.full((16, 3, 16, 16), 0.5, dtype=torch.float64)
    shift = (pgd(lambda z: z.sum((1, 2, 3)), x, EPS, STEP, 0) - x) / EPS
    assert shift.abs().max() <= 1 + 1e-12
    assert abs(shift.mean()) < 0.03 and abs(shift.square().mean() - 1 / 3) < 0.02


@pytest.mark.parametrize("keep", ["last", "best"])
def test_no_steps_give_the_projected_start(keep):
    x = random_images()
    start = x + 5 * EPS * (2 * random_images(seed=9) - 1)  # outside the ball and the box
    projected = torch.maximum(torch.minimum(start, x + EPS), x - EPS).clamp(0, 1)

    def objective(z):
        return z.sum((1, 2, 3))

    for random_start in (False, True):  # a given start is taken as it is, no noise on top
        begun = pgd(objective, x, EPS, STEP, 0, random_start, start=start, keep=keep)
        torch.testing.assert_close(begun, projected, rtol=0, atol=1e-12)
    clean = pgd(objective, x, EPS, STEP, 0, random_start=False, keep=keep)
    assert torch.equal(clean, x)


def test_a_start_outside_the_ball_is_projected_before_the_first_step():
    x, y, model = random_images(), torch.arange(4), small_classifier()
    start = x + 5 * EPS * (2 * random_images(seed=9) - 1)
    projected = torch.maximum(torch.minimum(start, x + EPS), x - EPS).clamp(0, 1)
    ours = pgd(cross_entropy(model, y), x, EPS, STEP, 3, start=start)
    theirs = naive_pgd(cross_entropy(model, y), x, projected, EPS, STEP, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_start_and_the_images_are_not_written_to():
    x, start = random_images(), random_images(seed=1)
    kept = x.clone(), start.clone()
    pgd(lambda z: z.square().sum((1, 2, 3)), x, EPS, STEP, 3, start=start)
    pgd(lambda z: z.square().sum((1, 2, 3)), x, EPS, STEP, 3)
    assert torch.equal(x, kept[0]) and torch.equal(start, kept[1])


@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_image_without_gradient_stays_as_it_is_to_the_bit(keep):
    weight = torch.tensor([0.0, 1.0], dtype=torch.float32)
    x = random_images(2).float()
    moved = pgd(lambda z: weight * z.sum((1, 2, 3)), x, EPS, STEP, 5, random_start=False, keep=keep)
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])


# ---- keep="best"


def iterates(objective, images, step_size, steps):
    """Every iterate from a zero start, each from a run of its own, and its objective."""
    runs = [
        pgd(objective, images, EPS, step_size, count, random_start=False)
        for count in range(steps + 1)
    ]
    return torch.stack(runs), torch.stack([objective(run) for run in runs])


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_best_is_per_image_the_highest_iterate_start_and_last_included(steps, seed):
    x = random_images(6, seed)
    target = (x + EPS * (2 * random_images(6, seed + 50) - 1)).clamp(0, 1)
    target[0] = x[0] + 0.05 * EPS  # the start is the best iterate of image 0
    target[1] = (x[1] + 2 * EPS).clamp(0, 1)  # every step helps image 1
    objective = oscillating(target)
    runs, values = iterates(objective, x, 0.75 * EPS, steps)
    best = pgd(objective, x, EPS, 0.75 * EPS, steps, random_start=False, keep="best")
    torch.testing.assert_close(objective(best), values.max(0).values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(best[0], x[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(best[1], runs[-1, 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_best_is_never_below_last_nor_below_the_start(seed):
    model, x, y = small_classifier(seed), random_images(8, seed), torch.arange(8) % 5
    objective = cross_entropy(model, y)
    found = {}
    for keep, steps in (("start", 0), ("last", 6), ("best", 6)):
        torch.manual_seed(seed)  # the same random start
        images = pgd(objective, x, EPS, EPS, steps, keep="last" if keep == "start" else keep)
        found[keep] = objective(images).detach()
    assert (found["best"] >= found["last"] - 1e-12).all()
    assert (found["best"] >= found["start"] - 1e-12).all()


# ---- one value per tuple


def test_a_tuple_objective_moves_all_three_images():
    torch.manual_seed(0)
    w, x = torch.randn(3, 3, 6, 6, dtype=torch.float64), random_images(6)

    def objective(stacked):  # [a; p; n] -> (T,)
        a, p, n = stacked.chunk(3)
        return (a * w[0] + p * w[1] - n * w[2]).sum((1, 2, 3))

    signs = torch.cat([w[:1], w[1:2], -w[2:]]).sign().repeat_interleave(2, dim=0)
    for keep in ("last", "best"):
        moved = pgd(objective, x, EPS, STEP, 10, random_start=False, keep=keep)
        torch.testing.assert_close(moved, (x + EPS * signs).clamp(0, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_best_keeps_the_three_images_of_a_tuple_from_the_same_iterate(seed):
    x = random_images(9, seed)
    target = (x + EPS * (2 * random_images(9, seed + 50) - 1)).clamp(0, 1)
    target[[0, 3, 6]] = x[[0, 3, 6]] + 0.05 * EPS  # tuple 0 is best at the start

    def objective(stacked):
        return oscillating(target)(stacked).view(3, 3).sum(0)

    runs, values = iterates(objective, x, 0.75 * EPS, 4)
    best = pgd(objective, x, EPS, 0.75 * EPS, 4, random_start=False, keep="best")
    torch.testing.assert_close(objective(best), values.max(0).values, rtol=1e-12, atol=1e-12)
    for t in range(3):
        same = (runs[:, t::3] - best[t::3]).abs().amax((1, 2, 3, 4)) < 1e-12
        assert same.any()


# ---- what the attack leaves behind


def test_parameters_and_batchnorm_statistics_are_untouched():
    model, x, y = batchnorm_network(), random_images(), torch.arange(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with eval_mode(model):
        pgd(cross_entropy(model, y), x, EPS, STEP, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_already_accumulated_stay_as_they_were():
    model, x, y = batchnorm_network(), random_images(), torch.arange(4)
    F.cross_entropy(model(x), y).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    pgd(cross_entropy(model, y), x, EPS, STEP, 3)
    after = [parameter.grad for parameter in model.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after))


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode_restores_the_flag_of_every_module(fails):
    model = batchnorm_network().train()
    model[1].eval()  # a frozen BatchNorm inside a network in training mode
    flags = [module.training for module in model.modules()]
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == flags


def test_the_attack_does_not_change_the_mode_of_the_model():
    model = batchnorm_network().train()
    pgd(cross_entropy(model, torch.arange(4)), random_images(), EPS, STEP, 2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_pgd_works_inside_no_grad_and_returns_detached_images(keep):
    model, x, y = small_classifier(), random_images(), torch.arange(4)
    outside = pgd(cross_entropy(model, y), x, EPS, STEP, 3, random_start=False, keep=keep)
    with torch.no_grad():
        inside = pgd(cross_entropy(model, y), x, EPS, STEP, 3, random_start=False, keep=keep)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and torch.equal(inside, outside)
    assert not outside.requires_grad and outside.grad_fn is None


def test_pgd_of_images_that_want_a_gradient_is_detached():
    x = random_images().requires_grad_()
    for steps in (0, 2):
        moved = pgd(lambda z: z.square().sum((1, 2, 3)), x, EPS, STEP, steps, random_start=False)
        assert not moved.requires_grad and moved.grad_fn is None
    assert x.grad is None


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_same_torch_seed_gives_the_same_images(keep):
    model, x, y = small_classifier(), random_images(), torch.arange(4)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(pgd(cross_entropy(model, y), x, EPS, STEP, 1, keep=keep))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
