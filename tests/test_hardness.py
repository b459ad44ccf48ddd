"""Hardness Manipulation: how hard triplets shall become, the attack, the loss, runs, the flags.

Oracles are numbers worked out by hand, sign ascent written out for one triplet at a time, losses
that loop over the triplets, and a triplet training loop of its own, which a run whose source and
destination are the same repeats bit for bit.
"""

import functools
import json
import shutil

import pytest
import torch
from test_baselines import assert_in_ball, assert_same, number
from test_eat import EPS, STEP, random_images
from test_panum import displaced, distance, network, parameters, same_bits

import common
import hardness_manipulation as hm
from hardness_manipulation import hardness, hm_loss, ics_loss, manipulate, mine, wanted_hardness

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


def test_hardness_is_the_distance_to_the_positive_minus_that_to_the_negative():
    anchor = plane(0, 0, 0, 0)
    ours = hardness(anchor, plane(90, 0, 180, 60), plane(180, 180, 0, -60))
    assert ours.tolist() == pytest.approx([2 ** 0.5 - 2, -2, 2, 0])


@pytest.mark.parametrize("destination, expected", [
    ("lga", [0, -0.05, -0.1, -0.2, -0.2]),
    ("g-sqrt", [0, -0.1, -0.1 * 2 ** 0.5, -0.2, -0.2]),
    ("g-square", [0, -0.0125, -0.05, -0.2, -0.2]),
    ("constant", [0.3] * 5),
])
def test_a_pseudo_hardness_is_a_function_of_the_previous_loss(destination, expected):
    for previous, wanted in zip([0, 0.05, 0.1, 0.2, 5], expected):
        ours = wanted_hardness(destination, clean_embeddings(), LABELS, torch.tensor(previous),
                               constant=0.3)
        assert ours.shape == () and number(ours) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_wants_the_hardness_of_its_own_triplets_and_g_b_up_to_a_tenth_more(sampler):
    clean, results = clean_embeddings(), []
    for destination in (sampler, "g-b"):
        for previous in (0.0, 0.05, 0.2, 5.0):
            torch.manual_seed(3)
            results.append(wanted_hardness(destination, clean, LABELS, torch.tensor(previous),
                                           sampler=sampler))
    torch.manual_seed(3)
    expected = hardness_of(clean, common.mine_pairs(clean, LABELS, sampler))
    for ours, extra in zip(results, [0, 0, 0, 0, 0.1, 0.075, 0, 0]):
        assert ours.shape == (5,) and torch.allclose(ours, expected + extra, atol=1e-8)


# ---- mining

APART = plane(0, 5, 10, 15, 180, 185, 190, 195), torch.tensor([0] * 4 + [1] * 4)
MIXED = plane(0, 100, 10, 105, 20, 21), torch.tensor([0, 0, 0, 0, 1, 1])


def draws(embeddings, labels, sampler, self_positive, count=100):
    for seed in range(count):
        torch.manual_seed(seed)
        yield mine(embeddings, labels, sampler, self_positive)


def test_an_anchor_of_a_well_separated_class_may_be_its_own_positive_only_with_the_flag():
    for flag, reached in ((True, [{0, 1, 2, 3}] * 2 + [{4, 5, 6, 7}] * 2),
                          (False, [{1, 2, 3}, {0, 1, 3}, {5, 6, 7}, {4, 5, 7}])):
        positives = torch.stack([p for _, p, _ in draws(*APART, "softhard", flag)], 1)
        for p, every in zip(positives, reached):
            images, counts = p.unique(return_counts=True)
            assert set(images.tolist()) == every and counts.min() > 0.5 * 100 / len(every)


def test_where_a_positive_is_farther_than_a_negative_the_flag_changes_nothing():
    # anchors 0 and 2, at 0 and 10 degrees, have positives beyond 20 degrees, anchor 4 has none
    reached = set()
    for with_flag, without in zip(*(draws(*MIXED, "softhard", flag) for flag in (True, False))):
        assert torch.equal(with_flag[0], without[0]) and torch.equal(with_flag[2], without[2])
        assert torch.equal(with_flag[1][:2], without[1][:2])
        assert {*without[1][:2].tolist()} <= {1, 3} and without[1][2] == 5
        reached.add(int(with_flag[1][2]))
    assert reached == {4, 5}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_the_flag_or_with_another_sampler_the_triplets_are_those_of_mine_pairs(sampler):
    for flag in (False, sampler != "softhard"):
        for seed, ours in enumerate(draws(*APART, sampler, flag, count=20)):
            torch.manual_seed(seed)
            expected = common.mine_pairs(*APART, sampler)
            assert all(torch.equal(x, y) for x, y in zip(ours, expected))


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


def test_from_the_images_on_every_triplet_gets_harder_inside_the_ball():
    images, model = STACKED.clone(), network()
    images[0], images[7] = 0, 1
    state = torch.get_rng_state()
    ours = manipulate(model, images, torch.tensor(2.0), EPS, STEP, 10)
    assert torch.equal(torch.get_rng_state(), state) and not ours.requires_grad
    assert_in_ball(ours, images)
    before, after = (stacked_hardness(model, x) for x in (images, ours))
    assert (after > before + 1e-3).all()
    assert torch.equal(manipulate(model, images, torch.tensor(2.0), EPS, STEP, 0), images)


def test_a_triplet_that_is_hard_enough_stays_to_the_bit_while_others_move():
    extra = [0, 0.1, -0.1, 0.05, -1, 0.1]
    ours = manipulate(network(), STACKED, wanted_above(STACKED, *extra), *BALL)
    moved = (ours != STACKED).flatten(1).any(1).view(3, 6)         # anchors, positives, negatives
    assert moved.tolist() == 3 * [[h > 0 for h in extra]]


def test_a_step_has_the_signs_of_hardness_and_of_the_triplet_loss_where_that_is_positive():
    model, x = network(), STACKED.clone().requires_grad_()
    h = stacked_hardness(model, x)
    (slope,) = torch.autograd.grad(h.sum(), x, retain_graph=True)
    (of_loss,) = torch.autograd.grad((h + 0.2).clamp(min=0).sum(), x)
    ours = manipulate(model, STACKED, torch.tensor(2.0), EPS, STEP, 1)
    assert torch.allclose(ours, STACKED + STEP * slope.sign(), atol=1e-12)
    positive = (h > -0.2).repeat(3)
    assert 0 < positive.sum() < len(positive)
    assert torch.equal((ours - STACKED).sign()[positive], of_loss.sign()[positive])
    assert not of_loss[~positive].any()


def test_a_triplet_stops_as_soon_as_it_is_hard_enough_and_not_before():
    model, wanted, made = network(), wanted_above(STACKED, -0.01, 0.002, 0.05, 0.1, 0.15, 2), []
    ours = manipulate(model, STACKED, wanted, EPS, STEP / 5, 6).view(3, 6, *STACKED.shape[1:])
    for t in range(6):
        images = IMAGES[TRIPLETS[:, t]]
        expected, steps = ascent_by_hand(model, images, wanted[t], STEP / 5, 6)
        assert torch.allclose(ours[:, t], expected, atol=1e-12)
        made.append(steps)
    assert made[:2] == [0, 1] and made[-1] == 6 and len({*made}) >= 4


def test_the_last_images_count_not_the_hardest():
    path = [stacked_hardness(network(), manipulate(network(), STACKED, torch.tensor(2.0), 0.5, 0.3,
                                                   steps)) for steps in range(8)]
    assert (path[-1] < torch.stack(path).amax(0) - 1e-3).any()


def test_the_attack_leaves_the_network_as_it_was_and_does_not_see_the_mode():
    def state():
        return ([module.training for module in model.modules()],
                [(p.requires_grad, p.grad) for p in model.parameters()],
                [value.tolist() for value in model.state_dict().values()])

    expected = manipulate(network(), STACKED, torch.tensor(0.0), *BALL)
    model = network(live=True)
    model.layers[2].eval()
    model.layers[0].requires_grad_(False)
    before = state()
    assert torch.equal(manipulate(model, STACKED, torch.tensor(0.0), *BALL), expected)
    assert state() == before


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
    """Embeddings, sampler, flag and triplets of every call of the mining."""
    calls = []
    monkeypatch.setattr(hm, "mine", lambda *args: calls.append(
        (args[0], *args[2:], mine(*args))) or calls[-1][-1])
    return calls


def step(model, source, destination, previous=0.1, labels=LABELS, **options):
    torch.manual_seed(0)
    return hm_loss(model, IMAGES, labels, source, destination, torch.tensor(previous), BALL,
                   **options)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("source, destination, options", [(name, name, {}) for name in SAMPLERS] + [
    ("random", "semihard", {}), ("softhard", "random", {"self_positive": True}),
    ("semihard", "lga", {}), ("hardest", "constant", {"constant": 0.4}),
    ("distance", "g-b", {"sampler": "softhard", "self_positive": True}),
])
def test_it_is_the_triplet_loss_of_the_images_moved_unless_source_and_destination_are_equal(
        source, destination, options, live, attacks, mined):
    model, clean = network(live=live), clean_embeddings()
    loss, terms, previous = step(model, source, destination, **options)
    triplet = mined[0][-1]
    images, wanted = IMAGES[torch.cat(triplet)], hardness_of(clean, mined[-1][-1])
    samplers, moved = [source], images
    if source != destination:
        ((attacked, asked, ball),), moved = attacks, displaced(images)
        wanted = {"lga": wanted * 0 - 0.1, "constant": wanted * 0 + 0.4,
                  "g-b": wanted + 0.05}.get(destination, wanted)
        assert torch.equal(attacked, images) and ball == BALL and not asked.requires_grad
        assert torch.allclose(asked.double(), wanted, atol=1e-7)
        if destination not in ("lga", "constant"):
            samplers.append(options.get("sampler", destination))
    assert len(attacks) == (source != destination)
    flag = options.get("self_positive", False)
    assert [call[1:3] for call in mined] == [(sampler, flag) for sampler in samplers]
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
    far, own = model(moved)[:5], model(IMAGES)
    hinges = [distance(own[i], far[k]) - distance(own[j], own[i])
              for k, (i, j) in enumerate(zip(a, p))]
    assert len({number(h) > 0 for h in hinges}) == 2
    structure = 3 * sum(h.clamp(min=0) for h in hinges) / 5
    triplets = triplet_loss_by_hand(model, moved)
    assert number(previous) == number(terms["loss"]) == pytest.approx(number(triplets))
    assert number(terms["ics"]) == pytest.approx(number(structure)) and not previous.requires_grad
    assert_same(loss, triplets + structure, parameters(model))


@pytest.mark.parametrize("destination", ["softhard", "lga"])
def test_a_batch_of_one_class_has_loss_zero_with_a_graph(destination):
    model = network(live=True)
    loss, terms, previous = step(model, "softhard", destination, labels=torch.zeros_like(LABELS),
                                 previous=0.07, self_positive=True, ics=0.5)
    loss.backward()
    assert number(loss) == number(terms["loss"]) == 0
    assert number(previous) == pytest.approx(0.07)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---- runs

TINY = ("--dataset gaussian --image-size 16 --embedding-dim 8 --epochs 2 --batch-size 32 "
        "--benign-epochs 0 --eps-ramp-epochs 0 --attack-steps 2 --plain-epochs 0 --eval-steps 1 "
        "--limit-queries 8 --workers 0 --device cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Every fifth training image: 102."""
    def load(args, load=common.load_run_data):
        train, test = load(args)
        return train.subset(range(0, len(train), 5)), test

    monkeypatch.setattr(common, "load_run_data", load)


def tiny(words, out="unused"):
    return hm.parse_args([*TINY.split(), *words.split(), "--out", str(out)])


def weights_in(out):
    return torch.load(out / "last.pt")["members"][0]


@functools.cache
def natural_weights(source):
    """Triplet training without a word of an attack."""
    args = tiny(f"--source {source} --destination {source}")
    train, _ = common.load_run_data(args)
    member = common.new_member(args, torch.device("cpu"))
    optimizer = torch.optim.Adam(member.parameters(), args.lr, weight_decay=args.weight_decay)
    for epoch in range(2):
        common.seed_torch(args.seed, epoch, common.TRAIN)
        member.train()
        batches = common.pair_batches(train.labels, 32, args.seed, epoch)
        for images, labels, _ in common.load_batches(train, batches, args.seed, epoch):
            with common.eval_mode(member), torch.no_grad():
                clean = member(images)
            triplet = common.mine_pairs(clean, labels, source)
            loss = common.triplet_loss(*member(images[torch.cat(triplet)]).chunk(3), margin=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return member.state_dict()


def test_equal_source_and_destination_and_the_undefended_row_are_plain_training_bit_for_bit(
        tmp_path):
    for source in ("random", "softhard"):
        out = tmp_path / source
        hm.main(tiny(f"--source {source} --destination {source}", out))
        assert same_bits(weights_in(out), natural_weights(source))
        assert "undefended" not in json.loads((out / "results.json").read_text())
    assert not same_bits(natural_weights("random"), natural_weights("softhard"))
    args = tiny("--plain-epochs 2 --ics")
    train, _ = common.load_run_data(args)
    member = common.new_member(args, torch.device("cpu"))
    hm.train_plain(args, member, train, torch.device("cpu"),
                   lambda epoch: common.pair_batches(train.labels, 32, args.seed, epoch))
    assert same_bits(member.state_dict(), natural_weights("softhard"))


def test_a_defended_run_trains_otherwise_and_reports_its_notation(tmp_path):
    hm.main(tiny("--ics", tmp_path / "run"))
    assert not same_bits(weights_in(tmp_path / "run"), natural_weights("softhard"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["notation"], results["eta"]) == ("HM[S,g_LGA]&ICS", 2)
    assert results["variant"] == "softhard-lga-ics-eta2" and results["undefended"]["epochs"] == 0
    first, _ = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert {"loss", "ics", "H_source", "H_wanted", "H_moved"} <= first.keys()


def test_every_epoch_has_its_ball_and_destination_and_every_step_the_loss_before(monkeypatch,
                                                                                tmp_path):
    seen = []

    def step_loss(args, member, images, labels, destination, previous, ball):
        seen.append((destination, number(previous), *ball))
        value = sum(p.sum() for p in member.parameters()) * 0
        return value, {"loss": value}, torch.tensor(len(seen) / 16)

    monkeypatch.setattr(hm, "step_loss", step_loss)
    out = tmp_path / "run"
    hm.main(tiny("--epochs 4 --batch-size 102 --benign-epochs 1 --eps-ramp-epochs 2 --eps 0.04 "
                 "--step-size 0.02 --attack-steps 3", out))
    destinations, radii = zip(*[(line[0], line[2:]) for line in seen[::2]])
    assert destinations == ("softhard", "softhard", "lga", "lga")
    assert radii == ((0, 0, 3), (0, 0, 3), (0.02, 0.01, 3), (0.04, 0.02, 3))
    assert [line[1] for line in seen] == pytest.approx([0.2] + [k / 16 for k in range(1, 8)])
    assert torch.load(out / "last.pt")["state"] == {"previous_loss": 0.5}


def interrupted(args, epochs, monkeypatch):
    """A run that is interrupted when it has saved so many epochs."""
    def save(*args, epoch, save=common.save_checkpoint, **content):
        save(*args, epoch=epoch, **content)
        if epoch == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_checkpoint", save)
        hm.main(args)


def test_a_resumed_run_goes_on_with_the_previous_loss_bit_for_bit(monkeypatch, tmp_path):
    words = "--lr 1e-5 --eps 0.5 --step-size 0.01 --attack-steps 4"
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    interrupted(tiny(words, whole), 2, monkeypatch)
    interrupted(tiny(words, cut), 1, monkeypatch)
    shutil.copytree(cut, other)
    checkpoint = torch.load(other / "last.pt")
    assert checkpoint["epoch"] == 1 and checkpoint["state"].keys() == {"previous_loss"}
    old = checkpoint["state"]["previous_loss"]
    checkpoint["state"]["previous_loss"] = 0.0 if old > 0.1 else 0.2
    torch.save(checkpoint, other / "last.pt")
    for out in (cut, other):
        hm.main(hm.parse_args(["--resume", "--workers", "0", "--device", "cpu", "--out", str(out)]))
        assert same_bits(weights_in(out), weights_in(whole)) == (out is cut)


# ---- flags


def flags(words=""):
    return hm.parse_args(["--dataset", "cub", *words.split()])


def test_the_defaults_are_the_recipe_of_the_paper():
    expected = dict(arch="resnet18", embedding_dim=512, epochs=75, batch_size=112, lr=1e-5,
                    weight_decay=4e-4, eps=8 / 255, step_size=1 / 255, attack_steps=8, ics=0,
                    warmup_epochs=0, benign_epochs=0, eps_ramp_epochs=0, plain_epochs=0)
    args = vars(flags())
    assert {name: args[name] for name in expected} == pytest.approx(expected)
    assert (args["source"], args["destination"], args["crop"]) == ("softhard", "lga", "square")
    assert args["softhard_self"] is False and args["weights"] == "imagenet"
    small = hm.parse_args([])
    assert small.dataset == "glyphs" and hm.SMALL.items() <= vars(small).items()


@pytest.mark.parametrize("words, weight", [
    ("--ics", 0.5), ("--ics --dataset sop", 0.05), ("--dataset=sop --ics", 0.05),
    ("--dataset sop", 0), ("--ics 0.25", 0.25), ("--ics 0.5 --dataset sop", 0.5)])
def test_the_weight_of_ics_without_a_number_is_that_of_the_data_set(words, weight):
    assert hm.parse_args(words.split()).ics == weight


@pytest.mark.parametrize("words, named", [
    ("--destination-hardness 0", "--destination-hardness belongs to --destination constant"),
    ("--destination-sampler random", "--destination-sampler belongs to --destination g-b"),
    ("--softhard-self --source random", "--softhard-self"),
    ("--softhard-self --source random --destination g-b", "--softhard-self"),
    ("--batch-size 2", "--batch-size 2"), ("--batch-size 111", "--batch-size 111"),
    ("--images-per-class 2", "--images-per-class"), ("--source lga", "--source"),
    ("--destination softer", "--destination"), ("--ics -1", "--ics"), ("--dataset", "--dataset"),
    ("--destination constant --destination-hardness 2.5", "--destination-hardness"),
])
def test_flags_that_make_no_sense_are_refused_in_one_line(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        flags(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("words, name, paper", [
    ("--ics", "hm-softhard-lga-ics", "HM[S,g_LGA]&ICS"), ("", "hm-softhard-lga", "HM[S,g_LGA]"),
    ("--source random --destination semihard", "hm-random-semihard", "HM[R,M]"),
    ("--source distance --destination hardest", "hm-distance-hardest", "HM[D,H]"),
    ("--destination constant", "hm-softhard-constant-0.1", "HM[S,-0.1]"),
    ("--destination g-b", "hm-softhard-g-b-semihard", "HM[S,g_B(M)]"),
    ("--destination g-sqrt", "hm-softhard-g-sqrt", "HM[S,g_1/2]"),
    ("--destination g-square", "hm-softhard-g-square", "HM[S,g_2]"),
    ("--attack-steps 16", "hm-softhard-lga-eta16", "HM[S,g_LGA]"),
    ("--ics 0.1 --softhard-self", "hm-softhard-lga-ics-0.1-self", "HM[S,g_LGA]&ICS"),
    ("--softhard-self --source random --destination g-b --destination-sampler softhard",
     "hm-random-g-b-softhard-self", "HM[R,g_B(S)]"),
    ("--destination constant --destination-hardness 2", "hm-softhard-constant2", "HM[S,2]"),
])
def test_the_name_of_a_run_says_what_is_not_the_default_and_the_paper_has_one_too(words, name,
                                                                                 paper):
    args = flags(words)
    assert hm.run_name(args) == name and hm.notation(args) == paper
    assert args.out == f"runs/{name}-cub-resnet18-s0"


@pytest.mark.parametrize("words, destination, given", [
    ("", "lga", {}), ("--ics 0.3 --softhard-self", "lga", dict(ics=0.3, self_positive=True)),
    ("--ics 0.3", "softhard", {}),                                 # no attack, no ICS
    ("--destination constant --destination-hardness 0.5", "constant", dict(constant=0.5)),
    ("--destination g-b --destination-sampler hardest", "g-b", dict(sampler="hardest")),
])
def test_a_step_of_the_training_is_the_loss_that_the_flags_say(words, destination, given,
                                                               monkeypatch):
    monkeypatch.setattr(hm, "hm_loss", lambda *args, **options: (args, options))
    args, options = hm.step_loss(flags(words), "member", "images", "labels", destination,
                                 "previous", "ball")
    assert args == ("member", "images", "labels", "softhard", destination, "previous", "ball")
    assert options == dict(ics=0, constant=-0.1, sampler="semihard", self_positive=False) | given
