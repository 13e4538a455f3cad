"""Turns a JSONL file with your own field names into the columns that `pivottrace init` reads.

    python recipes/own_pool/to_pool.py questions.jsonl pool.jsonl \
        --question question --source topic [--answer answer]

Contract: one row out for each row in, with `prompt`, `data_source` and the `pt_id` by which
PivotTrace knows the prompt; `label` only with --answer, which is for validation data and for
answers that play the annotator. A bad row is one sentence and exit status 2, with nothing written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_bytes_atomic
from pivottrace_verl.prompts import pt_id


def rows(path: Path, question: str, source: str, answer: str | None) -> list[dict[str, Any]]:
    """The converted rows; PivotTraceError for a file or a row that cannot be read."""
    out = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PivotTraceError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise PivotTraceError(f"Line {number} of {path} is not JSON: {error}.") from error
        fields = [question, source, *([] if answer is None else [answer])]
        missing = [f for f in fields if not isinstance(record, dict) or record.get(f) in (None, "")]
        if missing:
            raise PivotTraceError(f"Line {number} of {path} has no {', '.join(missing)}.")
        prompt = [{"role": "user", "content": str(record[question])}]
        row = {"prompt": prompt, "data_source": str(record[source])}
        row["pt_id"] = pt_id(prompt, row["data_source"])
        if answer is not None:
            row["label"] = str(record[answer])
        out.append(row)
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--question", required=True, help="field that holds the prompt's text")
    parser.add_argument("--source", required=True, help="field that says where it comes from")
    parser.add_argument("--answer", help="field that holds the answer; default: write none")
    args = parser.parse_args(argv)
    try:
        made = rows(args.file, args.question, args.source, args.answer)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        write_bytes_atomic(args.out, text.encode())
    except PivotTraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {len(made)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
