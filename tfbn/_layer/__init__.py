"""The Keras layer: weights, config, dtypes, the training flag, checks of arguments and masks.

`BatchNormalization.update_statistics` is the one place where training updates the moving statistics.

Imports: `_normalize` and below.
"""
