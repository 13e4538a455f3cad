"""Argilla 2: records as `Dataset.records.from_json` logs them and `records.to_json` writes them.

    settings = rg.Settings(
        fields=[rg.TextField("prompt")],
        questions=[rg.TextQuestion("label")],
        metadata=[rg.TermsMetadataProperty("data_source"),
                  rg.FloatMetadataProperty("uncertainty"), rg.FloatMetadataProperty("cost")],
    )
    rg.Dataset("queue", settings=settings).create().records.from_json("queue.argilla.json")

Contract: the record's id is the pt_id; the majority is a suggestion for the question `label`, the
uncertainty is metadata to sort by. Argilla's export names the users but not whether a response
was submitted, so only records that it calls `completed` (or that say nothing of a status) are
read: discarding a record is how an annotator skips it. TextField shows markup as text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation.formats.rows import Annotation, Fault, annotation, report, take
from pivottrace_verl.annotation.formats.text import read_json_list, write_json_list

QUESTION = "label"
AGENT = "pivottrace majority"


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The records, atomically; metadata that is unknown is left out, as Argilla wants it."""
    write_json_list(path, [_record(row, columns) for row in rows])


def _record(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    suggestion = {"value": row.get("majority"), "score": None, "agent": AGENT}
    kept = [name for name in columns if name in ("data_source", "uncertainty", "cost")]
    return {
        "id": row["pt_id"],
        "fields": {"prompt": row["prompt"]},
        "metadata": {name: row[name] for name in kept if row.get(name) is not None},
        "suggestions": {} if row.get("majority") is None else {QUESTION: suggestion},
        "responses": {},
        "vectors": {},
    }


def read(path: Path, faults: list[Fault] | None = None) -> list[Annotation]:
    """One `Annotation` for each response, one without a label for a record that has none.

    Raises PivotTraceError if the file is no JSON list. Records without an id, or whose responses
    are no lists of values, go to `faults`, or are raised if that is None.
    """
    out: list[Annotation] = []
    content = read_json_list(path, "a file of Argilla records")
    for number, record in enumerate(content, start=1):
        where = f"record {number}"
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            report(path, faults, Fault(where, "has no id: it is no record of ours", record))
            continue
        responses = record.get("responses")
        given = (responses.get(QUESTION) or []) if isinstance(responses, dict) else None
        if not isinstance(given, list) or not all(
            isinstance(item, dict) and "value" in item for item in given
        ):
            reason = "has no responses as `records.to_json` writes them"
            report(path, faults, Fault(where, reason, record))
            continue
        metadata = record.get("metadata")
        cost = metadata.get("cost") if isinstance(metadata, dict) else None
        if not given or record.get("status") not in (None, "completed"):
            take(path, out, faults, annotation(where, record["id"], None, None, cost, record))
            continue
        for item in given:
            who, value = item.get("user_id"), item["value"]
            take(path, out, faults, annotation(where, record["id"], value, who, cost, record))
    return out
