"""Atomic saves, detection of damage, reading of weights from any file, strict loading."""

import argparse
import builtins
import errno
import io
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mae_et.errors import CheckpointError
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.pos_embed import sincos_pos_embed
from mae_et.storage import atomic, checkpoint
from mae_et.storage.atomic import atomic_path
from mae_et.storage.checkpoint import list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from mae_et.storage.weights import check_position_tables, describe, load_weights, read_weights

SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    return MaskedAutoencoder(**SIZES | options)


def state_of(step):
    return {"step": step, "model": {"w": torch.arange(5000.0) + step}, "names": ["a", "b"], "none": None}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- saving ----


def test_save_checkpoint__round_trip(tmp_path):
    path = save_checkpoint(state_of(7), tmp_path, 7, keep=2)
    assert path == tmp_path / "step_00000007.pt"
    loaded = load_checkpoint(path)
    assert (loaded["step"], loaded["names"], loaded["none"]) == (7, ["a", "b"], None)
    assert torch.equal(loaded["model"]["w"], state_of(7)["model"]["w"])
    assert files(tmp_path) == ["step_00000007.pt"]


def test_save_checkpoint__keeps_the_newest(tmp_path):
    for step in (5, 10, 20, 100):
        save_checkpoint(state_of(step), tmp_path, step, keep=2)
    assert files(tmp_path) == ["step_00000020.pt", "step_00000100.pt"]
    (tmp_path / "step_00000100.pt").write_bytes(b"cut off")  # so the run resumes from 20 and saves at 50
    save_checkpoint(state_of(50), tmp_path, 50, keep=1)
    assert files(tmp_path) == ["step_00000050.pt"]
    (tmp_path / "step_last.pt").touch()  # a user's own file: neither listed nor removed
    save_checkpoint(state_of(200), tmp_path, 200, keep=1)
    assert files(tmp_path) == ["step_00000200.pt", "step_last.pt"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000200.pt"]


def test_save_checkpoint__the_same_step_again_replaces(tmp_path):
    save_checkpoint(state_of(1), tmp_path, 1, keep=2)
    save_checkpoint({"step": "new"}, tmp_path, 1, keep=2)
    assert load_checkpoint(tmp_path / "step_00000001.pt") == {"step": "new"}


def full_disk_in_torch_save(monkeypatch):
    """Half the file is written, then the disk is full, as torch reports it."""

    def save(state, path):
        Path(path).write_bytes(b"PK" + bytes(1000))
        raise RuntimeError(
            "[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0: file write failed"
        )

    monkeypatch.setattr(checkpoint.torch, "save", save)


def full_disk_in_writes(monkeypatch):
    def save(state, path):
        Path(path).write_bytes(b"PK" + bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint.torch, "save", save)


def full_disk_in_fsync(monkeypatch):
    """Everything seems written; the disk says otherwise when it is made to."""

    def fsync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fsync)


def full_disk_in_rename(monkeypatch):
    def replace(source, target):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(atomic.os, "replace", replace)


@pytest.mark.parametrize(
    "inject", [full_disk_in_torch_save, full_disk_in_writes, full_disk_in_fsync, full_disk_in_rename]
)
@pytest.mark.parametrize("step", [1, 2])  # over the earlier save itself, and beside it
def test_save_checkpoint__full_disk_loses_nothing(tmp_path, monkeypatch, inject, step):
    earlier = save_checkpoint(state_of(1), tmp_path, 1, keep=1)
    before = earlier.read_bytes()
    with monkeypatch.context() as patch:
        inject(patch)
        with pytest.raises(
            CheckpointError, match=r"cannot write .*step_0000000\d\.pt: .*(MiB are free|quota)"
        ) as caught:
            save_checkpoint(state_of(step), tmp_path, step, keep=1)
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == ["step_00000001.pt"]  # no temporary file, the earlier save not rotated out
    assert earlier.read_bytes() == before
    save_checkpoint(state_of(3), tmp_path, 3, keep=1)  # and it continues once there is space
    assert files(tmp_path) == ["step_00000003.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_save_checkpoint__really_full_device(tmp_path, monkeypatch):
    """torch's own writer on a device that is always full."""
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full") if name.endswith(".writing") else self)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(CheckpointError, match="MiB are free"):
        save_checkpoint(state_of(1), tmp_path, 1, keep=1)
    assert files(tmp_path) == []


def test_save_checkpoint__missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(state_of(1), tmp_path / "absent", 1, keep=1)


def test_atomic_path__a_bug_is_not_dressed_up_and_leaves_nothing(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")

    def write_and_fail():
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise KeyError("bug")

    with pytest.raises(KeyError):
        write_and_fail()
    assert target.read_text() == "old"
    assert files(tmp_path) == ["x.txt"]


def test_atomic_path__leftover_of_a_killed_save_does_not_matter(tmp_path):
    (tmp_path / ".step_00000001.pt.writing").write_bytes(b"half")
    save_checkpoint(state_of(1), tmp_path, 1, keep=1)
    assert files(tmp_path) == ["step_00000001.pt"]
    assert load_checkpoint(tmp_path / "step_00000001.pt")["step"] == 1


# ---- damage ----


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.99, "all but one byte"])
def test_load_checkpoint__truncated(tmp_path, kept):
    path = save_checkpoint(state_of(1), tmp_path, 1, keep=1)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 1 if isinstance(kept, str) else int(kept * len(content))])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_load_checkpoint__flipped_bit_in_a_tensor(tmp_path):
    path = save_checkpoint(state_of(1), tmp_path, 1, keep=1)
    content = bytearray(path.read_bytes())
    place = content.index(state_of(1)["model"]["w"].numpy().tobytes()[4000:4400])
    for bit, offset in ((0, 0), (7, 200)):
        damaged = bytearray(content)
        damaged[place + offset] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def test_load_checkpoint__no_flipped_byte_passes_unseen(tmp_path):
    """Anywhere in the file: an error, or the state as it was (a byte of padding)."""
    path = save_checkpoint({"w": torch.arange(64.0), "step": 3}, tmp_path, 1, keep=1)
    content = path.read_bytes()
    num_found = 0
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = load_checkpoint(path)
        except CheckpointError:
            num_found += 1
        else:
            assert loaded["step"] == 3
            assert torch.equal(loaded["w"], torch.arange(64.0))
    assert num_found > 20


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n" + bytes(100), bytes(5000), b"\x80\x02}q\x00."])
def test_load_checkpoint__other_files(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(path)


def test_load_checkpoint__missing(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path)


def test_load_checkpoint__no_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dict"):
        load_checkpoint(tmp_path / "x.pt")


class Evil:
    def __reduce__(self):
        return (builtins.print, ("code ran",))


@pytest.mark.parametrize("legacy", [False, True])
def test_load__runs_no_code(tmp_path, capsys, legacy):
    path = tmp_path / "x.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "x": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError,
        match=r"cannot be read as tensors and plain values .*it names (builtins.)?print, which could run code; nothing was run",
    ):
        read_weights(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert "code ran" not in capsys.readouterr().out


# ---- load_newest ----


def test_load_newest__falls_back_past_damaged_saves_with_a_warning(tmp_path):
    paths = [save_checkpoint(state_of(step), tmp_path, step, keep=5) for step in (1, 2, 3)]
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    said = []
    path, state = load_newest(tmp_path, said.append)
    assert (path, state["step"]) == (paths[0], 1)
    assert len(said) == 2
    assert str(paths[2]) in said[0]
    assert "truncated" in said[0]
    assert str(paths[1]) in said[1]
    assert "damaged" in said[1]


def test_load_newest__silent_where_all_is_well(tmp_path):
    for step in (9, 10):
        save_checkpoint(state_of(step), tmp_path, step, keep=5)
    said = []
    assert load_newest(tmp_path, said.append)[1]["step"] == 10
    assert said == []


def test_load_newest__nothing_there_or_all_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from: start without --resume"):
        load_newest(tmp_path, print)
    for step in (1, 2):
        (tmp_path / f"step_0000000{step}.pt").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged.*another --work-dir"):
        load_newest(tmp_path, print)


def test_load_newest__one_process_of_a_machine_verifies_for_all(tmp_path, monkeypatch):
    paths = [save_checkpoint(state_of(step), tmp_path, step, keep=5) for step in (1, 2)]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    read = []
    monkeypatch.setattr(
        checkpoint, "_digest", lambda path, digest=checkpoint._digest: read.append(path) or digest(path)
    )
    said, answers = [], iter([[(paths[0].name, paths[1].name)] * 2, ["step 2 is damaged", None], [None, None]])
    path, state = load_newest(tmp_path, said.append, check=lambda path: None, gather=lambda value: next(answers))
    assert (path, state["step"], read) == (paths[0], 1, [])
    assert said == ["step 2 is damaged. Trying the checkpoint before it"]
    with pytest.raises(CheckpointError, match="the processes see different checkpoints"):
        load_newest(tmp_path, said.append, gather=lambda value: [value, value[:1]])


def test_load_checkpoint__shares_the_pages_of_the_file(tmp_path):
    """The tensors are mapped: reading a file does not copy it, and changing a tensor does not change the file."""
    path = save_checkpoint({"w": torch.zeros(2**22)}, tmp_path, 1, keep=1)
    before = path.read_bytes()
    loaded = load_checkpoint(path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    loaded["w"] += 1
    assert path.read_bytes() == before


# ---- read_weights ----


def save_in(form, state, path):
    if form == "bare":
        torch.save(state, path)
    elif form == "official":
        torch.save({"model": state}, path)
    elif form == "official, with its arguments":
        args = argparse.Namespace(lr=1e-3, model="mae_vit_base_patch16", resume="", distributed=True, betas=(0.9, 0.95))
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        torch.save({"model": state, "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}, path)
    elif form == "legacy, with its arguments":
        content = {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "legacy":
        torch.save({"model": OrderedDict(state)}, path, _use_new_zipfile_serialization=False)
    elif form == "state_dict":
        torch.save({"state_dict": OrderedDict(state), "meta": {"epoch": 1}}, path)
    elif form == "safetensors":
        save_file(state, path.with_suffix(".safetensors"), metadata={"source": "here"})
        return path.with_suffix(".safetensors")
    return path


FORMS = [
    "bare", "official", "official, with its arguments", "legacy", "legacy, with its arguments", "state_dict", "safetensors",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_read_weights__every_form(tmp_path, form):
    state = make_model().state_dict()
    path = save_in(form, state, tmp_path / "weights.pth")
    found, metadata = read_weights(path)
    assert_equal_states(found, state)
    assert metadata == ({"source": "here"} if form == "safetensors" else {})
    other = make_model(seed=1)
    load_file(other, path)
    assert_equal_states(other.state_dict(), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "model.", "module._orig_mod."])
def test_read_weights__prefix_of_all_keys(tmp_path, prefix):
    state = make_model().state_dict()
    torch.save({"model": {prefix + key: value for key, value in state.items()}}, tmp_path / "w.pth")
    assert_equal_states(read_weights(tmp_path / "w.pth")[0], state)


def test_read_weights__prefix_of_some_keys_stays(tmp_path):
    state = {"backbone.norm.weight": torch.ones(2), "head.weight": torch.ones(2)}
    torch.save(state, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")[0]) == set(state)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1}}])
def test_read_weights__no_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_read_weights__no_dict(tmp_path, legacy):
    torch.save([torch.zeros(2)], tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="not a dict"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [0, 1, 2, 100, 0.5, 0.95])
def test_read_weights__truncated(tmp_path, form, kept):
    path = save_in(form, make_model().state_dict(), tmp_path / "w.pth")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_read_weights__missing_or_foreign(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="no such"):
        read_weights(path)
    path.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"not a checkpoint|not a complete safetensors"):
        read_weights(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError):
        read_weights(path)


# ---- load_weights ----


def load_file(model, path, **options):
    return load_weights(model, read_weights(path)[0], str(path), **options)


def saved(tmp_path, state):
    torch.save({"model": state}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_load_weights__names_missing_unexpected_and_misshaped_keys(tmp_path):
    state = make_model().state_dict()
    del state["blocks.1.attn.qkv.bias"], state["mask_token"]
    state["head.weight"] = torch.zeros(10, 16)
    state["norm.weight"] = torch.zeros(17)
    model = make_model(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_file(model, saved(tmp_path, state))
    message = str(caught.value)
    assert "2 missing: " in message
    assert "blocks.1.attn.qkv.bias" in message
    assert "mask_token" in message
    assert "1 unexpected: head.weight" in message
    assert "1 of another shape: norm.weight (17,), the model has (16,)" in message
    assert "a ViT of width 16, depth 2, patch 8, 3 channels, with a decoder" in message
    assert_equal_states(model.state_dict(), before)  # nothing was half loaded


def test_load_weights__other_architecture(tmp_path):
    path = saved(tmp_path, make_model(embed_dim=32, depth=3).state_dict())
    with pytest.raises(CheckpointError, match=r"of another shape: .*, \.\.\..*size, patch_size, in_chans"):
        load_file(make_model(), path)


def encoder_of(state):
    return {key: value for key, value in state.items() if key != "mask_token" and not key.startswith("decoder_")}


def test_load_weights__encoder_only_leaves_the_decoder(tmp_path):
    source, model = make_model(), make_model(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = saved(tmp_path, encoder_of(source.state_dict()))
    with pytest.raises(CheckpointError, match=r"missing: mask_token .*, decoder_embed\.weight"):
        load_file(model, path)
    load_file(model, path, may_miss=("decoder_", "mask_token"))
    for key, value in model.state_dict().items():
        expected = source.state_dict()[key] if key in encoder_of(before) else before[key]
        assert torch.equal(value, expected), key


def test_load_weights__part_of_a_decoder_is_a_fault(tmp_path):
    state = make_model().state_dict()
    del state["decoder_norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: decoder_norm.weight"):
        load_file(make_model(), saved(tmp_path, state), may_miss=("decoder_", "mask_token"))
    model = nn.Sequential(OrderedDict(encoder=nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"2 missing: encoder\.weight \(2, 2\), encoder\.bias \(2,\)"):
        load_file(model, saved(tmp_path, {"decoder_x": torch.zeros(1)}), may_miss=("decoder_",))


@pytest.mark.parametrize("side", [2, 7, 14])
def test_load_weights__position_tables_of_any_grid(tmp_path, side):
    state = make_model().state_dict()
    state["pos_embed"] = sincos_pos_embed(16, (side, side))
    state["decoder_pos_embed"] = sincos_pos_embed(8, (side, side)).half()  # some files are saved in half precision
    model = make_model(seed=1)
    before = model.pos_embed.clone()
    load_file(model, saved(tmp_path, state))
    assert torch.equal(model.pos_embed, before)
    assert torch.equal(model.cls_token, state["cls_token"])


def test_load_weights__no_position_tables(tmp_path):
    state = {key: value for key, value in make_model().state_dict().items() if not key.endswith("pos_embed")}
    load_file(make_model(seed=1), saved(tmp_path, state))


def transposed(table):
    """The same numbers with rows and columns exchanged: another model's convention."""
    half = table.shape[-1] // 2
    return torch.cat([table[..., half:], table[..., :half]], dim=-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table + 0.02 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)),
        transposed,
        lambda table: table[:, 1:],  # without the row for cls
        lambda table: table.reshape(1, -1),
        lambda table: table[0],
        lambda table: table[..., :-2],
    ],
    ids=["learnt", "transposed", "no cls row", "flat", "two dimensions", "width not a multiple of 4"],
)
@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_load_weights__other_position_tables_are_refused(tmp_path, name, change):
    state = make_model().state_dict()
    state[name] = change(state[name])
    with pytest.raises(CheckpointError, match=rf"{name} \(.*\) is not the fixed sine-cosine table"):
        load_file(make_model(seed=1), saved(tmp_path, state))


def test_check_position_tables__none_or_nan():
    check_position_tables({"x": torch.zeros(2)}, "file")
    with pytest.raises(CheckpointError):
        check_position_tables({"pos_embed": torch.full((1, 17, 16), float("nan"))}, "file")


def test_describe():
    state = make_model(in_chans=1).state_dict()
    assert describe(state) == "a ViT of width 16, depth 2, patch 8, 1 channels, with a decoder"
    assert describe(encoder_of(state)) == "a ViT of width 16, depth 2, patch 8, 1 channels, without a decoder"
    assert describe({"a": torch.zeros(1)}) == "1 tensors, no ViT encoder among them"


def test_read_weights__bytes_of_the_official_form_are_a_zip(tmp_path):
    """Guards the tests above: what they call legacy really is the older format."""
    buffer = io.BytesIO()
    torch.save({"model": {}}, buffer)
    assert buffer.getvalue()[:2] == b"PK"
    path = save_in("legacy", {"w": torch.zeros(1)}, tmp_path / "w.pth")
    assert path.read_bytes()[:1] == b"\x80"
