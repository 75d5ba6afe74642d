"""Fine-tuning a supervised DeiT-S on 100 classes at 32 px, enlarged to 224.

Command:  MAE_ET_DATA=/data python tools/classify.py configs/classification/cifar100_finetune_deit_small.py --backbone FILE
Hardware: one GPU. Not run by this project, so no hours are given.
Expected: no number in an author table that could be checked.
Source:   ours; see configs/_base_/deit_finetune_small_sets.py.
"""

_base_ = ["../_base_/cifar100.py", "../_base_/deit_finetune_small_sets.py"]
