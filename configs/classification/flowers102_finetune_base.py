"""Fine-tuning an MAE ViT-Base/16 on 102 flowers; needs scipy.

Command:  MAE_ET_DATA=/data python tools/classify.py configs/classification/flowers102_finetune_base.py --backbone FILE
Hardware: one GPU. Not run by this project, so no hours are given.
Expected: no published number of the MAE authors.
Source:   MAE's ImageNet recipe, with the batch of a small data set (ours).
"""

_base_ = ["../_base_/flowers102.py", "../_base_/mae_finetune_small_sets.py"]
