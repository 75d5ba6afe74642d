"""Backbone and neck for detectors."""
