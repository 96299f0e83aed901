"""The Keras layer: weights, config, dtypes, the training flag, and what happens to the moving statistics.

Imports: `_normalize` and below.
"""
