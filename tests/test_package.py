"""The wheel holds what it needs, and what is installed from it works outside the checkout."""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jinfer", "pallas_kernels", "serve", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip(
        "hatchling", reason="the test extra, which brings the build backend, is not installed"
    )
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel; its dependencies are this environment's, so no network."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # Python reads no .pth files from a folder that is itself on the path through one, so an editable
    # installation of the checkout does not shine through.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"XDG_CACHE_HOME": str(folder / "cache")}


def test_wheel_holds_every_file_of_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".log"
    }
    assert sorted(ours - names) == []
    assert {f"{package}/py.typed" for package in PACKAGES[:3]} <= names
    assert any(name.startswith("jinfer/assets/") and name.endswith(".safetensors") for name in names)
    assert sorted({name.split("/")[0] for name in names if ".dist-info" not in name}) == sorted(PACKAGES)


def test_metadata_asks_for_what_is_needed_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        fields = Parser().parsestr(archive.read(metadata).decode())
        assert any("LICENSE" in name for name in archive.namelist())
    assert fields["Requires-Python"] == ">=3.11"
    required = fields.get_all("Requires-Dist") or []
    assert [line for line in required if "torch" in line and "extra ==" not in line] == []
    assert {"tpu", "gpu", "test", "dev"} <= set(fields.get_all("Provides-Extra") or [])


def test_imports_come_from_the_wheel(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import jinfer, pallas_kernels, serve; print(jinfer.__file__)")
    assert ROOT not in Path(where.strip()).parents
    assert installed.parent.parent in Path(where.strip()).parents


def test_help_works_outside_the_checkout(installed, tmp_path):
    text = run(installed, tmp_path, "-m", "jinfer.serve", "--help")
    assert "--model" in text
    assert "--port" in text


@pytest.mark.slow
def test_serves_the_bundled_model_outside_the_checkout(installed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [installed, "-m", "jinfer.serve", "--host", "127.0.0.1", "--port", str(port)]
    # Few and simple programs: its cache is empty, and what is compiled is not what is tested here.
    command += ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--max-model-len", "64"]
    command += ["--optimization-level", "0"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment(tmp_path), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url, tmp_path / "log")
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["content"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0, (tmp_path / "log").read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"the server was not ready after 120 s:\n{log.read_text()}")
