"""Measurements of batch normalization layers against each other.

``python -m benchmarks --help`` lists the options. A run writes JSON, a table and a picture
into build/benchmarks, or where ``--output`` says.

The committed runs are in benchmarks/results. Comments in docs/numbers.md and README.md name them;
``python -m benchmarks.page`` writes their tables and figures between such comments::

    <!-- benchmarks/results/cpu.json -->
    <!-- end of benchmarks/results/cpu.json -->
"""
