"""Explains why training and inference disagree: measures evidence, looks up causes, reports findings."""
