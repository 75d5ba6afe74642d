"""Golden pre-training with a replay buffer in the first two stages."""

_base_ = "pretrain.py"

replay = {
    "mode": "mix",
    "stages": [{"bandwidth": 16, "factor": 4, "size": 3}, {"bandwidth": 24, "factor": 2, "size": 2}],
}
