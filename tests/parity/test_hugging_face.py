"""Weights between this project and transformers, in both directions, on random weights."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mae_et.data.transforms import EvalTransform
from mae_et.errors import CheckpointError
from mae_et.lowfreq import normalize
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.models.vit import random_vit, vit_from_state
from mae_et.storage.backbone import load_encoder, load_mae, read_backbone, write_backbone, write_safetensors
from mae_et.storage.huggingface import export_hugging_face

transformers = pytest.importorskip("transformers", reason="needs transformers: requirements-dev.txt")

DIMS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 32,
        "patch_size": 8}  # fmt: skip
DECODER_DIMS = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 40}  # fmt: skip


def randomized(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name and "position_embeddings" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def their_mae(tmp_path):
    model = randomized(transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**DIMS, **DECODER_DIMS, mask_ratio=0.5, norm_pix_loss=True)
    ))  # fmt: skip
    # The tables of the published files. A new model of transformers 5.20 starts with others.
    model.vit.embeddings.position_embeddings.data = sincos_pos_embed(32, (4, 4))
    model.decoder.decoder_pos_embed.data = sincos_pos_embed(16, (4, 4))
    model.save_pretrained(tmp_path / "theirs")
    return model


@torch.no_grad()
def test_vitmae__goes_in_and_out_without_a_changed_bit(tmp_path, their_mae):
    ours, metadata = load_mae(tmp_path / "theirs")
    assert metadata["target"] == "normalised pixels"
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    close(ours(images(), 0.5, noise)[0], their_mae(images(), noise=noise).loss)
    export_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours")
    assert same_state(again, their_mae)
    assert again.config.norm_pix_loss
    assert again.config.layer_norm_eps == 1e-12
    encoder = transformers.ViTModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
    close(load_encoder(tmp_path / "theirs", 32).eval().forward_features(images()), encoder(images()).last_hidden_state)


@torch.no_grad()
def test_vitmae__state_dict_in_memory_of_transformers_5(tmp_path, their_mae):
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in their_mae.state_dict().items()}}, tmp_path / "last.ckpt"
    )
    state, _ = read_backbone(tmp_path / "last.ckpt")
    expected, _ = read_backbone(tmp_path / "theirs")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@torch.no_grad()
def test_vit__learnt_positions_eps_and_normalisation_are_kept(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**DIMS, layer_norm_eps=1e-3), add_pooling_layer=False)
    model = randomized(model)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path / "theirs")
    transformers.ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path / "theirs")
    close(load_encoder(tmp_path / "theirs", 32).eval().forward_features(images()), model(images()).last_hidden_state)
    export_hugging_face(tmp_path / "theirs", tmp_path / "ours")
    assert same_state(transformers.ViTModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False), model)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").layer_norm_eps == 1e-3
    processor = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.5] * 3, [0.25] * 3)


@torch.no_grad()
def test_export__our_mae_and_its_evaluation_transform(tmp_path):
    model = randomized(MaskedAutoencoder(32, 8, 3, 32, 2, 4, 16, 1, 2, norm_pix_loss=True))
    metadata = {"num_heads": "4", "decoder_num_heads": "2", "target": "normalised pixels", "mask_ratio": "0.5",
                "mean": "[0.4, 0.5, 0.6]", "std": "[0.2, 0.3, 0.4]", "eval_crop_ratio": "0.8"}  # fmt: skip
    write_backbone(model.state_dict(), tmp_path / "mae.pth", "mae", metadata)
    written = export_hugging_face(tmp_path / "mae.pth", tmp_path / "out")
    assert written["hugging_face_class"] == "ViTMAEForPreTraining"
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    close(theirs(images(), noise=noise).loss, model(images(), 0.5, noise)[0])
    back, read = read_backbone(tmp_path / "out")
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    assert read["mean"] == metadata["mean"]

    picture = torch.randint(256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    picture = torch.nn.functional.avg_pool2d(picture.float(), 5, 1, 2).byte().permute(1, 2, 0).numpy()
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")(
        Image.fromarray(picture), return_tensors="pt"
    )
    ours = EvalTransform(32, 0.8)(Image.fromarray(picture))[None]
    ours = normalize(ours, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert pixels["pixel_values"].shape == ours.shape
    assert (pixels["pixel_values"] - ours).abs().max() < 0.05  # their resize may round to the next of 256 values


@torch.no_grad()
def test_export__classifier_on_the_cls_token(tmp_path):
    model = randomized(random_vit(32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3))
    metadata = {"num_heads": "4", "class_names": '["ant", "bee", "cat"]', "image_size": "32"}
    write_safetensors(model.state_dict(), tmp_path / "classifier.safetensors", metadata)
    export_hugging_face(tmp_path / "classifier.safetensors", tmp_path / "out")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    close(theirs(images()).logits, model(images()))
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


def test_export__what_has_no_place_is_refused_or_named(tmp_path, caplog):
    mean = random_vit(32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=3, global_pool="avg")
    write_safetensors(mean.state_dict(), tmp_path / "mean.safetensors", {"num_heads": "4"})
    with pytest.raises(CheckpointError, match="uses the cls token"):
        export_hugging_face(tmp_path / "mean.safetensors", tmp_path / "out")
    hog = MaskedAutoencoder(32, 8, 3, 32, 1, 4, 16, 1, 2, target="hog", hog_cell_size=4)
    heads = {"num_heads": "4", "decoder_num_heads": "2", "target": "hog", "hog_cell_size": "4"}
    write_backbone(hog.state_dict(), tmp_path / "hog.pth", "mae", heads)
    assert export_hugging_face(tmp_path / "hog.pth", tmp_path / "hog")["hugging_face_class"] == "ViTModel"
    assert "predicts HOG descriptors, which ViTMAE cannot" in caplog.text
    assert not any(key.startswith("decoder") for key in load_file(tmp_path / "hog/model.safetensors"))


def test_read__a_folder_of_another_architecture(tmp_path):
    save_file({"encoder.layer.0.attention.self.query.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        CheckpointError,
        match=r"model_type = 'bert'; of Hugging Face only vit, vit_mae, .*, dinov3_vit can be read",
    ):
        read_backbone(tmp_path)


def test_vit_from_state__uses_the_recorded_eps():
    state = random_vit(32, patch_size=8, embed_dim=32, depth=1, num_heads=4).state_dict()
    model = vit_from_state(state, 32, metadata={"num_heads": "4", "norm_eps": "0.001"})
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-3


SWIGLU = {"use_swiglu_ffn": True, "mlp_ratio": 4}
DINO_DIMS = {key: value for key, value in DIMS.items() if key != "intermediate_size"}
DINOS = {
    "Dinov2Model": ("Dinov2Config", {"mlp_ratio": 4}),
    "Dinov2Model, SwiGLU": ("Dinov2Config", SWIGLU),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {"mlp_ratio": 3, "num_register_tokens": 2}),
    "Dinov2WithRegistersModel, SwiGLU": ("Dinov2WithRegistersConfig", {**SWIGLU, "num_register_tokens": 2}),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {"intermediate_size": 80, "num_register_tokens": 2}),
    "DINOv3ViTModel, SwiGLU": (
        "DINOv3ViTConfig",
        {"intermediate_size": 80, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "DINOv3ViTModel, no registers": ("DINOv3ViTConfig", {"intermediate_size": 80, "num_register_tokens": 0}),
}


def loaded(folder, name):
    """Returns a model of transformers after a strict loading."""
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def their_dino(kind):
    config, options = DINOS[kind]
    name = kind.partition(",")[0]
    model = getattr(transformers, name)(getattr(transformers, config)(**DINO_DIMS, **options))
    model = randomized(model)
    model.embeddings.mask_token.data.zero_()  # we do not keep it: only their own pre-training uses it
    if name != "DINOv3ViTModel":
        torch.nn.init.normal_(model.embeddings.position_embeddings)
    return model, name


@torch.no_grad()
@pytest.mark.parametrize("kind", DINOS)
def test_dino__goes_in_and_out_without_a_changed_bit(tmp_path, kind):
    model, name = their_dino(kind)
    model.save_pretrained(tmp_path / "theirs")
    encoder = load_encoder(tmp_path / "theirs", 32).eval()
    close(encoder.forward_features(images()), model(images()).last_hidden_state)
    assert export_hugging_face(tmp_path / "theirs", tmp_path / "ours")["hugging_face_class"] == name
    again = loaded(tmp_path / "ours", name)
    assert same_state(again, model)
    assert torch.equal(again(images()).last_hidden_state, model(images()).last_hidden_state)
    written, wanted = again.config.to_dict(), model.config.to_dict()
    assert {key for key in wanted if written[key] != wanted[key]} <= {"pos_embed_rescale", "_name_or_path"}
    ours, theirs = read_backbone(tmp_path / "ours")[0], read_backbone(tmp_path / "theirs")[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@torch.no_grad()
@pytest.mark.parametrize(
    ("timms", "name", "options"),
    [
        ("vit_small_patch14_dinov2", "Dinov2Model", {}),
        ("vit_small_patch14_reg4_dinov2", "Dinov2WithRegistersModel", {}),
        ("vit_giant_patch14_reg4_dinov2", "Dinov2WithRegistersModel", {"mlp_ratio": 5.5}),  # 2 x 88 of 32
        ("vit_small_patch16_dinov3", "DINOv3ViTModel", {}),
        ("vit_huge_plus_patch16_dinov3", "DINOv3ViTModel", {}),
    ],
)
def test_dino__of_timm_has_the_same_features_in_transformers(tmp_path, timms, name, options):
    dims = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "init_values": 0.3}
    model = randomized(timm.create_model(timms, num_classes=0, **dims, **options))
    write_safetensors(model.state_dict(), tmp_path / "timm.safetensors", {"num_heads": "4", "image_size": "32"})
    assert export_hugging_face(tmp_path / "timm.safetensors", tmp_path / "out")["hugging_face_class"] == name
    theirs = loaded(tmp_path / "out", name)
    close(theirs(images()).last_hidden_state, model.forward_features(images()))
    lambdas = [value for key, value in theirs.state_dict().items() if key.endswith("lambda1")]
    assert len(lambdas) == 4
    assert not any(bool((value == 1).any()) for value in lambdas), "layer scales are kept"


@torch.no_grad()
def test_pixio__has_the_same_features_both_ways(tmp_path):
    options = {**DINO_DIMS, "mlp_ratio": 3, "n_cls_tokens": 3}
    model = randomized(transformers.PixioModel(transformers.PixioConfig(**options)))
    model.save_pretrained(tmp_path / "theirs")
    encoder = load_encoder(tmp_path / "theirs", 32).eval()
    theirs = model(images())
    close(encoder.forward_features(images()), theirs.last_hidden_state)
    close(encoder(images()), theirs.pooler_output)
    assert export_hugging_face(tmp_path / "theirs", tmp_path / "ours")["hugging_face_class"] == "PixioModel"
    again = loaded(tmp_path / "ours", "PixioModel")
    close(again(images()).pooler_output, theirs.pooler_output)
    written, wanted = again.config.to_dict(), model.config.to_dict()
    assert {key for key in wanted if written[key] != wanted[key]} <= {"_name_or_path"}


@torch.no_grad()
def test_pixio__our_mae(tmp_path, caplog):
    caplog.set_level("INFO")
    model = randomized(MaskedAutoencoder(32, 8, 3, 32, 2, 4, 16, 1, 2, num_cls_tokens=2))
    metadata = {"num_heads": "4", "image_size": "32", "target": "pixels"}
    write_safetensors(model.state_dict(), tmp_path / "mae.safetensors", metadata)
    assert export_hugging_face(tmp_path / "mae.safetensors", tmp_path / "out")["hugging_face_class"] == "PixioModel"
    assert "has 2 cls tokens, for which ViTMAE has no place: the decoder is left out" in caplog.text
    found = loaded(tmp_path / "out", "PixioModel")(images())
    close(torch.cat([found.pooler_output[:, None], found.last_hidden_state[:, 2:]], dim=1), model.features(images()))
    with_registers = random_vit(32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_registers=1, num_cls_tokens=2)
    write_safetensors(with_registers.state_dict(), tmp_path / "b.safetensors", {**metadata, "num_cls_tokens": "2"})
    with pytest.raises(CheckpointError, match=r"has 1 register, 2 cls tokens, and no class of transformers has all"):
        export_hugging_face(tmp_path / "b.safetensors", tmp_path / "refused")


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"num_registers": 2}, "Dinov2WithRegistersModel", "2 registers"),
        ({"mlp": "swiglu", "mlp_ratio": 2.75}, "Dinov2Model", "SwiGLUs as MLPs"),
        ({"rotary_positions": True, "num_registers": 1}, "DINOv3ViTModel", "rotary positions, 1 register"),
    ],
)
def test_export__our_mae_with_parts_of_dino(tmp_path, caplog, options, name, message):
    caplog.set_level("INFO")
    model = randomized(MaskedAutoencoder(32, 8, 3, 32, 2, 4, 16, 1, 2, **options))
    metadata = {"num_heads": "4", "image_size": "32", "target": "pixels"}
    write_safetensors(model.state_dict(), tmp_path / "mae.safetensors", metadata)
    assert export_hugging_face(tmp_path / "mae.safetensors", tmp_path / "out")["hugging_face_class"] == name
    assert f"has {message}, for which ViTMAE has no place: the decoder is left out" in caplog.text
    assert f"{name} has layer scales; 4 of them are set to 1, which changes no feature" in caplog.text
    features = loaded(tmp_path / "out", name)(images()).last_hidden_state
    prefix = 1 + options.get("num_registers", 0)
    close(torch.cat([features[:, :1], features[:, prefix:]], dim=1), model.features(images()))


def test_export__what_dino_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "b.safetensors"
    for mlp, hidden, nearest in (("swiglu", 80, "2.75"), ("gelu", 80, "2")):
        model = random_vit(
            32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_registers=1, mlp=mlp, mlp_ratio=hidden / 32
        )
        write_safetensors(model.state_dict(), path, {"num_heads": "4"})
        message = f"MLPs of hidden width {hidden} at width 32, .* pre-train with model.mlp_ratio={nearest}$"
        with pytest.raises(CheckpointError, match=message):
            export_hugging_face(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    model = random_vit(32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_registers=1, num_classes=3)
    write_safetensors(model.state_dict(), path, {"num_heads": "4"})
    with pytest.raises(CheckpointError, match=r"classifier whose encoder has 1 register, .* or its encoder as 'timm'"):
        export_hugging_face(path, tmp_path / "out")


@torch.no_grad()
def test_export__layer_scales_of_a_width_that_dino_lacks_are_multiplied_in(tmp_path):
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=32, patch_size=8, num_classes=0, embed_dim=32, depth=2, num_heads=4,
        init_values=0.3, mlp_ratio=2.5,
    )  # fmt: skip
    randomized(model)
    write_safetensors(model.state_dict(), tmp_path / "timm.safetensors", {"num_heads": "4"})
    assert export_hugging_face(tmp_path / "timm.safetensors", tmp_path / "out")["hugging_face_class"] == "ViTModel"
    close(loaded(tmp_path / "out", "ViTModel")(images()).last_hidden_state, model.forward_features(images()))
