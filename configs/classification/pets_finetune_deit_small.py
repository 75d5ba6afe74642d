"""Fine-tuning a supervised DeiT-S on 37 pets.

Command:  MAE_ET_DATA=/data python tools/classify.py configs/classification/pets_finetune_deit_small.py --backbone FILE
Hardware: one GPU. Not run by this project, so no hours are given.
Expected: no number in an author table that could be checked.
Source:   ours; see configs/_base_/deit_finetune_small_sets.py.
"""

_base_ = ["../_base_/pets.py", "../_base_/deit_finetune_small_sets.py"]
