"""Backbones and necks for mmdetection and mmsegmentation, and their strict loading."""
