"""The `MODEL_CARD.md` inside an exported model."""

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
    """Returns the card as Markdown.

    Args:
        model: The exported model, before folding.
        signature: Its inputs and outputs.
        name: The name under which the signature is served.
        difference: The largest difference between the outputs of the SavedModel and of the model, relative
            to the largest output.
        report: What was folded; None if the model was exported unfolded.
    """
    arguments = ", ".join(f"{spec.name}=..." for spec in signature.inputs)
    folded = "The graph contains it unfolded." if report is None else report.to_markdown().strip()
    return f"""# {model.name}

A TensorFlow SavedModel for inference. The model has {model.count_params():,} parameters before folding.

```python
import tensorflow as tf

serve = tf.saved_model.load(PATH).signatures["{name}"]
outputs = serve({arguments})  # a dict
```

## Signature `{name}`

{tables.markdown(["input", "shape", "type"], _rows(signature.inputs))}

{tables.markdown(["output", "shape", "type"], _rows(signature.outputs))}

The first axis is the batch axis{_batch_size(signature)}.

## Check

The outputs of the loaded SavedModel differ from those of the Keras model by at most {difference:.1e}, relative to
the largest output.

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
        return " and can have any size; each output depends on its own example alone"
    return ", whose size the model fixes"
