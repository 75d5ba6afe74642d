"""CSWin-Base from ImageNet-22K, fine-tuned on ImageNet-1K at 224 px.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised cswin_base_22k_finetune
          At 384 px: add --cfg-options data.image_size=384 data.eval_crop_ratio=1.0 batch.micro_batch_size=16
          From another file: add --cfg-options model.init_from=FILE
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 86.4/87.4, pre-trained with Early Large Batch, top-1 at 224/384 px (paper).
Source:   released command of EfficientTrain++ for CSWin-B at 224 px. At 384 px the authors use values
          tuned on the baseline, which they do not print.
"""

_base_ = "../_base_/imagenet_22k_finetune.py"

model = dict(name="cswin_base_224", drop_path_rate=0.2, init_from="work_dirs/cswin_base_22k")
optimizer = dict(layer_decay=0.9)
regularization = dict(ema_decay=0.9998)
