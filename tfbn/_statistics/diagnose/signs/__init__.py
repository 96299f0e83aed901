"""The signs of each cause in the evidence: which layers show it, and by what numbers."""
