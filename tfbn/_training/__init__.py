"""The training loop: compiled steps, epochs, replicas and workers, backups.

`loop.py` resumes a run from the file that `backup.py` writes.
Imports from `_statistics`, `_data`, `_models` and the rooms below them.
"""
