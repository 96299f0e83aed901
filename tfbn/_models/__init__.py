"""Models from outside: finding their layers, stepping into their calls, and building them again.

Imports: `_layer` and below.
"""
