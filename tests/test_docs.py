"""What the documentation shows is what the code does."""

import re

from conftest import ROOT, SMALL, flags, metrics, script, train_losses
from test_readme import make_copy


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_walk_through_of_a_new_objective_works_as_it_stands(dataset, tmp_path):
    copy = make_copy(tmp_path, max_steps=6)
    page = (ROOT / "docs" / "how_to_change.md").read_text(encoding="utf-8")
    text = page.partition("## Add an objective\n")[2].partition("\n## ")[0]
    options, module = blocks(text, "python")
    (diff,) = blocks(text, "diff")
    assert len([line for line in (options + module).splitlines() if line]) + diff.count("\n+") < 40

    path = copy / "utils" / "config.py"
    source = path.read_text(encoding="utf-8")
    for removed, added in re.findall(r"^-(.*)\n((?:\+.*\n)+)", diff, re.M):
        assert source.count(removed + "\n") == 1
        source = source.replace(removed + "\n", added.replace("\n+", "\n").removeprefix("+"))
    source = source.replace("@dataclass\nclass ObjectiveConfig", f"{options}\n\n@dataclass\nclass ObjectiveConfig")
    path.write_text(source, encoding="utf-8")
    (copy / "utils/objectives/prefix.py").write_text(module, encoding="utf-8")

    (command,) = blocks(text, "bash")
    launched = command.strip().removeprefix("accelerate launch ").split()
    small = SMALL | {"data.dataset": dataset, "schedule.max_steps": 3, "evaluation.every_steps": 3}
    script(*launched, *flags(small), cwd=copy)
    records = metrics(copy / "runs/prefix")
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3]
    script(*launched, *flags(small), "--output", "runs/whole", "--objective.prefix.max_share", "0", cwd=copy)
    whole = metrics(copy / "runs/whole")
    assert records[0]["train/loss"] != whole[0]["train/loss"]


def test_the_walk_through_of_a_new_optimizer_works_as_it_stands(dataset, tmp_path):
    """It trains, and resumes to the same numbers, which shows that its state is saved and read."""
    copy = make_copy(tmp_path, max_steps=6)
    page = (ROOT / "docs" / "how_to_change.md").read_text(encoding="utf-8")
    text = page.partition("## Add an optimizer\n")[2].partition("\n## ")[0]
    (function,), (diff,) = blocks(text, "python"), blocks(text, "diff")
    above, entry = (line[1:] for line in diff.splitlines())
    path = copy / "training" / "optimization" / "optimizers.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(above) == 1
    path.write_text(source.replace(above, f"{function}\n\n{above}\n{entry}"), encoding="utf-8")

    (command,) = blocks(text, "bash")
    launched = command.strip().removeprefix("accelerate launch ").split()
    small = SMALL | {"data.dataset": dataset, "schedule.shape": "constant"}
    script(*launched, *flags(small | {"schedule.max_steps": 4}), cwd=copy)
    script(*launched, *flags(small | {"schedule.max_steps": 6, "checkpoint.resume": "auto"}), cwd=copy)
    script(*launched, *flags(small | {"schedule.max_steps": 6, "output": "runs/whole"}), cwd=copy)
    parted, whole = (train_losses(metrics(copy / "runs" / name)) for name in ("nadam", "whole"))
    assert parted == whole and whole[-1] < whole[0]


def test_the_pages_name_what_is_in_the_code():
    """Links of the form [`name`](file.py) name something that stands in that file."""
    found = 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for name, target in re.findall(r"\[`([^`]+)`\]\(([^)#:]+\.(?:py|yaml))\)", page.read_text(encoding="utf-8")):
            text = (page.parent / target).resolve().read_text(encoding="utf-8")
            known = rf'(def|class) {name}\b|\b{name}\(|"{name}"|^(    )?{name}(: .*)? =|\.{name}\b'
            assert re.search(known, text, re.M), (page.name, name, target)
            found += 1
    assert found > 20


def test_the_pages_name_paths_that_exist():
    """Paths in backticks, except the one that a walk-through adds and one in another repository."""
    missing, found = set(), 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/*.md")]:
        folders = "utils|training|preparation|tests|configs|accelerate_configs|examples|benchmarks|launch|sample_data"
        for path in re.findall(rf"`((?:{folders})/[^` {{}}]*)`", page.read_text(encoding="utf-8")):
            found += 1
            missing |= set() if (ROOT / path).exists() else {path}
    assert missing == {"utils/objectives/prefix.py", "benchmarks/llama3_h100_202412_torchtitan.md"} and found > 30
