"""Demo: dense probe on generated scenes, with the features of the backbone of configs/pretrain/demo.py.

Command:  python tools/make_demo_data.py data/demo_ade --layout ade20k --num-train 400 --num-val 60 --image-size 128
          python tools/dense_probe.py configs/dense_probe/demo.py --backbone work_dirs/demo/etpp/backbone.safetensors
Hardware: two CPU cores, less than a minute.
Expected: not measured over seeds. Compare it with `--backbone random`, which has the same sizes.
Source:   ours. Data: MAE_ET_DEMO_ADE, else data/demo_ade.
"""

data = dict(root="{{$MAE_ET_DEMO_ADE:data/demo_ade}}", image_size=128, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
model = dict(size="tiny", patch_size=8, embed_dim=128, depth=4, num_heads=4)  # of random weights
run = dict(precision="fp32")
