"""Views of a pruning run: tables, measurements, plots and an HTML page.

They are made from values (groups, costs, options, measurements), never from a model or a plan.
"""

from tp_cosep.report.benchmark import ModelStats, measure, measure_models
from tp_cosep.report.plots import plot_kept_channels, plot_mss, plot_separability_space
from tp_cosep.report.tables import LayerRow, ModelRow, layer_rows, layer_table, model_rows, model_table

__all__ = [
    "LayerRow",
    "ModelRow",
    "ModelStats",
    "layer_rows",
    "layer_table",
    "measure",
    "measure_models",
    "model_rows",
    "model_table",
    "plot_kept_channels",
    "plot_mss",
    "plot_separability_space",
]
