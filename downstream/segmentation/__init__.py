"""Backbone for segmentors."""
