"""Label Studio: tasks out, its JSON export in (not JSON-MIN). No SDK is needed for the files.

Contract: a task's `data` holds the queue's columns, its one prediction the policy's majority as
pre-annotation (`model_version` MODEL_VERSION) and the uncertainty as `score`. Tasks stand most
uncertain first, which `Sequential sampling` keeps; Label Studio's own `Uncertainty sampling` takes
low scores for uncertain and would turn the order around. Prompts go into a `Text` tag, which
shows markup as text. Several annotations of a task are several annotators' (`completed_by`);
cancelled ones and those marked `unsure` are skips. A task that carries `is_labeled: false`, as
`pull` writes it, still waits for annotators: its annotations are left for later.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation.formats.rows import Annotation, Fault, annotation, report, take
from pivottrace_verl.annotation.formats.text import read_json_list, write_json_list
from pivottrace_verl.files import write_bytes_atomic

LABEL, UNSURE_CHOICE, PROMPT = "label", "unsure", "prompt"
MODEL_VERSION = "pivottrace majority"

CONFIG = """\
<View>
  <Header value="Prompt"/>
  <Text name="prompt" value="$prompt" valueType="text"/>
  <Header value="Answer" size="5"/>
  <TextArea name="label" toName="prompt" maxSubmissions="1" editable="true" rows="1"
            placeholder="The answer alone, then Enter"/>
  <Choices name="unsure" toName="prompt" choice="multiple">
    <Choice value="unsure" hint="No answer can be given; whatever is typed above is not used"/>
  </Choices>
</View>
"""
"""The labelling configuration: what `tasks` and `read` expect of a project."""


def tasks(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Queue rows -> tasks as Label Studio imports them."""
    return [
        {
            "data": {name: row.get(name) for name in columns if name != LABEL},
            "predictions": _predictions(row),
        }
        for row in rows
    ]


def _predictions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    majority, uncertainty = row.get("majority"), row.get("uncertainty")
    if majority is None and uncertainty is None:
        return []
    region = {"from_name": LABEL, "to_name": PROMPT, "type": "textarea"}
    result = [] if majority is None else [{**region, "value": {"text": [majority]}}]
    prediction: dict[str, Any] = {"model_version": MODEL_VERSION, "result": result}
    if uncertainty is not None:
        prediction["score"] = uncertainty
    return [prediction]


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The tasks, and beside them, unless a file is there, the configuration as .xml."""
    config = path.with_suffix(".xml")
    write_json_list(path, tasks(rows, columns))
    if not config.exists():
        write_bytes_atomic(config, CONFIG.encode())


def read(path: Path, faults: list[Fault] | None = None) -> list[Annotation]:
    """One `Annotation` for each annotation, one without a label for a task that has none.

    Raises PivotTraceError if the file is no JSON list. Tasks without `data.pt_id` and annotations
    made with another configuration go to `faults`, or are raised if that is None.
    """
    out: list[Annotation] = []
    content = read_json_list(path, "a Label Studio export")
    for number, task in enumerate(content, start=1):
        where = f"task {task['id'] if isinstance(task, dict) and 'id' in task else number}"
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("pt_id"), str):
            reason = "has no data.pt_id: it is no task of ours in Label Studio's JSON format"
            report(path, faults, Fault(where, reason, task))
            continue
        done = task.get("annotations") or []
        if not isinstance(done, list) or not all(isinstance(item, dict) for item in done):
            report(path, faults, Fault(where, "has annotations that are no objects", task))
            continue
        pt_id, cost = data["pt_id"], data.get("cost")
        if not done or task.get("is_labeled") is False:
            # Skips are told even where others' annotations are still to come.
            done = [item for item in done if item.get("was_cancelled")]
            take(path, out, faults, annotation(where, pt_id, None, None, cost, task))
        for k, item in enumerate(done, start=1):
            place = f"{where}, annotation {k}"
            label = _label(item)
            if isinstance(label, Fault):
                report(path, faults, Fault(place, label.reason, task))
                continue
            who = _annotator(item.get("completed_by"))
            take(path, out, faults, annotation(place, pt_id, label, who, cost, task))
    return out


def _label(item: Mapping[str, Any]) -> Any:
    """What the annotator typed, the word for a skip, "" for nothing, or what is wrong."""
    result = item.get("result") or []
    if item.get("was_cancelled"):
        return UNSURE_CHOICE
    if not isinstance(result, list) or not all(
        isinstance(region, dict)
        and isinstance(region.get("from_name"), str)
        and isinstance(region.get("value"), dict)
        for region in result
    ):
        return Fault("", "has a result that is no list of regions with a name and a value")
    by_name = {region["from_name"]: region["value"] for region in result}
    strange = sorted(name for name in by_name if name not in (LABEL, UNSURE_CHOICE))
    if strange:
        return Fault(
            "",
            f"was made with another labelling configuration: it has {', '.join(strange)}, but ours "
            f"has {LABEL} and {UNSURE_CHOICE}",
        )
    if by_name.get(UNSURE_CHOICE, {}).get("choices"):
        return UNSURE_CHOICE
    text = by_name.get(LABEL, {}).get("text")
    if isinstance(text, list):
        if len(text) > 1:
            return Fault("", f"holds {len(text)} answers, but must hold one")
        return text[0] if text else ""
    return text


def _annotator(completed_by: Any) -> Any:
    """The e-mail address where the export names it, `user-7` where it has the number only."""
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email") or completed_by.get("id")
    return f"user-{completed_by}" if isinstance(completed_by, int) else completed_by
