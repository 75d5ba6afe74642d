"""The model against an independent one, written slowly from the paper's formulas in float64: loss, masks, predictions, gradients.

The reference embeds every patch with a convolution, attends with an explicit softmax, restores the order of the tokens,
decodes all of them and weighs the errors of all patches with the mask. It reads our weights by the official key names.
"""

import json
import math
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch.distributed.fsdp import fully_shard

from mae_et.models.mae import MaskedAutoencoder, build_mae
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.models.targets import denormalize_patches, normalize_patches, patchify, unpatchify
from tests import processes

SMALL = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 24,
    "decoder_depth": 3,
    "decoder_num_heads": 3,
    "mlp_ratio": 2.0,
}


def positions_by_loop(dim, rows, columns):
    """[1, 1 + rows * columns, dim]: a zero row, then for each patch sin and cos of its column, then of its row."""
    table = torch.zeros(1, 1 + rows * columns, dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                at = table[0, 1 + row * columns + column]
                at[i], at[quarter + i] = math.sin(column * frequency), math.cos(column * frequency)
                at[2 * quarter + i], at[3 * quarter + i] = math.sin(row * frequency), math.cos(row * frequency)
    return table


def naive_block(w, name, x, num_heads):
    dim = x.shape[-1]
    width = dim // num_heads

    def norm(key, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]

    def linear(key, x):
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
    heads = []
    for h in range(num_heads):
        q, k, v = (qkv[..., part * dim + h * width : part * dim + (h + 1) * width] for part in range(3))
        scores = q @ k.transpose(1, 2) / math.sqrt(width)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v)
    x = x + linear(f"{name}.attn.proj", torch.cat(heads, -1))
    hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(f"{name}.mlp.fc2", hidden)


def naive_norm(w, name, x):
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def naive_mae(w, images, noise, mask_ratio, num_heads, decoder_num_heads, norm_pix):
    """Returns loss, prediction [N, L, P] and mask [N, L]."""
    kernel = w["patch_embed.proj.weight"]
    dim, _, p, _ = kernel.shape
    n, _, height, width = images.shape
    rows, columns = height // p, width // p
    num_patches = rows * columns
    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))
    decoder_depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("decoder_blocks."))

    x = F.conv2d(images, kernel, w["patch_embed.proj.bias"], stride=p).flatten(2).transpose(1, 2)
    positions = positions_by_loop(dim, rows, columns).float().double()
    x = x + positions[:, 1:]
    num_keep = int(num_patches * (1 - mask_ratio))
    kept, mask = [], torch.ones(n, num_patches, dtype=torch.float64)
    orders = [sorted(range(num_patches), key=lambda i, row=row: row[i]) for row in noise.tolist()]
    for i, order in enumerate(orders):
        kept.append(torch.stack([x[i, j] for j in order[:num_keep]]))
        mask[i, order[:num_keep]] = 0
    num_cls = w["cls_token"].shape[1]
    cls = (w["cls_token"] + positions[:, :1]).expand(n, -1, -1)
    x = torch.cat([cls, torch.stack(kept)], dim=1)
    for i in range(depth):
        x = naive_block(w, f"blocks.{i}", x, num_heads)
    x = naive_norm(w, "norm", x)

    x = x @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    restored = []
    for i, order in enumerate(orders):
        row = [w["mask_token"][0, 0]] * num_patches
        for place, j in enumerate(order[:num_keep]):
            row[j] = x[i, num_cls + place]
        restored.append(torch.stack([*x[i, :num_cls], *row]))
    positions = positions_by_loop(x.shape[-1], rows, columns).float().double()
    x = torch.stack(restored) + torch.cat([positions[:, :1].expand(-1, num_cls, -1), positions[:, 1:]], dim=1)
    for i in range(decoder_depth):
        x = naive_block(w, f"decoder_blocks.{i}", x, decoder_num_heads)
    prediction = (naive_norm(w, "decoder_norm", x) @ w["decoder_pred.weight"].T + w["decoder_pred.bias"])[:, num_cls:]

    target = torch.stack(
        [
            images[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p].permute(0, 2, 3, 1).flatten(1)
            for r in range(rows)
            for c in range(columns)
        ],
        dim=1,
    )
    if norm_pix:
        mean = target.mean(-1, keepdim=True)
        variance = (target - mean).pow(2).sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (prediction - target).pow(2).mean(-1)
    return (error * mask).sum() / mask.sum(), prediction, mask


def trained_looking(model, seed=0):
    """Fills every parameter, also those that start at zero, so that none can be left out unseen."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.02 if name.endswith(("token", "bias")) else 0.3 / math.sqrt(parameter[0].numel())
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) * 3 * scale)
    return model


def random_images(n, channels, height, width, dtype=torch.float64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width, generator=rng, dtype=torch.float64).to(dtype)


def noise_for(model, images, seed=2):
    patches = (images.shape[2] // model.patch_size) * (images.shape[3] // model.patch_size)
    return torch.rand(len(images), patches, generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance):
    """Differences relative to the largest value."""
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-12)


CASES = {  # stored image size, image height and width, patch size, channels, mask ratio, norm_pix, and cls tokens if several
    "stored grid": (32, 32, 32, 8, 3, 0.75, True),
    "raw pixels": (32, 32, 32, 8, 3, 0.75, False),
    "another grid": (32, 48, 48, 8, 3, 0.75, True),
    "wide": (32, 24, 56, 8, 3, 0.75, True),
    "tall, stored": ((56, 24), 56, 24, 8, 3, 0.75, True),
    "transposed": ((56, 24), 24, 56, 8, 3, 0.75, True),
    "one channel": (32, 32, 32, 8, 1, 0.75, True),
    "four channels": (32, 32, 32, 8, 4, 0.75, False),
    "patch 4": (16, 16, 20, 4, 3, 0.75, True),
    "patch 14": (42, 56, 42, 14, 3, 0.75, True),
    "patch 16": (64, 64, 48, 16, 3, 0.75, True),
    "half": (32, 32, 32, 8, 3, 0.5, True),
    "one visible": (32, 16, 16, 8, 3, 0.75, True),
    "one removed": (32, 16, 16, 8, 3, 0.25, True),
    "three cls tokens": (32, 48, 32, 8, 3, 0.75, True, 3),
}


@pytest.mark.parametrize("decoder_depth", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward__equals_the_naive_mae_with_gradients(case, decoder_depth):
    stored, height, width, patch, channels, mask_ratio, norm_pix, num_cls_tokens = (
        case if len(case) == 8 else (*case, 1)
    )
    options = SMALL | {"decoder_depth": decoder_depth, "num_cls_tokens": num_cls_tokens}
    torch.manual_seed(0)
    model = trained_looking(MaskedAutoencoder(stored, patch, channels, norm_pix_loss=norm_pix, **options).double())
    images = random_images(3, channels, height, width)
    noise = noise_for(model, images)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss, prediction, mask = naive_mae(weights, images, noise, mask_ratio, 4, 3, norm_pix)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    found_loss, found_mask = model(images, mask_ratio, noise)
    assert found_loss.dtype == torch.float64
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(found_mask.double(), mask)
    assert found_mask.sum(1).tolist() == [mask.shape[1] - int(mask.shape[1] * (1 - mask_ratio))] * 3
    found_loss.backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        close(parameter.grad, gradients[name], 1e-6)

    found_prediction, found_mask = model.predict(images, mask_ratio, noise)
    close(found_prediction, prediction.detach(), 1e-6)
    assert torch.equal(found_mask.double(), mask)


def test_forward__float32_is_close_to_float64():
    torch.manual_seed(0)
    model = trained_looking(build_mae("tiny", img_size=64, norm_pix_loss=True))
    images = random_images(2, 3, 64, 64, torch.float32)
    noise = noise_for(model, images)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    loss, _, _ = naive_mae(weights, images.double(), noise, 0.75, 3, 4, True)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    found, _ = model(images, 0.75, noise)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    found.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], 1e-4)


def test_forward__loss_is_that_of_the_prediction():
    model = MaskedAutoencoder(32, 8, norm_pix_loss=True, **SMALL).double()
    images = random_images(2, 3, 32, 32)
    noise = noise_for(model, images)
    loss, mask = model(images, 0.75, noise)
    prediction, _ = model.predict(images, 0.75, noise)
    error = (prediction - normalize_patches(patchify(images, 8))).pow(2).mean(-1)
    assert loss.item() == pytest.approx(((error * mask).sum() / mask.sum()).item(), rel=1e-10)


def test_forward__removed_pixels_reach_the_loss_as_target_alone():
    """What is removed does not leak into the prediction."""
    model = trained_looking(MaskedAutoencoder(32, 8, **SMALL).double())
    images = random_images(1, 3, 32, 32)
    noise = noise_for(model, images)
    prediction, mask = model.predict(images, 0.75, noise)
    changed = unpatchify(patchify(images, 8) + 5 * mask[..., None], 8, (4, 4))
    assert not torch.equal(changed, images)
    assert torch.equal(model.predict(changed, 0.75, noise)[0], prediction)


def test_forward__draws_another_mask_each_time():
    model = MaskedAutoencoder(64, 8, **SMALL)
    images = random_images(4, 3, 64, 64, torch.float32)
    torch.manual_seed(0)
    masks = torch.cat([model(images)[1] for _ in range(50)])
    assert len(masks.unique(dim=0)) == len(masks)
    assert (masks.sum(1) == 48).all()
    assert (masks.mean(0) - 0.75).abs().max() < 0.12  # 200 draws, std .031: four of them
    torch.manual_seed(0)
    assert torch.equal(model(images)[1], masks[:4])


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5])
def test_forward__mask_ratio_out_of_range(mask_ratio):
    model, images = MaskedAutoencoder(32, 8, **SMALL), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        model(images, mask_ratio)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        model.predict(images, mask_ratio)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.0, 16), (0.99, 0)])
def test_forward__nothing_visible_or_nothing_removed(mask_ratio, kept):
    model = MaskedAutoencoder(32, 8, **SMALL)
    with pytest.raises(ValueError, match=f"keeps {kept} of 16 patches"):
        model(torch.zeros(1, 3, 32, 32), mask_ratio)


def test_predict__mask_ratio_0_shows_everything():
    prediction, mask = MaskedAutoencoder(32, 8, **SMALL).predict(torch.rand(2, 3, 32, 32), 0.0)
    assert prediction.shape == (2, 16, 192)
    assert not mask.any()


@pytest.mark.parametrize("shape", [(2, 15), (1, 16), (2, 4, 4), (16,)])
def test_forward__noise_of_another_shape(shape):
    model, images = MaskedAutoencoder(32, 8, **SMALL), torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"noise has shape .*; expected \(2, 16\)"):
        model(images, noise=torch.rand(shape))


@pytest.mark.parametrize("shape", [(2, 3, 30, 32), (2, 3, 32, 33), (2, 1, 32, 32), (3, 32, 32)])
def test_forward__images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"not a multiple of patch_size = 8|expected \[N, 3, H, W\]"):
        MaskedAutoencoder(32, 8, **SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_forward__activation_checkpointing_gives_the_same_gradients(num_blocks):
    torch.manual_seed(0)
    options = SMALL | {"decoder_depth": num_blocks}
    plain = trained_looking(MaskedAutoencoder(32, 8, **options).double())
    frugal = MaskedAutoencoder(32, 8, **options).double()
    frugal.set_grad_checkpointing()
    frugal.load_state_dict(plain.state_dict())
    images = random_images(2, 3, 32, 32)
    noise = noise_for(plain, images)
    saved = {}
    for name, model in (("plain", plain), ("frugal", frugal)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss, _ = model(images, 0.75, noise)
        saved[name] = sum(sizes)
        loss.backward()
    assert saved["frugal"] < saved["plain"] / 2  # it does keep less
    for (name, a), (_, b) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("norm_pix", [False, True])
def test_forward__bf16_autocast_is_finite_and_close(norm_pix):
    torch.manual_seed(0)
    model = build_mae("tiny", img_size=64, norm_pix_loss=norm_pix)
    images = random_images(2, 3, 64, 64, torch.float32)
    images[0, :, :32, :32] = 0.25  # flat patches: the variance of their normalisation is 0
    noise = noise_for(model, images)
    expected, _ = model(images, 0.75, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(images, 0.75, noise)
        features = model.features(images)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert torch.isfinite(features).all()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.dtype == torch.float32


def test_forward__trains_after_inference_mode():
    model = MaskedAutoencoder(32, 8, **SMALL)
    with torch.inference_mode():
        model.features(torch.rand(1, 3, 88, 40))  # a grid that no other test has cached
    model(torch.rand(1, 3, 88, 40))[0].backward()
    assert model.cls_token.grad is not None


def test_build_mae__after_a_build_on_the_meta_device():
    with torch.device("meta"):
        build_mae("tiny", img_size=176)  # a grid that no other test uses
    model = build_mae("tiny", img_size=176)
    assert not model.pos_embed.is_meta
    assert torch.isfinite(model(torch.rand(1, 3, 176, 176))[0])


# ---- names and shapes ----

OFFICIAL_BASE = {
    "cls_token": (1, 1, 768),
    "pos_embed": (1, 197, 768),
    "mask_token": (1, 1, 512),
    "decoder_pos_embed": (1, 197, 512),
    "patch_embed.proj.weight": (768, 3, 16, 16),
    "patch_embed.proj.bias": (768,),
    "norm.weight": (768,),
    "norm.bias": (768,),
    "decoder_embed.weight": (512, 768),
    "decoder_embed.bias": (512,),
    "decoder_norm.weight": (512,),
    "decoder_norm.bias": (512,),
    "decoder_pred.weight": (768, 512),
    "decoder_pred.bias": (768,),
}
OFFICIAL_BLOCK = {  # as multiples of the width; the first bias of a pair has the rows of its matrix
    "norm1.weight": (1,),
    "norm1.bias": (1,),
    "attn.qkv.weight": (3, 1),
    "attn.qkv.bias": (3,),
    "attn.proj.weight": (1, 1),
    "attn.proj.bias": (1,),
    "norm2.weight": (1,),
    "norm2.bias": (1,),
    "mlp.fc1.weight": (4, 1),
    "mlp.fc1.bias": (4,),
    "mlp.fc2.weight": (1, 4),
    "mlp.fc2.bias": (1,),
}


def official_keys(shapes, depth, width, decoder_depth, decoder_width):
    blocks = (("blocks", depth, width), ("decoder_blocks", decoder_depth, decoder_width))
    return shapes | {
        f"{prefix}.{i}.{key}": tuple(n * dim for n in shape)
        for prefix, num, dim in blocks
        for i in range(num)
        for key, shape in OFFICIAL_BLOCK.items()
    }


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_state_dict__base_has_the_official_full_checkpoints_keys():
    model = build_mae("mae_vit_base_patch16")
    assert shapes_of(model) == official_keys(OFFICIAL_BASE, 12, 768, 8, 512)
    assert {name for name, _ in model.named_buffers()} == {"pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize(("size", "width", "patch"), [("large", 1024, 16), ("huge", 1280, 14)])
def test_state_dict__large_and_huge(size, width, patch):
    """Built with fewer blocks, to save memory; tests/unit/test_config.py has the depths."""
    pixels, tokens = patch**2 * 3, (224 // patch) ** 2 + 1
    model = build_mae(size, depth=2, decoder_depth=1)
    assert (model.blocks[0].attn.num_heads, model.decoder_blocks[0].attn.num_heads) == (16, 16)
    expected = OFFICIAL_BASE | {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "decoder_pos_embed": (1, tokens, 512),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (512, width),
        "decoder_pred.weight": (pixels, 512),
        "decoder_pred.bias": (pixels,),
    }
    assert shapes_of(model) == official_keys(expected, 2, width, 1, 512)


@pytest.mark.parametrize(
    "name", ["gigantic", "", "vit", "a tiny one", "mae_vit_giant_patch16", "mae_vit_base_patch16_x"]
)
def test_build_mae__unknown_size(name):
    with pytest.raises(ValueError, match=r"known sizes: tiny, small, base, large, huge.*mae_vit_huge_patch14"):
        build_mae(name)


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch8", "vit_tiny_patch8_96"])
def test_build_mae__a_patch_size_that_the_size_does_not_have(name):
    """The name used to be searched for a size only, and patch 16 was built silently."""
    with pytest.raises(ValueError, match=r"unknown MAE .*Set another patch size: build_mae\('tiny', patch_size=8\)"):
        build_mae(name)
    with pytest.raises(ValueError, match="contradicts patch_size = 8"):
        build_mae("mae_vit_tiny_patch16", patch_size=8)


def test_build_mae__names_of_the_official_release_and_timm():
    for name, side in (("tiny", 224), ("mae_vit_tiny_patch16", 224), ("vit_tiny_patch16_96", 96)):
        model = build_mae(name, depth=1, decoder_depth=1)
        assert (model.patch_size, model.grid_size[0] * 16, model.embed_dim) == (16, side, 192)
    assert build_mae("tiny", patch_size=8, depth=1, decoder_depth=1).patch_size == 8


# ---- the last decoder block ----


def small_mae():
    torch.manual_seed(0)
    return MaskedAutoencoder(
        32, 8, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2
    )


def test_forward__calls_every_block_as_a_module():
    """FSDP2, per-block compilation and wrappers act in hooks, which only a call of the module runs."""
    model, calls = small_mae(), []
    for i, block in enumerate([*model.blocks, *model.decoder_blocks]):
        block.register_forward_hook(lambda block, args, out, i=i: calls.append((i, out.shape[1])))
    model(torch.randn(2, 3, 32, 32), 0.75)
    assert calls == [(0, 5), (1, 5), (2, 17), (3, 12)]


def test_decoder_block__last_tokens_equal_those_of_the_whole_block():
    block, tokens = small_mae().decoder_blocks[1], torch.randn(2, 17, 32)
    torch.testing.assert_close(block(tokens, 5), block(tokens)[:, -5:])
    assert torch.equal(block(tokens), Block.forward(block, tokens))


def test_forward__compiled_block_by_block():
    model, images, noise = small_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = model(images, noise=noise)[0]
    for block in model.decoder_blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(model(images, noise=noise)[0], expected)


def fsdp_losses(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        model = small_mae()
        for block in [*model.blocks, *model.decoder_blocks]:
            fully_shard(block)
        fully_shard(model)
        generator = torch.Generator().manual_seed(1)
        images, noise = (torch.randn(4, 3, 32, 32, generator=generator), torch.rand(4, 16, generator=generator))
        mine = slice(2 * rank, 2 * rank + 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(2):
            loss, _ = model(images[mine], noise=noise[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        (folder / f"{rank}.json").write_text(json.dumps(losses))
    finally:
        dist.destroy_process_group()


def test_forward__sharded_by_fsdp2_over_two_processes(tmp_path):
    ended = processes.run(partial(fsdp_losses, tmp_path), 2, tmp_path / "output")
    assert [code for code, _ in ended] == [0, 0], ended
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model = small_mae()
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(4, 3, 32, 32, generator=generator), torch.rand(4, 16, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        loss, _ = model(images, noise=noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = (results[0][step] + results[1][step]) / 2
        assert mean == pytest.approx(loss.item(), rel=1e-5)


TIMM = {
    "tiny": ("vit_tiny_patch16_224", 224, 16, {}),
    "base": ("vit_base_patch16_224", 224, 16, {}),
    "tiny, small images": ("vit_tiny_patch16_224", 64, 8, {"img_size": 64, "patch_size": 8}),
}


@pytest.mark.parametrize(("name", "size", "patch", "options"), TIMM.values(), ids=TIMM)
def test_state_dict__encoder_is_timms_vit(name, size, patch, options):
    model = trained_looking(build_mae("base" if "base" in name else "tiny", img_size=size, patch_size=patch)).eval()
    vit = timm.create_model(name, num_classes=0, **options).eval()
    encoder = {k: v for k, v in model.state_dict().items() if k != "mask_token" and not k.startswith("decoder_")}
    vit.load_state_dict(encoder, strict=True)
    images = random_images(2, 3, size, size, torch.float32)
    with torch.no_grad():
        expected = vit.forward_features(images)
        close(model.features(images), expected.double(), 1e-5)
        depth = len(model.blocks)
        taps = model.features(images, blocks=[0, depth // 2, depth - 1])
        inner = vit.get_intermediate_layers(images, n=[0, depth // 2, depth - 1], return_prefix_tokens=True)
    for tap, (patches, prefix) in zip(taps, inner, strict=True):
        close(tap, torch.cat([prefix, patches], dim=1).double(), 1e-5)


# ---- initial values ----


def test_init__linear_layers_are_xavier_uniform_and_biases_zero():
    torch.manual_seed(0)
    model = build_mae("tiny")
    seen = 0
    for name, parameter in model.named_parameters():
        if name == "patch_embed.proj.bias":  # a convolution's own start, as in the released code
            assert parameter.abs().max() <= 1 / math.sqrt(3 * 16 * 16)
        elif name.endswith(".bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif not name.endswith("_token"):
            matrix = parameter.flatten(1)  # the patch projection is seen as a matrix
            bound = math.sqrt(6 / sum(matrix.shape))
            assert matrix.abs().max() <= bound, name
            assert matrix.abs().max() > 0.99 * bound, name
            assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
            assert abs(matrix.mean().item()) < 0.02 * bound, name
            seen += 1
    assert seen == 4 * (12 + 4) + 3


def test_init__tokens_have_std_02():
    torch.manual_seed(0)
    models = [MaskedAutoencoder(32, 16, embed_dim=512, depth=1, num_heads=8, decoder_depth=1) for _ in range(8)]
    for name in ("cls_token", "mask_token"):
        values = torch.cat([getattr(model, name).flatten() for model in models])  # 4096 draws: std known to 1.1%
        assert values.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(values.mean().item()) < 0.0015
        assert values.abs().max() > 0.055  # normal, not cut off at two standard deviations


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (14, 14), (3, 7), (7, 3), (1, 1)])
@pytest.mark.parametrize("dim", [4, 24, 192])
def test_sincos_pos_embed__equals_the_loop(rows, columns, dim):
    expected = positions_by_loop(dim, rows, columns)
    found = sincos_pos_embed(dim, (rows, columns))
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() <= 1e-7
    assert torch.equal(sincos_pos_embed(dim, (rows, columns), cls_token=False), found[:, 1:])
    found.zero_()  # a table of one's own: the next one is not touched
    assert (sincos_pos_embed(dim, (rows, columns)).double() - expected).abs().max() <= 1e-7


def test_sincos_pos_embed__no_multiple_of_4():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_pos_embed(30, (2, 2))


def test_init__position_tables_are_fixed():
    model = MaskedAutoencoder((48, 80), 16, **SMALL)
    assert torch.allclose(model.pos_embed.double(), positions_by_loop(32, 3, 5), atol=1e-7)
    assert torch.allclose(model.decoder_pos_embed.double(), positions_by_loop(24, 3, 5), atol=1e-7)
    assert not model.pos_embed.requires_grad


# ---- patches ----


@pytest.mark.parametrize(("channels", "height", "width", "patch"), [(3, 32, 48, 8), (1, 28, 14, 14), (4, 8, 8, 4)])
def test_patchify__order_and_inverse(channels, height, width, patch):
    images = random_images(2, channels, height, width)
    patches = patchify(images, patch)
    columns = width // patch
    for index in range(patches.shape[1]):
        top, left = index // columns * patch, index % columns * patch
        expected = [
            images[1, c, top + y, left + x].item() for y in range(patch) for x in range(patch) for c in range(channels)
        ]
        assert patches[1, index].tolist() == expected
    assert torch.equal(unpatchify(patches, patch, (height // patch, columns)), images)


def test_normalize_patches__unbiased_and_reversible():
    patches = random_images(1, 2, 5, 48)[0] * 3 + 1
    patches[0, 0] = 0.5  # flat
    found = normalize_patches(patches)
    for i in range(2):
        for j in range(5):
            values = patches[i, j].tolist()
            mean = sum(values) / 48
            variance = sum((v - mean) ** 2 for v in values) / 47
            expected = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            assert found[i, j].tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.allclose(denormalize_patches(found, patches), patches, atol=1e-10)
