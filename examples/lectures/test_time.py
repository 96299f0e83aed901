"""Test time.

L7: at test time a batch's own statistics make no sense. The same example in another batch would be given another
answer; and one example alone is its own mean, so that its ẑ is 0 whatever it shows. By fixed statistics, a
prediction depends on the example alone.

One test image is put into many mini-batches of 60, and the network's score (logit) for its digit is read by the
statistics of each, in training mode, and by fixed ones, in inference mode. Then test images are read in batches
of different sizes.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Setting
from examples.models import Hidden

SIZES = (1, 2, 4, 12, 40, 120, 360)
MODES = {"batch": True, "fixed": False}  # by whose statistics, and whether that is training mode


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
        # Of the image that is the first of each batch: (seeds, batches).
        logits = [read(images[batch], training)[0][:, 0] for batch in batches]
        scores[key] = np.stack(logits, axis=1)[..., labels[0]]
        # Of all, cut into batches of each size: (seeds, sizes).
        cut = [
            [read(part, training)[0] for part in np.split(images, len(images) // m)] for m in sizes
        ]
        answers = [np.concatenate(parts, axis=1).argmax(-1) for parts in cut]
        accuracy[key] = 100 * np.mean(np.stack(answers, axis=1) == labels, axis=-1)
    spread = {key: np.ptp(score, axis=1) for key, score in scores.items()}
    claims = [
        Claim(
            "L7",
            "By a batch's own statistics, an example has another answer in another batch",
            f"largest minus smallest score of one image in {len(batches)} mini-batches, training mode",
            spread["batch"],
            above=0,
        ),
        Claim(
            "L7",
            "By fixed statistics, a prediction depends on the example alone",
            f"largest minus smallest score of one image in {len(batches)} mini-batches, inference mode",
            spread["fixed"],
            at_most=0,
        ),
        Claim(
            "L7",
            "One example at a time, its own statistics make no sense",
            "test accuracy in batches of one, inference mode minus training mode",
            accuracy["fixed"][:, 0] - accuracy["batch"][:, 0],
            unit="% points",
            above=0,
        ),
    ]
    medians = {key: bands(accuracy[key])[1] for key in MODES}
    seen = (
        f"The score of one test image scatters over {np.median(spread['batch']):.2g} between mini-batches of 60 in "
        f"training mode, and over {np.median(spread['fixed']):.2g} in inference mode. In batches of one the median "
        f"network reads {medians['batch'][0]:.1f} % of the test images by their own statistics and "
        f"{medians['fixed'][0]:.1f} % by fixed ones, and in a batch of {SIZES[-1]} {medians['batch'][-1]:.1f} % and "
        f"{medians['fixed'][-1]:.1f} %."
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
