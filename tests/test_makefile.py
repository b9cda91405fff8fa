"""The Makefile's choices: whose torch, from where, and what the demo runs on. The real Makefile, pip and environments; the
package indexes are a server here, and torch is a stand-in of a few bytes."""

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, environment

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or Path("/dev/kfd").exists(), reason="the choice is for Linux without an AMD GPU"
)
TORCH = "import types\ncuda = types.SimpleNamespace(is_available=lambda: {gpu})\n"
# A project without dependencies that installs itself, in place of ours: what is tested comes before.
PROJECT = """[project]
name = "stand-in"
version = "1"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """import shutil
def build_editable(folder, *_):
    return shutil.copy("stand_in-1-py3-none-any.whl", folder).rpartition("/")[2]
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    about = f"{name}-{version}.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        f"{len(text.encode())}\n"
        for path, text in files.items()
    )
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in (files | {f"{about}/RECORD": f"{record}{about}/RECORD,,\n"}).items():
            wheel.writestr(inside, text)
    return path


class Indexes:
    """PyTorch's index at /cpu with torch 2.13.0+cpu, and the package index at /all with 2.13.0; what they were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.python = "py3"  # the Python for which PyTorch's index says that its build is
        indexes = self
        wheels = {
            index: write_wheel(folder, "torch", version, {"torch/__init__.py": TORCH.format(gpu=False)})
            for index, version in {"cpu": "2.13.0+cpu", "all": "2.13.0"}.items()
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index, _, rest = self.path.strip("/").partition("/")
                indexes.asked.append(index)
                if rest == "torch":
                    name = wheels[index].name
                    if index == "cpu":
                        name = name.replace("py3", indexes.python)
                    body = f'<!DOCTYPE html><a href="{name.replace("+", "%2B")}">{name}</a>'.encode()
                elif rest.endswith(".whl"):
                    body = wheels[index].read_bytes()
                else:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if rest == "torch" else "application/zip")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Indexes]:
    found = Indexes(tmp_path_factory.mktemp("wheels"))
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def indexes(server: Indexes) -> Indexes:
    """The same, not asked for anything yet."""
    server.asked.clear()
    server.python = "py3"
    return server


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory: pytest.TempPathFactory, server: Indexes) -> tuple[Path, str]:
    """The folder of a first `make`, without a torch and without a GPU, and what it said."""
    folder = tmp_path_factory.mktemp("new")
    return folder, make(folder, ".venv/.plainloop-installed", f"PYTHON3={bare_python(folder)}", indexes=server)


@pytest.fixture
def active(new_environment: tuple[Path, str], tmp_path: Path) -> Path:
    """An active virtual environment with pip alone."""
    folder = shutil.copytree(new_environment[0] / ".venv", tmp_path / "active", symlinks=True)
    for path in site_packages(folder).iterdir():
        if not path.name.startswith("pip"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (".plainloop-installed", "plainloop-constraints.txt"):
        (folder / name).unlink()
    return folder


def bare_python(folder: Path) -> Path:
    """Our Python without what is installed beside it, which may be a torch."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def site_packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python*/site-packages")
    return found


def add_torch(folder: Path, version: str, gpu: bool = False) -> None:
    """A torch that somebody has installed."""
    folder.mkdir(exist_ok=True)
    wheel = write_wheel(folder, "torch", version, {"torch/__init__.py": TORCH.format(gpu=gpu)})
    zipfile.ZipFile(wheel).extractall(folder)


def make(
    folder: Path, *arguments: str, active: Path | None = None, nvidia: bool = False, indexes: Indexes | None = None,
    **extra: str,
) -> str:  # fmt: skip
    """Run our Makefile in `folder`, beside the stand-in project; its stdout."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n")
    write_wheel(folder, "stand_in", "1", {})
    driver = folder / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(f"#!/bin/sh\n{'echo GPU 0' if nvidia else 'exit 9'}\n")
    driver.chmod(0o755)
    variables = {name: value for name, value in environment().items() if not name.startswith(("PIP_", "VIRTUAL_ENV"))}
    variables |= {
        "PATH": f"{driver.parent}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_INDEX_URL": f"{indexes.url if indexes else ''}/all",
        **extra,
    }  # fmt: skip
    if active is not None:
        variables["VIRTUAL_ENV"] = str(active)
    command = ["make", f"PYTHON3={sys.executable}", *arguments]
    if indexes is not None and not any(argument.startswith("TORCH_INDEX=") for argument in arguments):
        command += [f"TORCH_INDEX={indexes.url}/cpu", "TORCH_INDEX_SECONDS=60"]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def installed_torch(environment: Path) -> list[str]:
    return [path.name.removesuffix(".dist-info") for path in site_packages(environment).glob("torch-*.dist-info")]


def pinned(environment: Path) -> str:
    return (environment / "plainloop-constraints.txt").read_text()


def test_a_new_environment_without_a_gpu_gets_torch_from_pytorchs_index(new_environment, server):
    folder, said = new_environment
    assert installed_torch(folder / ".venv") == ["torch-2.13.0+cpu"] and f"from {server.url}/cpu" in said
    assert pinned(folder / ".venv") == "numpy==2.4.6\ntorch==2.13.0+cpu\n"
    assert (site_packages(folder / ".venv") / "stand_in-1.dist-info").is_dir()
    assert "include-system-site-packages = false" in (folder / ".venv" / "pyvenv.cfg").read_text()


def test_with_a_gpu_torch_comes_from_the_package_index(tmp_path, indexes, active):
    make(tmp_path, f"{active}/.plainloop-installed", active=active, indexes=indexes, nvidia=True)
    assert installed_torch(active) == ["torch-2.13.0"] and set(indexes.asked) == {"all"}


def test_an_index_that_does_not_answer_is_passed_over(tmp_path, indexes, active):
    """It takes the connection and says nothing; pip alone would wait for longer than the test may take."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"TORCH_INDEX=http://127.0.0.1:{silent.getsockname()[1]}"
        said = make(
            tmp_path, f"{active}/.plainloop-installed", index, "TORCH_INDEX_SECONDS=3", active=active, indexes=indexes,
            PIP_DEFAULT_TIMEOUT="1000",
        )  # fmt: skip
    assert installed_torch(active) == ["torch-2.13.0"] and "from the package index" in said


def test_an_index_without_our_version_is_passed_over(tmp_path, indexes, active):
    arguments = [f"{active}/.plainloop-installed", "TORCH=torch-2.99.0"]
    make(tmp_path, *arguments, active=active, indexes=indexes)
    assert "cpu" in indexes.asked and installed_torch(active) == ["torch-2.13.0"]


def test_an_index_without_a_build_for_this_python_is_passed_over(tmp_path, indexes, active):
    indexes.python = "cp399"
    said = make(tmp_path, f"{active}/.plainloop-installed", active=active, indexes=indexes)
    assert "cpu" in indexes.asked and installed_torch(active) == ["torch-2.13.0"] and "from the package index" in said


def test_a_torch_in_the_active_environment_stays(tmp_path, indexes, active):
    add_torch(site_packages(active), "2.9.1+rocm6.4")
    said = make(tmp_path, f"{active}/.plainloop-installed", active=active, indexes=indexes)
    assert installed_torch(active) == ["torch-2.9.1+rocm6.4"] and indexes.asked == [] and "stays" in said
    assert pinned(active) == "numpy==2.4.6\ntorch==2.9.1+rocm6.4\n"
    assert not (tmp_path / ".venv").exists()


def test_a_new_environment_sees_the_torch_of_the_python_it_is_made_with(tmp_path, indexes):
    """PYTHONPATH stands for the packages of the system, which a test cannot change."""
    add_torch(tmp_path / "system", "2.10.0")
    arguments = [".venv/.plainloop-installed", f"PYTHON3={bare_python(tmp_path)}"]
    make(tmp_path, *arguments, indexes=indexes, PYTHONPATH=str(tmp_path / "system"))
    assert "include-system-site-packages = true" in (tmp_path / ".venv" / "pyvenv.cfg").read_text()
    assert installed_torch(tmp_path / ".venv") == [] and indexes.asked == []
    assert pinned(tmp_path / ".venv").endswith("\ntorch==2.10.0\n")


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_the_demo_trains_on_a_gpu_where_torch_sees_one(gpu, tmp_path, active):
    add_torch(site_packages(active), "2.13.0", gpu=gpu)
    planned = make(tmp_path, "--dry-run", "demo", "PRECISION=no", active=active)
    assert planned.count("accelerate.commands.launch") == 1
    assert ("accelerate_configs/single_gpu.yaml" in planned) == gpu
    assert ("accelerate_configs/cpu.yaml --mixed_precision no" in planned) == (not gpu)
