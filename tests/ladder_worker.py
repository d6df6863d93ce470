"""Imported once by the server from which the tests fork a ladder's workers: they then begin at once, and warm."""

import importlib
import tempfile
from pathlib import Path

import torch

from steadyrank.ladder import pool

from .tiny import tiny, train

torch.set_num_threads(1)
importlib.import_module("torch._dynamo")  # which every worker would else import for itself
with tempfile.TemporaryDirectory() as folder:  # the first run in a process takes four times as long
    train(tiny("data.rows=600"), Path(folder) / "run")
assert pool
