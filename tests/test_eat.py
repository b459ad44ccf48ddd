"""EAT's pieces: the split, the attack, the loss of a member, its optimiser and schedule.

Oracles are closed forms on linear models and Proxy Anchor written out with loops.
"""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_pil_image

import common
import eat
from common import pgd, proxy_anchor_loss, shift_objective

EPS, STEP = 8 / 255, 2 / 255
LOSSES = ("shift", "pal-label", "pal-pseudo", "pal-batch")
LABELS = torch.tensor([0, 1, 2, 0, 1, 3])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(count=6, size=6, seed=0, low=0.0, high=1.0):
    images = torch.rand(count, 3, size, size, generator=seeded(seed), dtype=torch.float64)
    return low + (high - low) * images


def linear_model(seed, size=6, dim=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, dim, bias=False)).double()


class UnitNetwork(nn.Module):
    """A convolution, BatchNorm and a linear layer onto the unit sphere."""

    def __init__(self, seed, dim=4):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                                    nn.Linear(64, dim)).double().eval()

    def forward(self, images):
        return F.normalize(self.layers(images), dim=1)


def networks(count=3):
    return [UnitNetwork(seed) for seed in range(count)]


def random_proxies(count=3, classes=5, dim=4):
    return [torch.randn(classes, dim, generator=seeded(10 + i), dtype=torch.float64)
            for i in range(count)]


def proxy_anchor_by_hand(embeddings, labels, proxies):
    """Kim et al., Eq. (4), with alpha 32 and delta 0.1, one proxy at a time."""
    embeddings, proxies = (F.normalize(x.detach(), dim=1) for x in (embeddings, proxies))
    present, pull, push = 0, 0.0, 0.0
    for c, proxy in enumerate(proxies):
        positive, negative = 0.0, 0.0
        for embedding, label in zip(embeddings, labels):
            cosine = float(embedding @ proxy)
            if int(label) == c:
                positive += math.exp(-32 * (cosine - 0.1))
            else:
                negative += math.exp(32 * (cosine + 0.1))
        present += positive > 0
        pull += math.log1p(positive)
        push += math.log1p(negative)
    return pull / present + push / len(proxies)


def attack_objective(monkeypatch, loss, members, proxies, images, labels):
    """The function that eat.attack hands to pgd."""
    with monkeypatch.context() as patch:
        patch.setattr(eat, "pgd", lambda objective, *_: objective)
        return eat.attack(members, proxies, images, labels, loss, EPS, STEP, 1)


def attacked(loss, members, proxies, images, labels=LABELS, steps=5, seed=0):
    torch.manual_seed(seed)
    return eat.attack(members, proxies, images, labels, loss, EPS, STEP, steps)


def displacement(member, adversarial, images):
    with torch.no_grad():
        return 1 - (member(adversarial) * member(images)).sum(1)


# ---- split


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_split_is_equal_within_one_image_overall_and_in_every_class(parts):
    labels = torch.randint(0, 7, (100,), generator=seeded(0))
    part = common.split_by_image(labels, parts, seed=0)
    for rows in (labels >= 0, *(labels == label for label in range(7))):
        sizes = part[rows].bincount(minlength=parts)
        assert len(sizes) == parts and sizes.max() - sizes.min() <= 1


def test_the_split_is_fixed_by_the_seed_and_random():
    labels = torch.arange(4).repeat(25)
    assert torch.equal(common.split_by_image(labels, 3, 0), common.split_by_image(labels, 3, 0))
    assert not torch.equal(common.split_by_image(labels, 3, 0), common.split_by_image(labels, 3, 1))


def test_one_member_with_a_split_is_a_user_error_that_names_no_split(capsys):
    with pytest.raises(SystemExit) as stop:
        eat.parse_args(["--members", "1"])
    assert stop.value.code == 2
    assert "--no-split" in capsys.readouterr().err
    assert eat.parse_args(["--members", "1", "--no-split"]).members == 1


# ---- attack


def test_the_shift_objective_is_one_minus_cosine_summed_over_members():
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2, math.pi], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    reference = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    one = shift_objective([nn.Identity()], [reference])(points)
    two = shift_objective([nn.Identity(), torch.neg], [reference, reference])(points)
    assert torch.allclose(one, torch.tensor([0, 0.5, 1, 2], dtype=torch.float64))
    assert torch.allclose(two, torch.full((4,), 2.0, dtype=torch.float64))


def test_no_gradient_flows_into_the_reference_of_the_shift_objective():
    model, images = linear_model(0), random_images(2)
    reference = model(images)
    shift_objective([model], [reference])(images).sum().backward()
    direction = reference.detach().sum(1, keepdim=True)          # d/dW of -(W x).t, t fixed
    assert direction.abs().sum() > 0
    expected = -(reference.detach().T @ images.flatten(1))
    assert torch.allclose(model[1].weight.grad, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_on_linear_models_the_shift_attack_ends_in_the_corner_of_the_closed_form(count):
    # sum_i 1 - (W_i x').(W_i x) has the constant gradient -sum_i W_i^T W_i x
    members = [linear_model(seed) for seed in range(count)]
    images = random_images(low=0.2, high=0.8)
    flat = images.flatten(1)
    gradient = -sum(flat @ m[1].weight.T @ m[1].weight for m in members).detach()
    torch.manual_seed(0)
    result = eat.attack(members, [], images, LABELS, "shift", EPS, EPS, 2)
    assert torch.allclose(result, images + EPS * gradient.sign().view_as(images))


def test_the_shift_attack_moves_every_member_away():
    members, images = networks(), random_images()
    start, end = (attacked("shift", members, [], images, steps=steps) for steps in (0, 10))
    for member in members:
        before, after = (displacement(member, x, images) for x in (start, end))
        assert (after > before).all() and (after > 1e-4).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_stays_in_the_ball_and_in_the_range(loss):
    images = random_images()
    images[0], images[1] = 0, 1
    result = attacked(loss, networks(), random_proxies(), images)
    assert (result - images).abs().max() <= EPS + 1e-12
    assert result.min() >= 0 and result.max() <= 1 and not result.requires_grad
    assert (result - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS


@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_starts_inside_the_ball_and_away_from_the_image(loss):
    images = random_images(low=0.2, high=0.8)
    start = attacked(loss, networks(), random_proxies(), images, steps=0)
    offset = (start - images) / EPS
    assert offset.abs().max() <= 1 + 1e-9
    assert offset.abs().mean() == pytest.approx(0.5, abs=0.05)     # uniform in the ball
    assert offset.mean() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_attack_loss_has_the_value_of_its_definition(loss, monkeypatch):
    members, proxies, images = networks(), random_proxies(), random_images()
    objective = attack_objective(monkeypatch, loss, members, proxies, images, LABELS)
    moved = pgd(objective, images, EPS, STEP, 0)
    expected = 0.0
    with torch.no_grad():
        for member, own in zip(members, proxies):
            clean, new = member(images), member(moved)
            if loss == "shift":
                expected += (1 - F.cosine_similarity(new, clean)).sum()
            elif loss == "pal-batch":             # the image's own F(x) is its one positive
                expected += proxy_anchor_by_hand(new, range(len(images)), clean)
            elif loss == "pal-label":
                expected += proxy_anchor_by_hand(new, LABELS, own)
            else:
                nearest = [max(range(5), key=lambda c: float(F.cosine_similarity(e, own[c], dim=0)))
                           for e in clean]
                expected += proxy_anchor_by_hand(new, nearest, own)
        value = objective(moved).sum()
    assert float(value) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_attack_raises_its_own_loss(loss, monkeypatch):
    members, proxies, images = networks(), random_proxies(), random_images()
    objective = attack_objective(monkeypatch, loss, members, proxies, images, LABELS)
    start, end = (attacked(loss, members, proxies, images, steps=steps) for steps in (0, 5))
    with torch.no_grad():
        assert objective(end).sum() > objective(start).sum() + 1e-3
        assert objective(end).sum() > objective(images).sum() + 1e-3


def test_the_pseudo_label_does_not_follow_the_true_one():
    members, proxies, images = networks(), random_proxies(), random_images()
    one, other = (attacked("pal-pseudo", members, proxies, images, labels)
                  for labels in (LABELS, LABELS.flip(0)))
    assert torch.equal(one, other)


def test_one_shared_attack_is_the_attack_on_the_rows_of_a_member():
    members, images = networks(), random_images()
    start = attacked("shift", members, [], images, steps=0)
    rows = torch.tensor([1, 3, 4])

    def crafted(images, start):
        with torch.no_grad():
            clean = [member(images) for member in members]
        return pgd(shift_objective(members, clean), images, EPS, STEP, 5, start=start)

    shared = crafted(images, start)
    assert torch.allclose(shared, attacked("shift", members, [], images))
    assert torch.allclose(shared[rows], crafted(images[rows], start[rows]))


# ---- loss of a member


def member_and_batches():
    clean = random_images()
    adversarial = (clean + 0.2 * (random_images(seed=5) - 0.5)).clamp(0, 1)
    return UnitNetwork(0), nn.Parameter(random_proxies(1)[0]), clean, adversarial


def gradients(loss, member, proxies):
    return torch.autograd.grad(loss, [*member.parameters(), proxies])


def test_the_loss_mixes_the_two_terms_with_beta_on_the_clean_one():
    member, proxies, clean, adversarial = member_and_batches()
    loss, natural, robust = eat.member_loss(member, proxies, clean, adversarial, LABELS, 0.3)
    for term, images in ((natural, clean), (robust, adversarial)):
        assert float(term) == pytest.approx(proxy_anchor_by_hand(member(images), LABELS, proxies))
    assert float(loss.detach()) == pytest.approx(0.3 * float(natural) + 0.7 * float(robust))
    assert abs(float(natural - robust)) > 0.01                     # swapped weights would show
    assert not natural.requires_grad and not robust.requires_grad


@pytest.mark.parametrize("beta", [0, 1])
def test_beta_one_trains_on_clean_images_alone_and_beta_zero_on_adversarial_ones(beta):
    member, proxies, clean, adversarial = member_and_batches()
    loss, _, _ = eat.member_loss(member, proxies, clean, adversarial, LABELS, beta)
    alone = proxy_anchor_loss(member(clean if beta else adversarial), LABELS, proxies)
    assert float(loss.detach()) == pytest.approx(float(alone.detach()))
    for ours, expected in zip(gradients(loss, member, proxies), gradients(alone, member, proxies)):
        assert torch.allclose(ours, expected) and expected.abs().sum() > 0


def test_live_batchnorm_sees_clean_and_adversarial_images_apart():
    member, proxies, clean, adversarial = member_and_batches()
    member.train()
    _, natural, robust = eat.member_loss(member, proxies, clean, adversarial, LABELS, 0.5)
    for term, images in ((natural, clean), (robust, adversarial)):
        apart = proxy_anchor_loss(member(images), LABELS, proxies)
        assert float(term) == pytest.approx(float(apart.detach()))


# ---- optimiser and schedule


def flags(**changes):
    return Namespace(**{"seed": 0, "embedding_dim": 8, "lr": 1e-4, "weight_decay": 1e-4,
                        "epochs": 8, **changes})


def learning_rates(epochs):
    """lr of every epoch, relative to the first one's: network, and proxies."""
    args = flags(epochs=epochs)
    optimizer = common.proxy_optimizer(args, nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2)))
    scheduler, rates = common.drop_schedule(args.epochs, optimizer), []
    for _ in range(epochs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    network, proxies = zip(*rates)
    assert proxies == pytest.approx([100 * rate for rate in network])
    return [rate / args.lr for rate in network]


@pytest.mark.parametrize("epochs, expected", [
    (8, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
    (6, [1, 1, 1, 0.1, 0.01, 0.01]),
    (3, [1, 0.1, 0.01]),
    (1, [1]),                                     # both drops would be at 0: skipped
])
def test_the_learning_rate_drops_at_half_and_at_three_quarters(epochs, expected):
    assert learning_rates(epochs) == pytest.approx(expected)


def test_the_paper_schedule_drops_at_epochs_100_and_150():
    rates = learning_rates(200)
    drops = [epoch for epoch in range(1, 200) if rates[epoch] < 0.5 * rates[epoch - 1]]
    assert drops == [100, 150]


def test_the_optimiser_is_adamw_over_network_and_proxies():
    member, proxies = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))
    optimizer = common.proxy_optimizer(flags(), member, proxies)
    first, second = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert [id(p) for p in first["params"]] == [id(p) for p in member.parameters()]
    assert len(second["params"]) == 1 and second["params"][0] is proxies
    assert second["lr"] == pytest.approx(100 * first["lr"]) and first["lr"] == 1e-4
    assert first["weight_decay"] == second["weight_decay"] == 1e-4


def test_proxies_differ_by_member_and_by_seed_and_repeat():
    def proxies(member, seed=0):
        return common.new_proxies(flags(seed=seed), 200, torch.device("cpu"), member)

    assert proxies(0).shape == (200, 8) and proxies(0).requires_grad and proxies(0).is_leaf
    assert torch.equal(proxies(1), proxies(1))
    assert not torch.equal(proxies(0), proxies(1))
    assert not torch.equal(proxies(1), proxies(1, seed=1))
    spread = proxies(0).detach().std()                             # kaiming, fan_out
    assert float(spread) == pytest.approx((2 / 200) ** 0.5, rel=0.1)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")   # of who never trains
def test_the_log_is_the_mean_over_the_members_that_trained(tmp_path, monkeypatch, capsys):
    for number in range(12):
        path = tmp_path / ("train" if number < 8 else "test") / str(number // 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.rand(3, 12, 12)).save(path)

    def fixed(member, proxies, images, adversarial, labels, beta):
        return member(images).sum() + proxies.sum(), torch.tensor(2.0), torch.tensor(3.0)

    monkeypatch.setattr(eat, "member_loss", fixed)
    monkeypatch.setattr(common, "split_by_image",                  # member 1 of three sees nothing
                        lambda labels, *_: torch.zeros(len(labels), dtype=torch.long))
    eat.main(eat.parse_args([
        "--dataset", "folder", "--data-root", str(tmp_path), "--arch", "convnet", "--weights",
        "none", "--image-size", "16", "--batch-size", "4", "--attack-steps", "1", "--workers", "0",
        "--device", "cpu", "--dry-run"]))
    assert "clean 2.000, adversarial 3.000" in capsys.readouterr().out
