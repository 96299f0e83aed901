"""Test time.

L7: batch statistics make no sense at test time. The same example would get another prediction in another batch,
and a single example is its own mean, so that its ẑ is 0 whatever it shows. With fixed statistics, a prediction
depends on its own example only.

Places one test image in many mini-batches of 60, and records the network's score (logit) for its digit with the
statistics of each batch, in training mode, and with fixed statistics, in inference mode. Then measures the test
accuracy in batches of different sizes.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Setting
from examples.models import Hidden

SIZES = (1, 2, 4, 12, 40, 120, 360)
MODES = {
    "batch": True,
    "fixed": False,
}  # whose statistics are used, and whether that is training mode


def run(setting: Setting) -> Result:
    networks = Networks(setting, Hidden(activation="sigmoid"))
    networks.begin(learning_rate=0.3)
    networks.train(setting.pick(1000, 20))
    read, sizes = networks.probe([networks.model]), setting.pick(SIZES, SIZES[::3])
    rng = np.random.default_rng(0)
    order = rng.permutation(len(setting.test.labels))[: SIZES[-1]]
    images, labels = setting.test.images[order], setting.test.labels[order]
    batches = [
        np.insert(rng.choice(range(1, SIZES[-1]), 59, replace=False), 0, 0)
        for _ in range(setting.pick(100, 10))
    ]
    scores, accuracy = {}, {}
    for key, training in MODES.items():
        # The logits of the first image of each batch: (seeds, batches).
        logits = [read(images[batch], training)[0][:, 0] for batch in batches]
        scores[key] = np.stack(logits, axis=1)[..., labels[0]]
        # The accuracy over all images, in batches of each size: (seeds, sizes).
        cut = [
            [read(part, training)[0] for part in np.split(images, len(images) // m)] for m in sizes
        ]
        answers = [np.concatenate(parts, axis=1).argmax(-1) for parts in cut]
        accuracy[key] = 100 * np.mean(np.stack(answers, axis=1) == labels, axis=-1)
    spread = {key: np.ptp(score, axis=1) for key, score in scores.items()}
    claims = [
        Claim(
            "L7",
            "With batch statistics, a prediction depends on the other examples in the batch",
            f"largest minus smallest score of one image in {len(batches)} mini-batches, training mode",
            spread["batch"],
            above=0,
        ),
        Claim(
            "L7",
            "With fixed statistics, a prediction depends on its own example only",
            f"largest minus smallest score of one image in {len(batches)} mini-batches, inference mode",
            spread["fixed"],
            at_most=0,
        ),
        Claim(
            "L7",
            "Batch statistics make no sense for one example at a time",
            "test accuracy in batches of one, inference mode minus training mode",
            accuracy["fixed"][:, 0] - accuracy["batch"][:, 0],
            unit="% points",
            above=0,
        ),
    ]
    medians = {key: bands(accuracy[key])[1] for key in MODES}
    seen = (
        f"Over mini-batches of 60, the range of one test image's score is {np.median(spread['batch']):.2g} in "
        f"training mode and {np.median(spread['fixed']):.2g} in inference mode. In batches of one, the median test "
        f"accuracy is {medians['batch'][0]:.1f} % with batch statistics and {medians['fixed'][0]:.1f} % with fixed "
        f"statistics; in a batch of {SIZES[-1]}, it is {medians['batch'][-1]:.1f} % and {medians['fixed'][-1]:.1f} %."
    )
    numbers = {"scores": scores, "sizes": sizes, "accuracy": accuracy}
    return Result("Test time", claims, seen, numbers, setting.to_dict())


def draw(result: Result) -> style.Figure:
    figure = style.figure()
    one, all_sizes = figure.subplots(1, 2)
    sizes, numbers = result.numbers["sizes"], result.numbers
    for key, label, look in (
        ("batch", "by the batch (training mode)", style.WITHOUT),
        ("fixed", "fixed (inference mode)", style.WITH),
    ):
        scores = np.array(numbers["scores"][key])[0]  # of the first seed
        one.plot(scores, **look | {"linestyle": "", "markersize": 3, "label": label})
        style.band(all_sizes, sizes, numbers["accuracy"][key], **look | {"label": label})
    style.label(one, "mini-batch", "score of its digit (logit)", "One image in mini-batches of 60")
    style.label(all_sizes, "examples in a batch", "test accuracy (%)", "Test images in batches")
    all_sizes.set_xscale("log")
    all_sizes.set_xticks(sizes, [str(size) for size in sizes])
    all_sizes.minorticks_off()
    all_sizes.set_ylim(0, 102)
    all_sizes.legend(title="statistics", loc="lower right")
    return figure
