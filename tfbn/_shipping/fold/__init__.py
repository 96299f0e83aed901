"""Folding batch normalization into adjacent layers, on a graph of the model's calls."""
