"""Running something once on each replica, outside of a `tf.function`."""

import logging
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def run_once(strategy: tf.distribute.Strategy, function: Callable[[], Any]) -> Any:
    """Calls a function on each replica, without the warning that this is slow: what runs once may be."""
    logger = tf.get_logger()
    logger.addFilter(_is_about_something_else)
    try:
        return strategy.run(function)
    finally:
        logger.removeFilter(_is_about_something_else)


def _is_about_something_else(record: logging.LogRecord) -> bool:
    return "eagerly has significant overhead" not in record.getMessage()
