"""Experiments that test the claims of lectures on batch normalization. Each can prove a claim wrong.

    python -m examples.lectures                      # all experiments, into examples/lectures/
    python -m examples.lectures original depth       # some
    python -m examples.lectures --dataset mnist      # on the paper's digits, which are downloaded

Each experiment is a module here, listed in `EXPERIMENTS` (`__main__.py`). The first line of its docstring is its
title; the rest says which claims it tests, and how. It has two functions:

    def run(setting: Setting) -> Result       trains, measures, and states each claim with its numbers
    def draw(result: Result) -> Figure        draws the figure from `result.numbers` alone

`setting.py` has the data and the seeds. `networks.py` trains the networks of all seeds side by side, with
`tfbn.TrainingLoop`. `surface.py` treats their losses as functions of their weights. `result.py` has the numbers
over seeds and the claims about them, `style.py` the style of the figures, and `page.py` writes the page.

Whether a claim is borne out is computed from its numbers, by one rule for all claims (`result.Claim`).
`Result.seen` states the numbers in two sentences, without judging them.
"""
