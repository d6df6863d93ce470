"""steadyrank: train multitask ranking models that do not blow up."""

__version__ = "0.1.0"
