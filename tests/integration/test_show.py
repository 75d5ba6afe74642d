"""`mae-et show`: attention, components, similarities and neighbours against their formulas, and every refusal."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mae_et.data.sources.spec import open_source
from mae_et.errors import UserError
from mae_et.evaluation.neighbours import nearest, similar_pairs
from mae_et.evaluation.patches import cls_attention, principal_colors, similarity_maps
from mae_et.models.timm_backbone import create_backbone
from mae_et.models.vit import random_vit
from mae_et.storage.backbone import write_backbone, write_safetensors
from tests.conftest import load_tool

TOOL = load_tool("show")
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
COMMON = ["--device", "cpu", "--num-workers", 0, "--batch-size", 3]


def run(kind: str, *words: object) -> None:
    TOOL.main(TOOL.make_parser().parse_args([kind, *map(str, (*words, *COMMON))]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a ViT, a ResNet and five images, of which the last repeats the first."""
    folder = tmp_path_factory.mktemp("show")
    torch.manual_seed(0)
    write_backbone(random_vit(32, **VIT).state_dict(), folder / "vit.safetensors", "timm", {"num_heads": "3"})
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    resnet = create_backbone("resnet18", 64, num_classes=0, **options)
    metadata = {"objective": "supervised", "architecture": "resnet18", "model_options": json.dumps(options)}
    write_safetensors(resnet.state_dict(), folder / "resnet.safetensors", {**metadata, "image_size": "64"})
    source = open_source("scenes:4@40,seed=2")
    (folder / "images").mkdir()
    for i in (0, 1, 2, 3, 4):
        source.load(i % 4).save(folder / f"images/{i}.png")
    return folder


# DINOv3 has registers and rotates halves of the channels, EVA-02 has separate projections and rotates pairs.
DINOV3 = {"rotary_positions": True, "num_registers": 2, "mlp": "swiglu"}
CLS_TOKENS = {"num_cls_tokens": 3, "num_registers": 1}
EVA02 = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.mark.parametrize("kind", ["ViT", "registers", "cls tokens", "DINOv3", "EVA-02", "PE"])
def test_cls_attention__equals_the_softmax_inside_the_block(kind: str) -> None:
    if kind in ("EVA-02", "PE"):
        name = "eva02_tiny_patch14_224" if kind == "EVA-02" else "vit_pe_core_tiny_patch16_384"
        model = timm.create_model(name, **EVA02)
    else:
        own = {"ViT": {}, "registers": {"num_registers": 2}, "cls tokens": CLS_TOKENS, "DINOv3": DINOV3}[kind]
        model = random_vit(32, **VIT, **own)
    model = model.eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # biases too
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    for block in (0, -1):
        layer = model.blocks[block].attn
        layer.fused_attn = False  # timm's explicit form has the weights as the input of its dropout
        inside: list[torch.Tensor] = []
        hook = layer.attn_drop.register_forward_pre_hook(lambda _, inputs, kept=inside: kept.append(inputs[0]))
        model.forward_features(images)
        hook.remove()
        ours = cls_attention(model, images, block)
        assert ours.shape == (2, 3, 4, 4)
        wanted = inside[0][:, :, : 3 if kind == "cls tokens" else 1].mean(dim=2)
        torch.testing.assert_close(ours.flatten(2), wanted[:, :, model.num_prefix_tokens :])
    with pytest.raises(UserError, match="block 2 does not exist"):
        cls_attention(model, images, 2)


def test_principal_colors__sign_scale_and_one_basis_for_all_images() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 5, 6, 7, generator=generator) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1]) + 4
    found = principal_colors(features)
    rows = features.reshape(-1, 7).double().numpy()
    rows = rows - rows.mean(axis=0)
    _, singular, basis = np.linalg.svd(rows, full_matrices=False)
    for i in range(3):
        vector = basis[i] * np.sign(basis[i][np.abs(basis[i]).argmax()])
        values = np.sort(rows @ vector)
        low, high = values[round(0.01 * 89)], values[round(0.99 * 89)]
        wanted = np.clip((rows @ vector - low) / (high - low), 0, 1).reshape(3, 5, 6)
        np.testing.assert_allclose(found.pictures[:, i].numpy(), wanted, atol=1e-5)
    assert found.shares == pytest.approx((singular**2 / (singular**2).sum())[:3].tolist())
    assert torch.equal(principal_colors(torch.ones(1, 2, 2, 4)).pictures, torch.zeros(1, 3, 2, 2)), "equal patches"


def test_similarity_maps__is_the_cosine() -> None:
    features = torch.randn(2, 3, 4, 5)
    maps = similarity_maps(features, (2, 1))
    wanted = torch.cosine_similarity(features, features[0, 2, 1].expand_as(features), dim=-1)
    torch.testing.assert_close(maps, wanted)
    with pytest.raises(UserError, match="rows are 0 to 2, columns 0 to 3"):
        similarity_maps(features, (3, 0))


def test_nearest_and_pairs__equal_the_plain_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_et.evaluation.neighbours.MAX_SIMILARITIES", 50)  # several chunks
    bank = torch.randn(20, 4)
    cosine = torch.nn.functional.normalize(bank, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
    values, rows = nearest(bank, bank, 3, torch.arange(20))
    for i in range(20):
        order = [j for j in cosine[i].argsort(descending=True).tolist() if j != i][:3]
        assert rows[i].tolist() == order
        torch.testing.assert_close(values[i], cosine[i, order])
    pairs = similar_pairs(bank, -0.1)
    assert {(i, j) for i, j, _ in pairs} == {
        (i, j) for i in range(20) for j in range(i + 1, 20) if cosine[i, j] >= -0.1
    }
    assert [value for *_, value in pairs] == sorted((value for *_, value in pairs), reverse=True)


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_show__pictures(folder: Path, tmp_path: Path, backbone: str) -> None:
    path = folder / f"{backbone}.safetensors"
    run("pca", path, folder / "images", "--out", tmp_path / "pca")
    run("similarity", path, folder / "images", "--out", tmp_path / "similarity", "--patch", 1, 1)
    for kind in ("pca", "similarity"):
        with Image.open(tmp_path / kind / "pictures/000.png") as picture:
            assert np.asarray(picture.convert("RGB")).std() > 20, "it shows something"
    if backbone == "resnet":
        with pytest.raises(UserError, match="ResNet has no cls token"):
            run("attention", path, folder / "images", "--out", tmp_path / "attention")
    else:
        run("attention", path, folder / "images", "--out", tmp_path / "attention", "--block", 0)
        assert json.loads((tmp_path / "attention/show.json").read_text())["block"] == 0


def test_show__neighbours_and_duplicates(folder: Path, tmp_path: Path) -> None:
    vit, images = folder / "vit.safetensors", folder / "images"
    (tmp_path / "<b>.png").write_bytes((images / "1.png").read_bytes())
    queries = (images / "0.png", tmp_path / "<b>.png")
    run("neighbours", vit, *queries, "--folder", images, "--out", tmp_path / "near", "--k", 2)
    with open(tmp_path / "near/neighbours.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = [Path(row["neighbour"]).name for row in rows if row["rank"] == "1"]
    assert first == ["4.png", "1.png"], "an image is not its own neighbour, a copy is"
    page = (tmp_path / "near/neighbours.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert "src=" not in page.replace('src="data:', ""), "it needs no other file"
    assert "<b>.png" not in page, "names are escaped"
    run("duplicates", vit, images, "--out", tmp_path / "same", "--threshold", 0.999999)
    with open(tmp_path / "same/duplicates.csv", newline="") as file:
        pairs = [(Path(row["first"]).name, Path(row["second"]).name) for row in csv.DictReader(file)]
    assert pairs == [("0.png", "4.png")]


def test_show__refusals(folder: Path, tmp_path: Path) -> None:
    vit, images = folder / "vit.safetensors", folder / "images"
    (tmp_path / "x").touch()
    for words, message in (
        (("pca", vit, images, "--out", tmp_path), "is not empty"),
        (("pca", vit, tmp_path / "*.png", "--out", tmp_path / "a"), "matches no image"),
        (("similarity", vit, images, "--out", tmp_path / "b", "--patch", 4, 0), "patch 4 0 does not exist"),
        (("duplicates", vit, images, "--out", tmp_path / "c", "--threshold", 2), "threshold = 2.0"),
        (("neighbours", vit, images, "--folder", images, "--out", tmp_path / "d", "--k", 0), "k = 0"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)
