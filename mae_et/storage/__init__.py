"""Files that are whole or absent: checkpoints, weights, backbone files."""
