"""The outer loop and what surrounds it: settings, checkpoints, several processes, logs, evaluation, reports."""

from innerloop.training.adaptation import load_adapted, predict
from innerloop.training.evaluation import Assessment, Estimate, Scores, assess, evaluate
from innerloop.training.fit import Diverged, Fitted, fit
from innerloop.training.runs import load_learner, read_run
from innerloop.training.settings import Settings

__all__ = [
    "Assessment",
    "Diverged",
    "Estimate",
    "Fitted",
    "Scores",
    "Settings",
    "assess",
    "evaluate",
    "fit",
    "load_adapted",
    "load_learner",
    "predict",
    "read_run",
]
