"""Hooks for the runner of mmengine."""
