"""The metrics file of a run: appended at once, cut back on resume, readable after a kill."""

import json

import pytest

from mae_et.storage import metrics_file
from mae_et.storage.metrics_file import MetricsFile, read_jsonl


def steps(path):
    return [line["step"] for line in read_jsonl(path)]


def test_metrics_file__one_object_a_line_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 0.5})
    file.write({"step": 2, "loss": 0.25, "note": "ü\n"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [  # before close: a kill loses nothing
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "note": "ü\n"},
    ]
    file.close()
    assert read_jsonl(path)[1]["note"] == "ü\n"


def test_metrics_file__a_resumed_run_drops_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (10, 20, 30, 40):
        file.write({"step": step, "loss": step / 7})
    file.close()
    file = MetricsFile(path, first_step=20)
    assert steps(path) == [10, 20]
    file.write({"step": 30, "loss": 9})
    file.close()
    assert steps(path) == [10, 20, 30]
    assert read_jsonl(path)[0]["loss"] == 10 / 7  # exactly as written
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_file__a_new_run_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    MetricsFile(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3', "{", "\x00\x00"])
def test_metrics_file__a_line_cut_off_by_a_kill(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    assert steps(path) == [1, 2]
    file = MetricsFile(path, first_step=3)
    file.write({"step": 3})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("block_bytes", [1, 40, 1000, 4 << 20])
@pytest.mark.parametrize("first_step", [0, 1, 57, 100])
@pytest.mark.parametrize("tail", ["", '{"step": 101, "lo'])
def test_metrics_file__is_cut_at_the_step_wherever_blocks_end(tmp_path, monkeypatch, block_bytes, first_step, tail):
    monkeypatch.setattr(metrics_file, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(metrics_file, "_read", None)  # the lines are not parsed
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": {step / 7}}}\n' for step in range(1, 101) for _ in range(1 + (step % 10 == 0))]
    path.write_text("".join(lines) + tail)
    MetricsFile(path, first_step).close()
    assert path.read_text() == "".join(line for line in lines if json.loads(line)["step"] <= first_step)


@pytest.mark.parametrize("position", [0, 49, 99])
@pytest.mark.parametrize("damage", [b"\xff", b"\0", b'{"loss": 1}\n', b"[]\n", b'{"step": "x"}\n', b'{"step": 1, "x'])
def test_metrics_file__damage_is_found_in_any_block(tmp_path, monkeypatch, caplog, damage, position):
    monkeypatch.setattr(metrics_file, "_BLOCK_BYTES", 200)
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": {step / 7}}}\n'.encode() for step in range(1, 101)]
    path.write_bytes(b"".join([*lines[:position], damage, *lines[position:]]))
    MetricsFile(path, 100).close()
    assert (tmp_path / "metrics.damaged-1.jsonl").exists()
    assert "1 lines are damaged" in caplog.text  # what a kill cut off spoils the line behind it


def test_read_jsonl__counts_what_it_leaves_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, oops}\n{"step": 3}\n')
    assert steps(path) == [1, 3]
    assert "1 lines are damaged and left out" in caplog.text
