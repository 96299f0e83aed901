"""From a trained model to one that is served: convert, fold, export.

Imports: `_statistics` and below.
"""
