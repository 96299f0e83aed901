"""The page that goes with an exported model."""

from collections.abc import Iterable

import keras
import tensorflow as tf

from tfbn._models.signature import Signature
from tfbn._shipping.fold.report import FoldReport
from tfbn._support import tables
from tfbn._support.version import VERSION


def text(
    model: keras.Model,
    signature: Signature,
    name: str,
    difference: float,
    report: FoldReport | None,
) -> str:
    """The card in Markdown.

    Args:
        model: What was exported.
        signature: Its inputs and outputs.
        name: The name that the signature is served by.
        difference: Between the outputs of the SavedModel and the model's, relative to the largest.
        report: What was folded; None if nothing was to be.
    """
    arguments = ", ".join(f"{spec.name}=..." for spec in signature.inputs)
    folded = "It is in the graph as it was." if report is None else report.to_markdown().strip()
    return f"""# {model.name}

A TensorFlow SavedModel for inference, with {model.count_params():,} parameters before folding.

```python
import tensorflow as tf

serve = tf.saved_model.load(PATH).signatures["{name}"]
outputs = serve({arguments})  # a dict
```

## Signature `{name}`

{tables.markdown(["input", "shape", "type"], _rows(signature.inputs))}

{tables.markdown(["output", "shape", "type"], _rows(signature.outputs))}

The first axis is the batch{_batch_size(signature)}.

## Check

Loaded again, it gave outputs within {difference:.1e} of the largest one of the Keras model.

## Batch normalization

{folded}

## Written with

tfbn {VERSION}, TensorFlow {tf.__version__}, Keras {keras.__version__}
"""


def _rows(specs: Iterable[tf.TensorSpec]) -> list[list[str]]:
    return [
        [
            f"`{spec.name}`",
            " × ".join("any" if d is None else str(d) for d in spec.shape),
            spec.dtype.name,
        ]
        for spec in specs
    ]


def _batch_size(signature: Signature) -> str:
    if signature.inputs[0].shape[0] is None:
        return ", of any size; an output depends on its own example alone"
    return ", of this size only: the model fixes it"
