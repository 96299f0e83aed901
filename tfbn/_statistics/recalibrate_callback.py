"""Recalibration as a part of training."""

import inspect
from typing import Any

import keras

from tfbn._statistics.recalibrate import Recalibration, recalibrate


class RecalibrateAfterTraining(keras.callbacks.Callback):
    """Recalibrates the model when training ends and, if asked, before each validation.

    For every training that ends with weights other than those the moving statistics were collected
    for: averaged ones (``use_ema=True``, `keras.callbacks.SwapEMAWeights`), restored ones, or just the
    last ones, with a momentum that lags. Works in `keras.Model.fit` and in `tfbn.TrainingLoop`.

    Callbacks run in their order: put it behind those that exchange weights, such as
    `keras.callbacks.SwapEMAWeights` and `keras.callbacks.EarlyStopping`, and before those that save.

    Statistics taken before a validation stay, so that a checkpoint of that epoch gives what was
    validated; training goes on from them.

    Args:
        data: As in `tfbn.recalibrate`; readable again and again if used before validations.
        before_validation: Whether to recalibrate before each validation too.
        **options: Further arguments of `tfbn.recalibrate`.

    Attributes:
        result: What the last recalibration did; None before the first.

    Raises:
        TypeError: For an option that `tfbn.recalibrate` does not have.

    Example:
        >>> model.compile(keras.optimizers.Adam(use_ema=True), loss)
        >>> model.fit(data, callbacks=[tfbn.RecalibrateAfterTraining(data)])
    """

    def __init__(self, data: Any, before_validation: bool = False, **options: Any):
        super().__init__()
        inspect.signature(recalibrate).bind(None, data, **options)
        self.result: Recalibration | None = None
        self._data = data
        self._options = options
        self._before_validation = before_validation
        self._training = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Takes note that validations from now on are a part of training."""
        self._training = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Recalibrates before a validation, if asked to."""
        if self._training and self._before_validation:
            self._recalibrate()

    def on_train_end(self, logs: Any = None) -> None:
        """Recalibrates."""
        self._training = False
        self._recalibrate()

    def _recalibrate(self) -> None:
        self.result = recalibrate(self.model, self._data, **self._options)
