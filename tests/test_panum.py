"""Robust contrastive and triplet training: the tuples, the attack, the loss, the flags.

Oracles are a hand-written table of who moves, corners and sign steps written out on small networks,
losses that loop over the tuples one by one, pytorch-metric-learning, and a natural training loop of
its own, which a run at attack rate 0 repeats bit for bit.
"""

import functools

import pytest
import torch
from test_baselines import assert_in_ball, assert_same, number
from test_eat import EPS, STEP, UnitNetwork, linear_model, random_images, seeded

import common
import panum_at
from panum_at import robust_loss, who_moves

BALL = EPS, STEP, 5, True
IMAGES = random_images(10, low=0.1, high=0.9)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 0])
LOSSES = ("contrastive", "triplet")
TARGETS = ("positive", "negative", "anchor")
CASES = [(loss, perturb) for loss in LOSSES for perturb in TARGETS]


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


@pytest.fixture
def lossy(monkeypatch):
    """Tuples and same of every call of the loss, as they were then."""
    calls, loss = [], panum_at.tuple_loss

    def watched(embeddings, tuples, same, *options):
        calls.append(([column.clone() for column in tuples], same))
        return loss(embeddings, tuples, same, *options)

    monkeypatch.setattr(panum_at, "tuple_loss", watched)
    return calls


def step(model, gamma, seed=0, images=IMAGES, labels=LABELS, **options):
    torch.manual_seed(seed)
    return robust_loss(model, images, labels, gamma, BALL, **options)


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


def loss_by_hand(tuples, reduction="nonzero", power=1):
    """The sum over kinds of the mean of their terms; tuples [(kind, embedding ...)]."""
    term = {"same": lambda x, y: distance(x, y), "other": lambda x, y: 1 - distance(x, y),
            "triplet": lambda a, p, n: distance(a, p) ** power - distance(a, n) ** power + 0.2}
    total = 0.0
    for kind in {kind for kind, *_ in tuples}:
        terms = [term[kind](*own).clamp(min=0) for name, *own in tuples if name == kind]
        positive = sum(number(value) > 0 for value in terms)
        total = total + sum(terms) / (positive if reduction == "nonzero" else len(terms))
    return total


def clean_by_hand(model, triplets, loss, *options):
    x = model(IMAGES)
    return loss_by_hand([(kind, *(x[row] for row in rows))
                         for kind, *rows in rows_by_hand(triplets, loss)], *options)


def robust_by_hand(model, triplets, gamma, loss, perturb, *options):
    """(loss, attacked, attackable) when every attack returns `displaced`; one tuple at a time."""
    rows, clean = rows_by_hand(triplets, loss), model(IMAGES)
    possible = [attackable(kind, perturb) for kind, *_ in rows]
    chosen = [t for t, coin in enumerate(gamma(len(rows)).tolist()) if coin and possible[t]]
    moved = displaced(IMAGES[[rows[t][place(rows[t][0], perturb)] for t in chosen]])
    tuples = [[kind, *(clean[row] for row in own)] for kind, *own in rows]
    for k, t in enumerate(chosen):
        tuples[t][place(rows[t][0], perturb)] = model(moved)[k]
    return loss_by_hand(tuples, *options), len(chosen), sum(possible)


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


@pytest.mark.parametrize("loss, perturb", CASES)
def test_a_moved_image_leaves_partners_of_its_class_and_nears_those_of_others(loss, perturb):
    triplets = common.mine_triplets(torch.zeros(10, 4), LABELS, "random", seeded(0))
    tuples, _, moved, terms, possible = who_moves(*triplets, loss, perturb)
    assert possible.any()
    for sign, partner in terms:
        for t in possible.nonzero()[:, 0]:
            own = LABELS[tuples[moved][t]] == LABELS[partner[t]]
            assert sign[t] == (1 if own else -1) and partner[t] != tuples[moved][t]


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


def gain(model, images, terms):
    """sum_k sign_k d(F(x), y_k) of every image."""
    return torch.stack([sum(int(sign[i]) * distance(x, y[i]) for sign, y in terms)
                        for i, x in enumerate(model(images))])


def attacked(model, images, terms, steps=5, random_start=True, step_size=STEP):
    torch.manual_seed(0)
    return panum_at.attack(model, images, terms, EPS, step_size, steps, random_start)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_the_attack_raises_the_signed_distances_of_every_image_inside_the_ball(terms):
    model, images = network(), IMAGES.clone()
    images[0], images[1] = 0, 1
    start, end = attacked(model, images, terms, 0), attacked(model, images, terms, 10)
    assert_in_ball(end, images)
    assert not end.requires_grad
    with torch.no_grad():
        before, random, after = (gain(model, x, terms) for x in (images, start, end))
    assert (after > before + 1e-3).all() and (after > random + 1e-3).all()


def test_a_positive_sign_moves_away_and_a_negative_one_moves_nearer():
    model, (sign, partner) = network(), TERMS["either"][0]
    with torch.no_grad():
        before, after = ((model(x) - partner).norm(dim=1)
                         for x in (IMAGES, attacked(model, IMAGES, TERMS["either"])))
    assert torch.equal(after > before, sign > 0) and ((after - before).abs() > 1e-3).all()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_on_a_linear_model_the_attack_ends_in_the_corner_of_the_closed_form(terms):
    # |W x - r u| = r - (W x).u + O(1/r): the gradient of sum sign |W x - r u| is -sum sign W^T u
    model, radius = linear_model(0), 1e6
    far = [(sign, radius * y) for sign, y in terms]
    direction = -sum(sign[:, None] * y for sign, y in terms) @ model[1].weight.detach()
    corner = IMAGES + EPS * direction.sign().view_as(IMAGES)
    assert direction.abs().min() > 10 / radius
    assert torch.allclose(attacked(model, IMAGES, far, 2, step_size=2 * EPS), corner)


def sign_steps_by_hand(model, images, terms, step_size, steps):
    x = images
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(gain(model, x, terms).sum(), x)
        x = torch.minimum(torch.maximum(x + step_size * slope.sign(), images - EPS), images + EPS)
        x = x.clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("step_size, steps", [(EPS, 1), (0.4 * EPS, 5)])
def test_fgsm_is_one_step_by_hand_and_pgd_is_several(step_size, steps, terms):
    model = network()
    expected = sign_steps_by_hand(model, IMAGES, terms, step_size, steps)
    ours = attacked(model, IMAGES, terms, steps, random_start=False, step_size=step_size)
    assert torch.allclose(ours, expected, atol=1e-12)
    assert not torch.allclose(ours, attacked(model, IMAGES, terms, steps, step_size=step_size))


def test_the_attack_starts_anywhere_in_the_ball_unless_it_is_told_to_start_at_the_image():
    model, terms = network(), TERMS["away"]
    offset = (attacked(model, IMAGES, terms, 0) - IMAGES) / EPS
    assert offset.abs().max() <= 1 + 1e-9
    assert offset.abs().mean() == pytest.approx(0.5, abs=0.05)     # uniform in the ball
    assert offset.mean() == pytest.approx(0, abs=0.1)
    assert torch.equal(attacked(model, IMAGES, terms, 0, random_start=False), IMAGES)


@pytest.mark.parametrize("live", [False, True])
def test_the_attack_leaves_everything_as_it_was_and_does_not_see_the_mode(live):
    def state():
        return ([module.training for module in model.modules()],
                [(p.requires_grad, p.grad) for p in model.parameters()],
                [value.tolist() for value in model.state_dict().values()], partner.grad,
                partner.tolist())

    model, partner = network(), unit_rows(1).requires_grad_()
    terms = [(signs("+-" * 5), partner)]
    expected = attacked(model, IMAGES, terms)
    model.train()
    model.layers[1].train(live)
    model.layers[0].requires_grad_(False)
    before = state()
    assert torch.equal(attacked(model, IMAGES, terms), expected)
    assert state() == before and not expected.requires_grad


# ---- loss without an attack


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("live", [False, True])
def test_without_an_attack_the_loss_is_that_of_the_mined_triplets_by_hand(live, loss, mined,
                                                                          attacks):
    for perturb in TARGETS:
        model = network(live=live)
        ours, terms = step(model, none, loss=loss, perturb=perturb)
        assert_same(ours, clean_by_hand(model, mined[-1][-1], loss), parameters(model))
        assert terms["attacked"] == 0 and terms["loss"] is ours
    assert not attacks


@pytest.mark.parametrize("loss", LOSSES)
def test_without_an_attack_the_loss_is_that_of_pytorch_metric_learning(loss, mined):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    oracle = {"triplet": losses.TripletMarginLoss(margin=0.2),
              "contrastive": losses.ContrastiveLoss(pos_margin=0, neg_margin=1)}[loss]
    for seed in range(5):
        model = network()
        ours, _ = step(model, none, seed, loss=loss)
        expected = oracle(model(IMAGES), LABELS, indices_tuple=mined[-1][-1])
        assert_same(ours, expected, parameters(model))


@pytest.mark.parametrize("live", [False, True])
def test_triplets_are_mined_by_distance_among_clean_embeddings_in_evaluation_mode(live, mined):
    model = network(live=live)
    step(model, every)
    step(model, every, cutoffs=(None, 1.0))
    with torch.no_grad():
        expected = network()(IMAGES)
    assert torch.allclose(mined[0][0], expected) and not mined[0][0].requires_grad
    assert [call[1] for call in mined] == ["distance"] * 2
    assert [call[2] for call in mined] == [{"cutoffs": (0.5, 1.4)}, {"cutoffs": (None, 1.0)}]
    a, p, n = mined[0][-1]
    assert a.tolist() == list(range(10)) and (p != a).all()
    assert torch.equal(LABELS[p], LABELS[a]) and (LABELS[n] != LABELS[a]).all()


# ---- loss with an attack

OPTIONS = [("contrastive", "nonzero", False), ("contrastive", "mean", False),
           ("triplet", "nonzero", False), ("triplet", "mean", False),
           ("triplet", "nonzero", True), ("triplet", "mean", True)]


@pytest.mark.parametrize("loss, reduction, squared", OPTIONS)
@pytest.mark.parametrize("perturb", TARGETS)
@pytest.mark.parametrize("gamma", [every, some])
def test_the_loss_is_that_of_the_tuples_with_the_chosen_images_moved_by_hand(
        gamma, perturb, loss, reduction, squared, mined, attacks):
    model, options = network(), (reduction, 1 + squared)
    ours, terms = step(model, gamma, loss=loss, perturb=perturb, reduction=reduction,
                       squared=squared)
    triplets = mined[0][-1]
    expected, hits, possible = robust_by_hand(model, triplets, gamma, loss, perturb, *options)
    clean = clean_by_hand(model, triplets, loss, *options)
    assert abs(number(expected) - number(clean)) > 1e-3
    assert_same(ours, expected, parameters(model))
    assert number(terms["clean"]) == pytest.approx(number(clean), rel=1e-9)
    assert not terms["clean"].requires_grad and terms["loss"] is ours
    assert terms["attacked"] == pytest.approx(hits / possible) and len(attacks) == 1
    assert hits == len(attacks[0][0]) and (hits < possible) == (gamma is some)


def test_the_options_of_the_loss_change_it(attacks):
    values = [number(step(network(), every, loss=loss, perturb=perturb, reduction=reduction,
                          squared=squared)[0])
              for loss, reduction, squared in OPTIONS for perturb in TARGETS]
    assert len({round(value, 6) for value in values}) == len(values)


@pytest.mark.parametrize("loss, perturb", CASES)
def test_gamma_is_asked_once_for_a_coin_of_every_tuple(loss, perturb, attacks):
    asked = []
    step(network(), lambda count: asked.append(count) or every(count), loss=loss, perturb=perturb)
    assert asked == [10 if loss == "triplet" else 20]


@pytest.mark.parametrize("gamma", [every, some])
@pytest.mark.parametrize("loss, perturb", CASES)
def test_every_adversarial_image_has_its_place_its_label_and_its_clean_partners(
        loss, perturb, gamma, mined, attacks, lossy):
    step(network(live=True), gamma, loss=loss, perturb=perturb)
    with torch.no_grad():
        clean = network()(IMAGES)
    (before, same), (after, _) = lossy
    (moved, terms, ball), = attacks
    assert ball == BALL
    sources = [int((IMAGES == image).flatten(1).all(1).nonzero()) for image in moved]
    rows, seen = rows_by_hand(mined[0][-1], loss), []
    names = "triplet" if same is None else ["same" if one else "other" for one in same]
    for t, (kind, *own) in enumerate(rows):
        assert names == "triplet" or names[t] == kind
        assert [int(column[t]) for column in before] == own
        new = [int(column[t]) for column in after]
        hit = bool(gamma(len(rows))[t]) and attackable(kind, perturb)
        column = place(kind, perturb) - 1
        assert (new[column] >= 10) == hit
        assert new[:column] + new[column + 1:] == own[:column] + own[column + 1:]
        if not hit:
            assert new == own
            continue
        k = new[column] - 10
        seen.append(k)
        assert sources[k] == own[column]
        partners = [own[0]] if column else own[1:]
        assert len(partners) == len(terms)
        for (sign, y), partner in zip(terms, partners):
            assert not y.requires_grad and torch.allclose(y[k], clean[partner])
            assert sign[k] == (1 if LABELS[sources[k]] == LABELS[partner] else -1)
    assert seen == list(range(len(moved))) and len(seen) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_every_adversarial_positive_has_the_label_of_its_anchor(loss, attacks, lossy):
    step(network(), some, loss=loss, perturb="positive")
    (before, _), (after, _) = lossy
    moved = attacks[0][0]
    labels = torch.cat([LABELS, torch.stack([
        LABELS[(IMAGES == image).flatten(1).all(1)][0] for image in moved])])
    adversarial = after[1] >= 10
    assert adversarial.sum() == len(moved) > 0
    assert torch.equal(labels[after[1]], LABELS[before[1]])
    assert torch.equal(labels[after[1][adversarial]], LABELS[after[0][adversarial]])


@pytest.mark.parametrize("gamma", [none, every, some])
@pytest.mark.parametrize("loss, perturb", CASES)
def test_there_is_one_training_pass_of_the_batch_enlarged_by_the_attacked_images(loss, perturb,
                                                                                 gamma, attacks):
    model, seen = network(live=True), []
    model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0]) if model.training else None)
    step(model, gamma, loss=loss, perturb=perturb)
    expected = torch.cat([IMAGES, *(displaced(images) for images, _, _ in attacks)])
    assert len(seen) == 1 and torch.equal(seen[0], expected)
    assert len(attacks) == (gamma is not none)
    alone = network(live=True)
    alone(expected)
    for name, value in alone.state_dict().items():                # BatchNorm saw that pass only
        assert torch.allclose(model.state_dict()[name], value)


@pytest.mark.parametrize("loss, perturb", CASES)
def test_the_real_attack_makes_the_loss_worse(loss, perturb):
    value, terms = step(network(), every, loss=loss, perturb=perturb, reduction="mean")
    assert number(value) > number(terms["clean"]) + 0.01


# ---- formulation 3: a regulariser


@pytest.mark.parametrize("gamma", [every, some])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_third_formulation_adds_the_mean_shift_with_a_gradient_through_both_embeddings(
        loss, gamma, mined, attacks):
    def by_hand(stop_moved=False, stop_clean=False):
        anchors = [int(a) for a, coin in zip(triplets[0], gamma(10)) if coin]
        moved, clean = model(displaced(IMAGES[anchors])), model(IMAGES)
        moved = moved.detach() if stop_moved else moved
        clean = clean.detach() if stop_clean else clean
        shift = sum(distance(z, clean[a]) for z, a in zip(moved, anchors)) / 10
        return clean_by_hand(model, triplets, loss) + 2.5 * shift

    model = network()
    value, terms = step(model, gamma, loss=loss, reg_weight=2.5)
    triplets = mined[0][-1]
    assert_same(value, by_hand(), parameters(model))
    for stops in ((True, False), (False, True)):
        again, _ = step(model, gamma, loss=loss, reg_weight=2.5)
        with pytest.raises(AssertionError):
            assert_same(again, by_hand(*stops), parameters(model))
    clean = number(clean_by_hand(model, triplets, loss))
    assert number(terms["clean"]) == pytest.approx(clean) and number(value) > clean + 0.1
    assert terms["attacked"] == pytest.approx(gamma(10).double().mean())


@pytest.mark.parametrize("loss, perturb", CASES)
def test_the_third_formulation_moves_anchors_away_from_themselves(loss, perturb, mined, attacks,
                                                                  lossy):
    asked = []
    step(network(live=True), lambda count: asked.append(count) or some(count), loss=loss,
         perturb=perturb, reg_weight=1.0)
    (images, ((sign, y),), ball), = attacks
    anchors = mined[0][-1][0][some(10)]
    with torch.no_grad():
        clean = network()(IMAGES)
    assert asked == [10] and ball == BALL
    assert torch.equal(images, IMAGES[anchors]) and torch.equal(sign, torch.ones(len(anchors)))
    assert torch.allclose(y, clean[anchors]) and not y.requires_grad
    (before, _), (after, _) = lossy
    assert all(torch.equal(x, z) for x, z in zip(before, after))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_third_formulation_with_weight_zero_is_the_clean_loss(loss, mined):
    model = network()
    value, terms = step(model, every, loss=loss, reg_weight=0.0)
    assert_same(value, clean_by_hand(model, mined[0][-1], loss), parameters(model))
    assert number(value) == pytest.approx(number(terms["clean"])) and terms["attacked"] == 1


def test_the_third_formulation_finds_a_shift_with_the_real_attack():
    weights = {weight: number(step(network(), every, reg_weight=weight)[0]) for weight in (0, 1, 3)}
    assert weights[1] > weights[0] + 0.02
    assert weights[3] - weights[0] == pytest.approx(3 * (weights[1] - weights[0]))


# ---- edges


@pytest.mark.parametrize("reg_weight", [None, 1.0])
@pytest.mark.parametrize("loss, perturb", CASES)
def test_a_batch_of_one_class_has_loss_zero_with_a_graph(loss, perturb, reg_weight):
    model = network(live=True)
    value, terms = step(model, every, labels=torch.zeros(10, dtype=torch.int64), loss=loss,
                        perturb=perturb, reg_weight=reg_weight)
    value.backward()
    assert number(value) == number(terms["clean"]) == terms["attacked"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("loss, perturb", CASES)
def test_embeddings_may_have_two_dimensions(loss, perturb, mined, attacks):
    model = network(dim=2)
    ours, _ = step(model, every, loss=loss, perturb=perturb)
    assert_same(ours, robust_by_hand(model, mined[0][-1], every, loss, perturb)[0],
                parameters(model))


# ---- natural training

TINY = ("--dataset gaussian --image-size 16 --epochs 2 --limit-queries 8 --eval-steps 1 "
        "--plain-epochs 0 --workers 0 --device cpu")


def tiny(words, out="unused"):
    return panum_at.parse_args([*TINY.split(), *words.split(), "--out", str(out)])


def drawn(args, labels, epoch):
    return common.epoch_batches(args, labels, epoch, batch_size=args.batch_size,
                                pool=torch.arange(len(labels)))


@functools.cache
def natural_weights(loss):
    """Contrastive or triplet training without a word of an attack."""
    args = tiny(f"--loss {loss}")
    train, _ = common.load_run_data(args)
    member = common.new_member(args, torch.device("cpu"))
    optimizer = torch.optim.Adam(member.parameters(), args.lr, weight_decay=args.weight_decay)
    for epoch in range(2):
        common.seed_torch(args.seed, epoch, common.TRAIN)
        common.train_mode(member, args.freeze_bn)
        for images, labels, _ in common.load_batches(train, drawn(args, train.labels, epoch),
                                                     args.seed, epoch, workers=0,
                                                     scale=panum_at.CROP_SCALE):
            with common.eval_mode(member), torch.no_grad():
                clean = member(images)
            a, p, n = common.mine_triplets(clean, labels, "distance")
            x = member(images)
            if loss == "triplet":
                value = common.triplet_loss(x[a], x[p], x[n], reduction="nonzero")
            else:
                same = torch.tensor([True] * len(a) + [False] * len(a))
                value = common.contrastive_loss(x[torch.cat([a, a])], x[torch.cat([p, n])], same,
                                                reduction="nonzero")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return member.state_dict()


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss", LOSSES)
def test_attack_rate_zero_is_natural_training_bit_for_bit(loss, tmp_path):
    for rate in (0, 1):
        out = tmp_path / f"rate{rate}"
        panum_at.main(tiny(f"--loss {loss} --attack-rate {rate} --attack-steps 1", out))
        (weights,) = torch.load(out / "last.pt")["members"]
        assert same_bits(weights, natural_weights(loss)) == (rate == 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_undefended_network_of_the_closing_table_is_naturally_trained(loss):
    args = tiny(f"--loss {loss} --attack-rate 1 --plain-epochs 2")
    train, _ = common.load_run_data(args)
    member = common.new_member(args, torch.device("cpu"))
    assert not same_bits(member.state_dict(), expected := natural_weights(loss))
    panum_at.train_plain(args, member, train, torch.device("cpu"),
                         lambda epoch: drawn(args, train.labels, epoch))
    assert same_bits(member.state_dict(), expected)


@pytest.mark.parametrize("words, balls, rates", [
    ("--attack-rate 0.25", [(0.01, 0.004, 5, True)] * 2, [0.25, 0.25]),
    ("--benign-epochs 1 --attack fgsm", [(0, 0, 1, False), (0.01, 0.01, 1, False)], [0, 0.5]),
    ("--formulation 3 --attack fgsm", [(0.01, 0.01, 1, True)] * 2, [0.5, 0.5]),
    ("--epochs 4 --benign-epochs 1 --eps-ramp-epochs 2 --step-size 0.006",
     [(0, 0, 5, True), (0, 0, 5, True), (0.005, 0.003, 5, True), (0.01, 0.006, 5, True)],
     [0, 0, 0.5, 0.5]),
])
def test_the_flags_give_every_epoch_its_ball_and_its_rate(words, balls, rates, monkeypatch,
                                                          tmp_path):
    seen = {}

    def step_loss(args, member, images, labels, ball, gamma):
        epoch = seen.setdefault("epochs", [])
        epoch.append((ball, float(gamma(4000).double().mean())))
        value = sum(p.sum() for p in member.parameters()) * 0
        return value, {"loss": value}

    monkeypatch.setattr(panum_at, "step_loss", step_loss)
    args = tiny(f"{words} --batch-size 508 --images-per-class 0", tmp_path / "run")
    panum_at.main(args)
    assert len(seen["epochs"]) == len(balls)                       # one batch an epoch
    for (ball, rate), expected, share in zip(seen["epochs"], balls, rates):
        assert ball == pytest.approx(expected)
        assert rate == pytest.approx(share, abs=0.03 if share else 0)


# ---- flags


def flags(words=""):
    return panum_at.parse_args(["--dataset", "cub", *words.split()])


def test_the_defaults_are_the_recipe_of_the_paper():
    expected = dict(arch="resnet50", embedding_dim=128, image_size=224, epochs=150, batch_size=112,
                    images_per_class=2, lr=1e-5, weight_decay=4e-4, eps=0.01, step_size=0.004,
                    attack_steps=5, eval_eps=0.01, eval_step_size=0.004, eval_steps=5,
                    attack_rate=0.5, loss="contrastive", perturb="positive", formulation="3.5",
                    reg_weight=1, attack="pgd", reduction="nonzero", squared=False, cutoff_low=0.5,
                    cutoff_high=1.4, warmup_epochs=0, benign_epochs=0, eps_ramp_epochs=0,
                    plain_epochs=0, weights="imagenet", freeze_bn=True)
    args = vars(flags())
    assert {name: args[name] for name in expected} == pytest.approx(expected)
    assert panum_at.CROP_SCALE == (0.6, 1.0)


@pytest.mark.parametrize("words, epochs", [
    ("--dataset sop", 100), ("--dataset=sop", 100), ("--dataset cars", 150),
    ("--dataset sop --epochs 7", 7), ("--dataset gaussian", 25), ("--epochs 3", 3)])
def test_the_data_set_decides_the_number_of_epochs_unless_it_is_given(words, epochs):
    assert panum_at.parse_args(words.split()).epochs == epochs


@pytest.mark.parametrize("dataset, small, step_size", [
    ("glyphs", panum_at.SMALL, 3.2 / 255), ("gaussian", panum_at.GAUSSIAN, 0.004)])
def test_generated_data_has_defaults_of_its_own(dataset, small, step_size):
    args = panum_at.parse_args(["--dataset", dataset])
    assert small.items() <= vars(args).items() and args.weights == "none"
    assert args.step_size == pytest.approx(step_size)
    assert panum_at.parse_args([]).dataset == "glyphs"


@pytest.mark.parametrize("words, step_size, steps", [
    ("", 0.004, 5),
    ("--eps 0.05", 0.02, 5),
    ("--attack-steps 10", 0.002, 10),
    ("--eps 8/255 --attack-steps 4", 4 / 255, 4),
    ("--step-size 0.001", 0.001, 5),
    ("--eps 0.05 --attack-steps 10 --step-size 0.003", 0.003, 10),
    ("--attack fgsm", 0.01, 1),
    ("--attack fgsm --eps 0.05", 0.05, 1),
    ("--attack fgsm --attack-steps 1 --eps 0.02 --step-size 0.02", 0.02, 1),
])
def test_the_step_is_two_radii_over_the_steps_unless_it_is_given(words, step_size, steps):
    args = flags(words)
    assert args.step_size == pytest.approx(step_size) and args.attack_steps == steps
    assert args.eval_step_size == 0.004 and args.eval_steps == 5


@pytest.mark.parametrize("words, perturb", [
    ("", "positive"), ("--perturb negative", "negative"), ("--perturb anchor", "anchor"),
    ("--formulation 2", "anchor"), ("--formulation 2 --perturb anchor", "anchor"),
    ("--formulation 3", "anchor")])
def test_the_formulation_decides_what_moves(words, perturb):
    assert flags(words).perturb == perturb


@pytest.mark.parametrize("words, named", [
    ("--formulation 2 --perturb positive", "drop --perturb positive"),
    ("--formulation 2 --perturb negative", "--formulation 2 moves the anchor"),
    ("--formulation 3 --perturb positive", "drop --perturb positive"),
    ("--reg-weight 2", "--reg-weight belongs to --formulation 3"),
    ("--formulation 2 --reg-weight 0", "--reg-weight belongs to --formulation 3"),
    ("--squared", "--squared belongs to --loss triplet"),
    ("--cutoff-low 1.5", "--cutoff-low 1.5 is above --cutoff-high 1.4"),
    ("--cutoff-high 0.4", "--cutoff-low 0.5 is above --cutoff-high 0.4"),
    ("--images-per-class 1", "--images-per-class 1 has no positives"),
    ("--attack fgsm --attack-steps 3", "--attack fgsm is one step"),
    ("--attack fgsm --step-size 0.004", "--attack fgsm is one step"),
    ("--attack-rate 1.1", "--attack-rate"), ("--attack-rate -0.1", "--attack-rate"),
    ("--cutoff-low 2.5", "--cutoff-low"), ("--cutoff-high zero", "--cutoff-high"),
    ("--reg-weight -1", "--reg-weight"), ("--loss proxy", "--loss"), ("--attack cw", "--attack"),
    ("--perturb all", "--perturb"), ("--formulation 1", "--formulation"),
    ("--reduction sum", "--reduction"), ("--dataset", "--dataset"),
])
def test_flags_that_make_no_sense_are_refused_in_one_line(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        flags(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("words, name, value", [
    ("--formulation 3 --reg-weight 2", "reg_weight", 2),
    ("--loss triplet --squared", "squared", True),
    ("--cutoff-low none --cutoff-high 0.4", "cutoff_low", None),
    ("--cutoff-low 1.5 --cutoff-high none", "cutoff_high", None),
    ("--cutoff-low 1.4", "cutoff_low", 1.4),
    ("--images-per-class 0", "images_per_class", 0),
])
def test_the_same_flags_are_taken_where_they_make_sense(words, name, value):
    assert getattr(flags(words), name) == value


@pytest.mark.parametrize("words, name", [
    ("", "panum"), ("--loss triplet", "panum-triplet"), ("--attack-rate 0", "panum-rate0"),
    ("--attack-rate 0.25 --loss triplet", "panum-triplet-rate0.25"),
    ("--perturb positive", "panum"), ("--perturb negative", "panum-negative"),
    ("--perturb anchor", "panum-anchor"), ("--formulation 2", "panum-formulation2"),
    ("--formulation 3 --reg-weight 0.1", "panum-formulation3-lambda0.1"),
    ("--attack fgsm", "panum-fgsm"), ("--reduction mean", "panum-mean"),
    ("--loss triplet --reduction mean --squared", "panum-triplet-mean-squared"),
    ("--cutoff-high none", "panum-cutoffs-0.5-none"),
])
def test_the_name_of_a_run_says_what_is_not_the_default(words, name):
    assert panum_at.run_name(flags(words)) == name
    assert flags(words).out == f"runs/{name}-cub-resnet50-s0"


@pytest.mark.parametrize("words, expected", [
    ("", dict(loss="contrastive", perturb="positive", reg_weight=None, reduction="nonzero",
              squared=False, cutoffs=(0.5, 1.4))),
    ("--loss triplet --perturb negative --reduction mean --squared --cutoff-low none",
     dict(loss="triplet", perturb="negative", reg_weight=None, reduction="mean", squared=True,
          cutoffs=(None, 1.4))),
    ("--formulation 2", dict(loss="contrastive", perturb="anchor", reg_weight=None,
                             reduction="nonzero", squared=False, cutoffs=(0.5, 1.4))),
    ("--formulation 3 --reg-weight 0", dict(loss="contrastive", perturb="anchor", reg_weight=0,
                                            reduction="nonzero", squared=False,
                                            cutoffs=(0.5, 1.4))),
])
def test_a_step_of_the_training_is_the_loss_that_the_flags_say(words, expected, monkeypatch):
    monkeypatch.setattr(panum_at, "robust_loss", lambda *args, **options: (args, options))
    given = ["member", "images", "labels", "ball", "gamma"]
    args, options = panum_at.step_loss(flags(words), *given)
    assert args == ("member", "images", "labels", "gamma", "ball") and options == expected
