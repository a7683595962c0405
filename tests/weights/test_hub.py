"""Finding a model: bundled, in a folder, or on a hub; the hub is a small server on loopback."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinfer.errors import ModelError
from jinfer.models.hf_config import read_config
from jinfer.pooling import PoolingParams, default_pooling
from jinfer.weights import hub
from jinfer.weights.hub import resolve_model
from jinfer.weights.safetensors_source import open_safetensors

TOKEN = "hf_right"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
WANTED = {
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "modules.json",
    "1_Pooling/config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
UNWANTED = {
    "modeling_evil.py": b"raise SystemExit('code of a model folder was run')",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "onnx/config.json": b"{}",
    "4bit/config.json": b"{}",
    "1_Pooling/old/config.json": b"{}",
    "fp16/model.safetensors": b"another form",
}


class Hub(http.server.ThreadingHTTPServer):
    """The part of a model hub's HTTP interface that a download uses. Counts the requests for each file."""

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        self.server.asked.append(path)
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo not in self.server.repos or (repo.startswith("private/") and given is None):
            return self.refuse(401, "RepoNotFound")
        if repo.startswith("gated/"):
            return self.refuse(403, "GatedRepo")
        files = self.server.repos[repo]
        if api and rest[:1] == ["tree"]:
            return self.answer(
                json.dumps([self.listing(name, data) for name, data in files.items()]).encode()
            )
        if api and rest[:1] in ([], ["revision"]):
            if rest[1:] not in ([], ["main"], ["v2"], [COMMIT]):
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        name = "/".join(rest[2:])
        if rest[0] != "resolve" or name not in files:
            return self.refuse(404, "EntryNotFound")
        return self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')

    def listing(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def refuse(self, status: int, code: str, message: str = "no") -> None:
        self.answer(b"", status, **{"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer.{i}": rng.standard_normal((64, 33)).astype(np.float32) for i in range(4)}


@pytest.fixture
def server(weights, write_checkpoint) -> Iterator[Hub]:
    folder = write_checkpoint(weights, shards=2)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files |= {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "tokenizer.model": b"\0"}
    files |= {"chat_template.jinja": b"{{ 1 }}", "additional_chat_templates/tools.jinja": b"{{ 2 }}"}
    files |= {
        "modules.json": json.dumps(MODULES).encode(),
        "1_Pooling/config.json": json.dumps(MEAN).encode(),
    }
    files |= UNWANTED
    repos: dict[str, dict[str, bytes]] = dict.fromkeys(("owner/model", "private/model", "gated/model"), files)
    repos["owner/pickled"] = {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}
    repos["owner/data"] = {"readme.txt": b"", "data.json": b"{}"}
    hub_server = Hub(repos)
    thread = threading.Thread(target=hub_server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()
    thread.join()


RESOLVE = """
import json, sys
from jinfer.errors import ModelError
from jinfer.weights.hub import resolve_model
assert "huggingface_hub" not in sys.modules and "jax" not in sys.modules
for options in json.loads(sys.argv[1]):
    try:
        print(json.dumps([str(resolve_model(**options)), ""]))
    except ModelError as error:
        print(json.dumps(["", str(error)]))
"""


@pytest.fixture
def resolve(tmp_path):
    """Resolves models in a process of its own, as the hub client reads its environment once."""

    def run(endpoint: str, *options: dict[str, Any], **env: str) -> list[tuple[str, str]]:
        base = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_TOKEN"}
        base |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", RESOLVE, json.dumps(options)]
        done = subprocess.run(
            command,
            env=base | env,
            cwd=Path(hub.__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


def test_download_brings_data_only_and_the_cache_serves_it_offline(server, resolve, weights):
    [(path, problem)] = resolve(server.url, {"model": "private/model"}, HF_TOKEN=TOKEN)
    assert problem == ""
    folder = Path(path)
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    assert found == WANTED
    assert not any(name in path for path in server.asked for name in UNWANTED)
    assert read_config(folder).vocab_size == 16
    assert default_pooling(folder) == PoolingParams("mean", False)
    source = open_safetensors(folder)
    assert set(source.names()) == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(source.read(name), values)
    source.close()

    before = len(server.asked)
    offline = resolve(
        server.url,
        {"model": "private/model"},
        {"model": "private/model", "revision": COMMIT},
        {"model": "owner/model"},
        HF_HUB_OFFLINE="1",
    )
    assert offline[:2] == [(path, ""), (path, "")]
    assert "not complete in the local cache and HF_HUB_OFFLINE is set" in offline[2][1]
    assert len(server.asked) == before
    # A hub that cannot be reached is the same as being offline, and its cache serves.
    unreachable = resolve("http://127.0.0.1:9", {"model": "private/model"}, {"model": "owner/model"})
    assert unreachable[0] == (path, "")
    assert "http://127.0.0.1:9 cannot be reached" in unreachable[1][1]


def test_download_of_a_tokenizer_leaves_the_weights(server, resolve):
    [(path, problem)] = resolve(server.url, {"model": "owner/model", "revision": "v2", "weights": False})
    assert problem == ""
    assert not list(Path(path).glob("*.safetensors"))
    assert (Path(path) / "tokenizer.json").exists()


def test_what_cannot_be_had_is_explained(server, resolve):
    cases = {
        "owner/nothing": "no folder 'owner/nothing', and http://127.0.0.1.* shows no model of that name",
        "private/model": "if it is private, set HF_TOKEN",
        "gated/model": "is gated: accept its terms at http.*/gated/model and set HF_TOKEN",
        "owner/pickled": "has no safetensors, and jinfer never unpickles",
        "owner/data": "has no config.json",
    }
    answers = resolve(
        server.url, *({"model": model} for model in cases), {"model": "owner/model", "revision": "v3"}
    )
    assert [path for path, _ in answers] == [""] * 6
    for (_, problem), expected in zip(answers, [*cases.values(), "has no revision 'v3'"], strict=True):
        with pytest.raises(ModelError, match=expected):
            raise ModelError(problem)


def test_wrong_token_is_explained(server, resolve):
    [(path, problem)] = resolve(server.url, {"model": "private/model"}, HF_TOKEN="hf_wrong")
    assert path == ""
    assert "answered 401" in problem
    assert "HF_TOKEN" in problem


def test_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("mine") == tmp_path / "mine"
    assert resolve_model(str(tmp_path / "tiny")) == resolve_model("./tiny") == tmp_path / "tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine") == tmp_path / "mine"


def test_bundled_names_come_first(tmp_path, monkeypatch):
    for name in hub.BUNDLED:
        folder = tmp_path / "jinfer" / "assets" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.resources, "files", lambda package: tmp_path / package)
    assert resolve_model("tiny") == tmp_path / "jinfer" / "assets" / "tiny"
    assert resolve_model("tiny-draft") == tmp_path / "jinfer" / "assets" / "tiny-draft"
    (tmp_path / "jinfer" / "assets" / "tiny" / "config.json").unlink()
    with pytest.raises(ModelError, match="bundled model 'tiny' is missing"):
        resolve_model("tiny")


@pytest.mark.parametrize(
    "name", ["", "./gone", "/gone/far", "~/gone", "a/b/c", "../gone", "a b", "x/..", "é\0"]
)
def test_no_such_folder_is_told_without_asking_a_hub(name):
    with pytest.raises(ModelError, match="is not an existing folder: give a folder, a hub id"):
        resolve_model(name)


def test_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file, expected a folder"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_an_incomplete_download_says_what_it_lacks(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_download", lambda *args: tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def problem() -> str:
        with pytest.raises(ModelError) as caught:
            resolve_model("owner/model")
        return str(caught.value)

    (tmp_path / "tokenizer.json").write_text("{}")
    assert "'owner/model' in the local cache" in problem()
    assert "is not complete, it lacks config.json, the safetensors files: download the rest" in problem()
    (tmp_path / "config.json").write_text("{}")
    assert "it lacks the safetensors files: download the rest without HF_HUB_OFFLINE" in problem()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "has no safetensors, and jinfer never unpickles" in problem()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    assert "is not complete, it lacks model-1.safetensors: download the rest" in problem()
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    assert resolve_model("owner/model") == tmp_path
