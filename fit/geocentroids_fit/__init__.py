"""Fit a codebook for geocentroids-tiler from a folder of overhead images."""

__version__ = "0.1.0"
