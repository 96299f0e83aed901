"""The data that users pass: read once or many times, and split into shards for replicas.

Imports: `_moments` and below; it knows no models.
"""
