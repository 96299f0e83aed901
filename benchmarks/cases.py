"""The cases: layers by shape, and whole models, each with a precision, a phase and a mode."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PRECISIONS = ("float32", "bfloat16", "float16")
PHASES = ("infer", "train")
MODES = ("graph", "xla", "eager")
DEPTH = 8
"""How many layers a stack has."""


@dataclass(frozen=True)
class LayerCase:
    """A stack of layers over a tensor of ``shape`` with its channels on ``axis``."""

    shape: tuple[int, ...]
    axis: int
    precision: str
    phase: str
    mode: str
    suite = "layers"

    @property
    def subject(self) -> str:
        """As "32x56x56x64", or "32x64x56x56@1" where the channels are not last."""
        sizes = "x".join(map(str, self.shape))
        return sizes if self.axis == len(self.shape) - 1 else f"{sizes}@{self.axis}"

    @property
    def worker(self) -> str:
        """Returns a key; cases with equal keys run in the same process."""
        return "layers"


@dataclass(frozen=True)
class ModelCase:
    """One step of a whole network with a batch of ``batch`` images."""

    subject: str
    batch: int
    precision: str
    phase: str
    mode: str
    suite = "models"

    @property
    def worker(self) -> str:
        """One process per network, so that its peak memory can be measured."""
        return f"{self.subject} {self.batch} {self.precision}"


Case = LayerCase | ModelCase

# The first five are those of the summary; the others are a volume and channels first.
CPU_SHAPES = (
    "32x56x56x64",
    "64x32x32x64",
    "32x14x14x256",
    "256x1024",
    "32x128x256",
    "8x8x28x28x32",
    "32x64x56x56@1",
)
GPU_SHAPES = (
    "256x56x56x64",
    "256x28x28x512",
    "256x14x14x1024",
    "256x7x7x2048",
    "8192x4096",
    "256x128x256",
    "32x16x28x28x64",
    "256x64x56x56@1",
)
MODELS = ("ResNet20", "MobileNetV2", "ResNet50")
CPU_BATCHES = {"ResNet20": 128, "MobileNetV2": 32, "ResNet50": 16}
QUICK = {
    "shapes": ("32x56x56x64", "256x1024", "32x64x56x56@1"),
    "models": ("ResNet20",),
    "precisions": ("float32",),
}
"""What --quick measures where the command line does not say."""
MALLOC_SHAPES = ("32x56x56x64", "256x1024", "32x64x56x56@1")
MALLOC_SUITES = {"layers": "layers, default malloc", "models": "models, default malloc"}
"""What is measured again with the C library's own settings, and how JSON calls it."""
GPU_BATCHES = {"ResNet20": 1024, "MobileNetV2": 256, "ResNet50": 256}
# The width and height of the images.
SIZES = {
    "cpu": {"ResNet20": 32, "MobileNetV2": 128, "ResNet50": 128},
    "gpu": {"ResNet20": 32, "MobileNetV2": 224, "ResNet50": 224},
}


def parse_shape(text: str) -> tuple[tuple[int, ...], int]:
    """Parses "32x56x56x64" or "32x64x56x56@1" into a shape and the axis of the channels.

    Raises:
        ValueError: If the text has another form.
    """
    sizes, _, axis = text.partition("@")
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
        channels = int(axis) if axis else len(shape) - 1
    except ValueError:
        shape, channels = (), 0
    if len(shape) < 2 or min(shape) < 1 or not 1 <= channels < len(shape):
        raise ValueError(
            "A shape is like 32x56x56x64, with the channels last, or like 32x64x56x56@1, where "
            f"axis 1 has the channels. Received: {text}"
        )
    return shape, channels


def layer_cases(
    shapes: Iterable[str],
    precisions: Sequence[str],
    phases: Sequence[str],
    modes: Sequence[str],
) -> list[LayerCase]:
    return [
        LayerCase(*parse_shape(shape), precision, phase, mode)
        for precision, mode, phase, shape in itertools.product(precisions, modes, phases, shapes)
    ]


def model_cases(
    batches: dict[str, int],
    precisions: Sequence[str],
    phases: Sequence[str],
    modes: Sequence[str],
) -> list[ModelCase]:
    """Returns the cases of models, grouped by worker, inference first."""
    return [
        ModelCase(model, batch, precision, phase, mode)
        for (model, batch), precision, phase, mode in itertools.product(
            batches.items(), precisions, phases, modes
        )
    ]


def default_malloc_cases() -> list[Case]:
    """Returns the training steps that are measured again with the C library's own settings."""
    kind = (["float32"], ["train"], ["graph"])
    return [*layer_cases(MALLOC_SHAPES, *kind), *model_cases(CPU_BATCHES, *kind)]


def described(case: Case) -> dict[str, Any]:
    """Returns the case as it is stored in JSON."""
    return {"suite": case.suite, "subject": case.subject, **asdict(case)}
