"""Measurements of what label skew does to nodes."""

from .skew import SkewProbe

__all__ = ["SkewProbe"]
