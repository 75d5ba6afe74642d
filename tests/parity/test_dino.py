"""DINOv2 with registers, SwiGLUs and DINOv3: our encoders have the features of timm's, on random weights at several sizes."""

import copy
import re

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from mae_et.config.schema import ClassifyConfig, PretrainConfig, from_dict
from mae_et.curriculum.cost import mae_parameters
from mae_et.errors import CheckpointError, ConfigError, UserError
from mae_et.evaluation.patches import cls_attention
from mae_et.models.architecture import encoder_options
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.param_groups import layer_of
from mae_et.storage.backbone import (
    load_encoder,
    load_initial_weights,
    load_mae,
    read_backbone,
    write_backbone,
    write_safetensors,
)
from mae_et.storage.checkpoint import list_checkpoints
from mae_et.storage.huggingface import export_hugging_face
from mae_et.storage.metadata import loading_lines
from mae_et.storage.onnx_file import export_onnx
from mae_et.tasks.classifier import build_classifier, classifier_metadata, open_backbone
from mae_et.tasks.classifier_file import load_classifier
from mae_et.tasks.pretrain import build_model, pretrain
from tests.conftest import small_values
from tests.parity.test_init_from import DIMS, close, images, randomized

SIZES = ((32, 32), (16, 16), (24, 40))
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 0, "init_values": 0.3, **DIMS}


def dinov2(name="vit_small_patch14_reg4_dinov2"):
    return randomized(timm.create_model(name, **SMALL))


def dinov3(name="vit_small_patch16_dinov3", **options):
    return randomized(timm.create_model(name, **{**SMALL, **options}))


def resized(model, size):
    model = copy.deepcopy(model)
    model.set_input_size(img_size=(size, size) if isinstance(size, int) else size)
    return model


def released_dinov2(model, chunks):
    """Returns a state in the form of DINOv2's own release: with a position of the cls token, SwiGLUs as w12 and w3."""
    state = model.state_dict()
    first = torch.randn(1, 1, 32)
    table = torch.cat([first, state.pop("pos_embed")], dim=1)
    state |= {"cls_token": state["cls_token"] - first, "pos_embed": table, "mask_token": torch.zeros(1, 32)}
    state["register_tokens"] = state.pop("reg_token")
    if isinstance(model.blocks[0].mlp, SwiGLUPacked.func):
        state = {key.replace("fc1", "w12").replace("fc2", "w3"): value for key, value in state.items()}
    if chunks:
        state = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", key): value for key, value in state.items()}
    return {"teacher": {f"backbone.{key}": value for key, value in state.items()}}


def released_dinov3(model):
    """Returns a state in the form of DINOv3's own release: with masked biases and the periods of the rotations."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"\.gamma_(\d)", r".ls\1.gamma", key.replace("reg_token", "storage_tokens"))
        key = key.replace("fc1_g", "w1").replace("fc1_x", "w2")
        state[key.replace("fc2", "w3") if "blocks.0.mlp.fc1_g.weight" in model.state_dict() else key] = value
    for i in range(len(model.blocks)):
        name = f"blocks.{i}.attn"
        if f"{name}.q_bias" in state:
            query, value = state.pop(f"{name}.q_bias"), state.pop(f"{name}.v_bias")
            state[f"{name}.qkv.bias"] = torch.cat([query, torch.ones(32), value])
            state[f"{name}.qkv.bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
    periods = 100.0 ** (torch.arange(2) / 2)
    return {**state, "rope_embed.periods": periods.bfloat16(), "mask_token": torch.zeros(1, 32)}


def continued(path, **options):
    state, _ = read_backbone(path)
    found = {**encoder_options(state), "num_heads": 4, **DECODER}
    model = MaskedAutoencoder(32, **found, **options).eval()
    load_initial_weights(model, path)
    return model


@torch.no_grad()
def check_features(path, theirs, **options):
    """Compares our two encoders with timm's model at each size."""
    ours = continued(path, **options)
    for size in SIZES:
        batch = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        expected = resized(theirs, size).forward_features(batch)
        encoder = load_encoder(path, size, num_heads=4).eval()
        close(encoder.forward_features(batch), expected)
        prefix = theirs.num_prefix_tokens
        close(ours.features(batch), torch.cat([expected[:, :1], expected[:, prefix:]], dim=1))
        patches, grid = ours._patchify(batch)  # visible patches alone, in shuffled order, with nothing masked
        shuffled = torch.randperm(patches.shape[1]).expand(2, -1)
        close(ours._encode(patches, grid, shuffled)[:, 1:], expected[:, prefix:][:, shuffled[0]])


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_dinov2__with_registers_and_swiglus_in_each_form(tmp_path, name):
    theirs = dinov2(name)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    torch.save(released_dinov2(theirs, chunks=False), tmp_path / "released.pth")
    torch.save(released_dinov2(theirs, chunks=True), tmp_path / "chunks.pth")
    for form in ("timm", "released", "chunks"):
        check_features(tmp_path / f"{form}.pth", theirs, learnt_positions=True)
    state, _ = read_backbone(tmp_path / "timm.pth")
    written = write_backbone(state, tmp_path / "b.safetensors", "timm", {"num_heads": "4"})
    namespace = {}
    exec(loading_lines(written, tmp_path / "b.safetensors"), namespace)
    with torch.no_grad():
        close(namespace["model"].eval().forward_features(images(32)), theirs.forward_features(images(32)))
    check_features(tmp_path / "b.safetensors", theirs, learnt_positions=True)


def test_plain_table__ambiguous_rows_are_refused_unless_recorded(tmp_path):
    theirs = randomized(VisionTransformer(**{**SMALL, "img_size": (24, 24)}, reg_tokens=6))
    torch.save(theirs.state_dict(), tmp_path / "b.pth")  # 7 rows and 3 x 3 patches, or 4 x 4 patches
    with pytest.raises(
        CheckpointError, match=r"pos_embed \(1, 16, 32\) can begin with 7 or 0 rows .* record its image_size"
    ):
        read_backbone(tmp_path / "b.pth")
    torch.save({"model": theirs.state_dict(), "metadata": {"image_size": "24"}}, tmp_path / "b.pth")
    with torch.no_grad():
        ours = load_encoder(tmp_path / "b.pth", 24, num_heads=4).eval()
        close(ours.forward_features(images(24)), theirs.forward_features(images(24)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("vit_huge_plus_patch16_dinov3", {"mlp_ratio": 2.0}),
    ],
)
def test_dinov3__in_each_form(tmp_path, name, options):
    theirs = dinov3(name, **options)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    torch.save(released_dinov3(theirs), tmp_path / "released.pth")
    check_features(tmp_path / "timm.pth", theirs)
    check_features(tmp_path / "released.pth", theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("reg_token"),
            r"no position table .* no registers, no rope_embed.periods and no record",
        ),
        (lambda state: state.update(rope_embed=1), r"rope_embed"),
        (
            lambda state: state.update({"rope_embed.periods": torch.tensor([1.0, 100.0])}),
            r"goes from 1 to 100; only .* base 100",
        ),
        (
            lambda state: state.update({"blocks.1.attn.qkv.bias": torch.ones(96)}),
            r"blocks.1.attn.qkv.bias has a bias of the keys",
        ),
    ],
)
def test_dinov3__other_rotary_positions_are_refused(tmp_path, change, message):
    state = dinov3("vit_small_patch16_dinov3_qkvb").state_dict()
    change(state)
    torch.save(
        {key: value if isinstance(value, torch.Tensor) else torch.ones(1) for key, value in state.items()},
        tmp_path / "b.pth",
    )
    with pytest.raises(CheckpointError, match=message):
        read_backbone(tmp_path / "b.pth")


class KeepPatches(torch.nn.Module):
    """Keeps given patches in the place of timm's random ones."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, tokens):
        prefix, patches = tokens[:, :3], tokens[:, 3:]
        return torch.cat([prefix, patches.gather(1, self.kept[..., None].expand(-1, -1, 32))], dim=1), self.kept


@torch.no_grad()
def test_rotary_positions__each_visible_patch_keeps_the_rotation_of_its_place():
    """Compares with timm's own dropping of patches, at a bandwidth of the curriculum and at full size."""
    ours = randomized(MaskedAutoencoder(32, 8, 3, 32, 2, 4, num_registers=2, rotary_positions=True, **DECODER))
    theirs = dinov3("vit_small_patch16_dinov3_qkvb", init_values=1.0, num_reg_tokens=2)
    state = {key: torch.ones(32) for key in theirs.state_dict() if ".gamma_" in key}  # we have no layer scales
    encoder = {key: value for key, value in ours.state_dict().items() if not key.startswith(("decoder_", "mask_token"))}
    theirs.load_state_dict(encoder | state)
    for size in (32, 16):
        batch, num = images(size), (size // 8) ** 2
        noise = torch.rand(2, num)
        kept = noise.argsort(dim=1)[:, : num // 4]

        timms = resized(theirs, size)
        timms.patch_drop = KeepPatches(kept)
        expected = timms.forward_features(batch)
        patches, grid = ours._patchify(batch)
        close(ours._encode(patches, grid, kept)[:, 1:], expected[:, 3:])
        loss, mask = ours(batch, 0.75, noise)
        assert loss.isfinite()
        assert int(mask.sum(1)[0]) == num - num // 4


def test_pretrain__continues_from_dinov3_and_its_backbone_loads_everywhere(tmp_path):
    theirs = dinov3()
    torch.save(theirs.state_dict(), tmp_path / "dinov3.pth")
    dims = {"model__size": "tiny", **{f"model__{key}": value for key, value in DIMS.items()}}
    own = {"model__patch_size": 8, "model__num_registers": 4, "model__rotary_positions": True}
    values = small_values(
        **dims, **own, model__init_from=str(tmp_path / "dinov3.pth"), data__image_size=32, optimizer__base_lr=1e-12
    )
    summary = pretrain(from_dict(PretrainConfig, values), tmp_path / "run", device="cpu")
    assert summary["encoder_sha256"]
    close(
        load_encoder(tmp_path / "run", 16).eval().forward_features(images(16)),
        resized(theirs, 16).forward_features(images(16)),
    )
    model, metadata = load_mae(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    assert model.pos_embed is None
    assert metadata["rotary_positions"] == "true"
    path = tmp_path / "run/backbone.safetensors"
    state, metadata = read_backbone(path)
    assert metadata["norm_eps"] == "1e-05"
    namespace = {}
    exec(loading_lines(metadata, path), namespace)
    assert isinstance(namespace["model"], Eva)
    close(namespace["model"].eval().forward_features(images(32)), theirs.forward_features(images(32)))
    with pytest.raises(UserError, match="registers, which are exported at one size"):
        export_onnx(path, tmp_path / "b.onnx", dynamic="size")
    assert export_hugging_face(path, tmp_path / "folder")["hugging_face_class"] == "DINOv3ViTModel"
    close(
        load_encoder(tmp_path / "folder", 32).eval().forward_features(images(32)), theirs.forward_features(images(32))
    )
    for layout in ("mae", "mmdet", "mmseg"):
        with pytest.raises(CheckpointError, match="rotary positions, for which layout"):
            write_backbone(state, tmp_path / "b.pth", layout, {})


def test_init_from__names_key_value_and_option_of_another_architecture(tmp_path):
    torch.save(dinov3("vit_huge_plus_patch16_dinov3").state_dict(), tmp_path / "dinov3.pth")
    torch.save(dinov2().state_dict(), tmp_path / "dinov2.pth")
    dims = {"img_size": 32, "patch_size": 8, **DIMS, **DECODER}
    with pytest.raises(
        CheckpointError,
        match=r"model.mlp = 'swiglu' \(blocks.0.mlp.fc1.weight\), not 'gelu', .* model.num_registers = 4 \(reg_token\), not 0, "
        r"model.rotary_positions = True \(blocks.0.attn.q_bias\), not False. Use --cfg-options model.mlp=swiglu "
        r"model.mlp_ratio=4.0 model.num_registers=4 model.rotary_positions=True",
    ):
        load_initial_weights(MaskedAutoencoder(**dims), tmp_path / "dinov3.pth")
    rotary = MaskedAutoencoder(**dims, rotary_positions=True, num_registers=4)
    with pytest.raises(CheckpointError, match=r"rotary_positions = False \(pos_embed\), not True. Use --cfg"):
        load_initial_weights(rotary, tmp_path / "dinov2.pth")
    for options, message in (
        (
            {"learnt_positions": True, "rotary_positions": True, "init_from": "b"},
            "learnt_positions has no effect with rotary",
        ),
        ({"rotary_positions": True, "embed_dim": 24, "num_heads": 4}, "needs heads of a multiple of 4 channels"),
        ({"mlp_ratio": 0.001, "embed_dim": 32, "num_heads": 4}, "leaves no hidden width"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(PretrainConfig, small_values(**{f"model__{key}": value for key, value in options.items()}))


@pytest.mark.parametrize("options", [{"mlp": "swiglu"}, {"rotary_positions": True, "mlp_ratio": 2, "num_registers": 1}])
def test_mae_parameters__equal_the_model(options):
    own = {"size": "tiny", "patch_size": 8, **DIMS, **DECODER, **options}
    config = from_dict(PretrainConfig, small_values(**{f"model__{key}": value for key, value in own.items()}))
    model = build_model(config)
    assert mae_parameters(config.model) == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["finetune", "linear_probe", "attentive_probe"])
def test_classifiers__of_dinov3_are_built_saved_and_loaded(tmp_path, protocol):
    theirs = dinov3("vit_huge_plus_patch16_dinov3")
    torch.save(theirs.state_dict(), tmp_path / "dinov3.pth")
    data = {"train": "x", "val": "x", "image_size": 16}
    model = {"size": "tiny", "patch_size": 8, **DIMS}
    values = {"protocol": protocol, "data": data, "backbone": str(tmp_path / "dinov3.pth"), "model": model}
    with pytest.raises(
        CheckpointError, match=r"model.mlp=swiglu model.mlp_ratio=4.0 model.num_registers=4 model.rotary_positions=True"
    ):
        open_backbone(from_dict(ClassifyConfig, values))
    model |= {"mlp": "swiglu", "mlp_ratio": 4.0, "num_registers": 4, "rotary_positions": True}
    config = from_dict(ClassifyConfig, values)
    classifier = build_classifier(config, 3, open_backbone(config)).eval()
    logits = classifier(images(16))
    assert logits.shape == (2, 3)
    metadata = classifier_metadata(config, ["a", "b", "c"], norm_eps=1e-5)
    write_safetensors(classifier.state_dict(), tmp_path / "classifier.safetensors", metadata)
    again = load_classifier(tmp_path / "classifier.safetensors").model
    assert torch.equal(again(images(16)), logits)
    layers = {layer_of(name, 2) for name, _ in classifier.named_parameters()} if protocol == "finetune" else set()
    assert layers <= {0, 1, 2, 3}


@torch.no_grad()
def test_show__attention_of_dinov3_by_its_formula():
    """Turns each pair of channels of q and k by 2 pi times its coordinate over its period, without code of timm."""
    model = dinov3()
    block, batch = model.blocks[-1], images(32)
    inputs = []
    hook = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model.forward_features(batch)
    hook.remove()
    tokens = block.norm1(inputs[0])
    weight, heads, width = block.attn.qkv.weight, 4, 8
    query, key = ((tokens @ part.T).view(2, 21, heads, width).transpose(1, 2) for part in weight.chunk(3)[:2])
    place = (torch.arange(4) + 0.5) / 4 * 2 - 1
    periods = 100.0 ** (torch.arange(2) / 2)
    along = 2 * torch.pi * place[:, None] / periods
    angles = torch.cat([along[:, None].expand(4, 4, 2), along[None].expand(4, 4, 2)], dim=-1).view(16, 4)
    turned = torch.complex(key[:, :, 5:, :4], key[:, :, 5:, 4:]) * torch.polar(torch.ones_like(angles), angles)
    key = torch.cat([key[:, :, :5], torch.cat([turned.real, turned.imag], dim=-1)], dim=2)
    expected = (query[:, :, :1] @ key.transpose(-2, -1) / width**0.5).softmax(dim=-1)[:, :, 0, 5:]
    close(cls_attention(model, batch), expected.view(2, heads, 4, 4))


@pytest.mark.slow
def test_onnx__rotary_positions_at_one_size(tmp_path):
    torch.manual_seed(0)
    model = MaskedAutoencoder(16, 8, 3, 32, 1, 4, rotary_positions=True, mlp="swiglu", mlp_ratio=2.0, **DECODER)
    metadata = {"num_heads": "4", "rotary_positions": "true", "image_size": "16"}
    write_backbone(model.state_dict(), tmp_path / "b.safetensors", "timm", metadata)
    export_onnx(tmp_path / "b.safetensors", tmp_path / "b.onnx")  # compares the features
    with pytest.raises(UserError, match="rotary positions, which are exported at one size"):
        export_onnx(tmp_path / "b.safetensors", tmp_path / "b.onnx", dynamic="size")
