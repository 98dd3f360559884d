"""Measure a model (needle grid, loss by position, cost of a context), and save, draw, report it."""

from longgen.evaluate.asking import run_needle
from longgen.evaluate.cost import Cost, measure_cost
from longgen.evaluate.needle import (
    NeedleCell,
    NeedleExample,
    NeedleMiss,
    NeedleResult,
    NeedleTask,
)
from longgen.evaluate.plots import plot_decode_time, plot_kv_bytes, plot_loss, plot_needle
from longgen.evaluate.positions import PositionLoss, loss_by_position
from longgen.evaluate.report import Code, Picture, Section, Table, comparison_table, write_report
from longgen.evaluate.results import read_results, wilson_interval, write_results

__all__ = [
    "Code",
    "Cost",
    "NeedleCell",
    "NeedleExample",
    "NeedleMiss",
    "NeedleResult",
    "NeedleTask",
    "Picture",
    "PositionLoss",
    "Section",
    "Table",
    "comparison_table",
    "loss_by_position",
    "measure_cost",
    "plot_decode_time",
    "plot_kv_bytes",
    "plot_loss",
    "plot_needle",
    "read_results",
    "run_needle",
    "wilson_interval",
    "write_report",
    "write_results",
]
