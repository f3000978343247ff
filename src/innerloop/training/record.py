"""The settings of a run made in Python, so that the commands work on it too."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import torch

from innerloop import pooling
from innerloop.batch_norm import convert
from innerloop.blocks import leading
from innerloop.choices import make, text
from innerloop.few_shot import cross_entropy, squared_error
from innerloop.learner import MetaLearner
from innerloop.training.choices import MODEL
from innerloop.training.code import PYTHON
from innerloop.training.settings import Settings, typed


def settings_of(learner: MetaLearner, tasks: object, shape: dict[str, Any], **outer: Any) -> Settings:
    """The settings with which a command makes a learner and its tasks again.

    What has no text, such as a model of the user's own, is ``"python"``; `read_run` says which option supplies it.

    Args:
        learner: any.
        tasks: where its tasks come from.
        shape: ``input_shape``, ``output_size`` and ``ways`` of the tasks.
        **outer: settings of the outer loop.
    """
    made = dict(getattr(tasks, "made", None) or {"dataset": PYTHON})
    if not made.keys() <= {each.name for each in fields(Settings)}:
        made = {"dataset": PYTHON}
    precision = "float64" if leading(learner).dtype == torch.float64 else "float32"
    found = Settings(**made, **outer, model=PYTHON, adapts=PYTHON, precision=precision)
    choices = _choices(learner, found, shape["ways"] is None)
    return found if choices is None else replace(choices, **_model(learner, shape))


def _choices(learner: MetaLearner, settings: Settings, regression: bool) -> Settings | None:
    """The settings with the learner's choices; None where they do not make the same ones again."""
    inner = replace(learner.inner, moves=()) if learner.few_shot.moves else learner.inner
    own = learner.adapts, inner, learner.meta_gradient
    found: dict[str, Any] = {"batch_norm": learner.batch_norm, "carry": learner.carry}
    try:
        found |= typed(*own)
        found["start"] = None if learner.few_shot.start is None else text(learner.few_shot.start)
        settings = replace(settings, **found)
        same = repr(settings.method()) == repr(own)
    except (TypeError, ValueError):  # a class of the user's own, or a rate that is no number
        return None
    same = same and learner.few_shot.regulariser is None
    return settings if same and learner.loss is (squared_error if regression else cross_entropy) else None


def _model(learner: MetaLearner, shape: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a model alike, if it is one of `innerloop.models`."""
    filters = len(next(learner.model.parameters()))
    for name, downsample, mean in product(MODEL, (None, "pool", "stride"), (None, True)):
        options = {"filters": filters, "downsample": downsample, "spatial_mean": mean}
        try:
            with torch.device("meta"):
                other = make("model", MODEL, name, shape["input_shape"], shape["output_size"], **options)
        except (TypeError, ValueError):
            continue
        convert(other, learner.batch_norm, learner.inner.steps)
        pooling.convert(other)
        if repr(other) == repr(learner.model):
            return {"model": name, **options}
    return {"model": PYTHON}
