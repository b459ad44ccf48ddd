"""Hardness Manipulation: how hard triplets shall become, the attack, the loss, the loop.

Oracles are numbers worked out by hand, sign ascent written out for one triplet at a time, losses
that loop over the triplets, and a triplet training loop of its own, which a run whose source and
destination are the same repeats bit for bit.
"""

import pytest
import torch
from test_baselines import assert_same, number
from test_eat import EPS, STEP, books, half_live, random_images, state_of, trained_by_hand
from test_panum import displaced, distance, network, parameters
from test_scripts import HM, interrupted, run, same_bits, saved

import common
import hardness_manipulation as hm
from hardness_manipulation import hardness, hm_loss, ics_loss, manipulate, wanted_hardness

BALL = EPS, STEP, 5
IMAGES = random_images(10, low=0.1, high=0.9)
LABELS = torch.tensor([0, 0, 1, 1, 0, 0, 2, 2, 1, 1])
SAMPLERS = ("random", "semihard", "softhard", "distance", "hardest")
TRIPLETS = torch.tensor([[0, 2, 4, 6, 8, 1], [1, 3, 5, 7, 9, 4], [2, 6, 8, 0, 7, 3]])
STACKED = IMAGES[TRIPLETS.flatten()]


def plane(*degrees):
    """Unit vectors (T, 2) at these angles."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


@torch.no_grad()
def clean_embeddings():
    return network()(IMAGES)


def hardness_of(x, triplet):
    """H of every triplet of rows of x, one by one."""
    return torch.stack([distance(x[a], x[p]) - distance(x[a], x[n]) for a, p, n in zip(*triplet)])


def stacked_hardness(model, images):
    """H of every triplet of stacked images [a; p; n], one by one."""
    return hardness_of(model(images), torch.arange(len(images)).view(3, -1))


def triplet_loss_by_hand(model, images):
    return sum((h + 0.2).clamp(min=0) for h in stacked_hardness(model, images)) * 3 / len(images)


# ---- hardness

@pytest.mark.parametrize("destination, expected", [
    ("lga", [0, -0.05, -0.1, -0.2, -0.2]), ("g-sqrt", [0, -0.1, -0.1 * 2 ** 0.5, -0.2, -0.2]),
    ("g-square", [0, -0.0125, -0.05, -0.2, -0.2]), (0.3, [0.3] * 5), (-1.0, [-1] * 5)])
def test_a_pseudo_hardness_is_a_function_of_the_previous_loss(destination, expected):
    for previous, wanted in zip([0, 0.05, 0.1, 0.2, 5], expected):
        ours = wanted_hardness(destination, clean_embeddings(), LABELS, torch.tensor(previous))
        assert number(ours.mean()) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("destination", [*SAMPLERS, "g-b"])
def test_a_sampler_wants_the_hardness_of_its_own_triplets_and_g_b_up_to_a_tenth_more(destination):
    clean, sampler = clean_embeddings(), {"g-b": "semihard"}.get(destination, destination)
    for previous, extra in zip((0.0, 0.05, 0.2, 5.0), (0.1, 0.075, 0, 0)):
        torch.manual_seed(3)
        ours = wanted_hardness(destination, clean, LABELS, torch.tensor(previous))
        torch.manual_seed(3)
        expected = hardness_of(clean, common.mine_pairs(clean, LABELS, sampler))
        expected = expected + extra * (destination == "g-b")
        assert ours.shape == (5,) and torch.allclose(ours, expected, atol=1e-8)


# ---- attack

@torch.no_grad()
def wanted_above(images, *extra):
    """So much more than the hardness that they have, triplet by triplet."""
    return hardness(*network()(images).chunk(3)) + torch.tensor(extra, dtype=torch.float64)


def ascent_by_hand(model, images, wanted, step_size, steps):
    """(images, steps made) of one triplet, three images: raise H by signs until it is `wanted`."""
    x, made = images, 0
    while made < steps:
        x = x.detach().requires_grad_()
        (h,) = stacked_hardness(model, x)
        if h >= wanted:
            break
        x = x + step_size * torch.autograd.grad(h, x)[0].sign()
        x = torch.minimum(torch.maximum(x, images - EPS), images + EPS).clamp(0, 1)
        made += 1
    return x.detach(), made


def test_a_triplet_stops_as_soon_as_it_is_hard_enough_and_not_before():
    model, wanted, made = network(), wanted_above(STACKED, -0.01, 0.002, 0.2, 0.4, 0.3, 2), []
    ours = manipulate(model, STACKED, wanted, EPS, STEP, 6).view(3, 6, *STACKED.shape[1:])
    for t in range(6):
        expected, steps = ascent_by_hand(model, IMAGES[TRIPLETS[:, t]], wanted[t], STEP, 6)
        assert torch.allclose(ours[:, t], expected, atol=1e-12)
        made.append(steps)
    assert made[:2] == [0, 1] and made[-1] == 6 and len({*made}) >= 4, made
    assert torch.equal(ours[:, 0], IMAGES[TRIPLETS[:, 0]])          # hard enough: to the bit


def test_the_attack_leaves_the_network_as_it_was_and_does_not_see_the_mode():
    model = half_live(network())
    before = state_of(model)
    ours, expected = (manipulate(m, STACKED, torch.tensor(0.0), *BALL) for m in (model, network()))
    assert torch.equal(ours, expected) and state_of(model) == before


# ---- intra-class structure

def test_the_intra_class_loss_and_its_slopes_are_those_worked_out_by_hand():
    a, moved, p = (x.requires_grad_() for x in (plane(0, 0, 0, 0), plane(90, 30, 60, 180),
                                                plane(60, 120, 60, 90)))
    loss = ics_loss(a, moved, p)                      # 90 > 60 and 180 > 90: two of four are active
    assert number(loss) == pytest.approx((2 ** 0.5 - 1 + 2 - 2 ** 0.5) / 4)
    loss.backward()
    root, first = 0.5 ** 0.5, torch.tensor([0, 3])
    from_moved = torch.tensor([[-root, root], [-1, 0]]) / 4        # unit vectors from a
    from_p = torch.tensor([[-0.5, 0.75 ** 0.5], [-root, root]]) / 4
    for x, expected in ((moved, from_moved), (p, -from_p), (a, from_p - from_moved)):
        assert torch.allclose(x.grad[first], expected.double(), atol=1e-6)
        assert not x.grad[1].any()


# ---- loss

@pytest.fixture
def attacks(monkeypatch):
    """Every attack returns `displaced`; images, wanted hardness and ball of the calls."""
    calls = []
    monkeypatch.setattr(hm, "manipulate", lambda _, images, wanted, *ball: calls.append(
        (images, wanted, ball)) or displaced(images))
    return calls


@pytest.fixture
def mined(monkeypatch):
    """Embeddings, sampler and triplets of every call of the mining."""
    calls, mine = [], common.mine_pairs
    monkeypatch.setattr(hm, "mine_pairs", lambda *args: calls.append(
        (args[0], args[2], mine(*args))) or calls[-1][-1])
    return calls


def step(model, source, destination, previous=0.1, labels=LABELS, ics=0.0):
    torch.manual_seed(0)
    return hm_loss(model, IMAGES, labels, source, destination, torch.tensor(previous), BALL, ics)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("source, destination", [(name, name) for name in SAMPLERS] + [
    ("random", "semihard"), ("softhard", "random"), ("semihard", "lga"), ("hardest", 0.4),
    ("distance", "g-b")])
def test_it_is_the_triplet_loss_of_the_images_moved_unless_source_and_destination_are_equal(
        source, destination, live, attacks, mined):
    model, clean = network(live=live), clean_embeddings()
    loss, terms, previous = step(model, source, destination)
    triplet = mined[0][-1]
    images, wanted = IMAGES[torch.cat(triplet)], hardness_of(clean, mined[-1][-1])
    samplers, moved = [source], images
    if source != destination:
        ((attacked, asked, ball),), moved = attacks, displaced(images)
        wanted = {"lga": wanted * 0 - 0.1, 0.4: wanted * 0 + 0.4,
                  "g-b": wanted + 0.05}.get(destination, wanted)
        assert torch.equal(attacked, images) and ball == BALL and not asked.requires_grad
        assert torch.allclose(asked.double(), wanted, atol=1e-7)
        samplers += {"lga": [], 0.4: [], "g-b": ["semihard"]}.get(destination, [destination])
    assert len(attacks) == (source != destination)
    assert [sampler for _, sampler, _ in mined] == samplers
    for embeddings, *_ in mined:                                   # mining is in evaluation mode
        assert torch.allclose(embeddings, clean) and not embeddings.requires_grad
    by_hand = dict(loss=triplet_loss_by_hand(model, moved), H_wanted=wanted.mean(),
                   H_source=hardness_of(clean, triplet).mean(),
                   H_moved=stacked_hardness(model, moved).mean())
    assert {name: number(value) for name, value in terms.items()} == pytest.approx(
        {name: number(value) for name, value in by_hand.items()}, abs=1e-7)
    assert number(previous) == number(loss) > 0 and not previous.requires_grad
    assert_same(loss, by_hand["loss"], parameters(model))


@pytest.mark.parametrize("live", [False, True])
def test_ics_adds_the_weighted_structure_of_clean_anchors_and_positives(live, attacks, mined):
    model = network(live=live)
    loss, terms, previous = step(model, "random", "lga", ics=3.0)
    (*_, (a, p, n)), = mined
    moved = displaced(IMAGES[torch.cat([a, p, n])])
    far, clean = model(moved)[:5], model(IMAGES)
    hinges = [distance(clean[i], far[k]) - distance(clean[j], clean[i])
              for k, (i, j) in enumerate(zip(a, p))]
    assert len({number(h) > 0 for h in hinges}) == 2
    structure = 3 * sum(h.clamp(min=0) for h in hinges) / 5
    triplets = triplet_loss_by_hand(model, moved)
    assert number(previous) == number(terms["loss"]) == pytest.approx(number(triplets))
    assert number(terms["ics"]) == pytest.approx(number(structure)) and not previous.requires_grad
    assert_same(loss, triplets + structure, parameters(model))


@pytest.mark.parametrize("destination", ["softhard", "lga", "random", "g-b"])
def test_a_batch_of_one_class_has_loss_zero_with_a_graph_and_keeps_the_previous_loss(destination):
    model = network(live=True)
    loss, terms, previous = step(model, "softhard", destination, labels=torch.zeros_like(LABELS),
                                 previous=0.07, ics=0.5)
    loss.backward()
    assert number(loss) == number(terms["loss"]) == 0
    assert number(previous) == pytest.approx(0.07)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---- training

def natural_weights(source):
    """Triplet training without a word of an attack."""
    def loss(model, images, labels):
        with common.frozen(model), torch.no_grad():
            clean = model(images)
        triplet = common.mine_pairs(clean, labels, source)
        return common.triplet_loss(*model(images[torch.cat(triplet)]).chunk(3), margin=0.2)

    plain = books(name=HM)
    return trained_by_hand(plain, lambda epoch: common.pair_batches(
        plain.train.labels, 12, 0, epoch), loss)


@pytest.mark.parametrize("source", ["random", "softhard"])
def test_equal_source_and_destination_are_plain_training_bit_for_bit(source, tmp_path):
    for destination in (source, "lga"):
        out = tmp_path / destination
        run(HM, out, f"--epochs 2 --ics 0 --batch-size 12 --source {source} "
            f"--destination {destination}")
        (weights,) = saved(out)["members"]
        assert same_bits(weights, natural_weights(source)) == (destination == source)


def test_every_epoch_has_its_ball_and_destination_and_every_step_the_loss_before(
        tmp_path, monkeypatch):
    steps, out = [], tmp_path / "run"

    def noted(model, images, labels, source, destination, previous, ball, ics):
        loss, terms, following = hm_loss(model, images, labels, source, destination, previous, ball,
                                         ics)
        steps.append((destination, number(previous), ball, ics, number(following)))
        return loss, terms, following

    monkeypatch.setattr(hm, "hm_loss", noted)
    words = "--eps-ramp 1 2 --eps 0.04 --step-size 0.02 --attack-steps 3 --ics 0.3"
    interrupted(HM, out, "log.jsonl", 3, more=words)
    assert saved(out)["state"]["previous"] == steps[-1][-1]
    torch.save({**saved(out), "state": {**saved(out)["state"], "previous": 0.125}}, out / "last.pt")
    run(HM, out, words)                          # goes on with what was saved
    destinations, previous, balls, weights, losses = zip(*steps)
    assert len(steps) == 32 and set(weights) == {0.3}              # 24 pairs an epoch, three a step
    assert destinations == ("softhard",) * 16 + ("lga",) * 16      # no radius yet: plain triplets
    assert balls[::8] == ((0, 0, 3), (0, 0, 3), pytest.approx((0.02, 0.01, 3)),
                          pytest.approx((0.04, 0.02, 3)))
    assert previous == (pytest.approx(0.2), *losses[:15], 0.125, *losses[16:-1])
