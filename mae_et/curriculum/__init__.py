"""The curriculum: what a config means, without torch."""
