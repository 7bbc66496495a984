"""Pictures and reports (extra ``report``)."""

from chunkglm.report.courses import time_course
from chunkglm.report.figures import save_figure
from chunkglm.report.page import PICTURES, REPORT, picture_names, report
from chunkglm.report.pictures import plot

__all__ = ["PICTURES", "REPORT", "picture_names", "plot", "report", "save_figure", "time_course"]
