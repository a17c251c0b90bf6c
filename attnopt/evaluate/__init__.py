"""Quality of a converted model next to its original, measured in a fresh process through the stock runtime.

Nothing here imports torch; the measuring process (`python -m attnopt.evaluate JOB.json`) does.
"""

from attnopt.evaluate.document import apply_gate, apply_gates, verify_report
from attnopt.evaluate.job import HarnessSpec, Job, ModelSpec, PasskeySpec, TextSpec
from attnopt.evaluate.launch import evaluate
from attnopt.evaluate.memory import peak_rss_bytes

__all__ = [
    "HarnessSpec",
    "Job",
    "ModelSpec",
    "PasskeySpec",
    "TextSpec",
    "apply_gate",
    "apply_gates",
    "evaluate",
    "peak_rss_bytes",
    "verify_report",
]
