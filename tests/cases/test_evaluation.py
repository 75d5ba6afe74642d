"""Cases of evaluation: inputs that once gave a wrong result in silence, with the right result."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mae_et.config.schema import ClassifyConfig, from_dict
from mae_et.errors import CheckpointError, ConfigError
from mae_et.models.sizes import recorded_size
from mae_et.tasks.classifier import check_backbone

# A small network of 64 px images with their own normalisation.
METADATA = {"num_heads": "3", "image_size": "64", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}


def state_of(width: int = 192, depth: int = 12, channels: int = 3, patch_size: int = 8) -> dict[str, torch.Tensor]:
    kernel = torch.zeros(width, channels, patch_size, patch_size)
    return {"patch_embed.proj.weight": kernel} | {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(depth)}


def config_of(**overrides: Any) -> ClassifyConfig:
    values: dict[str, Any] = {"data": {"train": "x", "val": "x"}, "backbone": "b.safetensors"}
    for key, value in overrides.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return from_dict(ClassifyConfig, values)


def check(config: ClassifyConfig, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Returns the message, empty if the backbone is accepted."""
    try:
        check_backbone(state, metadata, config, "b.safetensors")
    except CheckpointError as error:
        return str(error)
    return ""


def options_of(message: str) -> dict[str, Any]:
    """Returns the options that a message suggests, as `config_of` takes them."""
    options = dict(word.split("=") for word in message.partition("--cfg-options ")[2].split())
    return {key.replace(".", "__"): value if key == "model.size" else eval(value) for key, value in options.items()}


@pytest.mark.parametrize(
    ("state", "metadata"),
    [
        (state_of(), METADATA),
        (state_of(384, 7, patch_size=16), {**METADATA, "num_heads": "8", "image_size": "96"}),
        (state_of(channels=1), {**METADATA, "mean": "[0.3]", "std": "[0.4]"}),
        (state_of(768, 12, patch_size=16), {**METADATA, "num_heads": "12"}),
    ],
)
def test_case__M3_the_hint_for_another_network_is_complete(state: Any, metadata: dict[str, str]) -> None:
    """The suggested options alone give a config that accepts the backbone without any remark."""
    message = check(config_of(), state, metadata)
    assert "--cfg-options" in message
    options = options_of(message)
    assert {"data__image_size", "data__mean", "data__std"} <= options.keys()
    adapted = config_of(**options)
    assert check(adapted, state, metadata) == ""
    assert adapted.data.image_size == recorded_size(metadata)


def test_case__M3_another_size_is_said(caplog: pytest.LogCaptureFixture) -> None:
    own = config_of(model__size="tiny", model__patch_size=8, data__mean=[0.5] * 3, data__std=[0.25] * 3)
    with caplog.at_level(logging.INFO):
        assert check(own, state_of(), METADATA) == ""
    assert "pre-trained at 64 px, this config uses 224 px" in caplog.text
    assert "--cfg-options data.image_size=64" in caplog.text


@pytest.mark.parametrize("name", ["mean", "std"])
def test_case__M3_another_normalisation_is_refused(name: str) -> None:
    own: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, name: [0.4] * 3}
    config = config_of(
        model__size="tiny", model__patch_size=8, data__image_size=64, data__mean=own["mean"], data__std=own["std"]
    )
    message = check(config, state_of(), METADATA)
    assert f"data.{name} = " in message
    assert options_of(message).keys() == {f"data__{name}"}
    assert check(config, state_of(), {"num_heads": "3"}) == ""  # an official file does not say


@pytest.mark.mm
def test_case__M3_training_a_detector_says_and_refuses_the_same(caplog: pytest.LogCaptureFixture) -> None:
    from mmengine.config import Config

    from downstream.checks.backbone import check_backbone

    normalisation = {"mean": [127.5] * 3, "std": [63.75] * 3, "bgr_to_rgb": True}
    model = {"backbone": {"type": "ViTDet", "img_size": 1024}, "data_preprocessor": normalisation}
    backbone = {"file": "b.safetensors", "metadata": METADATA}
    with caplog.at_level(logging.INFO):
        check_backbone(Config({"model": model}), backbone)
    assert "pre-trained at 64 px, this config uses 1024 px" in caplog.text
    with pytest.raises(ConfigError, match="mean = "):
        check_backbone(
            Config({"model": {**model, "data_preprocessor": {**normalisation, "mean": [0.0] * 3}}}), backbone
        )
