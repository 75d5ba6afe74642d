"""Linear heads against autograd and SGD of torch, the choice among them, and the draws of labels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mae_et.config.probes import LabelsConfig
from mae_et.errors import DataError
from mae_et.evaluation import heads as heads_module
from mae_et.evaluation.heads import Heads, score_heads, train_heads
from mae_et.tasks.label_subset import draw_subset
from mae_et.tasks.linear_sweep import split_by_class

NAMES = ["ant", "bee", "cat"]


def blobs(num=60, dim=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    centers = torch.randn(classes, dim, generator=generator) * 2
    return centers[labels] + torch.randn(num, dim, generator=generator), labels


@pytest.mark.parametrize("soft", [False, True])
def test_train_heads__each_equals_sgd_of_torch(soft, monkeypatch):
    monkeypatch.setattr(heads_module, "BATCH_SIZE", 16)
    features, labels = blobs()
    targets = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) if soft else labels
    targets = targets / targets.sum(1, keepdim=True) if soft else targets
    pairs = [(0.1, 0.0), (0.02, 0.05)]
    found = train_heads(features, targets, 3, pairs, epochs=2, seed=3)
    inputs = (features - features.mean(0)) / features.std(0, correction=0)
    for i, (lr, decay) in enumerate(pairs):
        layer = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / 8)) / 2)
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            for rows in torch.randperm(60, generator=generator).tensor_split(4):
                optimizer.zero_grad()
                F.cross_entropy(layer(inputs[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(found.weight[i], layer.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.logits(features, i), layer(inputs).detach(), rtol=1e-4, atol=1e-5)


def test_score_heads__accuracy_decides_then_cross_entropy_then_order():
    identity, wrong = torch.eye(2), torch.eye(2).flip(0)
    found = Heads(
        torch.stack([wrong, identity, 3 * identity, 3 * identity]), torch.zeros(4, 2), torch.zeros(2), torch.ones(2)
    )
    best, accuracies = score_heads(found, torch.eye(2), torch.tensor([0, 1]))
    assert (best, accuracies) == (2, [0.0, 1.0, 1.0, 1.0])
    assert score_heads(found, torch.eye(2), torch.tensor([[0.75, 0.25], [0.25, 0.75]]))[1][:2] == [0.25, 0.75]


def test_split_by_class__keeps_and_gives_an_image_of_each_class():
    labels = np.array([0] * 10 + [1] * 2 + [2])
    fit, rest = split_by_class(labels, 0.3, seed=0)
    assert sorted([*fit, *rest]) == list(range(13))
    assert np.bincount(labels[rest], minlength=3).tolist() == [3, 1, 0]
    assert not np.array_equal(rest, split_by_class(labels, 0.3, seed=1)[1])


def test_draw_subset__shots_are_random_balanced_and_nested():
    labels = np.repeat([0, 1, 2], [9, 7, 5])
    few, more = (draw_subset(labels, NAMES, LabelsConfig(images_per_class=n), seed=4) for n in (2, 5))
    assert np.bincount(labels[few]).tolist() == [2, 2, 2]
    assert set(few) < set(more)
    assert len({tuple(draw_subset(labels, NAMES, LabelsConfig(images_per_class=2), seed=s)) for s in range(8)}) == 8
    assert draw_subset(labels, NAMES, LabelsConfig(), seed=0).tolist() == list(range(21))
    assert np.bincount(labels[draw_subset(labels, NAMES, LabelsConfig(fraction=0.3), 0)]).tolist() == [3, 2, 2]


def test_draw_subset__names_the_classes_that_are_too_small():
    labels = np.repeat([0, 1, 2], [9, 3, 30])
    with pytest.raises(
        DataError, match=r"images_per_class = 5, but 1 of 3 classes .*: bee \(3 images\)\. Lower it to 3"
    ):
        draw_subset(labels, NAMES, LabelsConfig(images_per_class=5), 0)
    with pytest.raises(
        DataError, match=r"leaves 2 of 3 classes .*: ant \(9 images\), bee \(3 images\)\. Use at least 0\.167"
    ):
        draw_subset(labels, NAMES, LabelsConfig(fraction=0.05), 0)
    assert len(draw_subset(labels, NAMES, LabelsConfig(fraction=0.167), 0)) == 2 + 1 + 5
