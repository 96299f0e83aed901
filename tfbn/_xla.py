"""Whether the graph that is being traced will be compiled by XLA.

TensorFlow has no public way to ask. While it traces ``tf.function(jit_compile=True)`` it enters an
XLA control-flow context on the graph around the function; ``tf.Graph._get_control_flow_context``
shows it. This is the one use of private TensorFlow API under the layer. Without it (another version
of TensorFlow) the answer is always ``False``: results stay right, XLA programs get the kernel of
plain graphs and are slower, and ``tests/test_kernels.py`` fails.
"""

import tensorflow as tf


def compiling() -> bool:
    """``True`` while a function with ``jit_compile=True`` (or one inside it) is being traced."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        context = getattr(graph, "_get_control_flow_context", lambda: None)()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False
