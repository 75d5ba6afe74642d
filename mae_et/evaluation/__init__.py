"""Measures and pictures of a trained network."""
