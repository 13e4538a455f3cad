"""Annotation: prompts go out to a person as a file, labels come back into the ledger.

export_queue(run, plan.to_buy(), "queue/annotate.csv")
# a person, or annotation.oracle, fills the column `label`
import_labels(run, "queue/annotate.csv", annotator="ana", purpose="annotate")
"""

from pivottrace_verl.annotation.queue import ImportResult, export_queue, import_labels

__all__ = ["ImportResult", "export_queue", "import_labels"]
