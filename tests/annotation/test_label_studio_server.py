"""Push and pull against a real Label Studio server, started here and stopped again.

It runs in an environment of its own, which `make test-label-studio` makes; without that these
tests are skipped. The command line runs there too: that is where the SDK is.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest

from pivottrace_verl.annotation.formats import label_studio

from .conftest import ids_of, write_plan

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-label-studio" / "bin"
USER, PASSWORD, LEGACY = "ana@example.com", "a-long-password", "0123456789abcdef0123456789abcdef"
START_SECONDS = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BIN / "label-studio").exists(),
        reason="Label Studio is not installed: run `make test-label-studio`.",
    ),
]


@dataclass
class Server:
    url: str
    token: str
    """A personal access token, as Account & Settings gives one."""

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The server's own API, as a browser or another client would use it."""
        access = _json(self.url + "/api/token/refresh/", {"refresh": self.token})["access"]
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {access}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or "null")

    def tasks(self, project: int) -> list[dict[str, Any]]:
        found = self.call("GET", f"/api/tasks/?project={project}&fields=all&page_size=100")
        return sorted(found["tasks"], key=lambda task: task["id"])

    def annotate(self, task: int, label: str | None, **more: Any) -> None:
        """What the labelling page sends when Submit (or Skip) is pressed."""
        region = {"from_name": "label", "to_name": "prompt", "type": "textarea"}
        result = [] if label is None else [{**region, "value": {"text": [label]}}]
        result += more.pop("also", [])
        self.call("POST", f"/api/tasks/{task}/annotations/", {"result": result, **more})


def _json(url: str, body: Any) -> Any:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def _personal_token(url: str) -> str:
    """Sign in with the password, as a browser does, and make a personal access token."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    page = browser.open(url + "/user/login/", timeout=60).read().decode()
    csrf = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)
    assert csrf, "the login page has no form"
    form = {"email": USER, "password": PASSWORD, "csrfmiddlewaretoken": csrf[1]}
    login = urllib.request.Request(
        url + "/user/login/",
        data=urllib.parse.urlencode(form).encode(),
        headers={"Referer": url + "/user/login/"},
    )
    browser.open(login, timeout=60)
    made = urllib.request.Request(
        url + "/api/token/", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with browser.open(made, timeout=60) as response:
        return str(json.loads(response.read())["token"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("label-studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = home / "server.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [
                *(BIN / "label-studio", "start", "--no-browser", "--data-dir", home / "data"),
                *("--internal-host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING"),
                *("--username", USER, "--password", PASSWORD, "--user-token", LEGACY),
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "LATEST_VERSION_CHECK": "false",
                "COLLECT_ANALYTICS": "false",
            },
            start_new_session=True,
        )
    try:
        limit = time.monotonic() + START_SECONDS
        while not _up(url):
            said = log.read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"Label Studio stopped:\n{said}"
            assert time.monotonic() < limit, f"Label Studio did not start:\n{said}"
            time.sleep(0.5)
        yield Server(url, _personal_token(url))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def annotate(server: Server, verb: str, run: Any, project: str, *options: str, **env: str) -> Any:
    """`pivottrace annotate VERB` in the environment that has the SDK."""
    return subprocess.run(
        [
            *(BIN / "python", "-m", "pivottrace_verl.cli", "annotate", verb, run.path),
            *("--url", server.url, "--project", project, "--json", *options),
        ],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "LABEL_STUDIO_API_KEY": server.token,
            **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def done(result: Any) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: Any) -> str:
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_labels_go_round_through_a_server(make_run, server):
    """Push twice, label as people do, pull twice: every prompt once, finished labels only."""
    run = make_run(["<img src=x onerror=alert(1)>", "https://a.b/c.txt", "=1+1", "d", "e", "f"])
    ids = ids_of(run)
    assert done(annotate(server, "push", run, "round trip"))["pushed"] == 6
    again = done(annotate(server, "push", run, "round trip"))
    assert (again["pushed"], again["already"]) == (0, 6)

    tasks = server.tasks(again["project"])
    assert [task["data"]["pt_id"] for task in tasks] == ids
    assert tasks[0]["data"]["prompt"] == "<img src=x onerror=alert(1)>"
    assert tasks[0]["predictions"][0]["score"] == 1.0
    assert tasks[1]["predictions"][0]["result"][0]["value"] == {"text": ["1"]}
    assert tasks[0]["predictions"][0]["model_version"] == label_studio.MODEL_VERSION

    draft = {"lead_time": 1.0, "result": []}
    unsure = {"from_name": "unsure", "to_name": "prompt", "type": "choices"}
    server.annotate(tasks[0]["id"], "four")
    server.annotate(tasks[1]["id"], "=2")
    server.annotate(tasks[2]["id"], "rash", was_cancelled=True)
    server.annotate(tasks[3]["id"], "?", also=[{**unsure, "value": {"choices": ["unsure"]}}])
    server.call("POST", f"/api/tasks/{tasks[4]['id']}/drafts", draft)
    pulled = done(annotate(server, "pull", run, "round trip"))
    assert (pulled["added"], pulled["skipped"]) == (2, 2)
    assert run.ledger().labels() == {ids[0]: "four", ids[1]: "=2"}
    assert {entry["annotator"] for entry in run.ledger().entries()} == {USER}

    ledger = run.ledger().path.read_bytes()
    assert done(annotate(server, "pull", run, str(again["project"])))["added"] == 0
    assert run.ledger().path.read_bytes() == ledger
    assert server.token not in "".join(
        path.read_text(errors="replace") for path in run.path.rglob("*") if path.is_file()
    )

    write_plan(run, ids[3:], reason="after the first round")
    third = done(annotate(server, "push", run, "round trip"))
    assert (third["pushed"], third["already"]) == (0, 3)
    server.annotate(tasks[5]["id"], "6")
    assert done(annotate(server, "pull", run, "round trip"))["round"] == 2


def test_the_servers_own_json_export_is_a_label_file(make_run, server, tmp_path):
    from pivottrace_verl.annotation import import_labels

    run = make_run(3)
    project = done(annotate(server, "push", run, "by file"))["project"]
    tasks = server.tasks(project)
    server.annotate(tasks[0]["id"], "7")
    server.annotate(tasks[1]["id"], None, was_cancelled=True)
    export = tmp_path / "project-at-today.json"
    content = server.call("GET", f"/api/projects/{project}/export?exportType=JSON")
    export.write_text(json.dumps(content))
    result = import_labels(run, export, "ana")
    assert (result.added, result.skipped) == (1, 1)
    assert run.ledger().labels() == {ids_of(run)[0]: "7"}


def test_an_exported_file_is_one_the_server_imports(make_run, server, tmp_path):
    """The tasks and the configuration that `export` writes, uploaded by hand."""
    from pivottrace_verl.annotation import export_queue

    run = make_run(3)
    export_queue(run, ids_of(run), tmp_path / "q.json")
    config = (tmp_path / "q.xml").read_text()
    project = server.call("POST", "/api/projects/", {"title": "by hand", "label_config": config})
    tasks = json.loads((tmp_path / "q.json").read_text())
    server.call("POST", f"/api/projects/{project['id']}/import", tasks)
    assert [t["data"]["pt_id"] for t in server.tasks(project["id"])] == ids_of(run)


def test_a_task_that_wants_two_annotators_waits_for_both(make_run, server):
    run = make_run(2)
    project = done(annotate(server, "push", run, "two each", "--annotators", "2"))["project"]
    tasks = server.tasks(project)
    server.annotate(tasks[0]["id"], "1")
    first = done(annotate(server, "pull", run, "two each"))
    assert (first["added"], first["empty"]) == (0, 2)
    other = server.call(
        "POST", "/api/users/", {"email": "bo@example.com", "username": "bo", "password": PASSWORD}
    )
    server.annotate(tasks[0]["id"], "1", completed_by=other["id"])
    second = done(annotate(server, "pull", run, "two each", "--cost", "2"))
    assert (second["added"], second["cost"]) == (1, 4.0)
    assert second["agreement"]["agreement"] == 1.0
    assert run.ledger().entries()[0]["annotator"] == f"{USER}, bo@example.com"


def test_what_the_server_refuses_is_one_sentence_and_changes_nothing(make_run, server):
    run = make_run(2)
    project = {"title": "foreign", "label_config": "<View><Text name='t' value='$text'/></View>"}
    server.call("POST", "/api/projects/", project)
    before = sorted(path.name for path in run.path.rglob("*"))
    legacy = annotate(server, "push", run, "no", LABEL_STUDIO_API_KEY=LEGACY)
    assert "legacy token authentication has been disabled" in refused(legacy)
    assert LEGACY not in legacy.stderr
    wrong = annotate(server, "push", run, "no", LABEL_STUDIO_API_KEY="nonsense")
    assert "Invalid token" in refused(wrong)
    assert "is not set" in refused(annotate(server, "pull", run, "no", LABEL_STUDIO_API_KEY=""))
    odd = refused(annotate(server, "pull", run, "no", LABEL_STUDIO_API_KEY="se cret"))
    assert "odd characters" in odd and "cret" not in odd
    assert "no project 'nowhere'" in refused(annotate(server, "pull", run, "nowhere"))
    assert "project 999" in refused(annotate(server, "pull", run, "999"))
    assert "TextArea named label" in refused(annotate(server, "push", run, "foreign"))
    assert "at least 3 characters" in refused(annotate(server, "push", run, "ab"))
    down = Server("http://127.0.0.1:9", server.token)
    assert "cannot be reached" in refused(annotate(down, "push", run, "no"))
    assert "http://" in refused(annotate(Server("a.b", server.token), "push", run, "no"))
    assert sorted(path.name for path in run.path.rglob("*")) == before
