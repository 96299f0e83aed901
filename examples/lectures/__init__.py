"""The lectures on batch normalization as experiments that would show it if a claim were false.

    python -m examples.lectures                      # all of them, into examples/lectures/
    python -m examples.lectures original depth       # some
    python -m examples.lectures --dataset mnist      # on the digits of the paper, by download

An experiment is one module here, listed in `EXPERIMENTS` (`__main__.py`). Its docstring's first line is its
title; the rest says which claims it puts to the test, and how. It has two functions:

    def run(setting: Setting) -> Result       trains, measures, and states each claim with its numbers
    def draw(result: Result) -> Figure        the picture, from `result.numbers` alone

`setting.py` has the data and the seeds; `networks.py` the networks of all seeds, trained side by side by
`tfbn.TrainingLoop`; `surface.py` their losses as functions of their weights; `result.py` numbers over seeds and
claims about them; `style.py` how pictures look; `page.py` the page.

Whether a claim is borne out is computed from its numbers, by one rule for all (`result.Claim`). Two sentences,
`Result.seen`, say what is seen: they hold numbers and no judgement of their own.
"""
