"""examples/prepare_data_cluster.py against prepare_data.py, on Ray nodes in their own processes, some of them killed."""

import filecmp
import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import call, environment, run, script

if importlib.util.find_spec("ray") is None:  # importing Ray takes seconds, which most test runs can save
    pytest.skip("the extra [cluster] is not installed", allow_module_level=True)

SCRIPT = "examples/prepare_data_cluster.py"
PATIENCE = 300.0


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one CPU each, with their own raylet and workers."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    started = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        started.add_node(**node)
        started.wait_for_nodes()
        yield started
    finally:
        started.shutdown()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder of three files with duplicates across them; no slice of 10,000 documents ends at the end of a file."""
    folder = tmp_path_factory.mktemp("texts") / "texts"
    folder.mkdir()
    rng = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    for number in range(3):
        lines = [" ".join(rng.choices(words, k=rng.randint(3, 14))) + "  " * (row % 3) for row in range(9000)]
        lines.append("This is the text that all of the three files have.")
        records = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{number}.jsonl").write_text(records + "not JSON\n" * (number == 1))
    (folder / "picture.png").write_bytes(b"passed over")
    return folder


def recipe(texts: Path) -> list[str]:
    sources = f"[{{path: {texts}, weight: 1.5}}, sample_data/dictionaries.jsonl]"
    return ["--sources", sources, "--keep_dropped", "true", "--cleaning.steps", "[standard, mask_personal_data]"]


def prepare_here(output: Path, *options: str) -> None:
    code, _, err = call("prepare_data.py", "--output", output, *options)
    assert code == 0, err


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(right)) for path in right.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


@pytest.mark.slow
def test_two_nodes_write_the_bytes_of_one_machine(cluster, texts, tmp_path):
    script("examples/make_instructions.py", tmp_path / "talks.jsonl")
    talks = ["--sources", f"[{tmp_path / 'talks.jsonl'}]", "--messages_column", "messages",
             "--tokenizer.chat_template", "configs/chat_template.jinja",
             "--tokenizer.special_tokens", "[<|im_start|>, <|im_end|>]"]  # fmt: skip
    for name, options in {"plain": recipe(texts), "talks": talks}.items():
        prepare_here(tmp_path / "one" / name, *options)
        arguments = ["--output", tmp_path / "two" / name, *options]
        output = script(SCRIPT, *arguments, RAY_ADDRESS=cluster.address).stdout
        assert "2 machine(s), 2 CPUs" in output
        assert_same_files(tmp_path / "one" / name, tmp_path / "two" / name)  # tokens, order, split, key and all
        assert len(list(tmp_path.glob(f"two/.{name}.stages/clean-*/*.arrow"))) == (4 if name == "plain" else 1)
        assert "up to date" in call("prepare_data.py", *arguments)[1]


@pytest.mark.slow
def test_parts_of_killed_workers_and_nodes_are_done_again_and_are_there_once(cluster, texts, tmp_path):
    prepare_here(tmp_path / "one" / "data", *recipe(texts))
    output = tmp_path / "two" / "data"
    command = [sys.executable, SCRIPT, "--output", str(output), *recipe(texts)]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(
            command, env=environment() | {"RAY_ADDRESS": cluster.address}, stdout=log, stderr=log
        )
    try:
        while not kill_workers(cluster, wait_for_part(started, output, "clean")):
            pass
        wait_for_part(started, output, "sketch")
        second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        cluster.remove_node(second, allow_graceful=False)
        assert started.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    finally:
        started.kill()
    assert_same_files(tmp_path / "one" / "data", output)
    assert not list(output.parent.rglob(".part-*"))


def wait_for_part(started: subprocess.Popen, output: Path, stage: str) -> list[Path]:
    """Wait until parts of a stage are running; return the folders that they write."""
    deadline = time.monotonic() + PATIENCE
    while not (found := list(output.parent.glob(f".data.stages/.{stage}.partial-*/.part-*"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    return found


def kill_workers(cluster, parts: list[Path]) -> bool:
    """Kill the workers that are running a part, if one of `parts` is still being written; else let them go on."""
    workers = [
        child
        for node in cluster.list_all_nodes()
        for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        if child.cmdline()[:1] == ["ray::run_part"]
    ]
    for worker in workers:
        worker.suspend()  # so that no part ends between the look and the kill
    in_time = bool(workers) and any(part.exists() for part in parts)
    for worker in workers:
        worker.kill() if in_time else worker.resume()
    return in_time


def refusal(output: Path, *options: str, **environment: str) -> str:
    """The error line of a refused call, printed before Ray is imported."""
    command = [sys.executable, "-X", "importtime", SCRIPT, "--output", output, *options]
    result = run(*command, check=False, **environment)
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    assert result.returncode == 2 and "utils.cli" in imported and not imported & {"ray", "datasets", "torch"}
    (line,) = [line for line in lines if not line.startswith("import time")]
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stream", "true"], "stream: a stream needs little preparation"),
        (["--num_proc", "2"], "num_proc is for one machine"),
        (["--sources", "[{hub: owner/texts}]"], "sources: a cluster cannot read hub owner/texts"),
    ],
)
def test_what_a_cluster_does_not_do_is_refused_in_one_line(options, message, tmp_path):
    assert refusal(tmp_path / "out", *options).startswith(f"prepare_data_cluster.py: error: {message}")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:10001", "here:port"])
def test_a_cluster_that_is_not_there_is_one_line(address, tmp_path):
    line = refusal(tmp_path / "out", RAY_ADDRESS=address)
    assert line.startswith(f"prepare_data_cluster.py: error: RAY_ADDRESS {address}: ")


@pytest.mark.slow
def test_a_mistake_that_a_worker_finds_is_one_line(tmp_path):
    (tmp_path / "talks.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]})
            + "\n"
            for n in range(100)
        )
    )
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('not this one') }}")
    result = script(
        SCRIPT, "--output", tmp_path / "out", "--sources", f"[{tmp_path / 'talks.jsonl'}]", "--messages_column", "messages",
        "--tokenizer.chat_template", tmp_path / "refuses.jinja", "--deduplication.near_threshold", "null",
        check=False, RAY_ADDRESS="local",
    )  # fmt: skip
    assert result.returncode == 2
    assert "not this one" in result.stderr and result.stderr.count("\n") == 1, result.stderr
