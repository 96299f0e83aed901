"""Folding batch normalization into the layers around it."""

from tfbn._fold._fold import FoldError, fold
from tfbn._fold._report import FoldReport

__all__ = ["FoldError", "FoldReport", "fold"]
