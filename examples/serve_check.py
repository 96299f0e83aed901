"""Serves a SavedModel as a machine would that has TensorFlow and nothing else, and compares.

    python examples/serve_check.py SAVED_MODEL EXAMPLES.npz

The file has the model's `inputs`, and its `outputs` as they were when it was exported. Prints what was
found as JSON; the exit status is 0 where the outputs agree.
"""

import json
import sys

# Whatever tries to import one of these fails: the SavedModel stands on its own.
for absent in ("tfbn", "keras", "tf_keras"):
    sys.modules[absent] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

TOLERANCE = 1e-3  # of the largest output: what the TF32 of a GPU allows; a CPU stays under 1e-5


def serve(saved_model: str, inputs: np.ndarray) -> np.ndarray:
    """The outputs of the default signature, which TensorFlow Serving would call."""
    signature = tf.saved_model.load(saved_model).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    (outputs,) = signature(**{name: tf.constant(inputs)}).values()
    return outputs.numpy()


def main() -> int:
    saved_model, examples = sys.argv[1:]
    with np.load(examples) as file:
        inputs, expected = file["inputs"], file["outputs"]
    # One example alone and all at once: the batch size is the caller's.
    served = np.concatenate([serve(saved_model, inputs[:1]), serve(saved_model, inputs[1:])])
    difference = float(np.max(np.abs(served - expected)))
    agree = difference <= TOLERANCE * float(np.max(np.abs(expected)))
    print(json.dumps({"agree": agree, "examples": len(inputs), "largest_difference": difference}))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
