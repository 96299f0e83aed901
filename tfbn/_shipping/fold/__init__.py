"""Folding batch normalization into the layers around it, on a graph of the model's calls."""
