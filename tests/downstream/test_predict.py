"""`mae-et predict` for detectors and segmentors: what the libraries' own inference returns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.errors import CheckpointError
from tests.downstream.conftest import needs_mm
from tests.downstream.runs import main, untrained, write_data

pytestmark = [pytest.mark.mm, needs_mm]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_predict__equals_the_libraries(data: Path, tmp_path: Path) -> None:
    image = next((data / "coco/val2017").glob("*"))
    (tmp_path / "cut.jpg").write_bytes(image.read_bytes()[:200])
    for task, number in (("detection", 10), ("segmentation", 18)):
        names = [f"class {i}" for i in range(number)]
        checkpoint, out = tmp_path / f"{task}.pth", tmp_path / task
        model = untrained(data, task, checkpoint, names)
        words = [checkpoint, image, tmp_path / "cut.jpg", "--config", f"{task}/demo", "--out", out, "--device", "cpu"]
        main(data, "predict", *words, "--pictures", "--score", 0)
        record = json.loads((out / "predictions.json").read_text())
        assert [Path(one["image"]).name for one in record["bad_images"]] == ["cut.jpg"]
        (entry,) = record["images"]
        assert [one["name"] for one in record["categories"]] == names
        assert len(list((out / "pictures").glob("*.png"))) == 1
        if task == "detection":
            from mmdet.apis import inference_detector
            from pycocotools import mask

            wanted = inference_detector(model, str(image)).pred_instances
            order = wanted.scores.argsort(descending=True, stable=True)
            ours = record["annotations"]
            assert len(ours) == len(order) > 0
            assert [one["category_id"] - 1 for one in ours] == wanted.labels[order].tolist()
            assert [one["score"] for one in ours] == pytest.approx(wanted.scores[order].tolist(), abs=1e-5)
            corners = [(x, y, x + width, y + height) for x, y, width, height in (one["bbox"] for one in ours)]
            np.testing.assert_allclose(corners, wanted.bboxes[order].numpy(), atol=0.011)
            for one, index in zip(ours[:3], order.tolist(), strict=False):
                assert (mask.decode(one["segmentation"]) == wanted.masks[index].numpy()).all()
        else:
            from mmseg.apis import inference_model

            wanted = inference_model(model, str(image)).pred_sem_seg.data[0].numpy()
            with Image.open(out / entry["mask"]) as ours:
                assert (np.asarray(ours) == wanted).all()
            assert sum(entry["pixels"].values()) == wanted.size
            content = torch.load(checkpoint)
            del content["meta"]["dataset_meta"]
            torch.save(content, checkpoint)
            with pytest.raises(CheckpointError, match="records no class names"):
                main(data, "predict", *words, "--overwrite")
