"""MAE ViT-Base/16 on ImageNet-1K, 400 equivalent epochs with a replay buffer, for machines with few CPU cores.

Command:  torchrun --nproc_per_node 8 tools/pretrain.py configs/pretrain/mae_base_etpp_400e_imagenet_replay.py
Hardware: written for 8 GPUs and 51 GiB of free memory on one machine (6.3 GiB per process), beside what the run itself
          takes. Not run by this project, so no hours are given.
Expected: prepares 426 passes over the data instead of 909. There is no published accuracy for MAE with replay: where the
          loader is not the limit, take mae_base_etpp_400e_imagenet.py.
Source:   factors 4, 2, 1 at 96, 160, 224 and sizes of 1920, 256, 0 loader batches: EfficientTrain++ (arXiv 2405.08768),
          its authors' released code for DeiT-S. Other sizes: replay = dict(mode="mix", stages=[dict(bandwidth=96,
          factor=4, size=500), ...]).
"""

_base_ = "./mae_base_etpp_400e_imagenet.py"

replay = dict(mode="mix", max_memory_gib=64)
