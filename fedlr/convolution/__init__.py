"""Convolutions that are fast in loops on CPU, for any function."""

from fedlr.convolution.patches import conv
from fedlr.convolution.transform import by_patches, for_loops

__all__ = ["by_patches", "conv", "for_loops"]
