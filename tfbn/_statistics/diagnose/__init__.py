"""Why training and inference disagree: evidence from the data, findings from the evidence, and the report."""
