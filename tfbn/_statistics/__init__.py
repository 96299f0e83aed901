"""Moving statistics of whole models: recalibrate, diagnose, freeze, pause, inspect.

Imports: `_data`, `_models` and below.
"""
