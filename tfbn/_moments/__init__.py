"""Count, mean and variance of a tensor over axes; merging them exactly; and the same over replicas.

Imports: `_support`.
"""
