"""The methods of baselines.py as pure functions, and the loop that trains them.

Oracles: losses written out with loops, closed forms on linear models, a training loop of its own.
"""

import pytest
import torch
import torch.nn.functional as F
from test_eat import (
    EPS,
    LABELS,
    STEP,
    UnitNetwork,
    books,
    half_live,
    linear_model,
    proxy_anchor_by_hand,
    random_images,
    seeded,
    state_of,
    trained_by_hand,
)
from test_scripts import contents, log, run, same_bits, saved, teacher

import baselines
import common
from baselines import act, at, est, fare, fast, iat, mixed_loss, mixup, shift_attack, trades

BALL = EPS, STEP, 5
ORDER = torch.tensor([1, 2, 0, 4, 5, 3])                           # not its own inverse
PAIRS = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2])


@pytest.fixture
def batch():
    """A network, images, labels and proxies: what every Proxy Anchor method begins with."""
    proxies = torch.randn(5, 4, generator=seeded(10), dtype=torch.float64).requires_grad_()
    return UnitNetwork(0), random_images(low=0.2, high=0.8), LABELS, proxies


@pytest.fixture
def adversarial():
    """Another batch: what fixed_attack returns."""
    return random_images(low=0.2, high=0.8) + 0.2 * (random_images(seed=5) - 0.5)


@pytest.fixture
def fixed_attack(adversarial, monkeypatch):
    """Every attack returns `adversarial`; name and arguments of the calls."""
    calls = []
    for name in ("shift_attack", "label_attack"):
        monkeypatch.setattr(baselines, name, lambda *args, name=name: calls.append(
            (name, *args)) or adversarial)
    return calls


@pytest.fixture
def mined(monkeypatch):
    """Embeddings, kind, options and triplets of every call of the mining."""
    calls, mine = [], common.mine_triplets

    def watched(embeddings, labels, how, **options):
        calls.append((embeddings.detach(), how, options, mine(embeddings, labels, how, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(common, "mine_triplets", watched)
    return calls


def watched_loss(method, model, *args, seed=0):
    """A method's loss, and the images on which it runs the network to train it."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0]) if torch.is_grad_enabled()
        and not inputs[0].requires_grad else None)                 # neither attack nor mining
    torch.manual_seed(seed)
    loss, _ = method(model, *args)
    hook.remove()
    return loss, seen


def pairs(method, source="random", steps=5, seed=0, model=None, labels=PAIRS):
    """est or act on a batch of pairs: (network, images, loss, the images it trains on)."""
    model, images = model or UnitNetwork(3), random_images(len(labels))
    return model, images, *watched_loss(method, model, images, labels, None, (EPS, STEP, steps),
                                        source, seed=seed)


def number(value):
    return float(value.detach())


def assert_same(loss, expected, tensors):
    """Equal values, and equal gradients that are not zero."""
    assert number(loss) == pytest.approx(number(expected), rel=1e-9)
    for ours, theirs in zip(*(torch.autograd.grad(x, tensors) for x in (loss, expected))):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9) and theirs.abs().sum() > 0


def assert_in_ball(adversarial, images, reach=0.9):
    offset = (adversarial - images).abs()
    assert offset.max() <= EPS + 1e-12 and offset.amax((1, 2, 3)).min() > reach * EPS
    assert adversarial.min() >= 0 and adversarial.max() <= 1 and not adversarial.requires_grad


@torch.no_grad()
def shift(model, adversarial, images):
    """1 - cos of the embeddings, image by image."""
    return 1 - F.cosine_similarity(model(adversarial), model(images))


# ---- attacks

def test_the_attacks_leave_the_network_as_it_was_and_do_not_see_its_mode(batch):
    _, images, labels, proxies = batch
    for attack, loss in [
            (lambda model, *ball: shift_attack(model, images, ball),
             lambda x: shift(UnitNetwork(0), x, images).sum()),
            (lambda model, *ball: baselines.label_attack(model, images, labels, proxies, ball),
             lambda x: proxy_anchor_by_hand(UnitNetwork(0)(x), labels, proxies))]:
        model = half_live(UnitNetwork(0))
        before, ends = state_of(model), []
        for network, steps in ((model, 5), (UnitNetwork(0), 5), (model, 0)):
            torch.manual_seed(0)
            ends.append(attack(network, EPS, STEP, steps))
        assert torch.equal(*ends[:2]) and state_of(model) == before and proxies.grad is None
        assert loss(ends[0]) > max(loss(ends[2]), loss(images)) + 1e-3
        assert_in_ball(ends[0], images)
        assert ((ends[2] - images) / EPS).abs().mean() == pytest.approx(0.5, abs=0.05)


# a method: (how it starts, in standard deviations of eps; whether its images move from F(x))
STARTS = {at: 3 ** -0.5, iat: 3 ** -0.5, trades: 0.001 / EPS, est: 1e-3}


@pytest.mark.parametrize("method", STARTS)
def test_a_method_starts_where_it_says_and_moves_every_image_away(method, batch, monkeypatch):
    model, _, _, proxies = batch
    images, labels = random_images(24, low=0.2, high=0.8), torch.arange(24) // 2 % 4
    monkeypatch.setattr(baselines, "draw_mixture", lambda _: (1.0, torch.arange(24)))    # not mixed
    start, end = (next(x for x in reversed(watched_loss(
        method, model, images, labels, proxies, (EPS, STEP, steps))[1])
        if not torch.equal(x, images)) for steps in (0, 8))
    offset, width = start - images, STARTS[method] * EPS
    assert 0.3 * width < offset.std() < 1.1 * width and offset.abs().mean() > 0.3 * width
    assert offset.abs().max() <= min(EPS, 5 * width) + 1e-12 and abs(offset.mean()) < 0.1 * width
    assert_in_ball(end, images)
    before, after = (shift(model, x, images) for x in (start, end))
    assert (after > 1.5 * before).all() and (before > 0).all()


# ---- natural, at, mixup, iat, trades

@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("attack_loss", ["shift", "label"])
def test_at_has_beta_on_the_clean_term_and_live_batchnorm_sees_the_terms_apart(attack_loss, live,
                                                                               batch, adversarial,
                                                                               fixed_attack):
    model, images, labels, proxies = batch
    model.train(live)
    loss, terms = at(*batch, BALL, 0.3, attack_loss)
    clean, robust = (proxy_anchor_by_hand(model(x), labels, proxies) for x in (images, adversarial))
    assert abs(clean - robust) > 0.01                              # swapped weights would show
    assert number(loss) == pytest.approx(0.3 * clean + 0.7 * robust)
    assert number(terms["clean"]) == pytest.approx(clean)
    assert number(terms["adversarial"]) == pytest.approx(robust)
    assert fixed_attack == [{"shift": ("shift_attack", model, images, BALL), "label": (
        "label_attack", model, images, labels, proxies, BALL)}[attack_loss]]


def mixed_by_hand(target, model, images, labels, proxies, w):
    mixed = model(torch.stack([w * images[i] + (1 - w) * images[j] for i, j in enumerate(ORDER)]))
    if target == "embedding":                    # every mixed image's one positive is its own row
        clean = model(images)
        rows = torch.stack([w * clean[i] + (1 - w) * clean[j] for i, j in enumerate(ORDER)])
        return proxy_anchor_by_hand(mixed, range(len(images)), rows)
    own, other = (proxy_anchor_by_hand(mixed, x, proxies) for x in (labels, labels[ORDER]))
    assert abs(own - other) > 0.01                                 # swapped weights would show
    return w * own + (1 - w) * other


@pytest.mark.parametrize("target", ["label", "embedding"])
def test_mixup_and_iat_mix_images_and_targets_with_the_same_weight_and_partners(
        target, batch, adversarial, fixed_attack, monkeypatch):
    model, images, labels, proxies = batch
    mixtures = iter([(0.3, ORDER)] * 2)          # mixup draws one, and iat one
    monkeypatch.setattr(baselines, "draw_mixture", lambda _: next(mixtures))
    clean, robust = (mixed_by_hand(target, model, x, labels, proxies, 0.3)
                     for x in (images, adversarial))
    assert number(mixup(*batch, BALL, target)[0]) == pytest.approx(clean)
    assert number(mixed_loss(*batch, 0.3, ORDER, target)) == pytest.approx(clean)
    loss, terms = iat(*batch, BALL, target)
    assert number(loss) == pytest.approx((clean + robust) / 2) and abs(clean - robust) > 0.01
    assert number(terms["mixed"]) == pytest.approx(clean)
    assert number(terms["mixed_adversarial"]) == pytest.approx(robust)
    assert fixed_attack == [("shift_attack", model, images, BALL)]


def test_the_mixing_weight_is_uniform_and_the_partners_are_a_permutation():
    torch.manual_seed(0)
    weights, orders = zip(*(baselines.draw_mixture(torch.zeros(6)) for _ in range(1000)))
    assert torch.tensor(weights).mean() == pytest.approx(0.5, abs=0.05)
    assert torch.tensor(weights).var() == pytest.approx(1 / 12, rel=0.1)       # Beta(1, 1)
    assert all(sorted(order.tolist()) == list(range(6)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) > 400


def test_trades_adds_the_mean_squared_distance_with_a_gradient_through_both_embeddings(
        batch, adversarial, fixed_attack):
    model, images, labels, proxies = batch
    for options, weight in (((), 6), ((2.5,), 2.5)):
        loss, terms = trades(*batch, BALL, *options)
        distance = sum((x - y) @ (x - y) for x, y in zip(model(images), model(adversarial))) / 6
        clean = common.proxy_anchor_loss(model(images), labels, proxies)
        assert number(terms["clean"]) == pytest.approx(number(clean))
        assert number(terms["shift"]) == pytest.approx(number(distance)) and terms["shift"] > 0.01
        assert_same(loss, clean + weight * distance, [*model.parameters(), proxies])


# ---- fast, fare

@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("method", [fast, fare])
def test_a_step_of_fast_and_fare_and_their_losses_are_those_worked_out_by_hand(method, live, batch):
    model, images, labels, proxies = batch
    fixed, goal = UnitNetwork(7).train(), UnitNetwork(7)(images).detach()    # in evaluation mode
    before, more, step = state_of(fixed), [fixed] * (method is fare), EPS * (
        1.25 if method is fast else 0.25)

    def by_hand(x):
        if method is fast:
            return common.proxy_anchor_loss(model(x), labels, proxies)
        return sum((row - other) @ (row - other) for row, other in zip(model(x), goal)) / 6

    _, (start,) = watched_loss(method, *batch, (EPS, step, 0), *more)
    assert (start - images).abs().mean() / EPS == pytest.approx(0.5, abs=0.05)
    x = start.clone().requires_grad_()                             # in evaluation mode, too
    (slope,) = torch.autograd.grad(by_hand(x), x)
    expected = (start + step * slope.sign()).minimum(images + EPS).maximum(images - EPS)
    loss, (moved,) = watched_loss(method, model.train(live), *batch[1:], (EPS, step, 1), *more)
    assert torch.allclose(moved, expected, atol=1e-12) and (slope != 0).all()
    inside = (moved - images).abs() < EPS - 1e-9
    assert inside.double().mean() == pytest.approx(1 - step / EPS / 2, abs=0.05)
    assert_same(loss, by_hand(expected), [*model.parameters(), *[proxies] * (method is fast)])
    method(model, *batch[1:], BALL, *more)[0].backward()           # and no clean term
    assert state_of(fixed) == before                               # no gradient reached it


# ---- est, act

def triplets_by_hand(anchors, positives, negatives):
    """mean max(0, d(a, p) - d(a, n) + 0.2), with a graph."""
    terms = [((a - p).square().sum().sqrt() - (a - n).square().sum().sqrt() + 0.2).clamp(min=0)
             for a, p, n in zip(anchors, positives, negatives)]
    return sum(terms) / len(terms), [number(term) > 0 for term in terms]


@pytest.mark.parametrize("source", ["random", "softhard", "hardest"])
@pytest.mark.parametrize("method", [est, act])
def test_est_mines_among_the_moved_embeddings_and_act_among_the_clean_ones(method, source, mined):
    _, images, _, seen = pairs(method, source, model=UnitNetwork(3).train(method is act))
    (embeddings, how, options, (a, p, _)), = mined
    with torch.no_grad():                        # act mines in evaluation mode
        expected = UnitNetwork(3)(seen[0] if method is est else images)
    assert torch.allclose(embeddings, expected) and how == source
    assert not torch.allclose(seen[0], images[:len(seen[0])], atol=0.5 * EPS)
    assert a.tolist() == [0, 2, 4, 6] and options["cutoffs"] == (None, None)
    assert source == "softhard" or p.tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("method", [est, act])
def test_the_loss_of_est_and_act_is_the_triplet_loss_by_hand(method, mined):
    active = []
    for seed in range(5):
        model, images, loss, seen = pairs(method, seed=seed)
        _, _, _, (a, p, n) = mined[seed]
        x = model(seen[0])
        expected, positive = (triplets_by_hand(x[a], x[p], x[n]) if method is est
                              else triplets_by_hand(model(images[a]), *x.chunk(2)))
        assert_same(loss, expected, [*model.parameters()])
        active += positive
    assert True in active and False in active


def test_on_a_linear_model_a_step_of_act_is_the_closed_form(mined):
    # -|W (p - n)| has the gradient -W^T W (p - n) / |W (p - n)| in p, and its opposite in n
    model, images, _, (pushed, _) = pairs(act, steps=1, model=linear_model(0))
    _, _, _, (_, p, n) = mined[0]
    weight = model[1].weight.detach()
    step = STEP * ((images[n] - images[p]).flatten(1) @ weight.T @ weight).sign()
    step = step.view_as(images[p])
    expected = torch.cat([images[p] + step, images[n] - step])
    assert torch.allclose(pushed, expected.clamp(0, 1)) and (step != 0).all()    # from zero


@pytest.mark.parametrize("method", [est, act])
def test_a_batch_of_one_class_has_loss_zero_with_a_graph(method):
    model, _, loss, _ = pairs(method, labels=torch.zeros(6, dtype=torch.int64))
    assert number(loss) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---- training

@pytest.mark.parametrize("method, words, options", [
    ("natural", "", {}), ("at", "--beta 0.2 --attack-loss label", dict(beta=0.2,
                                                                      attack_loss="label")),
    ("mixup", "--mixup-target embedding", dict(mixup_target="embedding")),
    ("iat", "", dict(mixup_target="label")), ("trades", "--trades-lambda 1",
                                              dict(trades_lambda=1)), ("fast", "", {}),
    ("est", "--source hardest", dict(source="hardest")), ("act", "", dict(source="random"))])
def test_a_step_gets_the_flags_of_its_method_and_the_ball_of_its_epoch(method, words, options,
                                                                       tmp_path, monkeypatch):
    calls, step = [], baselines.METHODS[method]
    monkeypatch.setitem(baselines.METHODS, method, lambda *args, **options: calls.append(
        (*args, options)) or step(*args, **options))
    run(method, tmp_path / "run", f"{words} --epochs 3 --eps 8/255 --step-size 3/255 "
        "--attack-steps 2 --eps-ramp 0 2")
    each = len(calls) // 3
    balls = [ball for _, _, _, _, ball, _ in calls]
    assert balls[::each] == [(0, 0, 0), pytest.approx((EPS / 2, 1.5 / 255, 2)),
                             pytest.approx((EPS, 3 / 255, 2))]
    assert all(given == options for *_, given in calls) and each == (8 if method in (
        "est", "act") else 4)
    for _, images, labels, points, *_ in calls:
        assert images.shape == (6, 3, 32, 32) and (points is None) == (method in ("est", "act"))
        if points is None:                       # a batch of pairs
            assert torch.equal(labels[::2], labels[1::2])


def test_fare_starts_at_its_teachers_and_every_network_has_its_own(tmp_path):
    before, start = contents(teacher()), [dict(state) for state in saved(teacher())["members"]]
    still, moved = (run("fare-x2", tmp_path / eps, f"--epochs 1 --eps {eps} --weight-decay 0")
                    for eps in ("0", "0.1"))
    assert log(still)[0]["distance"] == 0 < log(moved)[0]["distance"]
    assert same_bits([dict(state) for state in saved(still)["members"]], start)
    for old, new in zip(start, saved(moved)["members"]):
        same = {name for name in old if torch.equal(old[name], new[name])}
        assert same == {name for name in old if "running" in name or "tracked" in name}
    assert contents(teacher()) == before


@pytest.mark.parametrize("split", [True, False])
def test_network_i_never_trains_on_part_i_if_split_and_on_everything_otherwise(split, tmp_path,
                                                                               monkeypatch):
    drawn, batches = [], common.Run.batches

    def watched(books, numbers, **options):
        drawn.append(torch.cat(numbers).tolist())
        return batches(books, numbers, **options)

    monkeypatch.setattr(common.Run, "batches", watched)
    run("at", tmp_path / "run", "--members 3" + " --split" * split)
    part = common.split_by_image(torch.arange(3).repeat_interleave(8), 3, seed=0).tolist()
    assert len(drawn) == 12 and drawn[0] != drawn[1] != drawn[2]
    for k, rows in enumerate(drawn):             # network after network, epoch after epoch
        allowed = {row for row in range(24) if not split or part[row] != k % 3}
        assert set(rows) <= allowed and len(rows) == len({*rows}) > len(allowed) - 6


def test_act_without_its_attack_is_natural_training(tmp_path):
    def loss(model, images, labels):
        with torch.no_grad():
            triplet = common.mine_pairs(model(images), labels, "random")
        return triplets_by_hand(*(model(images[rows]) for rows in triplet))[0]

    words = "--epochs 2 --eps 0 --batch-size 12 --freeze-bn"
    run("act", tmp_path / "run", words)
    plain = books(words, "act")
    expected = trained_by_hand(plain, lambda epoch: common.pair_batches(
        plain.train.labels, 12, 0, epoch), loss)
    (weights,) = saved(tmp_path / "run")["members"]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, atol=1e-4), name
