"""Images: where they come from, how they are decoded, augmented and batched."""
