"""The search of a curriculum: algorithms without torch, driven by scores from outside."""
