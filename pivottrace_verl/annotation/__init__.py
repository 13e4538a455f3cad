"""Annotation: prompts go out to people as a file or into a tool, labels come back into the ledger.

export_queue(run, waiting(run), "queue/annotate.csv")
# a person, or annotation.oracle, fills the column `label`
import_labels(run, "queue/annotate.csv", annotator="ana")
"""

from pivottrace_verl.annotation.importing import import_labels
from pivottrace_verl.annotation.queue import export_queue, waiting
from pivottrace_verl.annotation.results import ImportResult

__all__ = ["ImportResult", "export_queue", "import_labels", "waiting"]
