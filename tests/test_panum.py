"""Robust contrastive and triplet training: the tuples, the attack, the loss, the loop.

Oracles are a hand-written table of who moves, corners on linear networks, losses that loop over the
tuples one by one, and a natural training loop, which a run at attack rate 0 repeats bit for bit.
"""

import pytest
import torch
from test_baselines import assert_same, number
from test_eat import (
    EPS,
    STEP,
    UnitNetwork,
    books,
    half_live,
    linear_model,
    random_images,
    seeded,
    state_of,
    trained_by_hand,
)
from test_scripts import run, same_bits, saved

import common
import panum_at
from panum_at import robust_loss, who_moves

BALL = EPS, STEP, 5
IMAGES = random_images(10, low=0.1, high=0.9)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 0])
LOSSES = ("contrastive", "triplet")
CASES = [(loss, perturb) for loss in LOSSES for perturb in ("positive", "negative", "anchor")]


def none(count):
    return torch.zeros(count, dtype=torch.bool)


def every(count):
    return torch.ones(count, dtype=torch.bool)


def some(count):
    return torch.arange(count) % 3 != 1


def network(dim=4, live=False):
    """A UnitNetwork whose embeddings of IMAGES lie around the origin, not in one corner."""
    model = UnitNetwork(3, dim)
    with torch.no_grad():
        model.layers[-1].bias -= model.layers(IMAGES).mean(0)
    return model.train(live)


def displaced(images):
    """Known images far from `images`, in another way at every place of the batch."""
    return images.flip(3) * (1 - torch.arange(len(images)) / 50).view(-1, 1, 1, 1)


@pytest.fixture
def attacks(monkeypatch):
    """Every attack returns `displaced`; images, terms and ball of the calls."""
    calls = []

    def attack(model, images, terms, *ball):
        calls.append((images, terms, ball))
        return displaced(images)

    monkeypatch.setattr(panum_at, "attack", attack)
    return calls


@pytest.fixture
def mined(monkeypatch):
    """Embeddings, kind, options and triplets of every call of the mining."""
    calls, mine = [], panum_at.mine_triplets

    def watched(embeddings, labels, how, **options):
        calls.append((embeddings, how, options, mine(embeddings, labels, how, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(panum_at, "mine_triplets", watched)
    return calls


def step(model, gamma, seed=0, labels=LABELS, **options):
    torch.manual_seed(seed)
    return robust_loss(model, IMAGES, labels, gamma, BALL, **options)


def parameters(model):
    return [*model.parameters()]


# ---- oracles

def rows_by_hand(triplets, loss):
    """[(kind, row, row ...)] of mined triplets."""
    triplets = [tuple(int(row) for row in rows) for rows in zip(*triplets)]
    if loss == "triplet":
        return [("triplet", *rows) for rows in triplets]
    return [("same", a, p) for a, p, _ in triplets] + [("other", a, n) for a, _, n in triplets]


def attackable(kind, perturb):
    return kind not in {"positive": ("other",), "negative": ("same",), "anchor": ()}[perturb]


def place(kind, perturb):
    """Where (kind, row, row ...) holds the image that moves."""
    return {"anchor": 1, "positive": 2, "negative": 3 if kind == "triplet" else 2}[perturb]


def distance(x, y):
    return (x - y).square().sum().sqrt()


def loss_by_hand(tuples):
    """The sum over kinds of the mean of their positive terms; tuples [(kind, embedding ...)]."""
    term = {"same": lambda x, y: distance(x, y), "other": lambda x, y: 1 - distance(x, y),
            "triplet": lambda a, p, n: distance(a, p) - distance(a, n) + 0.2}
    total = 0.0
    for kind in {kind for kind, *_ in tuples}:
        terms = [term[kind](*own).clamp(min=0) for name, *own in tuples if name == kind]
        total = total + sum(terms) / sum(number(value) > 0 for value in terms)
    return total


def robust_by_hand(model, triplets, gamma, loss, perturb):
    """(loss, attacked, attackable) when every attack returns `displaced`; one tuple at a time."""
    rows, clean = rows_by_hand(triplets, loss), model(IMAGES)
    possible = [attackable(kind, perturb) for kind, *_ in rows]
    chosen = [t for t, coin in enumerate(gamma(len(rows)).tolist()) if coin and possible[t]]
    moved = displaced(IMAGES[[rows[t][place(rows[t][0], perturb)] for t in chosen]])
    tuples = [[kind, *(clean[row] for row in own)] for kind, *own in rows]
    for k, t in enumerate(chosen):
        tuples[t][place(rows[t][0], perturb)] = model(moved)[k]
    return loss_by_hand(tuples), len(chosen), sum(possible)


# ---- tuples

A, P, N = [0, 1], [2, 3], [4, 5]
TABLE = {          # tuples, same, moved, [(sign, partner)], possible
    ("triplet", "positive"): ([A, P, N], None, 1, [([1, 1], A)], [1, 1]),
    ("triplet", "negative"): ([A, P, N], None, 2, [([-1, -1], A)], [1, 1]),
    ("triplet", "anchor"): ([A, P, N], None, 0, [([1, 1], P), ([-1, -1], N)], [1, 1]),
    ("contrastive", "positive"): ([[0, 1, 0, 1], [2, 3, 4, 5]], [1, 1, 0, 0], 1,
                                  [([1, 1, -1, -1], [0, 1, 0, 1])], [1, 1, 0, 0]),
    ("contrastive", "negative"): ([[0, 1, 0, 1], [2, 3, 4, 5]], [1, 1, 0, 0], 1,
                                  [([1, 1, -1, -1], [0, 1, 0, 1])], [0, 0, 1, 1]),
    ("contrastive", "anchor"): ([[0, 1, 0, 1], [2, 3, 4, 5]], [1, 1, 0, 0], 0,
                                [([1, 1, -1, -1], [2, 3, 4, 5])], [1, 1, 1, 1]),
}


@pytest.mark.parametrize("loss, perturb", CASES)
def test_who_moves_is_the_table_written_by_hand(loss, perturb):
    a, p, n = (torch.tensor(column) for column in (A, P, N))
    tuples, same, moved, terms, possible = who_moves(a, p, n, loss, perturb)
    shown = ([column.tolist() for column in tuples], None if same is None else same.tolist(), moved,
             [(sign.tolist(), rows.tolist()) for sign, rows in terms], possible.tolist())
    assert shown == TABLE[loss, perturb]
    assert possible.dtype == torch.bool and (same is None or same.dtype == torch.bool)


# ---- attack

def unit_rows(seed, count=10, dim=4):
    return torch.nn.functional.normalize(
        torch.randn(count, dim, generator=seeded(seed), dtype=torch.float64), dim=1)


def signs(text):
    return torch.tensor([{"+": 1, "-": -1}[sign] for sign in text])


TERMS = {
    "away": [(signs("+" * 10), unit_rows(1))],
    "towards": [(signs("-" * 10), unit_rows(1))],
    "either": [(signs("+-" * 5), unit_rows(1))],
    "both": [(signs("+" * 10), unit_rows(1)), (signs("-" * 10), unit_rows(2))],
}


def attacked(model, images, terms, steps=5, step_size=STEP):
    torch.manual_seed(0)
    return panum_at.attack(model, images, terms, EPS, step_size, steps)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_on_a_linear_model_the_attack_ends_in_the_corner_of_the_closed_form(terms):
    # |W x - r u| = r - (W x).u + O(1/r): the gradient of sum sign |W x - r u| is -sum sign W^T u
    model, radius = linear_model(0), 1e6
    far = [(sign, radius * y) for sign, y in terms]
    direction = -sum(sign[:, None] * y for sign, y in terms) @ model[1].weight.detach()
    corner = IMAGES + EPS * direction.sign().view_as(IMAGES)
    assert direction.abs().min() > 10 / radius
    assert torch.allclose(attacked(model, IMAGES, far, 2, step_size=2 * EPS), corner)
    offset = (attacked(model, IMAGES, far, 0) - IMAGES) / EPS
    assert offset.abs().mean() == pytest.approx(0.5, abs=0.05)     # uniform in the ball


def test_the_attack_leaves_everything_as_it_was_and_does_not_see_the_mode():
    model, partner = half_live(network()), unit_rows(1).requires_grad_()
    terms, before = [(signs("+-" * 5), partner)], state_of(model)
    assert torch.equal(attacked(model, IMAGES, terms), attacked(network(), IMAGES, terms))
    assert state_of(model) == before and partner.grad is None


# ---- loss

@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("loss, perturb", CASES)
@pytest.mark.parametrize("gamma", [none, every, some])
def test_the_loss_is_that_of_the_tuples_with_the_chosen_images_moved_by_hand(gamma, loss, perturb,
                                                                             dim, mined, attacks):
    model = network(dim)
    ours, terms = step(model, gamma, loss=loss, perturb=perturb)
    expected, hits, possible = robust_by_hand(model, mined[0][-1], gamma, loss, perturb)
    clean = robust_by_hand(model, mined[0][-1], none, loss, perturb)[0]
    assert (abs(number(expected) - number(clean)) > 1e-4) == (hits > 0) == len(attacks)
    assert_same(ours, expected, parameters(model))
    assert number(terms["clean"]) == pytest.approx(number(clean), rel=1e-9)
    assert not terms["clean"].requires_grad and terms["loss"] is ours
    assert terms["attacked"] == pytest.approx(hits / possible)
    assert (hits < possible) == (gamma is not every)


@pytest.mark.parametrize("gamma", [every, some])
@pytest.mark.parametrize("loss, perturb", CASES)
def test_the_attack_gets_the_chosen_images_and_their_clean_partners(loss, perturb, gamma, mined,
                                                                    attacks):
    asked, passes, model = [], [], network(live=True)
    model.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0]) if model.training else None)
    step(model, lambda count: asked.append(count) or gamma(count), loss=loss, perturb=perturb)
    tuples, _, moved, terms, possible = who_moves(*mined[0][-1], loss, perturb)
    chosen, (images, given, ball) = gamma(len(possible)) & possible, attacks[0]
    assert asked == [len(possible)] and ball == BALL               # a coin for every tuple
    assert torch.equal(images, IMAGES[tuples[moved][chosen]]) and len(images) > 2
    with torch.no_grad():
        clean = network()(IMAGES)
    embeddings, how, options, (a, _, _) = mined[0]                 # mined in evaluation mode
    assert torch.allclose(embeddings, clean) and not embeddings.requires_grad
    assert how == "distance" and not options and a.tolist() == list(range(10))
    for (sign, y), (expected, rows) in zip(given, terms, strict=True):
        assert torch.equal(sign, expected[chosen]) and not y.requires_grad
        assert torch.allclose(y, clean[rows[chosen]])
    assert len(passes) == len(attacks) == 1                        # of the enlarged batch
    assert torch.equal(passes[0], torch.cat([IMAGES, displaced(images)]))


# ---- formulation 3: a regulariser

@pytest.mark.parametrize("gamma", [every, some])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_regulariser_is_the_mean_shift_with_a_gradient_through_both_embeddings(
        loss, gamma, mined, attacks):
    model = network()
    value, terms = step(model, gamma, loss=loss, reg_weight=2.5)
    triplets, (images, ((sign, y),), ball) = mined[0][-1], attacks[0]
    anchors = triplets[0][gamma(10)]             # they move away from themselves
    assert torch.equal(images, IMAGES[anchors]) and ball == BALL and (sign == 1).all()
    assert torch.allclose(y, model(IMAGES)[anchors]) and not y.requires_grad
    moved, clean = model(displaced(images)), model(IMAGES)
    plain = robust_by_hand(model, triplets, none, loss, "anchor")[0]
    shift = sum(distance(z, clean[a]) for z, a in zip(moved, anchors)) / 10
    assert_same(value, plain + 2.5 * shift, parameters(model))
    assert number(terms["clean"]) == pytest.approx(number(plain)) and number(shift) > 0.04
    assert terms["attacked"] == pytest.approx(gamma(10).double().mean())


# ---- edges, training

@pytest.mark.parametrize("reg_weight", [0, 1.0])
@pytest.mark.parametrize("loss, perturb", CASES)
def test_a_batch_of_one_class_has_loss_zero_with_a_graph(loss, perturb, reg_weight):
    model = network(live=True)
    value, terms = step(model, every, labels=torch.zeros(10, dtype=torch.int64), loss=loss,
                        perturb=perturb, reg_weight=reg_weight)
    value.backward()
    assert number(value) == number(terms["clean"]) == terms["attacked"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def natural_weights(words):
    """Contrastive or triplet training without a word of an attack."""
    plain = books(words, "panum")

    def loss(model, images, labels):
        with common.frozen(model), torch.no_grad():
            clean = model(images)
        a, p, n = common.mine_triplets(clean, labels, "distance")
        x = model(images)
        if plain.args.loss == "triplet":
            return common.triplet_loss(x[a], x[p], x[n], reduction="nonzero")
        same = torch.tensor([True] * len(a) + [False] * len(a))
        return common.contrastive_loss(x[torch.cat([a, a])], x[torch.cat([p, n])], same,
                                       reduction="nonzero")

    return trained_by_hand(plain, lambda epoch: common.class_balanced_batches(
        plain.train.labels, 6, 2, 0, epoch), loss, scale=(0.6, 1.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_attack_rate_zero_is_natural_training_bit_for_bit(loss, tmp_path):
    words = f"--loss {loss} --epochs 2"
    for rate in (0, 1):
        run("panum", tmp_path / str(rate), f"{words} --attack-rate {rate}")
        (weights,) = saved(tmp_path / str(rate))["members"]
        assert same_bits(weights, natural_weights(words)) == (rate == 0)


@pytest.mark.parametrize("words, balls, rates, options", [
    ("--attack-rate 0.25 --loss triplet", [(0.01, 0.004, 5)] * 3, [0.25] * 3,
     dict(loss="triplet", perturb="positive", reg_weight=0)),
    ("--reg-weight 2", [(0.01, 0.004, 5)] * 3, [1, 1, 1],
     dict(loss="contrastive", perturb="positive", reg_weight=2)),
    ("--eps-ramp 1 2 --step-size 0.006 --perturb anchor",
     [(0, 0, 5), (0, 0, 5), (0.005, 0.003, 5), (0.01, 0.006, 5)], [0, 0, 0.5, 0.5],
     dict(loss="contrastive", perturb="anchor", reg_weight=0))])
def test_the_flags_give_every_epoch_its_ball_its_rate_and_its_loss(words, balls, rates, options,
                                                                   tmp_path, monkeypatch):
    seen = []

    def noted(model, images, labels, gamma, ball, **given):
        seen.append((ball, float(gamma(4000).double().mean()), given))
        return robust_loss(model, images, labels, gamma, ball, **given)

    monkeypatch.setattr(panum_at, "robust_loss", noted)
    run("panum", tmp_path / "run", f"--attack-steps 5 --epochs {len(balls)} {words}")
    assert len(seen) == 4 * len(balls)
    for (ball, rate, given), expected, share in zip(seen[::4], balls, rates):
        assert ball == pytest.approx(expected) and given == options
        assert rate == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)
    assert len({rate for _, rate, _ in seen}) > 4 or {*rates} == {1}   # other coins in every step
