"""A thin adapter to the lm-eval harness (`lm_eval`, the extra `lm-eval`). Imported in the measuring process only.

The harness is EleutherAI's Language Model Evaluation Harness (Gao et al., doi 10.5281/zenodo.12608602). It brings
tasks, prompts and metrics; their data must be on the machine or be downloadable.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from typing import Any

from attnopt.errors import AttnoptError, OptionError
from attnopt.evaluate.job import HarnessSpec


class Harness:
    """The tasks of a spec, ready to be run on models.

    Raises:
        AttnoptError: the harness is not installed.
        OptionError: it knows no such task.
    """

    def __init__(self, spec: HarnessSpec) -> None:
        self.spec = spec
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise AttnoptError(
                f"the lm-eval harness cannot be imported: {error}",
                'install it with pip install "attnopt[lm-eval]", or leave --lm-eval out',
            ) from error
        self._library, self._wrapper = lm_eval, HFLM
        self.version = str(getattr(lm_eval, "__version__", "unknown"))
        self._manager = TaskManager(include_path=spec.folder)
        self.tasks = [name for asked in spec.tasks for name in self._match(asked)]

    def _match(self, asked: str) -> list[str]:
        found = list(self._manager.match_tasks([asked]))
        if not found:
            near = difflib.get_close_matches(asked, list(self._manager.all_tasks), n=1)
            hint = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists them"
            raise OptionError(f"the lm-eval harness has no task {asked!r}", hint)
        return found

    def run(self, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        """Scores of one model.

        Returns:
            per task, metric and filter: `task`, `metric`, `filter`, `value`, `standard_error` (None if the harness
            gives none), `examples` (None if unknown), `higher_is_better` (None if unknown).

        Raises:
            AttnoptError: a task's data cannot be had.
        """
        # The harness prints; stdout of this process carries progress.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                wrapped = self._wrapper(pretrained=model, tokenizer=tokenizer, batch_size=1)
                found = self._library.simple_evaluate(
                    model=wrapped,
                    tasks=self.tasks,
                    task_manager=self._manager,
                    limit=self.spec.limit,
                    log_samples=False,
                )
            except OSError as error:  # so the libraries say that they cannot reach or find a data set
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise AttnoptError(
                    f"the lm-eval harness cannot run {', '.join(self.tasks)}: {reason[0]}",
                    "download the tasks' data where there is a network, or name tasks whose data is here",
                ) from error
        return list(_rows(found))


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The harness's results, {task: {"metric,filter": value, "metric_stderr,filter": value, ...}}, as rows."""
    rows = []
    for task, values in found["results"].items():
        better = found.get("higher_is_better", {}).get(task) or {}
        examples = (found.get("n-samples", {}).get(task) or {}).get("effective")
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "examples": examples,
                    "higher_is_better": better.get(metric),
                }
            )
    return rows
