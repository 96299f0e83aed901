"""The training loop: compiled steps, epochs, replicas and workers, backups.

Imports from `_statistics`, `_data`, `_models` and the rooms below them.
"""
