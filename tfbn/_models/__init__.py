"""Models as a whole: finding their layers, intercepting their calls, copying and comparing them.

Imports: `_layer` and below.
"""
