"""The worst of many attacks and eps50: functions of records, and evaluate_robustness with them."""

import functools
import json
import statistics

import numpy as np
import pytest
import torch
from test_evaluation import network, noisy_classes, retrieval_of

import eval as evaluator
from baselines import natural
from common import unpack
from eval import attack_of, attacked, eps50, measured, worst_case, worst_parts

SUM = ["shift", "PSEUDO", "push-mean", "target", "impostor", "soft-impostor"]


def words(attack):
    return attack.objective + (f" against {attack.against}" if attack.against != "sum" else "")


@pytest.mark.parametrize("protocol, exact, last", [
    ("clustering", "joint", "joint"), ("template", "impostor", "neighbour")])
def test_the_parts_of_the_worst(protocol, exact, last):
    def against(*rules):
        return [f"{exact} against {rule}" for rule in rules]

    attack = attack_of(protocol, objective="worst", eps=0.03, steps=4, restarts=3, seed=7)
    single = [name.replace("PSEUDO", f"{exact}-pseudo") for name in SUM] + [last]
    two = ["concat", "mean", "vote", "member_1", "member_2"]
    three = [*two, "member_3", "members_1+2", "members_1+3", "members_2+3"]
    for count, more in ((1, ["vote"] * (exact == "joint")), (2, two), (3, three)):
        parts = worst_parts(attack, count)
        assert sorted(map(words, parts)) == sorted(single + against(*more))
        for part in parts:
            assert (part.eps, part.steps, part.seed, part.step) == (0.03, 4, 7, attack.step)
            assert part.restarts == (1 if part.objective.startswith("joint") else 3)
            assert part == attack_of(protocol, objective=part.objective, against=part.against,
                                     eps=0.03, steps=4, restarts=part.restarts, seed=7)
    strong = worst_parts(attack_of(protocol, "strong", eps=0.03, seed=7), 1)
    assert [part.attack for part in strong] == ["strong-1"] * (7 + (exact == "joint")) + ["square"]
    assert strong[-1] == attack_of(protocol, "square", eps=0.03, seed=7)


def record_of(objective, protocol="template", against="sum", attack="pgd", **hits):
    """A record in which every rule has these hits, as text: "110" are right, right, wrong."""
    bits = {rule: [int(bit) for bit in text] for rule, text in hits.items()}
    scores = {rule: {"R@1": statistics.mean(own), "hits": np.packbits(own).tobytes().hex()}
              for rule, own in bits.items()}
    members = [scores[rule]["R@1"] for rule in scores if rule.startswith("member_")]
    scores["member_mean"] = {"R@1": statistics.mean(members)}
    return {"protocol": protocol, "objective": objective, "against": against, "attack": attack,
            "n_queries": len(next(iter(bits.values()))), "scores": scores}


def records_of(protocol, exact):
    return [record_of("shift", protocol, vote="1110110110", member_1="1111111100",
                      member_2="0000000011"),
            record_of("push-mean", protocol, vote="0111110111", member_1="1011111111",
                      member_2="1111111111"),
            record_of(f"{exact}-pseudo", protocol, vote="1101111001", member_1="1110111100",
                      member_2="1111111111"),
            record_of("impostor", protocol, "vote", vote="1111111110", member_1="1111111111",
                      member_2="0111111111"),
            record_of("impostor", protocol, "sum", "square", vote="1111111111",
                      member_1="1111111111", member_2="1111111111")]


def test_a_query_counts_as_right_when_it_survives_every_attack():
    scores = worst_case(records_of("template", "impostor"))
    assert list(scores) == ["vote", "member_1", "member_2", "member_mean"]
    for rule, left, free in (("vote", "0100110000", "1100110000"),
                             ("member_1", "1010111100", "1110111100"),
                             ("member_2", "0000000011", "0000000011")):
        assert unpack(scores[rule]["hits"], 10).tolist() == [bit == "1" for bit in left]
        assert scores[rule]["R@1"] == pytest.approx(left.count("1") / 10)
        assert scores[rule]["R@1_label_free"] == pytest.approx(free.count("1") / 10)
    assert scores["vote"]["parts"] == pytest.approx({
        "shift": 0.7, "push-mean": 0.8, "impostor-pseudo": 0.7, "impostor against vote": 0.9,
        "impostor (Square)": 1.0})
    assert scores["member_mean"] == {"R@1": pytest.approx(0.4), "R@1_label_free":
                                     pytest.approx(0.45), "parts": pytest.approx({
                                         "shift": 0.5, "push-mean": 0.95, "impostor-pseudo": 0.85,
                                         "impostor against vote": 0.95, "impostor (Square)": 1.0})}


def test_the_worst_of_whole_sets_is_one_attack():
    records = records_of("clustering", "joint")
    scores = worst_case(records)
    assert {rule: (row["R@1"], row["R@1_label_free"]) for rule, row in scores.items()} == {
        "vote": (0.7, 0.7), "member_1": (0.7, 0.7), "member_2": (0.2, 0.2),
        "member_mean": (pytest.approx(0.45), pytest.approx(0.45))}
    assert unpack(scores["vote"]["hits"], 10).tolist() == [bit == "1" for bit in "1110110110"]
    none = worst_case(records[1:2])
    assert {row["R@1_label_free"] for row in none.values()} == {None} and none["vote"]["R@1"] == 0.8


@pytest.mark.parametrize("members", [1, 3])
def test_the_worst_of_clustering_equals_attacking_every_part_by_hand(members):
    images, labels = noisy_classes(4, 4, spread=0.3, seed=1)
    models = [network(m).forward for m in range(members)]
    result = evaluator.evaluate_robustness(models, images, labels, objective="worst", eps=0.03,
                                           seed=3, steps=2)
    worst, *parts = result["robust"]
    attack = attack_of("clustering", objective="worst", eps=0.03, seed=3, steps=2)
    retrieval = retrieval_of([network(m) for m in range(members)], images, labels)
    by_hand = [measured(retrieval, part)[0] for part in worst_parts(attack, members)]
    assert [{**part, "seconds": 0} for part in parts] == [{**part, "seconds": 0}
                                                          for part in by_hand]
    assert worst["scores"] == worst_case(by_hand) and worst["objective"] == "worst"
    assert worst["seconds"] == pytest.approx(sum(part["seconds"] for part in parts), abs=0.01)
    assert (worst["eps"], worst["attack"]) == (0.03, attack.attack)
    assert worst.get("all_fail", 1) == max(part.get("all_fail", 1) for part in parts)
    for row in worst["scores"].values():
        assert row["R@1"] <= min(row["R@1_label_free"], *row["parts"].values())
    headline = worst["scores"][worst["rule"]]
    assert worst["R@1"] == headline["R@1"] and len(headline["parts"]) == len(parts)
    json.dumps(result, allow_nan=False)


@functools.cache
def trained(members):
    """Networks after 30 steps on 6 classes, and the images of 8 others."""
    images, labels = noisy_classes(6, 8, spread=0.3, seed=1)
    models = [network(m) for m in range(members)]
    for m, model in enumerate(models):
        torch.manual_seed(m)
        proxies = torch.randn(6, 8, requires_grad=True)
        adam = torch.optim.Adam([*model.parameters(), proxies], 1e-2)
        for _ in range(30):
            adam.zero_grad()
            natural(model, images, labels, proxies, None)[0].backward()
            adam.step()
    return retrieval_of(models, *noisy_classes(8, 6, spread=0.3, seed=2))


@pytest.mark.parametrize("members, options", [
    (1, {"steps": 3}), (3, {"steps": 3}), (2, {"steps": 2, "restarts": 2}),
    (1, {"attack": "strong"}), (2, {"attack": "strong"})])
@pytest.mark.parametrize("eps", [0.01, 0.03])
def test_the_worst_of_template_is_that_of_all_parts_on_all_queries(members, options, eps):
    retrieval = trained(members)
    attack = attack_of("template", **{"objective": "worst", **options}, eps=eps, seed=3)
    (worst,) = measured(retrieval, attack)
    every = [(part, retrieval.ranked(*attacked(retrieval, part)))
             for part in worst_parts(attack, members)]
    wanted = worst_case([measured(retrieval, part)[0] for part, _ in every])
    everything = torch.ones(len(retrieval.labels), dtype=torch.bool)
    left, right, attacked_counts = everything, {}, []
    for _, ranked in every[:len(worst["parts"])]:
        attacked_counts.append(int(left.sum()))
        right = {rule: right.get(rule, everything) & hits[:, 0]
                 for rule, (hits, _) in ranked.items()}
        left = torch.stack([*right.values()]).any(0)
    assert [part["attacked"] for part in worst["parts"].values()] == attacked_counts
    assert len(worst["parts"]) == len(every) or not left.any()
    for rule in ["vote"] * (members > 1) + [f"member_{m + 1}" for m in range(members)]:
        row = worst["scores"][rule]
        for name in ("R@1", "R@1_label_free", "hits"):
            assert row[name] == wanted[rule][name]
        wrong = torch.stack([~ranked[rule][0][:, 0] for _, ranked in every])
        first = torch.where(wrong.any(0), wrong.long().argmax(0), len(every) - 1)
        precision = torch.stack([ranked[rule][1] for _, ranked in every])
        assert row["mAP@R"] == pytest.approx(float(precision.gather(0, first[None]).mean()))
    assert worst["R@1"] < retrieval.ranked(retrieval.clean)[worst["rule"]][0][:, 0].double().mean()
    assert worst["scores"].get("member_mean", worst)["R@1"] == pytest.approx(statistics.mean(
        worst["scores"][f"member_{m + 1}"]["R@1"] for m in range(members)))


def test_records_that_are_there_are_read_and_new_ones_told_as_they_are_finished():
    retrieval = retrieval_of([network()], *noisy_classes(3, 3, spread=0.2))
    attack, told, held = attack_of("clustering", objective="worst", steps=1), [], {}
    every = measured(retrieval, attack, find=held.get, done=lambda attack, record: (
        told.append(attack), held.update({attack: record})))
    assert told == [*worst_parts(attack, 1), attack] and len(every) == 9
    del held[attack], held[told[2]]
    told.clear()
    again = measured(retrieval, attack, find=held.get, done=lambda attack, _: told.append(attack))
    assert told == [worst_parts(attack, 1)[2], attack]
    assert again[0]["scores"] == every[0]["scores"]
    assert measured(retrieval, attack, find=lambda _: every[0]) == every[:1]


@pytest.mark.parametrize("radii, recalls, first, eps", [
    ([2, 4, 8], [0.7, 0.5, 0.1], 0.8, 4 + 4 * 0.1 / 0.4), ([4, 2, 8], [0.5, 0.7, 0.1], 0.8, 5),
    ([4], [0.2], 1.0, 4 * 0.5 / 0.8), ([1, 4], [0.9, 0.6], 1.0, None), ([1, 4], [0.4, 0.0], 0.8, 1),
    ([1, 2, 3, 4], [0.9, 0.4, 0.6, 0.3], 1.0, 1.8),            # it falls so far for the first time
    ([2], [0.0], 0.0, 0)])
def test_eps50_is_where_straight_lines_cross_half_of_the_clean_recall(radii, recalls, first, eps):
    records = [{"eps_255": radius, "rule": "vote", "scores": {
        "vote": {"R@1": recall}, "mean": {"R@1": recall / 2}}}
        for radius, recall in zip(radii, recalls)]
    clean = {"scores": {"vote": {"R@1": first}, "mean": {"R@1": first / 2}}}
    for rule in (None, "vote", "mean"):
        found = eps50(records, clean, rule)
        assert found == (None if eps is None else pytest.approx(eps))
        records[0]["clean"] = clean
        assert eps50(records, rule=rule) == found
