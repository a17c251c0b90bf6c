"""Quality of a converted model next to its original, measured in a fresh process through the stock runtime.

Nothing here imports torch; the measuring process (`python -m attnopt.evaluate JOB.json`) does.
"""

from attnopt.evaluate.job import Job, ModelSpec, TextSpec
from attnopt.evaluate.launch import evaluate
from attnopt.evaluate.memory import peak_rss_bytes
from attnopt.evaluate.report import apply_gate, verify_report

__all__ = ["Job", "ModelSpec", "TextSpec", "apply_gate", "evaluate", "peak_rss_bytes", "verify_report"]
