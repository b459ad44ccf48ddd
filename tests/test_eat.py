"""EAT's pieces: the split, the attack, who trains on what, the whole loop; schedules, starts.

Oracles are closed forms on linear models, Proxy Anchor written out with loops, and Algorithm 1 as a
training loop of its own, which a run repeats bit for bit.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_scripts import CASES, flags, log, run, same_bits, saved
from torch import nn

import common
import eat
from common import proxy_anchor_loss

EPS, STEP = 8 / 255, 2 / 255
LOSSES = ("shift", "label", "batch")
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


def state_of(model):
    """All that an attack must leave as it was."""
    return ([module.training for module in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [value.tolist() for value in model.state_dict().values()])


def half_live(model):
    """The network in training mode, its BatchNorm not, its first layer fixed."""
    model.train()
    model.layers[1].eval()
    model.layers[0].requires_grad_(False)
    return model


def proxy_anchor_by_hand(embeddings, labels, proxies):
    """Kim et al., Eq. (4), with alpha 32 and delta 0.1, one proxy at a time."""
    embeddings, proxies = (F.normalize(x.detach(), dim=1).tolist() for x in (embeddings, proxies))
    labels, present, pull, push = [int(label) for label in labels], 0, 0.0, 0.0
    for c, proxy in enumerate(proxies):
        cosines = [(sum(map(math.prod, zip(row, proxy))), label == c)
                   for row, label in zip(embeddings, labels)]
        present += c in labels
        pull += math.log1p(sum(math.exp(-32 * (x - 0.1)) for x, same in cosines if same))
        push += math.log1p(sum(math.exp(32 * (x + 0.1)) for x, same in cosines if not same))
    return pull / present + push / len(proxies)


def attack_objective(monkeypatch, loss, members, proxies, images):
    """The function that eat.attack hands to pgd."""
    with monkeypatch.context() as patch:
        patch.setattr(eat, "pgd", lambda objective, *_: objective)
        return eat.attack(members, proxies, images, LABELS, loss, EPS, STEP, 1)


def attacked(loss, members, proxies, images, steps=5):
    torch.manual_seed(0)
    return eat.attack(members, proxies, images, LABELS, loss, EPS, STEP, steps)


# ---- split

@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_equal_stratified_and_fixed_by_the_seed(parts):
    labels = torch.arange(7).repeat_interleave(torch.tensor([3, 10, 1, 4, 8, 5, 2]))
    labels = labels[torch.randperm(len(labels), generator=seeded(0))]
    part = common.split_by_image(labels, parts, seed=0)
    for rows in (labels >= 0, *(labels == label for label in range(7))):
        sizes = part[rows].bincount(minlength=parts)
        assert len(sizes) == parts and sizes.max() - sizes.min() <= 1
    assert torch.equal(part, common.split_by_image(labels, parts, seed=0))
    assert parts == 1 or not torch.equal(part, common.split_by_image(labels, parts, seed=1))


# ---- attack

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


@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_starts_uniformly_and_stays_in_the_ball_and_in_the_range(loss):
    images = random_images()
    images[0], images[1] = 0, 1
    result = attacked(loss, networks(), random_proxies(), images)
    assert (result - images).abs().max() <= EPS + 1e-12
    assert result.min() >= 0 and result.max() <= 1 and not result.requires_grad
    assert (result - images).abs().amax((1, 2, 3)).min() > 0.9 * EPS
    images = random_images(low=0.2, high=0.8)
    offset = (attacked(loss, networks(), random_proxies(), images, steps=0) - images) / EPS
    assert offset.abs().mean() == pytest.approx(0.5, abs=0.05) and offset.abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("loss", LOSSES)
def test_every_attack_raises_its_own_loss_which_has_the_value_of_its_definition(loss, monkeypatch):
    members, proxies, images = networks(), random_proxies(), random_images()
    objective = attack_objective(monkeypatch, loss, members, proxies, images)
    start, end = (attacked(loss, members, proxies, images, steps) for steps in (0, 5))
    expected = 0.0
    with torch.no_grad():
        for member, points in zip(members, proxies):
            clean, moved = member(images), member(start)
            if loss == "shift":
                expected += (1 - F.cosine_similarity(moved, clean)).sum()
            elif loss == "batch":                 # the image's own F(x) is its one positive
                expected += proxy_anchor_by_hand(moved, range(len(images)), clean)
            else:
                expected += proxy_anchor_by_hand(moved, LABELS, points)
        assert float(objective(start).sum()) == pytest.approx(float(expected), rel=1e-9)
        assert objective(end).sum() > objective(start).sum() + 1e-3
        assert objective(end).sum() > objective(images).sum() + 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_the_attack_leaves_the_networks_as_they_were_and_does_not_see_their_mode(loss):
    images, proxies = random_images(), [p.requires_grad_() for p in random_proxies()]
    members = [half_live(member) for member in networks()]
    before = [state_of(member) for member in members]
    assert torch.equal(attacked(loss, members, proxies, images),
                       attacked(loss, networks(), proxies, images))
    assert [state_of(member) for member in members] == before
    assert all(points.grad is None for points in proxies)


# ---- training

def books(words="", name="eat-x2"):
    """A Run with flags, data, device and the start of every network, and nothing else."""
    run = common.Run.__new__(common.Run)
    run.args = CASES[name].script.parse_args(flags("unused", name, words))
    run.device, run.checkpoint = torch.device("cpu"), None
    run.train, _ = common.load_run_data(run.args)
    common.cache_images([run.train], 1, 0)       # crops are taken from the resized copies
    return run


def test_an_evaluation_leaves_half_precision_to_the_training(monkeypatch):
    run = books("--amp")
    run.members, run.test = [run.network()], run.train
    run.members[0].amp = True
    monkeypatch.setattr(common, "evaluate", lambda members, *_, **__: [m.amp for m in members])
    assert run._evaluate(["clustering"]) == [False]


def trained_by_hand(run, batches_of, loss_of, scale=(0.08, 1.0)):
    """Two epochs of training with Adam -> the weights. batches_of(epoch); loss_of(network, images,
    labels)."""
    args, model = run.args, run.network()
    adam = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay,
                            foreach=True)
    for epoch in range(2):
        common.seed_torch(args.seed, epoch, common.TRAIN)
        common.train_mode(model, args.freeze_bn)
        for images, labels, _ in common.load_batches(run.train, batches_of(epoch), args.seed, epoch,
                                                     scale=scale):
            loss = loss_of(model, images, labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
    return model.state_dict()


@pytest.mark.parametrize("options, drawn", [("", 9), ("--no-split", 6)])
def test_member_i_trains_on_the_whole_batch_but_part_i(options, drawn, tmp_path, monkeypatch):
    network, batches, passes, expected = common.Run.network, common.Run.batches, [], []
    part = common.split_by_image(torch.arange(3).repeat_interleave(8), 3, seed=0)

    def hooked(run, i=0):
        member = network(run, i)
        member.register_forward_pre_hook(lambda module, images: passes.append(
            (i, images[0])) if module.training else None)
        return member

    def watched(run, *args, **options_of):
        for images, labels, rows in batches(run, *args, **options_of):
            assert len(images) == drawn          # so that each member sees --batch-size 6 of them
            for i in range(3):
                kept = [k for k, row in enumerate(rows) if options or part[row] != i]
                expected.extend([(i, x[kept]) for x in (images, 1 - images) if kept])
            yield images, labels, rows

    monkeypatch.setattr(common.Run, "network", hooked)
    monkeypatch.setattr(common.Run, "batches", watched)
    attacks = []
    monkeypatch.setattr(eat, "attack", lambda members, proxies, images, *numbers: attacks.append(
        (len(members), len(images), *numbers[1:])) or 1 - images)
    run("eat-x2", tmp_path, f"--members 3 --epochs 3 {options}")
    assert len(passes) == len(expected) >= 30
    for (i, images), (member, given) in zip(expected, passes):
        assert member == i and torch.equal(given, images)
    size = 3 * (24 // drawn)                     # one attack a step, shared, of every image
    assert attacks == [(3, drawn, "shift", 16 / 255, 4 / 255, 1)] * size


def algorithm_1(words):
    """EAT's training as a loop of its own -> (networks, proxies, mean clean and adversarial loss of
    every epoch)."""
    run = books(words)
    args, labels, count = run.args, run.train.labels, run.args.members
    part = common.split_by_image(labels, count, args.seed)
    members, proxies = [[make(i) for i in range(count)] for make in (run.network, run.proxies)]
    optimizers = [torch.optim.AdamW([{"params": [*member.parameters()], "lr": args.lr},
                                     {"params": [points], "lr": 100 * args.lr}],
                                    weight_decay=args.weight_decay, foreach=True)
                  for member, points in zip(members, proxies)]
    means = []
    for epoch in range(args.epochs):
        common.seed_torch(args.seed, epoch, common.TRAIN)
        for member in members:
            common.train_mode(member, args.freeze_bn)
        for optimizer in optimizers:             # 4 epochs: drops after half and three quarters
            for group, rate in zip(optimizer.param_groups, (args.lr, 100 * args.lr)):
                group["lr"] = rate * [1, 1, 0.1, 0.1 ** 2][epoch]
        batches = common.epoch_batches(args, labels, epoch, batch_size=12 if args.split else 6)
        terms = []
        for images, y, rows in common.load_batches(run.train, batches, args.seed, epoch):
            share = [0, 0, 0.5, 1][epoch] if args.eps_ramp == [1, 2] else 1
            moved = eat.attack(members, proxies, images, y, args.attack_loss, share * args.eps,
                               share * args.step_size, args.attack_steps if share else 0)
            for i in range(count):
                mine = torch.ones(len(rows)).bool() if not args.split else part[rows] != i
                if not mine.any():
                    continue
                clean, robust = (proxy_anchor_loss(members[i](x[mine]), y[mine], proxies[i])
                                 for x in (images, moved))
                loss = args.beta * clean + (1 - args.beta) * robust
                optimizers[i].zero_grad()
                loss.backward()
                for tensor in (*members[i].parameters(), proxies[i]):
                    tensor.grad.clamp_(-10, 10)
                optimizers[i].step()
                terms.append((clean.item(), robust.item()))
        means.append([sum(column) / len(column) for column in zip(*terms)])
    return members, proxies, means


@pytest.mark.parametrize("words", ["", "--beta 0.2 --attack-steps 2 --eps-ramp 1 2", "--no-split",
                                   "--attack-loss label --lr 0.1"])
def test_a_run_is_algorithm_1_bit_for_bit(words, tmp_path):
    run("eat-x2", tmp_path / "run", words)
    members, proxies, means = algorithm_1(words)
    checkpoint = saved(tmp_path / "run")
    assert same_bits(checkpoint["members"], [member.state_dict() for member in members])
    assert same_bits(checkpoint["proxies"], [points.detach() for points in proxies])
    for line, (clean, robust) in zip(log(tmp_path / "run"), means):
        assert (line["clean"], line["adversarial"]) == pytest.approx((clean, robust), rel=1e-5)


# ---- schedule, starts, radius, warm-up

@pytest.mark.parametrize("epochs, expected", [
    (8, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]), (6, [1, 1, 1, 0.1, 0.01, 0.01]), (3, [1, 0.1, 0.01]),
    (1, [1]),                                     # both drops would be at 0: skipped
    (200, [1] * 100 + [0.1] * 50 + [0.01] * 50)])
def test_the_learning_rate_drops_at_half_and_at_three_quarters(epochs, expected):
    rates = [common.two_drops(epoch, epochs) for epoch in range(epochs)]
    assert rates == pytest.approx(expected)


def test_every_network_and_its_proxies_start_elsewhere():
    run = books()
    assert not torch.equal(run.proxies(0), run.proxies(1))
    assert not same_bits(run.network(0).state_dict(), run.network(1).state_dict())


@pytest.mark.parametrize("ramp, shares", [
    ([0, 0], [1] * 6), ([0, 4], [0, 0.25, 0.5, 0.75, 1, 1]), ([2, 0], [0, 0, 1, 1, 1, 1]),
    ([1, 2], [0, 0, 0.5, 1, 1, 1])])
def test_the_radius_is_zero_and_then_grows_with_its_step(ramp, shares):
    run = books(f"--eps 0.08 --step-size 0.02 --eps-ramp {ramp[0]} {ramp[1]}")
    for epoch, share in enumerate(shares):
        assert run.ball(epoch) == pytest.approx((0.08 * share, 0.02 * share))


def test_the_warm_up_trains_head_and_proxies_alone(tmp_path):
    out = tmp_path / "run"
    for epochs in (1, 2):                        # the first one is the warm-up
        run("natural", out / str(epochs), f"--epochs {epochs} --warmup-epochs 1")
    run("natural", out / "start", "--epochs 1 --lr 0")
    start, *ends = (saved(out / name)["members"][0] for name in ("start", "1", "2"))
    for end, moved in zip(ends, (False, True)):
        assert not torch.equal(end["head.weight"], start["head.weight"])
        weights = [name for name in start if name.startswith("backbone") and "weight" in name]
        assert weights and all(torch.equal(end[name], start[name]) != moved for name in weights)
