"""What the evaluator says of a network that has learnt something: undefended, on glyphs."""

import pytest
import torch

import common
from eval import evaluate_robustness


@pytest.fixture(scope="module")
def undefended():
    """(network, images, labels): Recall@1 about 0.7 on 200 images of unseen classes."""
    train, test = common.load_dataset("glyphs", image_size=32)
    common.seed_torch(0, 0, common.TRAIN)
    network = common.build_model("convnet", 64)
    proxies = torch.nn.Parameter(torch.randn(len(train.classes), 64))
    optimizer = torch.optim.AdamW([{"params": network.parameters(), "lr": 2e-3},
                                   {"params": [proxies], "lr": 0.2}])
    images = torch.stack([image for image, _ in train])
    network.train()
    for _ in range(6):
        for rows in torch.randperm(len(images)).split(30):
            loss = common.proxy_anchor_loss(network(images[rows]), train.labels[rows], proxies)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    subset = common.balanced_subset(test, 200)
    return (network.eval(), torch.stack([image for image, _ in subset]), subset.labels)


def recalls(undefended, objective, radii, protocol, steps=10):
    found = []
    for eps in radii:
        report = evaluate_robustness(*undefended, protocol=protocol, objective=objective,
                                     eps=eps / 255, steps=steps)
        found.append(report["robust"][0]["R@1"])
    return report["clean"]["R@1"], found


def test_joint_falls_to_chance_as_eps_grows_and_shift_does_not(undefended):
    clean, joint = recalls(undefended, "joint", (1, 4, 8), "clustering")
    assert clean > 0.5 and joint == sorted(joint, reverse=True)
    assert joint[0] < clean and joint[-1] <= 3 / 199           # three others of its class of four
    _, shift = recalls(undefended, "shift", (8, 32), "clustering")
    assert shift[1] > shift[0] > joint[-1]


def test_impostor_leaves_nothing_of_an_undefended_network(undefended):
    clean, impostor = recalls(undefended, "impostor", (2, 8), "template", steps=20)
    assert clean > 0.5 and impostor[1] == 0 < impostor[0] < clean
