"""All that is known of a model when causes are looked for."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from tfbn._statistics.diagnose.comparison import Comparison
from tfbn._statistics.diagnose.evidence import LayerEvidence
from tfbn._statistics.diagnose.experiments import Experiments
from tfbn._statistics.diagnose.losses import Losses
from tfbn._statistics.diagnose.not_finite import NotFinite
from tfbn._statistics.diagnose.structure import Structure

# What a layer may be off. Healthy layers that were measured stayed under half of it.
MEAN_SHIFT = 0.25
"""In standard deviations."""
LOG_VARIANCE_RATIO = 0.4
GROSS = 4.0
"""How many times these limits make an error of a warning where there are no losses."""
SAMPLING = 3.0
"""How many standard errors of the sample a layer may be off in any case."""

SUFFERS = 0.02
"""The fraction of what was learned that may be lost in inference. Healthy models lost up to 0.01."""
USEFUL = 0.05
"""The fraction of what was learned that a model must show to be of use."""
BROKEN = 0.2
"""The fraction that makes an error of a warning."""

FROZEN = ("trainable=False", "freeze_statistics=True")


@dataclasses.dataclass(frozen=True)
class ModelEvidence:
    """What was observed of a model.

    Attributes:
        layers: What was measured of each layer.
        comparisons: The arrays behind it, by the name of the layer, where statistics could be compared.
        structure: How the model uses its layers.
        losses: The losses by mode, if they could be computed.
        no_losses: Why they could not, although the data has labels.
        experiments: What else can be found out.
        steps: How many batches the optimizer was given, at least; 0 if unknown.
        averages_weights: Whether the optimizer averages the weights.
        zeros: The fraction of the weights that are exactly 0, biases and vectors apart.
        not_finite: What was not finite, if something was.
        diverged: The layers whose replicas hold different statistics.
    """

    layers: Sequence[LayerEvidence]
    comparisons: Mapping[str, Comparison] = dataclasses.field(default_factory=dict)
    structure: Structure = dataclasses.field(default_factory=Structure)
    losses: Losses | None = None
    no_losses: str = ""
    experiments: Experiments | None = None
    steps: int = 0
    averages_weights: bool = False
    zeros: float = 0.0
    not_finite: NotFinite | None = None
    diverged: Sequence[str] = ()

    @functools.cached_property
    def candidates(self) -> list[LayerEvidence]:
        """The layers whose moving statistics can be off for a reason that is not theirs alone."""
        return [
            layer
            for layer in self.layers
            if layer.examples
            and not (layer.never_updated or layer.calls_apart > 1 or is_frozen(layer))
        ]

    @functools.cached_property
    def off(self) -> list[LayerEvidence]:
        """The candidates whose moving statistics are off."""
        return [layer for layer in self.candidates if is_off(layer)]

    @functools.cached_property
    def to_blame(self) -> list[LayerEvidence]:
        """The layers that are off, if that matters: if the loss is known, it has to suffer."""
        if self.losses is None:
            return self.off
        if not self.suffers:
            return []
        return self.off or [layer for layer in self.candidates if is_off(layer, 0.5)]

    @functools.cached_property
    def gain(self) -> float:
        """The fraction of what the model has learned that recalibrating brings back; NaN if unknown."""
        if self.losses is None:
            return math.nan
        return self.losses.gain("recalibrated", over="inference")

    @functools.cached_property
    def suffers(self) -> bool:
        """Whether the loss in inference is worse than it could be, or the model useless."""
        if self.losses is None:
            return False
        if self.losses.skill("inference") < 0.1 and any(is_off(layer) for layer in self.layers):
            return True
        return self.gain > SUFFERS and self.losses.is_better("recalibrated", over="inference")

    @functools.cached_property
    def recalibrating_helps(self) -> bool | None:
        """Whether recalibrating lowers the loss; None if unknown."""
        if self.losses is None:
            return None
        useful = self.losses.skill("recalibrated") > USEFUL
        return useful and self.losses.is_better("recalibrated", over="inference")

    @property
    def why_no_cure(self) -> str:
        """Why recalibrating is not the cure although statistics are off; empty if it may be."""
        if self.losses is None or self.recalibrating_helps:
            return ""
        if self.losses.skill("recalibrated") <= USEFUL:
            return "No cure is printed: recalibrated, too, the model is no better than a constant output."
        return "No cure is printed: recalibrating does not lower the loss."

    @functools.cached_property
    def recalibrating_harms(self) -> bool:
        """Whether recalibrating raises the loss."""
        return (
            self.losses is not None
            and self.gain < -SUFFERS / 2
            and self.losses.is_better("inference", over="recalibrated")
        )

    def severity(self, layers: Sequence[LayerEvidence]) -> str:
        """Returns how bad it is that these layers are off."""
        if self.losses is not None:
            if not self.suffers:
                return "note"
            bad = self.gain > BROKEN or self.losses.skill("inference") < 1 - BROKEN
            return "error" if bad else "warning"
        return "error" if any(is_off(layer, GROSS) for layer in layers) else "warning"


def is_off(layer: LayerEvidence, times: float = 1.0) -> bool:
    """Whether the moving statistics differ from those of the data by more than chance and health allow."""
    if not layer.examples:
        return False
    chance = SAMPLING * math.sqrt(2 / layer.examples)
    return layer.mean_shift > max(
        times * MEAN_SHIFT, SAMPLING * layer.sampling_error
    ) or layer.log_variance_ratio_rms > max(times * LOG_VARIANCE_RATIO, chance)


def is_frozen(layer: LayerEvidence) -> bool:
    """Whether the layer runs in inference mode while the model trains."""
    return layer.state in FROZEN
