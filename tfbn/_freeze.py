"""Batch normalization that stands still, whatever the model around it says."""

from tfbn._models import BatchNormLayer


def statistics_are_frozen(layer: BatchNormLayer) -> bool:
    """Whether a call with ``training=True`` runs in inference mode all the same."""
    return not layer.trainable or getattr(layer, "freeze_statistics", False)
