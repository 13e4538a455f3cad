"""A running Label Studio: tasks pushed into a project, finished annotations pulled out of it.

Contract: `push` makes a task only for prompts that have none in the project (by `data.pt_id`), so
pushing again adds nothing; `pull` takes the tasks that Label Studio counts as labelled, writes
them to RUN/queue/label-studio-ID.json and leaves the rest to the import of that file, which is
idempotent itself. The SDK is an extra and imported here only. The token comes from the
environment variable LABEL_STUDIO_API_KEY: a personal access token, or a legacy token where the
organisation allows them. It is not written anywhere. Run against the Community edition, which
imports tasks before it answers; other editions do so in the background: push again only after.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pivottrace_verl.annotation.formats import label_studio
from pivottrace_verl.annotation.formats.text import write_json_list
from pivottrace_verl.annotation.queue import queue_rows
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir

TOKEN = "LABEL_STUDIO_API_KEY"
BATCH = 200
"""Tasks in one request."""

Progress = Callable[[int, int, str], None]


class LabelStudioServer:
    """One project of one server."""

    def __init__(self, url: str, project: str) -> None:
        """`project`: a title, or a number for the id. PivotTraceError without SDK or token."""
        self.url = url
        self.project = project
        token = os.environ.get(TOKEN, "").strip()
        if not token:
            raise PivotTraceError(
                f"The environment variable {TOKEN} is not set: put an access token of {url} there "
                "(Label Studio: Account & Settings)."
            )
        if not token.isascii() or any(c.isspace() or not c.isprintable() for c in token):
            # The HTTP library would quote it in its own error.
            raise PivotTraceError(f"What {TOKEN} holds is no token: it has odd characters.")
        if not url.startswith(("http://", "https://")):
            raise PivotTraceError(f"The URL is '{url}', but must begin with http:// or https://.")
        with warnings.catch_warnings():
            # Of libraries that the SDK pulls in, on their own future.
            warnings.simplefilter("ignore")
            try:
                from label_studio_sdk import LabelStudio
            except ImportError as error:
                raise PivotTraceError(
                    "The Label Studio SDK is not installed: pip install "
                    f"'pivottrace-verl[label-studio]' ({error})."
                ) from error
        with self._told("sign in"):
            self._client = LabelStudio(base_url=url, api_key=token)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """The server's refusals and a broken connection as one sentence."""
        import httpx
        from label_studio_sdk.core.api_error import ApiError

        try:
            yield
        except ApiError as error:
            reason = _reason(error.status_code, error.body)
            raise PivotTraceError(
                f"Label Studio at {self.url} would not {what}: {reason}."
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PivotTraceError(
                f"Label Studio at {self.url} cannot be reached: {str(error).rstrip('.')}."
            ) from error
        except ValueError as error:
            raise PivotTraceError(
                f"What answers at {self.url} is not Label Studio: it could not {what}."
            ) from error

    def push(
        self, run: RunDir, pt_ids: list[str], annotators: int = 1, progress: Progress | None = None
    ) -> tuple[int, int, int]:
        """(project id, tasks made, tasks that were there already), in the order of `pt_ids`.

        A project that does not exist is made, with our labelling configuration, in the order of
        the tasks, wanting `annotators` a task. Raises PivotTraceError if an existing one has a
        configuration that our import cannot read, or if the server refuses.
        """
        rows, columns = queue_rows(run, pt_ids)
        project = self._project(make=True, annotators=annotators)
        there = {
            task.data.get("pt_id")
            for task in self._tasks(project.id, fields="task_only")
            if isinstance(task.data, dict)
        }
        missing = label_studio.tasks([row for row in rows if row["pt_id"] not in there], columns)
        for start in range(0, len(missing), BATCH):
            with self._told("take the tasks"):
                self._client.projects.import_tasks(
                    project.id, request=missing[start : start + BATCH]
                )
            if progress is not None:
                done = min(start + BATCH, len(missing))
                progress(done, len(missing), "tasks pushed")
        return project.id, len(missing), len(rows) - len(missing)

    def pull(self, run: RunDir, progress: Progress | None = None) -> tuple[Path, int]:
        """The file with the project's tasks, and how many of them still wait for annotators.

        Only pt_id, cost and annotations are kept. Raises PivotTraceError if there is no such
        project or the server refuses.
        """
        project = self._project(make=False)
        with self._told("list its users"):
            users = {user.id: user.email for user in self._client.users.list()}
        kept, waiting = [], 0
        for task in self._tasks(project.id, fields="all"):
            content = task.model_dump(mode="json")
            waiting += not content["is_labeled"]
            kept.append(_export(content, users))
            if progress is not None and len(kept) % BATCH == 0:
                progress(len(kept), project.task_number or len(kept), "tasks read")
        path = run.path / "queue" / f"label-studio-{project.id}.json"
        write_json_list(path, kept)
        return path, waiting

    def _tasks(self, project_id: int, fields: str) -> Iterator[Any]:
        with self._told("list the tasks"):
            yield from self._client.tasks.list(project=project_id, fields=fields, page_size=BATCH)

    def _project(self, *, make: bool, annotators: int = 1) -> Any:
        if self.project.isdecimal():
            with self._told(f"show project {self.project}"):
                found = [self._client.projects.get(int(self.project))]
        else:
            with self._told("list its projects"):
                # The server's own filter is by part of the title.
                listed = self._client.projects.list(title=self.project)
                found = [item for item in listed if item.title == self.project]
        if len(found) > 1:
            ids = ", ".join(str(item.id) for item in found)
            raise PivotTraceError(
                f"{len(found)} projects at {self.url} are called '{self.project}': name one of the "
                f"numbers {ids} instead."
            )
        if not found and not make:
            raise PivotTraceError(f"There is no project '{self.project}' at {self.url}.")
        if found:
            self._check_config(found[0])
            return found[0]
        with self._told(f"make the project '{self.project}'"):
            return self._client.projects.create(
                title=self.project,
                label_config=label_studio.CONFIG,
                sampling="Sequential sampling",
                show_collab_predictions=True,
                maximum_annotations=annotators,
            )

    def _check_config(self, project: Any) -> None:
        try:
            tags = list(ElementTree.fromstring(project.label_config or "<View/>").iter())
        except ElementTree.ParseError:
            tags = []
        names = {(tag.tag, tag.get("name")) for tag in tags}
        if ("TextArea", label_studio.LABEL) not in names:
            raise PivotTraceError(
                f"The project '{project.title}' at {self.url} has a labelling configuration "
                f"without a TextArea named {label_studio.LABEL}; `pivottrace annotate config "
                "label-studio` prints the one to use."
            )


def _export(task: dict[str, Any], users: dict[int, str]) -> dict[str, Any]:
    """A task as Label Studio's JSON export has it, without what we know ourselves."""
    kept = ("id", "result", "was_cancelled", "created_at", "updated_at")
    annotations = sorted(task["annotations"] or [], key=lambda item: item["id"])
    data = task["data"] if isinstance(task["data"], dict) else {}
    return {
        "id": task["id"],
        "is_labeled": bool(task["is_labeled"]),
        "data": {name: data[name] for name in ("pt_id", "cost") if name in data},
        "annotations": [
            {
                **{name: item.get(name) for name in kept},
                "completed_by": users.get(item.get("completed_by"), item.get("completed_by")),
            }
            for item in annotations
        ],
    }


def _reason(status: int | None, body: Any) -> str:
    """What the server said, in one line."""
    if isinstance(body, dict):
        detail = str(body.get("detail") or body)
        problems = body.get("validation_errors")
        text = f"{detail} {problems}" if problems else detail
    else:
        text = str(body)
    text = " ".join(text.split())[:300].rstrip(".")
    return f"{text} (status {status})" if status else text
