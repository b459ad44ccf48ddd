"""The methods of baselines.py as pure functions, and the flags that choose between them.

Oracles: losses written out with loops, finite differences, and closed forms on linear models.
"""


import pytest
import torch
import torch.nn.functional as F
from test_eat import (
    EPS,
    LABELS,
    STEP,
    UnitNetwork,
    linear_model,
    proxy_anchor_by_hand,
    random_images,
    seeded,
)

import baselines
import common
import eat
from baselines import act, at, est, iat, mixup, natural, shift_attack, trades

BALL = EPS, STEP, 5
ORDER = torch.tensor([1, 2, 0, 4, 5, 3])                           # not its own inverse
PAIRS = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2])
TWINS = torch.tensor([0, 0, 1, 1, 2, 2])


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
    """Every attack returns `adversarial`; the arguments of the calls."""
    calls = []
    monkeypatch.setattr(baselines, "shift_attack", lambda *args: calls.append(args) or adversarial)
    return calls


@pytest.fixture
def mined(monkeypatch):
    """Embeddings, kind, options and triplets of every call of the mining."""
    calls, mine = [], common.mine_triplets

    def watched(embeddings, labels, how, **options):
        triplets = mine(embeddings, labels, how, **options)
        calls.append((embeddings.detach(), how, options, triplets))
        return triplets

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
    return model, images, *watched_loss(method, model, images, labels, source, EPS, STEP, steps,
                                        seed=seed)


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
    assert adversarial.min() >= 0 and adversarial.max() <= 1


@torch.no_grad()
def shift(model, adversarial, images):
    """1 - cos of the embeddings, image by image."""
    return 1 - F.cosine_similarity(model(adversarial), model(images))


# ---- attack


def attacked(model, images, steps=5):
    torch.manual_seed(0)
    return shift_attack(model, images, EPS, STEP, steps)


def test_the_shift_attack_raises_one_minus_cosine_of_every_image():
    model, images = UnitNetwork(0), random_images()
    images[0], images[1] = 0, 1
    start, end = attacked(model, images, 0), attacked(model, images, 10)
    assert_in_ball(end, images)
    assert (shift(model, end, images) > 2 * shift(model, start, images)).all()


def test_on_a_linear_model_the_shift_attack_ends_in_the_corner_of_the_closed_form():
    # 1 - (W x').(W x) has the constant gradient -W^T W x
    model, images = linear_model(0), random_images(low=0.2, high=0.8)
    weight = model[1].weight.detach()
    corner = images - EPS * (images.flatten(1) @ weight.T @ weight).sign().view_as(images)
    assert torch.allclose(shift_attack(model, images, EPS, EPS, 2), corner)


@pytest.mark.parametrize("live", [False, True])
def test_the_shift_attack_leaves_the_network_as_it_was_and_does_not_see_its_mode(live):
    def state():
        return ([module.training for module in model.modules()],
                [(p.requires_grad, p.grad) for p in model.parameters()],
                [value.tolist() for value in model.state_dict().values()])

    model, images = UnitNetwork(0), random_images()
    expected = attacked(model, images)
    model.train()
    model.layers[1].train(live)
    model.layers[0].requires_grad_(False)
    before = state()
    assert torch.equal(attacked(model, images), expected)
    assert state() == before


@pytest.mark.parametrize("method", [at, trades, est])
def test_the_adversarial_images_are_in_the_ball_and_moved_away(method, batch):
    model, images, _, proxies = batch
    args = (images, TWINS, "random") if method is est else (images, LABELS, proxies)
    start, end = ([x for x in watched_loss(method, model, *args, EPS, STEP, steps)[1]
                   if not torch.equal(x, images)] for steps in (0, 8))
    assert len(start) == len(end) == 1
    assert_in_ball(end[0], images)
    before, after = (shift(model, x, images) for x in (start[0], end[0]))
    assert (after > 1.5 * before).all() and (before > 0).all()     # so does d = sqrt(2 (1 - cos))


# ---- natural, at, mixup, iat, trades


def test_natural_is_proxy_anchor_and_its_gradient_is_the_slope(batch):
    model, images, labels, proxies = batch
    loss, _ = natural(*batch)
    assert number(loss) == pytest.approx(proxy_anchor_by_hand(model(images), labels, proxies))
    tensors, generator, h = [*model.parameters(), proxies], seeded(0), 1e-6
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in tensors]
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss, tensors), direction))
    values = []
    for change in (h, -2 * h):                                     # to +h, then to -h
        with torch.no_grad():
            for x, d in zip(tensors, direction):
                x += change * d
        values.append(proxy_anchor_by_hand(model(images), labels, proxies))
    assert number(slope) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("method, args, reference, reference_args", [
    (at, (*BALL, 1), natural, ()),
    (mixup, (1.0, ORDER), natural, ()),
    (trades, (*BALL, 0), natural, ()),
    (iat, (0.3, ORDER, 0.0, STEP, 5), mixup, (0.3, ORDER)),
    (iat, (1.0, ORDER, *BALL), at, (*BALL, 0.5)),
], ids=["at", "mixup", "trades", "iat at eps 0", "iat at weight 1"])
def test_at_its_limit_a_method_is_a_simpler_one(method, args, reference, reference_args, batch):
    torch.manual_seed(0)
    loss, _ = method(*batch, *args)
    torch.manual_seed(0)
    expected, _ = reference(*batch, *reference_args)
    assert_same(loss, expected, [*batch[0].parameters(), batch[3]])


def test_at_with_beta_zero_is_natural_on_the_adversarial_images(batch, adversarial, fixed_attack):
    model, _, labels, proxies = batch
    assert_same(at(*batch, *BALL, 0)[0], natural(model, adversarial, labels, proxies)[0],
                [*model.parameters(), proxies])


def test_mixup_with_weight_zero_is_natural_on_the_partners(batch):
    model, images, labels, proxies = batch
    assert_same(mixup(*batch, 0.0, ORDER)[0],
                natural(model, images[ORDER], labels[ORDER], proxies)[0],
                [*model.parameters(), proxies])


@pytest.mark.parametrize("live", [False, True])
def test_at_has_beta_on_the_clean_term_and_live_batchnorm_sees_the_terms_apart(
        live, batch, adversarial, fixed_attack):
    model, images, labels, proxies = batch
    model.train(live)
    loss, terms = at(*batch, EPS, STEP, 7, 0.3)
    clean, robust = (proxy_anchor_by_hand(model(x), labels, proxies) for x in (images, adversarial))
    assert abs(clean - robust) > 0.01                              # swapped weights would show
    assert number(loss) == pytest.approx(0.3 * clean + 0.7 * robust)
    assert number(terms["clean"]) == pytest.approx(clean)
    assert number(terms["adversarial"]) == pytest.approx(robust)
    assert fixed_attack == [(model, images, EPS, STEP, 7)]
    if live:
        joint, _ = model(torch.cat([images, adversarial])).chunk(2)
        assert abs(clean - proxy_anchor_by_hand(joint, labels, proxies)) > 1e-3


def mixup_by_hand(model, images, labels, proxies, w):
    mixed = model(torch.stack([w * images[i] + (1 - w) * images[j] for i, j in enumerate(ORDER)]))
    own, other = (proxy_anchor_by_hand(mixed, x, proxies) for x in (labels, labels[ORDER]))
    assert abs(own - other) > 0.01                                 # swapped weights would show
    return w * own + (1 - w) * other


def test_mixup_and_iat_mix_images_and_losses_with_the_same_weight_and_partners(
        batch, adversarial, fixed_attack):
    model, images, labels, proxies = batch
    clean, robust = (mixup_by_hand(model, x, labels, proxies, 0.3) for x in (images, adversarial))
    assert number(mixup(*batch, 0.3, ORDER)[0]) == pytest.approx(clean)
    loss, terms = iat(*batch, 0.3, ORDER, EPS, STEP, 7)
    assert number(loss) == pytest.approx((clean + robust) / 2) and abs(clean - robust) > 0.01
    assert number(terms["mixed"]) == pytest.approx(clean)
    assert number(terms["mixed_adversarial"]) == pytest.approx(robust)
    assert fixed_attack == [(model, images, EPS, STEP, 7)] and fixed_attack[0][1] is images


def test_the_embedding_target_of_mixup_is_the_mixed_embedding(batch):
    model, images, _, _ = batch
    expected = 0.0
    for i, j in enumerate(ORDER):
        m, x, y = model(torch.stack([0.3 * images[i] + 0.7 * images[j], images[i], images[j]]))
        target = 0.3 * x + 0.7 * y
        expected += (1 - m @ target / target.norm()) / 6
    assert number(expected) > 1e-4
    assert_same(mixup(*batch, 0.3, ORDER, "embedding")[0], expected, [*model.parameters()])
    assert number(mixup(*batch, 1.0, ORDER, "embedding")[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha, variance", [(1, 1 / 12), (0.2, 1 / 5.6)])
def test_the_mixing_weight_is_beta_distributed_and_the_partners_are_a_permutation(alpha, variance):
    torch.manual_seed(0)
    weights, orders = zip(*(baselines.draw_mixture(torch.zeros(6), alpha) for _ in range(1000)))
    assert torch.tensor(weights).mean() == pytest.approx(0.5, abs=0.05)
    assert torch.tensor(weights).var() == pytest.approx(variance, rel=0.1)
    assert all(sorted(order.tolist()) == list(range(6)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) > 400
    assert baselines.draw_mixture(torch.zeros(6), 0)[0] == 1


def test_trades_adds_the_mean_squared_distance_with_a_gradient_through_both_embeddings(
        batch, adversarial, fixed_attack):
    model, images, labels, proxies = batch
    tensors = [*model.parameters(), proxies]

    def by_hand(stop_clean=False, stop_robust=False):
        clean, robust = model(images), model(adversarial)
        clean = clean.detach() if stop_clean else clean
        robust = robust.detach() if stop_robust else robust
        distance = sum((x - y) @ (x - y) for x, y in zip(clean, robust)) / 6
        return natural(*batch)[0] + 2.5 * distance, distance

    loss, terms = trades(*batch, EPS, STEP, 7, 2.5, "uniform")
    assert number(terms["clean"]) == pytest.approx(
        proxy_anchor_by_hand(model(images), labels, proxies))
    assert number(terms["shift"]) == pytest.approx(number(by_hand()[1])) and terms["shift"] > 0.01
    assert fixed_attack == [(model, images, EPS, STEP, 7, None)]
    assert_same(loss, by_hand()[0], tensors)
    for stops in ((True, False), (False, True)):
        with pytest.raises(AssertionError):
            assert_same(trades(*batch, *BALL, 2.5)[0], by_hand(*stops)[0], tensors)


def trades_start(start, eps=EPS):
    """x_adv - x of TRADES before the first step."""
    images, proxies = random_images(24, low=0.2, high=0.8), torch.eye(4).double()
    _, seen = watched_loss(trades, UnitNetwork(0), images, torch.arange(24) % 4, proxies, eps, STEP,
                           0, 6.0, start)
    (offset,) = (x - images for x in seen if not torch.equal(x, images))
    assert offset.abs().max() <= eps + 1e-12 and abs(offset.mean()) < 0.05 * eps
    return offset


def test_trades_starts_at_the_image_plus_a_little_noise_projected_or_anywhere_in_the_ball():
    gauss, narrow, uniform = (trades_start("gauss"), trades_start("gauss", 0.0005).abs(),
                              trades_start("uniform") / EPS)
    assert gauss.std() == pytest.approx(0.001, rel=0.1)
    assert gauss.abs().max() > 0.0025                              # uniform noise ends at 0.00173
    assert (narrow > 0.000499).double().mean() > 0.5               # 0.62 of it was outside
    assert uniform.abs().mean() == pytest.approx(0.5, abs=0.05)


# ---- est, act


def triplets_by_hand(anchors, positives, negatives):
    """mean max(0, d(a, p) - d(a, n) + 0.2), with a graph."""
    terms = [((a - p).square().sum().sqrt() - (a - n).square().sum().sqrt() + 0.2).clamp(min=0)
             for a, p, n in zip(anchors, positives, negatives)]
    return sum(terms) / len(terms), [number(term) > 0 for term in terms]


def test_est_mines_among_the_moved_embeddings_and_act_among_the_clean_ones(mined):
    for method in (est, act):
        model, images, _, seen = pairs(method)
        embeddings, how, options, (a, p, _) = mined.pop()
        assert torch.allclose(embeddings, model(seen[0] if method is est else images).detach())
        assert not torch.allclose(seen[0], images, atol=0.5 * EPS)
        assert a.tolist() == [0, 2, 4, 6] and p.tolist() == [1, 3, 5, 7]
        assert how == "random" and options["cutoffs"] == (None, None) and not mined


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


@pytest.mark.parametrize("steps", [0, 5])
def test_act_pushes_positives_and_negatives_together_from_zero_and_leaves_anchors(steps, mined):
    model, images, _, (pushed, anchors) = pairs(act, steps=steps)
    _, _, _, (a, p, n) = mined[0]
    clean = images[torch.cat([p, n])]
    assert torch.equal(anchors, images[a]) and len(a) == 4
    assert torch.equal(pushed, clean) == (steps == 0)
    assert_in_ball(pushed, clean, reach=0.7 if steps else -1)
    with torch.no_grad():
        before, after = (torch.sub(*model(x).chunk(2)).norm(dim=1) for x in (clean, pushed))
    assert steps == 0 or (after < 0.9 * before).all()


def test_act_mines_and_attacks_in_evaluation_mode_and_trains_in_the_given_one():
    still, live = (pairs(act, "hardest", model=UnitNetwork(3).train(mode))
                   for mode in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(still[3], live[3]))
    assert live[0].training and not still[0].training and number(live[2]) != number(still[2])


def test_on_a_linear_model_a_step_of_act_is_the_closed_form(mined):
    # -|W (p - n)| has the gradient -W^T W (p - n) / |W (p - n)| in p, and its opposite in n
    model, images, _, (pushed, _) = pairs(act, steps=1, model=linear_model(0))
    _, _, _, (_, p, n) = mined[0]
    weight = model[1].weight.detach()
    step = STEP * ((images[n] - images[p]).flatten(1) @ weight.T @ weight).sign()
    step = step.view_as(images[p])
    expected = torch.cat([images[p] + step, images[n] - step])
    assert torch.allclose(pushed, expected.clamp(0, 1)) and (step != 0).all()


@pytest.mark.parametrize("source", ["random", "semihard", "softhard", "distance", "hardest"])
@pytest.mark.parametrize("method", [est, act])
def test_every_source_keeps_the_partner_except_softhard(method, source, mined):
    for seed in range(8):
        loss = pairs(method, source, 1, seed)[2]
        assert torch.isfinite(loss) and loss.requires_grad
    for _, how, _, (a, p, n) in mined:
        assert how == source and a.tolist() == [0, 2, 4, 6] and (a != p).all()
        assert torch.equal(PAIRS[p], PAIRS[a]) and (PAIRS[n] != PAIRS[a]).all()
    kept = [torch.equal(p, a + 1) for _, _, _, (a, p, _) in mined]
    assert len(kept) == 8 and all(kept) == (source != "softhard")


@pytest.mark.parametrize("method", [est, act])
def test_a_batch_of_one_class_has_loss_zero_with_a_graph(method):
    model, _, loss, _ = pairs(method, labels=torch.zeros(6, dtype=torch.int64))
    assert number(loss) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---- vote of an ensemble

FIRST, SECOND = [0, 10, 90, 25], [0, 50, 80, 60]                   # degrees on the circle


@pytest.mark.parametrize("members, recall, tied, lost, won", [
    ((FIRST, SECOND), 0.75, 0.25, 0.5, 0.75),     # image 1: 0 against 1, the first voter is right
    ((SECOND, FIRST), 0.5, 0.25, 0.5, 0.75),      # ... and now wrong
    ((SECOND, FIRST, FIRST), 0.75, 0, 0.75, 0.75),                 # a majority overrules it
])
def test_the_vote_is_counted_as_by_hand(members, recall, tied, lost, won):
    # labels of the nearest: FIRST 0 0 1 0, SECOND 0 1 1 0; both are wrong about image 3
    angles = [torch.tensor(own, dtype=torch.float64).deg2rad() for own in members]
    scores = common.metrics_by_rule([torch.stack([x.cos(), x.sin()], 1) for x in angles],
                                    torch.tensor([0, 0, 1, 1]), ks=(1,), clusters=2, seed=0,
                                    clustering=False)
    vote = scores["vote"]
    assert (vote["R@1"], vote["tie_share"]) == (recall, tied)
    assert (vote["R@1_ties_lost"], vote["R@1_ties_won"]) == (lost, won)
    assert [scores[f"member_{i + 1}"]["R@1"] for i in range(len(members))] \
        == [0.75 if own is FIRST else 0.5 for own in members]


# ---- flags

METHODS = ("natural", "at", "mixup", "iat", "trades", "ensemble", "est", "act")
KE = dict(arch="mobilenetv2", embedding_dim=128, crop="resized", epochs=200, batch_size=120,
          lr=1e-4, weight_decay=1e-4, eps=16 / 255, step_size=4 / 255, attack_steps=10,
          warmup_epochs=1)
ZHOU = dict(arch="resnet18", embedding_dim=512, crop="square", epochs=75, batch_size=112, lr=1e-5,
            weight_decay=4e-4, eps=8 / 255, step_size=1 / 255, attack_steps=8, warmup_epochs=0)
SHARED = dict(image_size=224, freeze_bn=True, images_per_class=0, eps_ramp_epochs=0,
              benign_epochs=0, beta=0.5, mixup_alpha=1, mixup_target="label", trades_lambda=6,
              trades_start="gauss", members=3, members_method="at", split=False, source="random",
              eval_eps=8 / 255, eval_step_size=2 / 255, eval_steps=10)


def flags(words):
    return baselines.parse_args(["--dataset", "cub", *words.split()])


def refusal(words, capsys):
    """The one line with which these flags are refused."""
    with pytest.raises(SystemExit) as stop:
        flags(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_the_recipe_of_the_paper(method):
    expected = {**SHARED, **(ZHOU if method in ("est", "act") else KE), "method": method}
    args = vars(flags(f"--method {method}"))
    assert {name: args[name] for name in expected} == expected


def test_small_runs_are_as_small_as_those_of_eat():
    assert baselines.SMALL == eat.SMALL
    for method in METHODS:
        small = baselines.SMALL_TRIPLET if method in ("est", "act") else baselines.SMALL
        args = vars(baselines.parse_args([f"--method={method}"]))
        assert args["dataset"] == "glyphs" and small.items() <= args.items()


@pytest.mark.parametrize("words, folder", [
    ("trades --trades-lambda 1", "trades-lambda1-cub-mobilenetv2-s0"),
    ("trades --init uniform", "trades-uniform-cub-mobilenetv2-s0"),
    ("at --beta 0", "at-beta0-cub-mobilenetv2-s0"), ("natural", "natural-cub-mobilenetv2-s0"),
    ("ensemble --members-method natural", "ensemble-natural-cub-mobilenetv2-s0"),
    ("ensemble --split --seed 2", "ensemble-split-cub-mobilenetv2-s2"),
    ("mixup --mixup-target embedding", "mixup-embedding-cub-mobilenetv2-s0"),
    ("iat --mixup-alpha 0.2", "iat-alpha0.2-cub-mobilenetv2-s0"),
    ("act --source softhard --arch resnet50", "act-softhard-cub-resnet50-s0"),
])
def test_the_folder_of_a_run_names_what_is_not_the_default(words, folder):
    assert flags(f"--method {words}").out == f"runs/{folder}"
    assert eat.parse_args(["--beta", "0", "--dataset", "cub"]).out \
        == "runs/eat-beta0-cub-mobilenetv2-s0"


@pytest.mark.parametrize("flag, default, other, owners", [
    ("--beta", "--beta 0.5", "--beta 0", "at, ensemble"),
    ("--mixup-alpha", "--mixup-alpha 1", "--mixup-alpha 0", "mixup, iat"),
    ("--mixup-target", "--mixup-target label", "--mixup-target embedding", "mixup"),
    ("--trades-lambda", "--trades-lambda 6", "--trades-lambda 0", "trades"),
    ("--trades-start", "--trades-start gauss", "--trades-start uniform", "trades"),
    ("--members", "--members 3", "--members 2", "ensemble"),
    ("--members-method", "--members-method at", "--members-method natural", "ensemble"),
    ("--split", "--no-split", "--split", "ensemble"),
    ("--source", "--source random", "--source softhard", "est, act"),
])
def test_another_methods_flag_is_refused_by_name_unless_it_is_the_default(flag, default, other,
                                                                          owners, capsys):
    for method in METHODS:
        assert flags(f"--method {method} {default}").method == method
        if method in owners.split(", "):
            assert flags(f"--method {method} {other}").method == method
        else:
            assert f"{flag} belongs to --method {owners}, not to {method}:" \
                in refusal(f"--method {method} {other}", capsys)


@pytest.mark.parametrize("words, flag, good", [
    ("est --images-per-class 2", "--images-per-class", "est --images-per-class 0"),
    ("act --images-per-class 2", "--images-per-class", "act --images-per-class 0"),
    ("at --images-per-class 121", "--images-per-class 121", "at --images-per-class 120"),
    ("ensemble --members 1 --split", "drop --split", "ensemble --members 1 --no-split"),
    ("est --batch-size 2", "--batch-size 2", "est --batch-size 4"),
    ("ensemble --members-method natural --beta 0", "--beta",
     "ensemble --members-method natural --beta 0.5"),
])
def test_flags_that_contradict_each_other_are_refused_by_name(words, flag, good, capsys):
    assert flag in refusal(f"--method {words}", capsys)
    assert flags(f"--method {good}").method == good.split()[0]
