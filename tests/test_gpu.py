"""A training step, from the attack to the optimiser, never waits for the GPU that it keeps busy."""

import argparse

import pytest
import torch
from test_benchmarks import train_step

SETTINGS = argparse.Namespace(arch="convnet", image_size=32)
VARIANTS = ["eat --no-split", "eat --attack-loss batch", "at --amp", "at --attack-loss label",
            "iat --mixup-target embedding", "hm --ics", "hm --destination distance",
            "hm --destination g-b", "est --source distance", "panum --loss triplet",
            "panum --perturb anchor", "panum --reg-weight 1"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("words", [*train_step.DEFENSES, *VARIANTS])
def test_a_step_waits_for_no_gpu(words):
    defense, *flags = words.split()
    args = train_step.script_args(defense, SETTINGS, "--dataset=cub", "--batch-size=24", *flags)
    device, labels = torch.device("cuda"), train_step.LABELS
    _, step = train_step.start(defense, args, labels, device)
    rows = train_step.batches_of(defense, args, labels)[0]
    batch = torch.rand(len(rows), 3, 32, 32, device=device), labels[rows].to(device), rows
    step(*batch)                                 # what happens once: the optimiser's state ...
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
