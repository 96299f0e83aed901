"""From (x, γ, β, statistics) to y, with the right gradients. Only this room knows the kernels.

Imports: `_moments` and below. Start at `dispatch.py`.
"""
