"""tools/reconstruct.py: the pictures show what their captions say, from every kind of file that has a decoder."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.data.transforms import EvalTransform
from mae_et.errors import UserError
from mae_et.evaluation.pictures import hog_picture, ladder, picture_grid, reconstruct, save_picture, target_footer
from mae_et.lowfreq import crop_and_normalize
from mae_et.models.hog import hog_cells
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.targets import denormalize_patches, patchify, unpatchify
from mae_et.storage.backbone import export, load_mae
from mae_et.tasks import reconstruct as task
from mae_et.tasks.pretrain import pretrain
from tests.conftest import load_tool, small_values
from tests.processes import run_command

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
DATA = "scenes:5@40,seed=7"
COMMON = ["--device", "cpu"]


TOOL = load_tool("reconstruct")


def draw(*words: object) -> str:
    """Runs the tool in this process; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        TOOL.main(TOOL.make_parser().parse_args([*map(str, words), *COMMON]))
    return out.getvalue()


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs the command as a person does."""
    return run_command("reconstruct", *words, *COMMON)


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


def place(figure: Figure, row: int, column: int) -> np.ndarray | None:
    """Returns the pixels that are drawn at a place of a grid, [H, W, C] uint8; None where the place is empty."""
    num_columns = figure.axes[0].get_gridspec().ncols
    images = figure.axes[row * num_columns + column].images
    return np.asarray(images[0].get_array()).reshape(*images[0].get_array().shape[:2], -1) if images else None


def captions(figure: Figure) -> list[str]:
    return [axes.get_title().replace("\n", " ") for axes in figure.axes[: figure.axes[0].get_gridspec().ncols]]


def texts(figure: Figure) -> list[str]:
    """Returns the title and the footer."""
    return [text.get_text().replace("\n", " ") for text in figure.texts]


def test_reconstruct__a_run_folder_and_every_kind_of_image(
    small_run: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    for name in ("photo.png", "folder/b 1.jpg", "folder/a.jpg"):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "folder" / "broken.png").write_bytes(b"")
    out = tmp_path / "out" / "new"
    text = draw(
        small_run, tmp_path / "photo.png", DATA, tmp_path / "folder", "--out", out, "--max-images", 3, "--tile", 48
    )
    assert pictures(out) == [
        "000_photo.png",
        "001_scene_0_of_seed_7.png",
        "002_scene_2_of_seed_7.png",
        "003_scene_4_of_seed_7.png",
        "004_a.png",
        "005_b_1.png",
    ]
    record = json.loads((out / "reconstructions.json").read_text())
    assert (record["bandwidths"], record["mask_ratio"], record["num_pictures"]) == ([16, 24, 32], 0.5, 6)
    assert record["encoder_sha256"] == json.loads((small_run / "summary.json").read_text())["encoder_sha256"]
    assert f"left out {tmp_path}/folder/broken.png: empty file" in caplog.text
    assert "predicts normalised pixels; bandwidths 16, 24, 32, mask ratio 0.5, seed 0" in text
    assert str(checkpoint) in text
    with Image.open(out / "000_photo.png") as sheet:
        assert 4 * 48 < sheet.size[0] < 5 * 48  # row names and gaps take less than a tile
        assert 3 * 48 < sheet.size[1] < 5 * 48


def test_reconstruct__options_change_the_picture(checkpoint: Path, tmp_path: Path) -> None:
    one = [checkpoint, "scenes:1@40", "--tile", "32", "--out"]
    seen = {}
    for name, words in {
        "plain": [],
        "again": ["--seed", "0", "--mask-ratio", "0.5"],
        "seed": ["--seed", "1"],
        "ratio": ["--mask-ratio", "0.75"],
        "bands": ["--bandwidth", "32"],
        "size": ["--image-size", "48"],
    }.items():
        draw(*one, tmp_path / name, *words)
        (path,) = (tmp_path / name).glob("*.png")
        seen[name] = path.read_bytes()
    assert seen["plain"] == seen["again"]
    assert len(set(seen.values())) == 5


def test_reconstruct__official_and_exported_files(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "mae.safetensors", "mae")
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "full.pth")
    common = ["scenes:1@40", "--tile", "32", "--bandwidth", "32", "--mask-ratio", "0.5", "--out"]
    heads = ["--num-heads", "3", "--decoder-num-heads", "2", "--image-size", "32"]
    text = draw(tmp_path / "mae.safetensors", *common, tmp_path / "exported")
    assert "predicts normalised pixels" in text
    text = draw(tmp_path / "full.pth", *common, tmp_path / "official", "--norm-pix", "no", *heads)
    assert "predicts pixels; bandwidths 32" in text
    with pytest.raises(UserError, match="--norm-pix yes"):
        draw(tmp_path / "full.pth", *common, tmp_path / "x", *heads)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{t}/backbone.safetensors", DATA], "is a backbone without the decoder"),
        (["{c}", DATA, "--bandwidth", "16", "20"], "bandwidth 20 must be a multiple of the patch size 8"),
        (["{c}", DATA, "--bandwidth", "40"], "at most the image size 32"),
        (["{c}", DATA, "--mask-ratio", "1"], "mask_ratio = 1.0 must be at least 0 and below 1"),
        (["{c}", DATA, "--max-images", "0"], "max_images = 0 must be 1 or more"),
        (["{t}", DATA], "is a backbone without the decoder"),
        (["{c}", "{t}/nothing"], "does not exist"),
        (["{c}", "{t}/broken.png"], "none of the images can be read"),
    ],
)
def test_reconstruct__faults(checkpoint: Path, tmp_path: Path, words: list[str], message: str) -> None:
    export(checkpoint, tmp_path / "backbone.safetensors")
    (tmp_path / "broken.png").write_bytes(b"")
    words = [word.format(c=checkpoint, t=tmp_path) for word in words]
    with pytest.raises(UserError) as caught:
        draw(*words, "--out", tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_ladder__each_place_shows_what_it_says(checkpoint: Path, norm_pix: bool) -> None:
    model, _ = load_mae(checkpoint, norm_pix_loss=norm_pix)
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sheet = ladder(model, image, [16, 32], MEAN, STD, 0.5, seed=4, title="t")
    pixels = image.permute(1, 2, 0).numpy()
    name = "reconstruction (norm-pix)" if norm_pix else "reconstruction"
    assert captions(sheet) == ["original", "low frequencies", "masked 50%", name]
    assert texts(sheet) == ["t", f"{target_footer(model)} Visible patches show their input.".strip()]
    assert [sheet.axes[4 * i].texts[0].get_text() for i in (0, 1)] == ["bandwidth 16 px", "bandwidth 32 px"]
    assert [place(sheet, 0, j).shape[0] for j in range(4)] == [32, 16, 16, 16]
    assert np.array_equal(place(sheet, 0, 0), pixels)
    assert place(sheet, 1, 0) is None  # the original is shown once
    assert np.abs(place(sheet, 1, 1).astype(int) - pixels).max() <= 1  # at full bandwidth nothing is lost

    inputs = crop_and_normalize(image[None], 32, MEAN, STD)
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        predicted, mask = model.predict(inputs, 0.5, noise)
    patches = patchify(inputs, 8)
    if norm_pix:
        predicted = denormalize_patches(predicted, patches)
    filled = torch.where(mask[..., None].bool(), predicted, patches)
    expected = (unpatchify(filled, 8, (4, 4))[0] * 0.25 + 0.5).clamp(0, 1) * 255
    found = place(sheet, 1, 3)
    assert np.abs(found.astype(float) - expected.permute(1, 2, 0).numpy()).max() <= 1
    masked = place(sheet, 1, 2)
    removed = mask[0].bool().reshape(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    assert removed.mean() == 0.5
    assert np.abs(masked[removed].astype(int) - 128).max() <= 1
    assert np.abs(masked[~removed].astype(int) - pixels[~removed]).max() <= 1


def hog_model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        32,
        8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
        target="hog",
    ).eval()


@pytest.mark.parametrize("direction", range(9))
def test_hog_picture__strokes_run_along_the_edge(direction: int) -> None:
    """The brightest line through a cell's middle is the one along which the image does not change."""
    cells = torch.zeros(1, 3, 9, 2, 3)
    cells[0, :, direction, 1, 2] = torch.tensor([0.9, 0.6, 0.3])  # the channels' mean is drawn
    picture = hog_picture(cells, side=31)
    assert picture.shape == (1, 1, 62, 93)
    assert picture.max() == pytest.approx(0.6)
    drawn = picture[0, 0, 31:, 62:].clone()
    assert picture.sum() == pytest.approx(drawn.sum().item())  # nothing elsewhere
    angle = math.radians(20 * direction + 10)  # of the gradient, from the vertical
    for r in range(-12, 13):
        y, x = 15 + r * -math.sin(angle), 15 + r * math.cos(angle)  # at right angles to it
        assert drawn[round(y), round(x)] > 0.2
        if abs(r) > 4:
            y, x = 15 + r * math.cos(angle), 15 + r * math.sin(angle)
            assert drawn[round(y), round(x)] == 0


def test_ladder__hog_shows_the_target_beside_the_prediction() -> None:
    model = hog_model()
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sheet = ladder(model, image, [16, 32], MEAN, STD, 0.5, seed=4, title="t")
    assert captions(sheet)[3:] == ["HOG target", "HOG prediction"]
    assert "Visible patches show their target." in texts(sheet)[1]
    inputs = crop_and_normalize(image[None], 32, MEAN, STD)
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        predicted, mask = model.predict(inputs, 0.5, noise)
        target = model.targets(inputs)
    filled = torch.where(mask[..., None].bool(), predicted, target)
    for column, patches in ((3, target), (4, filled)):
        expected = hog_picture(hog_cells(patches, 3, (4, 4)))[0, 0] * 255
        found = place(sheet, 1, column)
        assert np.abs(found - expected.numpy()[..., None]).max() <= 1
    assert not np.array_equal(place(sheet, 1, 3), place(sheet, 1, 4))
    assert place(sheet, 0, 3).any()


def test_reconstruct__hog_run_and_exported_file(tmp_path: Path) -> None:
    values = small_values(
        model__target="hog", curriculum__equivalent_epochs=1.5, curriculum__warmup_equivalent_epochs=0.5
    )
    pretrain(from_dict(PretrainConfig, values), tmp_path / "run", device="cpu")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*.pt")
    export(saved, tmp_path / "mae.safetensors", "mae")
    for name in ("run", "mae.safetensors"):
        text = draw(tmp_path / name, "scenes:1@40", "--tile", "32", "--out", tmp_path / f"out_{name}")
        assert "predicts HOG descriptors; bandwidths 16, 24, 32" in text
    with pytest.raises(UserError, match="--norm-pix"):
        draw(tmp_path / "run", "scenes:1@40", "--norm-pix", "yes", "--out", tmp_path / "out")


def test_picture_grid__as_pretrain_uses_it(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load_mae(checkpoint)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    columns = reconstruct(model, images, 24, MEAN, STD, 0.5)
    assert list(columns) == ["original", "input, bandwidth 24", "masked 50%", "reconstruction"]
    sheet = picture_grid(columns, target_footer(model))
    assert captions(sheet) == list(columns)
    assert texts(sheet) == ["", target_footer(model)]
    assert np.array_equal(place(sheet, 1, 0), images[1].permute(1, 2, 0).numpy())
    pixels = save_picture(sheet, tmp_path / "new" / "grid.png")
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    with Image.open(tmp_path / "new" / "grid.png") as file:
        assert np.array_equal(pixels, np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("tile", [32, 160])
def test_picture_grid__pictures_are_tile_px_wide_and_no_text_is_cut_off(tmp_path: Path, tile: int) -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 20, 20)
    grey = torch.full((1, 40, 40), 0.5)
    long = "a long text with $dollars$ that needs several lines " * 5
    sheet = picture_grid({long: [red, None], "b": [grey, red]}, long, tile, long, ["x" * 20, "y"])
    pixels = save_picture(sheet, tmp_path / "grid.png").astype(int)
    is_red = (np.abs(pixels - [255, 0, 0]).max(axis=2) < 30) * 1
    assert abs(is_red.sum() / tile**2 - 2) < 0.2
    is_grey = np.abs(pixels - 128).max(axis=2) < 3
    assert abs(is_grey.sum() / tile**2 - 1) < 0.3  # with a few pixels of the texts
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()
    if tile == 160:
        ink = (pixels.max(axis=2) < 128).any(axis=1)
        assert ink[:40].any()
        assert ink[-40:].any()


def test_reconstruct__from_the_command_line(small_run: Path, tmp_path: Path) -> None:
    done = run_script(small_run, DATA, "--out", tmp_path / "out", "--max-images", 2)
    assert done.returncode == 0, done.stderr
    assert "wrote 2 pictures" in done.stdout
    assert len(pictures(tmp_path / "out")) == 2
    done = run_script(small_run, DATA, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "holds reconstructions already" in done.stderr
    assert len(pictures(tmp_path / "out")) == 2
    done = run_script(tmp_path, DATA, "--out", tmp_path / "new")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_reconstruct__shows_as_much_of_an_image_as_the_runs_evaluation_saw(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "photo.png")
    for ratio in (0.5, 1.0):
        state["metadata"]["eval_crop_ratio"] = str(ratio)
        torch.save(state, tmp_path / "step_00000001.pt")
        drawn: list[np.ndarray | None] = []

        def save(figure: Figure, path: Path, drawn: list[np.ndarray | None] = drawn) -> np.ndarray:
            drawn.append(place(figure, 0, 0))
            return save_picture(figure, path)

        monkeypatch.setattr(task, "save_picture", save)
        draw(tmp_path / "step_00000001.pt", tmp_path / "photo.png", "--out", tmp_path / str(ratio))
        expected = EvalTransform(32, ratio)(image).permute(1, 2, 0).numpy()
        assert np.array_equal(drawn[0], expected), ratio
