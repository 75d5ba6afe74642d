"""A new decoder is trained alone before the encoder that `model.init_from` brings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mae_et.config.schema import PretrainConfig, from_dict
from mae_et.curriculum.hours import scale_budget
from mae_et.errors import ConfigError
from mae_et.storage.backbone import write_backbone
from mae_et.storage.checkpoint import list_checkpoints, load_checkpoint
from mae_et.tasks import pretrain
from mae_et.tasks.run import run_training
from tests.conftest import Stop, killed_before, losses, small_values
from tests.plans import plan_for


def config_from(tmp_path, layout="timm", **own):
    """Returns a config whose run starts from a file with or without a decoder, and the file."""
    torch.manual_seed(3)
    model = from_dict(PretrainConfig, small_values()).model
    path = tmp_path / f"{layout}.safetensors"
    network = pretrain.build_model(from_dict(PretrainConfig, small_values()))
    metadata = {"num_heads": str(model.dims.num_heads), "target": "normalised pixels"}
    write_backbone(network.state_dict(), path, layout, metadata)
    own = {"curriculum__equivalent_epochs": 2.0, "curriculum__decoder_warmup_equivalent_epochs": 1.0, **own}
    return from_dict(PretrainConfig, small_values(**{"model__init_from": str(path), "run__loggers": [], **own})), path


def encoder_of(state):
    return {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token", "pos_embed"))}


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_pretrain__encoder_keeps_its_bits_until_the_warmup_ends_and_resumes_exactly(tmp_path, caplog):
    caplog.set_level("INFO")
    config, path = config_from(tmp_path, run__save_interval=1, run__keep_checkpoints=99, model__ema_decay=0.9)
    plan = plan_for(config, 20)
    warmup = sum(plan.compute_fraction(step) < 0.5 for step in range(plan.num_steps))
    assert 1 < warmup < plan.num_steps - 1
    run_training(pretrain.MAETask, config, tmp_path / "whole", device="cpu")
    notes = "\n".join(json.loads((tmp_path / "whole/plan.json").read_text())["notes"])
    assert "the decoder alone is trained in the first 50.0% of the compute" in notes
    assert "step 0: training the decoder alone from here on" in caplog.text
    assert f"step {warmup}: training encoder and decoder from here on" in caplog.text

    first = load_file(path)
    saves = {int(save.stem[5:]): load_checkpoint(save) for save in list_checkpoints(tmp_path / "whole/checkpoints")}
    for part in ("model", "ema"):
        start, before, after = (encoder_of(saves[step][part]) for step in (1, warmup, warmup + 1))
        assert equal(start, first)
        assert equal(before, first)
        assert not any(torch.equal(after[key], first[key]) for key in ("blocks.0.attn.qkv.weight", "cls_token"))
    assert not torch.equal(saves[1]["model"]["decoder_pred.weight"], saves[warmup]["model"]["decoder_pred.weight"])
    names = [name for group in saves[warmup]["optimizer"]["param_groups"] for name in group["param_names"]]
    trained = {names[index] for index in saves[warmup]["optimizer"]["state"]}
    assert "decoder_pred.weight" in trained
    assert not encoder_of(dict.fromkeys(trained))  # no moments of gradients that were not applied

    for step in (warmup - 1, warmup, warmup + 1):
        folder = tmp_path / f"killed{step}"
        with pytest.raises(Stop):
            run_training(killed_before(pretrain.MAETask, step), config, folder, device="cpu")
        run_training(pretrain.MAETask, config, folder, resume=True, device="cpu")
        assert losses(folder) == losses(tmp_path / "whole")
        assert equal(load_file(folder / "backbone.safetensors"), load_file(tmp_path / "whole/backbone.safetensors"))


def test_decoder_warmup__is_refused_where_it_has_no_effect(tmp_path):
    config, _ = config_from(tmp_path, layout="mae")
    with pytest.raises(ConfigError, match=r"= 1 has no effect: model.init_from = .*mae.safetensors' holds a decoder"):
        run_training(pretrain.MAETask, config, tmp_path / "run", device="cpu")
    warmup = {"curriculum__decoder_warmup_equivalent_epochs": 1.0}
    for options, message in (
        (warmup, "decoder_warmup_equivalent_epochs = 1.0 has no effect with model.init_from = None"),
        (
            {**warmup, "model__init_from": "b", "curriculum__equivalent_epochs": 1.0},
            "must be below equivalent_epochs = 1: the",
        ),
        (
            {"curriculum__decoder_warmup_equivalent_epochs": -1.0, "model__init_from": "b"},
            "decoder_warmup_equivalent_epochs",
        ),
    ):
        options = {"curriculum__warmup_equivalent_epochs": 0.5, **options}
        with pytest.raises(ConfigError, match=message):
            from_dict(PretrainConfig, small_values(**options))


def test_scale_budget__scales_the_warmup_of_the_decoder(tmp_path):
    config, _ = config_from(tmp_path)
    assert scale_budget(config, 20.0).curriculum.decoder_warmup_equivalent_epochs == pytest.approx(10.0)
