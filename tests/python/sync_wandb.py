"""usage: sync_wandb.py DIR: has the real `wandb sync` upload an offline run to a server here, which takes all that comes.

Prints one JSON object: `run` (the variables of the first UpsertBucket), `history` (the rows, parsed), `summary` (the
uploaded file) and `exitcode`.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

got = {"run": None, "history": [], "summary": None, "exitcode": None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply = json.dumps(self.take(body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = answer

    def take(self, body):
        if self.path.endswith("/graphql"):
            return {"data": graphql(json.loads(body))}
        if self.path.endswith("/file_stream"):
            said = json.loads(body)
            rows = said.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            got["history"] += [json.loads(row) for row in rows]
            if said.get("complete"):
                got["exitcode"] = said["exitcode"]
        if self.path.endswith("wandb-summary.json"):
            got["summary"] = json.loads(body)
        return {}


def graphql(request):
    query, variables = request["query"], request.get("variables") or {}
    if "upsertBucket" in query:
        got["run"] = got["run"] or variables
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": variables["entity"] or "me"}}
        bucket = {"id": "r", "name": variables["name"], "displayName": variables["displayName"], "project": project}
        return {"upsertBucket": {"bucket": bucket | {"config": "{}", "historyLineCount": 0}, "inserted": True}}
    if "createRunFiles" in query:
        files = [{"name": name, "uploadUrl": f"{address}/put/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    return {}


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
address = f"http://127.0.0.1:{server.server_port}"
threading.Thread(target=server.serve_forever, daemon=True).start()
with tempfile.TemporaryDirectory() as home:  # for its logs and settings
    environment = os.environ | {
        "HOME": home,
        "WANDB_BASE_URL": address,
        "WANDB_API_KEY": 40 * "a",
        "WANDB_ERROR_REPORTING": "false",
    }
    command = [sys.executable, "-m", "wandb", "sync", os.path.abspath(sys.argv[1])]
    sync = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
if sync.returncode or "Error" in sync.stderr:
    sys.exit(sync.stdout + sync.stderr)
print(json.dumps(got))
