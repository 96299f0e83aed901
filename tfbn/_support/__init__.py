"""Tables, checks and versions, and everything private of Keras and TensorFlow that tfbn touches.

Imports nothing of tfbn.
"""
