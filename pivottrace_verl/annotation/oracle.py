"""The oracle: an annotator that knows the answers, for demonstrations and tests.

The only module that reads a file of answers: JSONL, CSV or Parquet with `pt_id` and `label`. It
writes a filled queue file of these formats, which comes back by the same import that a person's
file takes.
"""

from pathlib import Path

from pivottrace_verl.annotation.formats import KEYS, table_of
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import remove_leftovers


def fill(queue_file: str | Path, answers_file: str | Path, out_file: str | Path) -> int:
    """Fill the queue's empty labels into `out_file`; returns how many were filled.

    Labels that are there stay. Raises PivotTraceError if a prompt of the queue has no answer.
    """
    queue, known, out = Path(queue_file), Path(answers_file), Path(out_file)
    answers = {row["pt_id"]: row["label"] for _, row in table_of(known).rows(known, KEYS)}
    rows = [row for _, row in table_of(queue).rows(queue, KEYS)]
    writer = table_of(out)
    open_rows = [row for row in rows if row["label"] in (None, "")]
    missing = [row["pt_id"] for row in open_rows if row["pt_id"] not in answers]
    if missing:
        raise PivotTraceError(
            f"{answers_file} has no answer for {len(missing)} prompts of {queue_file} (first: "
            f"{missing[0]})."
        )
    for row in open_rows:
        row["label"] = answers[row["pt_id"]]
    columns = dict.fromkeys(name for row in rows for name in row) or KEYS
    remove_leftovers(out.parent, out.name)
    writer.write(out, rows, list(columns))
    return len(open_rows)
