"""Model cards and the options of `mae-et export`."""

import json
import re

import pytest
import torch

from mae_et.commands.export import main, make_parser
from mae_et.errors import UserError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.report.model_card import model_card
from mae_et.runs.record_files import write_record
from mae_et.runs.records import PretrainSummary
from mae_et.storage.backbone import write_backbone

STAGES = {"stages": [{"bandwidth": 16}], "preset": "custom", "centered": True, "equivalent_epochs": 5.2}
METADATA = {
    "num_heads": "4", "decoder_num_heads": "2", "target": "pixels", "image_size": "32", "architecture": "vit_tiny_patch8_32",
    "objective": "mae", "mask_ratio": "0.5", "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]", "eval_crop_ratio": "0.875",
    "data": "photos_<b>|x", "num_images": "12345", "curriculum": json.dumps(STAGES), "bandwidths": "[16, 32]", "seed": "7",
    "step": "24", "num_steps": "24", "mae_et_version": "0.0",
}  # fmt: skip


def summary(**changes):
    zero = dict.fromkeys(
        ["num_fresh_images", "refilled_images", "bad_images", "skipped_steps"], 0
    ) | dict.fromkeys(
        ["refill_seconds", "load_reduction", "real_epochs", "waiting_fraction", "baseline_equivalent_epochs"], 0.0
    )  # fmt: skip
    none = dict.fromkeys(
        ["tflops_per_second", "mfu", "peak_tflops", "speedup_against_baseline", "speedup_over_nominal",
         "speedup_over_nominal_flops", "peak_memory_mb", "initial_weights", "knn_top1_before"]
    )  # fmt: skip
    values = {
        "num_steps": 24, "num_images": 4321, "seconds": 98.0, "dataset_size": 12345, "equivalent_epochs": 5.2,
        "train_petaflops": 1.75, "images_per_second": 44.0, "stages": [], "nominal_speedup": 1.4, "nominal_speedup_flops": 1.6,
        "first_loss": 1.25, "last_loss": 0.75, "world_size": 2, "encoder_sha256": "0", "knn_top1_after": 0.625,
    }  # fmt: skip
    return PretrainSummary(**zero, **none, **values | changes)


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    state = MaskedAutoencoder(32, 8, 3, 32, 1, 4, 16, 1, 2).state_dict()
    write_backbone(state, folder / "backbone.safetensors", "timm", METADATA)
    write_record(folder / "summary.json", summary())
    return folder


def rows(card):
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, re.MULTILINE))


def export(*words):
    main(make_parser().parse_args([str(word) for word in words]))


def test_huggingface__the_card_has_data_curriculum_cost_and_results(run, tmp_path, capsys):
    export(run, tmp_path / "hf", "--layout", "huggingface")
    card = (tmp_path / "hf/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\n# photos\n" in card
    assert f"ViTModel.from_pretrained('{tmp_path / 'hf'}')" in card
    expected = {
        "source": r"photos\_\<b\>\|x", "images": "12,345", "bandwidths of the stages, px": "16, 32",
        "equivalent epochs": "5.2", "training compute": "1.75 PFLOPs", "images shown": "4,321",
        "loss, first to last": "1.2500 to 0.7500", "kNN top-1, before to after": "0.6250", "step": "24 of 24",
        "initial weights": "random", "seed": "7", "measured speed-up against its baseline": "not recorded",
    }  # fmt: skip
    assert {key: rows(card.replace(r"\|x", r"\¦x"))[key].replace("¦", "|") for key in expected} == expected
    assert "wrote the model card" in capsys.readouterr().out


def test_card__without_summary_and_of_an_earlier_step(run, tmp_path, capsys):
    card = tmp_path / "card.md"
    export(run / "backbone.safetensors", tmp_path / "b.safetensors", "--card", card)
    assert "1.75 PFLOPs" in card.read_text()
    state = MaskedAutoencoder(32, 8, 3, 32, 1, 4, 16, 1, 2).state_dict()
    write_backbone(state, run / "early.safetensors", "timm", METADATA | {"step": "12"})
    export(run / "early.safetensors", tmp_path / "b.safetensors", "--card", card)
    assert card.read_text().count("No summary of a finished training belongs to this file.") == 2
    assert "is not used: SOURCE is of an earlier step" in capsys.readouterr().out


def test_card__values_that_are_absent_are_marked():
    card = model_card({}, None, "weights")
    assert rows(card)["mean"] == rows(card)["source"] == "not recorded"
    assert "The file records no curriculum." in card


def test_options_without_effect_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="--dynamic has no effect with --layout timm: remove it"):
        export(run, tmp_path / "b.safetensors", "--dynamic", "size")
