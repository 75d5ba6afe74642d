"""Fine-tuning a supervised DeiT-S on 120 dogs, as image folders.

Command:  MAE_ET_DATA=/data python tools/classify.py configs/classification/stanford_dogs_finetune_deit_small.py --backbone FILE
Hardware: one GPU. Not run by this project, so no hours are given.
Expected: no number in an author table that could be checked.
Source:   ours; see configs/_base_/deit_finetune_small_sets.py.
"""

_base_ = ["../_base_/stanford_dogs.py", "../_base_/deit_finetune_small_sets.py"]
