"""The `tf.GradientTape` training loop: steps, epochs, replicas, workers, backups.

Imports: `_statistics`, `_data`, `_models` and below.
"""
