"""Measurements of batch normalization layers against each other.

``python -m benchmarks --help`` says what can be asked for. A run writes JSON, a table and a picture
into build/benchmarks, or where ``--output`` says.

A run for the README goes into benchmarks/results, and two comments in README.md say where its table
stands; ``python -m benchmarks.readme`` writes it there::

    <!-- benchmarks/results/cpu.json -->
    <!-- end of benchmarks/results/cpu.json -->
"""
