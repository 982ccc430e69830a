"""A stand-in for W&B's server on loopback: what sweeps, agents, runs and their files need of its API, in memory."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, product
from urllib.parse import urlsplit

import yaml

ENTITY = "team"


def grid(parameters: dict) -> list[dict]:
    """The points of a grid, in alphabetical order of its parameters as the server has them."""
    names = sorted(parameters)
    values = (parameters[name].get("values", [parameters[name].get("value")]) for name in names)
    return [dict(zip(names, point, strict=True)) for point in product(*values)]


class Run(dict):
    """What the client has sent of a run."""

    def __init__(self, name: str):
        super().__init__(displayName=None, project=None, sweep=None, group=None, config={}, summary={}, exit=[])
        self.name = name
        self.given: dict = {}
        """The parameters of a sweep's cell."""
        self.history: dict[int, dict] = {}
        """What was logged, by line."""
        self.files: dict[str, bytes] = {}
        self.stop = self.stopped = False


class WandbServer(ThreadingHTTPServer):
    """The server; ``with WandbServer() as server`` runs it in threads."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.numbers = count(1)
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, dict] = {}
        self.resumed: list[Run] = []
        """Cells that were stopped, to be given out again."""
        self.stops: Callable[[Run], str | None] = lambda run: None
        """How a running cell is to be stopped now: by a 'command' to its agent, by the run's own 'status', or not."""
        self.agents: dict[str, dict] = {}
        self.artifacts: list[dict] = []
        self.unknown: list[str] = []
        """Requests without an answer here."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self) -> dict[str, str]:
        """The variables with which a client finds this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ENTITY": ENTITY}

    def handle_error(self, *_):
        """Clients may break off."""

    # ------------------------------------------------------------------ GraphQL

    def answer(self, query: str, variables: dict) -> dict | None:
        """The data of an operation; None where it is not known."""
        operation = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        method = getattr(self, f"on_{operation[1]}", None) if operation else None
        if method is None:
            self.unknown.append(query)
            return None
        with self.lock:
            return method(**variables)

    def on_Viewer(self, **_):
        return {"viewer": {"id": "user", "entity": ENTITY, "username": "user", "email": "user@example.org",
                           "flags": "{}", "teams": {"edges": [{"node": {"name": ENTITY}}]}}}  # fmt: skip

    def on_ServerFeaturesQuery(self, **_):
        return {"serverInfo": {"features": []}}

    def on_UpsertSweep(self, config=None, projectName=None, id=None, state=None, **_):
        name = id or f"sweep{next(self.numbers)}"
        if config is not None:
            points = grid(yaml.safe_load(config)["parameters"])
            self.sweeps[name] = {"config": config, "project": projectName, "waiting": points, "state": "RUNNING"}
        project = {"id": projectName, "name": projectName, "entity": {"id": ENTITY, "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def on_SweepWithRuns(self, sweep, **_):
        found = self.sweeps[sweep]
        return {"project": {"sweep": {"id": sweep, "name": sweep, "method": "grid", "state": found["state"],
                                      "description": None, "config": found["config"], "createdAt": None,
                                      "heartbeatAt": None, "updatedAt": None, "earlyStopJobRunning": False,
                                      "bestLoss": None, "controller": None, "scheduler": None,
                                      "runs": {"edges": []}}}}  # fmt: skip

    def on_CreateAgent(self, host, sweep, **_):
        name = f"agent{next(self.numbers)}"
        self.agents[name] = {"sweep": sweep, "cells": set()}
        return {"createAgent": {"agent": {"id": name}}}

    def on_Heartbeat(self, id, runState, **_):
        """Stops what is to be stopped, gives an idle agent a cell, and lets it go when all are done."""
        agent, running, commands = self.agents[id], set(json.loads(runState)), []
        for cell in agent["cells"] - running:
            if self.runs[cell].stopped:
                self.resumed.append(self.runs[cell])
        agent["cells"] = running
        for run in (self.runs[name] for name in running):
            how = self.stops(run)
            run.stopped |= how is not None
            run.stop |= how == "status"
            commands += [{"type": "stop", "run_id": run.name}] * (how == "command")
        if not running:
            if self.resumed or self.sweeps[agent["sweep"]]["waiting"]:
                commands = [self.cell(agent["sweep"])]
                agent["cells"] = {commands[0]["run_id"]}
            elif not any(other["cells"] for other in self.agents.values()):
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": id}, "commands": json.dumps(commands)}}

    def cell(self, sweep: str) -> dict:
        """The command that starts a stopped cell again, or the next one."""
        if self.resumed:
            kind, run = "resume", self.resumed.pop(0)
            run.stop = run.stopped = False
        else:
            kind, run = "run", Run(f"cell{next(self.numbers)}")
            run.given, self.runs[run.name] = self.sweeps[sweep]["waiting"].pop(0), run
        program = yaml.safe_load(self.sweeps[sweep]["config"])["program"]
        return {
            "type": kind,
            "run_id": run.name,
            "program": program,
            "args": {k: {"value": v} for k, v in run.given.items()},
        }

    def on_RunResumeStatus(self, name, project, **_):
        found, bucket = self.runs.get(name), None
        if found is not None and found.history:
            last = max(found.history)
            bucket = {"id": name, "name": name, "displayName": found["displayName"], "logLineCount": 0,
                      "summaryMetrics": json.dumps(found["summary"]), "historyLineCount": last + 1,
                      "eventsLineCount": 0, "eventsTail": "[]",
                      "historyTail": json.dumps([json.dumps(found.history[last])]),
                      "config": json.dumps({k: {"value": v} for k, v in found["config"].items()}), "tags": [],
                      "notes": None, "wandbConfig": json.dumps({"t": 1})}  # fmt: skip
        return {"model": {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY}, "bucket": bucket}}

    def on_UpsertBucket(self, name, project=None, displayName=None, groupName=None, config=None, sweep=None, **_):
        found = self.runs.setdefault(name, Run(name))
        for key, value in {"displayName": displayName, "project": project, "group": groupName, "sweep": sweep}.items():
            found[key] = value or found[key]
        if config:
            found["config"] |= {k: v["value"] for k, v in json.loads(config).items() if k != "_wandb"}
        bucket = {"id": name, "name": name, "displayName": found["displayName"], "description": "", "config": "{}",
                  "sweepName": found["sweep"], "historyLineCount": len(found.history),
                  "project": {"id": project, "name": project, "entity": {"id": ENTITY, "name": ENTITY}}}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": not found.history}}

    def on_CreateRunFiles(self, run, files, **_):
        urls = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": urls}}

    def on_OrganizationCoreWeaveOrganizationID(self, **_):
        return {"entity": None}

    def on_ArtifactType(self, **_):
        return {"project": {"artifact": None}}

    def on_CreateArtifact(self, input):
        """Taken as known already, so that its files are not asked for."""
        self.artifacts.append(input)
        found = {
            "id": f"artifact{next(self.numbers)}",
            "state": "COMMITTED",
            "artifactSequence": {"latestArtifact": None},
        }
        return {"createArtifact": {"artifact": found}}

    # ------------------------------------------------------------------ files

    def stream(self, name: str, content: dict) -> dict:
        """A request of a run's file stream: lines of history, summary, exit."""
        with self.lock:
            found = self.runs.setdefault(name, Run(name))
            for file, part in (content.get("files") or {}).items():
                for i, line in enumerate(part["content"]):
                    if file == "wandb-history.jsonl":
                        found.history[part["offset"] + i] = json.loads(line)
                    elif file == "wandb-summary.json":
                        found["summary"] = json.loads(line)
            if content.get("complete"):
                found["exit"].append(content["exitcode"])
            return {"stopped": found.stop}

    def upload(self, path: str, content: bytes) -> None:
        run, _, name = path.partition("/")
        with self.lock:
            self.runs.setdefault(run, Run(run)).files[name] = content


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def reply(self, content: object, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self):
        path, content = urlsplit(self.path).path, self.body()
        if path == "/graphql":
            asked = json.loads(content)
            data = self.server.answer(asked["query"], asked.get("variables") or {})
            self.reply({"data": data} if data is not None else {"errors": [{"message": "not known here"}]})
        elif m := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self.reply(self.server.stream(m[1], json.loads(content)))
        elif path.startswith("/sdk/otel/"):  # W&B's own telemetry
            self.reply({})
        else:
            self.server.unknown.append(self.path)
            self.reply({}, 404)

    def do_PUT(self):
        content = self.body()
        if self.path.startswith("/upload/"):
            self.server.upload(urlsplit(self.path).path.removeprefix("/upload/"), content)
            self.reply({})
        else:
            self.server.unknown.append(self.path)
            self.reply({}, 404)

    def do_GET(self):
        self.server.unknown.append(self.path)
        self.reply({}, 404)
