"""ConvNeXt-Large from ImageNet-22K, fine-tuned on ImageNet-1K at 224 px.

Command:  torchrun --nproc_per_node 8 -m mae_et supervised convnext_large_22k_finetune
          At 384 px: add --cfg-options data.image_size=384 data.eval_crop_ratio=1.0 batch.micro_batch_size=16
          From another file: add --cfg-options model.init_from=FILE
Hardware: written for 8 GPUs of 24 GB; accumulation follows for other numbers. Not run by this project: no hours.
Expected: 86.5/87.3 top-1 at 224/384 px (paper).
Source:   ConvNeXt's own code. Its layer decay is 0.8 for each three blocks; here each block is a layer, so the cube root of it.
"""

_base_ = "../_base_/imagenet_22k_finetune.py"

model = dict(name="convnext_large", drop_path_rate=0.3, init_from="work_dirs/convnext_large_22k")
optimizer = dict(layer_decay=0.928)
