"""Known GPUs by the names that CUDA gives them; anything else is not known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mae_et.commands.pretrain import speed_lines
from mae_et.engine.hardware import PEAK_TFLOPS, available_memory, peak_tflops
from mae_et.engine.precision import device_peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32", "fp32"),
    [
        ("Tesla V100-SXM2-32GB", None, 125, None, 15.7),
        ("Tesla V100-SXM2-16GB", None, 125, None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112, None, 14),
        ("Tesla T4", None, 65, None, 8.1),
        ("NVIDIA A100-SXM4-40GB", 312, 312, 156, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756, 756, 378, 51.2),
        ("NVIDIA H100 NVL", 835.5, 835.5, 417.5, 60),
        ("NVIDIA H200", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA B200", 2250, 2250, 1125, 75),
        ("NVIDIA A10", 125, 125, 62.5, 31.2),
        ("NVIDIA A10G", 70, 70, 35, 31.5),
        ("NVIDIA A40", 149.7, 149.7, 74.8, 37.4),
        ("NVIDIA L4", 121, 121, 60, 30.3),
        ("NVIDIA L40S", 362, 362, 183, 91.6),
        ("NVIDIA RTX A6000", 154.8, 154.8, 77.4, 38.7),
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6, 35.6),
        ("GeForce RTX 3090", 71, 71, 35.6, 35.6),  # of older drivers
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8, 104.8),
    ],
)
def test_peak_tflops__of_known_cards(name, bf16, fp16, tf32, fp32):
    found = [peak_tflops(name, precision) for precision in ("bf16", "fp16", "tf32", "fp32")]
    assert found == [bf16, fp16, tf32, fp32]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",  # a slice
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A1000",
        "NVIDIA H20",
        "AMD Instinct MI300X",
        "cpu",
        "",
    ],
)
def test_peak_tflops__a_name_that_only_begins_like_a_known_one(name):
    assert peak_tflops(name, "fp16") is None
    assert peak_tflops(name, "fp32") is None


def test_peak_tflops__table_makes_sense():
    for name, row in PEAK_TFLOPS.items():
        assert set(row) <= {"bf16", "fp16", "tf32", "fp32"}, name
        assert row["fp16"] >= 1.9 * row["fp32"], name
        assert ("bf16" in row) == ("tf32" in row), name  # both came with Ampere
        if "bf16" in row:
            assert row["bf16"] == row["fp16"] == pytest.approx(2 * row["tf32"], rel=0.02), name


def test_device_peak_tflops__in_the_precision_of_the_run(monkeypatch):
    device = torch.device("cuda", 0)
    assert device_peak_tflops("bf16", torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert [device_peak_tflops(kind, device) for kind in ("auto", "bf16", "fp16", "fp32")] == [312, 312, 312, 19.5]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak_tflops("fp32", device) == 156
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert device_peak_tflops("auto", device) == 15.7
    assert device_peak_tflops("bf16", device) is None


# ---- the last lines of mae-et pretrain ----


def summary_of(speeds, mfu=None):
    return {
        "speedup_against_baseline": 3.1,
        "baseline_equivalent_epochs": 1600.0,
        "nominal_speedup": 4.0,
        "nominal_speedup_flops": 3.9,
        "mfu": mfu,
        "peak_tflops": None if mfu is None else 312,
        "stages": [
            {
                "bandwidth": 96,
                "input_size": (96, 96),
                "images_per_second": 1000 * speed,
                "speed_over_full_size": speed,
                "ideal_by_area": 5.44,
                "ideal_by_flops": 5.3,
                "speed_over_ideal_by_flops": None if speed is None else speed / 5.3,
                "waiting_fraction": 0.4,
            }
            for speed in speeds
        ],
    }


def test_speed_lines__names_the_stages_that_fall_short():
    first, second = speed_lines(summary_of([2.6, 5.2]))
    assert (
        first
        == "speed-up over 1600 full-size epochs (computed from this run's full-size speed): 3.10x; ideal: 4.00x by area, "
        "3.90x by counted FLOPs"
    )
    assert second == (
        "  bandwidth 96: 2600 images/s, 2.6x full size (ideal: 5.4x by area, 5.3x by counted FLOPs), 40% of the time waiting "
        "for data"
    )
    assert speed_lines(summary_of([5.2], mfu=0.314))[1:] == ["model FLOPs utilisation: 31.4% of 312 TFLOP/s a GPU"]


def test_speed_lines__nothing_to_compare_with():
    summary = summary_of([1.0]) | {"speedup_against_baseline": None}
    summary["stages"][0]["speed_over_ideal_by_flops"] = None
    assert speed_lines(summary) == []


def test_available_memory__smallest_of_machine_and_groups(tmp_path: Path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    assert available_memory(proc, cgroup) is None
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     800 kB\n")
    (proc / "self/cgroup").write_text("0::/job/step\n")
    assert available_memory(proc, cgroup) == 800 * 1024
    for folder, limit, used, cache in (("job/step", "max", 0, 0), ("job", "500000", 300000, 1000)):
        (cgroup / folder).mkdir(parents=True, exist_ok=True)
        (cgroup / folder / "memory.max").write_text(f"{limit}\n")
        (cgroup / folder / "memory.current").write_text(f"{used}\n")
        (cgroup / folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    assert available_memory(proc, cgroup) == 500000 - 300000 + 1000


def test_available_memory__groups_of_version_1(tmp_path: Path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable: 800 kB\n")
    (proc / "self/cgroup").write_text("9:cpu:/job\n4:blkio,memory:/job\n0::/job\n")
    (cgroup / "memory/job").mkdir(parents=True)
    for name, text in (("limit_in_bytes", "3000"), ("usage_in_bytes", "1500")):
        (cgroup / f"memory/job/memory.{name}").write_text(f"{text}\n")
    (cgroup / "memory/job/memory.stat").write_text("cache 9\ninactive_file 200\n")
    assert available_memory(proc, cgroup) == 1700


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_available_memory__of_this_machine():
    free = available_memory()
    assert free is not None
    assert free > 2**26
