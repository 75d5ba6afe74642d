"""Fine-tuning an MAE ViT-Base/16 on 100 classes at 32 px, enlarged to 224.

Command:  MAE_ET_DATA=/data python tools/classify.py configs/classification/cifar100_finetune_base.py --backbone FILE
Hardware: one GPU. Not run by this project, so no hours are given.
Expected: no published number of the MAE authors.
Source:   MAE's ImageNet recipe, with the batch of a small data set (ours).
"""

_base_ = ["../_base_/cifar100.py", "../_base_/mae_finetune_small_sets.py"]
