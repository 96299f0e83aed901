"""The command line: the public functions, applied to files.

Imports: every room below.
"""
