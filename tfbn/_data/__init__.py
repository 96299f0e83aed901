"""What users pass as data, read once or many times, and cut into shards for replicas.

Imports: `_moments` and below; it knows no models.
"""
