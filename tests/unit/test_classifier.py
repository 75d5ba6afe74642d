"""The optimizers and the linear probe against references written from the formulas, and the recipes of the configs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mae_et.config.files import load_config
from mae_et.config.schema import ClassifyConfig, from_dict
from mae_et.data import transforms
from mae_et.data.buffers import Batch
from mae_et.data.transforms import make_train_transform
from mae_et.models.linear_probe import LinearProbe
from mae_et.models.param_groups import set_lr
from mae_et.models.vit import random_vit
from mae_et.tasks.classifier import build_classifier, build_optimizer
from mae_et.tasks.regularization import RegularizedLoss
from tests.plans import plan_for

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "classification").glob("*.py"))
IMAGES = 1_281_167


def config_of(**values):
    base = {"data": {"train": "x", "val": "x", "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}}
    base["model"] = {"size": "tiny", "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return from_dict(ClassifyConfig, base | values)


# ---- LARS ----


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_build_optimizer__lars_equals_a_naive_loop(weight_decay):
    """v = 0.9 v + trust * (g + decay w); w = w - lr v; trust = 0.001 |w| / (|g| + decay |w|), 1 for biases."""
    config = config_of(
        protocol="linear_probe", optimizer={"name": "lars", "base_lr": 0.1, "weight_decay": weight_decay}
    )
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    nn.init.normal_(model.bias)
    optimizer = build_optimizer(config, model)
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    speed = {name: np.zeros_like(value) for name, value in weights.items()}
    for step in range(6):
        lr = 6.4 * (step + 1) / 6
        set_lr(optimizer, lr)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape) * 10.0 ** (step - 3)
            w, g = weights[name], parameter.grad.double().numpy()
            if name == "weight":
                norms = [math.sqrt(sum(float(x) ** 2 for x in values.ravel())) for values in (w, g)]
                g = 0.001 * norms[0] / (norms[1] + weight_decay * norms[0]) * (g + weight_decay * w)
            speed[name] = 0.9 * speed[name] + g
            weights[name] = w - lr * speed[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_build_optimizer__lars_of_zero_weights_or_gradients_is_plain():
    """The trust ratio of 0 / 0 or 0 / g is 1: a head that begins at zero can learn."""
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(
        config_of(protocol="linear_probe", optimizer={"name": "lars", "weight_decay": 0.0}), model
    )
    set_lr(optimizer, 0.5)
    nn.init.zeros_(model.weight)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.zeros(2)
    bias = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight.detach(), torch.full((2, 3), -0.5))
    assert torch.equal(model.bias.detach(), bias)


# ---- the linear probe ----


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_linear_probe__equals_a_naive_batch_norm(pool):
    torch.manual_seed(0)
    encoder = random_vit(32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    probe = LinearProbe(encoder, 5, pool).train()
    assert not encoder.training
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    head, bias = (p.detach().double().numpy() for p in probe.head.parameters())
    mean, variance = np.zeros(16), np.ones(16)
    for _ in range(3):
        images = torch.randn(6, 3, 32, 32)
        with torch.no_grad():
            tokens = encoder.forward_features(images).double().numpy()
        features = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(axis=1)
        of_batch = [sum(row[d] for row in features) / 6 for d in range(16)]
        squares = [sum((row[d] - of_batch[d]) ** 2 for row in features) for d in range(16)]
        normalised = [
            [(row[d] - of_batch[d]) / math.sqrt(squares[d] / 6 + 1e-6) for d in range(16)] for row in features
        ]
        expected = np.array(normalised) @ head.T + bias
        np.testing.assert_allclose(probe(images).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        mean, variance = 0.9 * mean + 0.1 * np.array(of_batch), 0.9 * variance + 0.1 * np.array(squares) / 5
    probe.eval()
    expected = (features - mean) / np.sqrt(variance + 1e-6) @ head.T + bias
    np.testing.assert_allclose(probe(images).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


# ---- loss ----


def batch_of(labels, first_place=0):
    labels = torch.tensor(labels)
    return Batch(torch.empty(0), labels, torch.arange(len(labels)), [], first_place)


def loss_of(options, num_classes=4):
    config = config_of(regularization=options)
    return RegularizedLoss(config.regularization, num_classes, config.run.seed, torch.device("cpu"))


def test_finetune_loss__smoothed_cross_entropy():
    objective = loss_of({"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.1})
    logits = torch.randn(6, 4)
    labels = [0, 1, 2, 3, 3, 1]
    loss = objective(lambda images: logits, torch.zeros(6, 3, 8, 8), batch_of(labels))
    expected = 0.0
    for row, label in zip(logits.double().tolist(), labels, strict=True):
        total = math.log(sum(math.exp(x) for x in row))
        target = [0.1 / 4 + (0.9 if i == label else 0.0) for i in range(4)]
        expected -= sum(t * (x - total) for t, x in zip(target, row, strict=True)) / 6
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_finetune_loss__mixes_each_image_with_its_opposite(kind):
    """What comes out of the pixels is what comes out of the targets, smoothed once."""
    options = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.2, kind: 1.0}
    objective = loss_of(options)
    labels = [0, 1, 2, 3]
    seen = {}

    def model(images):
        seen["images"] = images
        return torch.eye(4) * 3

    plain = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    loss = objective(model, plain.clone(), batch_of(labels, 80))
    again = objective(model, plain.clone(), batch_of(labels, 80))
    other = objective(model, plain.clone(), batch_of(labels, 88))
    assert float(loss) == float(again) != float(other)
    objective(model, plain.clone(), batch_of(labels, 80))
    shares = [1 - float((seen["images"][i] - i).mean()) / (3 - 2 * i) for i in range(4)]
    assert shares == pytest.approx([shares[0]] * 4, abs=1e-4)
    expected = 0.0
    for i in range(4):
        target = [0.05] * 4
        target[i] += 0.8 * shares[0]
        target[3 - i] += 0.8 * (1 - shares[0])
        total = math.log(math.exp(3) + 3)
        expected -= sum(t * ((3 if j == i else 0) - total) for j, t in enumerate(target)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-4)


# ---- the schedule and MAE's recipes ----


def test_plan__cosine_from_the_peak_to_min_lr():
    config = config_of(
        curriculum={"preset": "constant", "equivalent_epochs": 20, "warmup_equivalent_epochs": 5},
        batch={"global_batch_size": 64},
        optimizer={"base_lr": 0.004, "min_lr": 1e-5},
    )
    plan = plan_for(config, 640)
    assert plan.num_steps == 200
    for step in range(200):
        if step < 50:
            expected = 1e-5 + (0.001 - 1e-5) * step / 50
        else:
            expected = 1e-5 + (0.001 - 1e-5) * (1 + math.cos(math.pi * (step - 50) / 150)) / 2
        assert plan.lr(step) == pytest.approx(expected, rel=1e-9)
    assert plan.lr(0) == 1e-5
    assert plan.lr(199) < 1.02e-5 + 0.001 * 1.2e-4


def resolved(name):
    path = ROOT / "configs" / "classification" / f"imagenet_{name}.py"
    config = load_config(ClassifyConfig, path)
    return config, plan_for(config, IMAGES, world_size=8)


@pytest.mark.parametrize(
    ("size", "base_lr", "layer_decay", "drop_path", "epochs", "depth"),
    [("base", 5e-4, 0.65, 0.1, 100, 12), ("large", 1e-3, 0.75, 0.2, 50, 24), ("huge", 1e-3, 0.75, 0.3, 50, 32)],
)
def test_recipe__finetuning_on_imagenet(monkeypatch, size, base_lr, layer_decay, drop_path, epochs, depth):
    config, plan = resolved(f"finetune_{size}")
    (stage,) = plan.stages
    assert (stage.global_batch_size, stage.bandwidth, config.data.image_size) == (1024, 224, (224, 224))
    assert stage.lr == pytest.approx(base_lr * 1024 / 256)
    assert plan.num_steps == round(epochs * IMAGES / 1024)
    assert plan.warmup_fraction == pytest.approx(5 / epochs)
    assert plan.min_lr == 1e-6
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.weight_decay, optimizer.betas) == ("adamw", 0.05, (0.9, 0.999))
    assert optimizer.layer_decay == layer_decay
    options = config.regularization
    assert (options.mixup, options.cutmix, options.label_smoothing, options.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert options.ema_decay is None
    assert config.data.eval_crop_ratio == 0.875
    assert (config.data.mean, config.data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = config.model
    assert (model.pool, model.drop_path_rate, model.head_init_std) == ("avg", drop_path, 2e-5)
    assert (model.dims.depth, model.dims.patch_size) == (depth, 14 if size == "huge" else 16)

    asked = []
    original = transforms.rand_augment_transform

    def asking(text, hparams):
        asked.append((text, hparams))
        return original(text, hparams)

    monkeypatch.setattr(transforms, "rand_augment_transform", asking)
    transform = make_train_transform(config.data)
    for step in (0, 1, plan.num_steps // 20, plan.num_steps // 2, plan.num_steps - 1):
        transform._rand_augments.clear()
        transform._rand_augment(round(plan.strength(step) * transform.max_magnitude), "RGB")
    assert {text for text, _ in asked} == {"rand-m9-mstd0.5-inc1"}
    assert len(asked) == 5
    assert (transform.ramp, transform.min_scale, transform.color_jitter) == ("randaugment", 0.08, 0.0)
    assert (transform.flip, transform.interpolation.value) == (True, "bicubic")


@pytest.mark.parametrize(("size", "epochs"), [("base", 90), ("large", 50), ("huge", 50)])
def test_recipe__linear_probe_on_imagenet(size, epochs):
    config, plan = resolved(f"linear_{size}")
    (stage,) = plan.stages
    assert (stage.global_batch_size, stage.bandwidth) == (16384, 224)
    assert stage.lr == pytest.approx(6.4)
    assert plan.num_steps == round(epochs * IMAGES / 16384)
    assert plan.warmup_fraction == pytest.approx(10 / epochs)
    assert plan.min_lr == 0
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.trust_coefficient) == ("lars", 0.9, 0.001)
    assert optimizer.weight_decay == 0
    assert config.model.pool == "token"
    transform = make_train_transform(config.data)
    assert (transform.ramp, transform.min_scale, transform.flip) == ("none", 0.08, True)


def test_recipe__what_is_built_of_it():
    """Shrunk in width; the rest as on ImageNet."""
    torch.manual_seed(0)
    small = {"size": "tiny", "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3}
    config = config_of(model={**small, "drop_path_rate": 0.1})
    model = build_classifier(config, 1000)
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.any()
    assert [type(norm).__name__ for norm in (model.norm, model.fc_norm)] == ["Identity", "LayerNorm"]
    assert model.fc_norm.eps == 1e-6
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])
    probe = build_classifier(config_of(protocol="linear_probe", model=small), 1000)
    assert float(probe.head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not probe.head.bias.any()
    assert (probe.norm.eps, probe.norm.affine) == (1e-6, False)
    erase = loss_of({}, 1000).erase
    assert (erase.probability, erase.per_pixel, erase.min_count, erase.max_count) == (0.25, True, 1, 1)
    mixup = loss_of({}, 1000).mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing, mixup.num_classes) == (0.8, 1.0, 0.1, 1000)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs__every_file_loads_plans_and_explains_itself(path):
    config = load_config(ClassifyConfig, path)
    assert (config.data.num_images is None) == (path.stem in ("photos_knn", "photos_sweep", "photos_finetune"))
    if config.is_trained:
        plan = plan_for(config, config.data.num_images or 5000)
        assert plan.planned_equivalent_epochs == pytest.approx(config.curriculum.equivalent_epochs, rel=1e-2)
        assert [stage.input_size for stage in plan.stages] == [config.data.image_size]
    header = path.read_text().split('"""')[1]
    assert all(word in header for word in ("Command:", "Hardware:", "Expected:", "Source:"))
    assert str(path.relative_to(ROOT)) in header
