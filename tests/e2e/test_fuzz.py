"""Requests made from the server's own OpenAPI document, against the real engine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx

from tests.e2e.server_process import running_server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
FUZZER = shutil.which("schemathesis") or str(Path(sys.executable).parent / "schemathesis")


def test_fuzz_finds_no_server_error_and_no_violation_of_the_document(tmp_path):
    with running_server("--max-model-len", "48", "--max-num-seqs", "4") as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
        for name in ("CompletionRequest", "ChatCompletionRequest"):
            # A guess at the model's name would only ever see 404.
            properties = document["components"]["schemas"][name]["properties"]
            properties["model"]["const"] = "moe-engine-demo"
        path = tmp_path / "openapi.json"
        path.write_text(json.dumps(document))
        command = [FUZZER, "run", str(path), "--url", server.url, "--seed", "1"]
        options = ["--checks", ",".join(CHECKS), "--max-examples", "60", "--request-timeout", "30"]
        ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
        assert server.health() == 200
        assert server.metric("moe_engine:generation_tokens_total") > 50
        assert server.metric("moe_engine:num_requests_running") == 0
        assert server.metric("moe_engine:kv_cache_usage_perc") == 0
