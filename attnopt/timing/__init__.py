"""Speed and memory of models beside each other, measured in fresh processes.

Nothing here imports torch; the measuring process (`python -m attnopt.timing JOB.json RESULT.json`) does.
"""

from attnopt.timing.job import BenchJob
from attnopt.timing.launch import bench
from attnopt.timing.report import bench_report

__all__ = ["BenchJob", "bench", "bench_report"]
