"""What the documentation shows is run or parsed, so that it cannot drift from the code."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import commands, sentences, tiny_config
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast, pipeline

import fffconvert.python_docs
from fffconvert.checkpoint import Loaded, save
from fffconvert.cli import main
from fffconvert.conversion import convert
from fffconvert.recipe import DataSource, Recipe, Training, load_recipe
from fffconvert.tree import TreeShape

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "benchmarks/README.md", "benchmarks/notes.md", "benchmarks/results/README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


# ---- Commands


def command_lines() -> Iterator[tuple[str, str]]:
    """Places that show a command line, and the line."""
    texts = {
        "README.md": "\n".join(re.findall(r"(?s)```bash\n.*?```|`[^`]+`", README)),
        "Makefile": (ROOT / "Makefile").read_text(encoding="utf-8"),
        "fffconvert --help": main.help or "",
        **{f"{name} --help": command.help or "" for name, command in commands()},
    }
    for place, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            if shown := re.search(r"(?:^\s*|`|-m |/)fffconvert (?!COMMAND)([a-z-]+ [^`]+)", line):
                yield place, shown[1].strip()


@pytest.mark.parametrize(("place", "line"), list(command_lines()), ids=lambda text: text.replace(" ", "_"))
def test_a_command_line_that_is_shown_parses(place: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    elided = words[-1] == "..."
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *words = words
        assert name in command.commands, f"{place}: there is no command {name}"
        command = command.commands[name]
    with click.Context(command, info_name=name, resilient_parsing=elided) as context:
        command.parse_args(context, words[:-1] if elided else words)
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), f"{place}: there is no {word}"


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[0] for place, line in command_lines() if place == "README.md"}
    shown |= set(re.findall(r"`(?:fffconvert )?([a-z-]+)`", README))
    assert {name.split()[0] for name, _ in commands()} - shown == set()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", README))))
def test_a_make_target_that_is_shown_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^{target}:", makefile)
    assert re.search(rf"(?m)^\.PHONY:.*\b{target}\b", makefile)


@pytest.mark.parametrize(
    "script", sorted(set(re.findall(r"python (?:-m )?((?:benchmarks|examples)[/.][\w./]+)", README)))
)
def test_a_script_that_is_shown_exists(script: str) -> None:
    assert (ROOT / script).is_file() or (ROOT / f"{script.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_a_relative_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing


# ---- Python


def test_the_python_that_the_readme_shows(
    classifier: BertForSequenceClassification,
    folder_of: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(classifier, "my-classifier")
    rows = [f"{text},LABEL_{int('good' in text)}" for text in sentences(540)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    loading, verbs = re.findall(r"(?s)```python\n(.*?)```", README)
    exec(verbs, {})
    assert "Scores(task='train.csv'" in capsys.readouterr().out
    (tmp_path / "student").rename(tmp_path / "distilled")
    names: dict[str, Any] = {}
    exec(loading, names)
    assert names["classify"]("a good film")[0]["label"] in classifier.config.label2id
    assert type(names["classify"].model).__name__ == "FFFBertForSequenceClassification"


def test_the_recipe_that_the_readme_shows(tmp_path: Path) -> None:
    (shown,) = re.findall(r"(?s)```yaml\n(.*?)```", README)
    (tmp_path / "mine.yaml").write_text(shown, encoding="utf-8")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe == Recipe(
        model="my-classifier",
        data=DataSource("train.csv", label="stars"),
        distill=Training(epochs=3),
        controls=("removed", "narrow"),
    ), "all else are the defaults"


# ---- Scripts


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The folder of a converted sentence encoder."""
    dense = BertModel(tiny_config()).eval()
    made = convert(dense, tokenizer, sentences(50), TreeShape(depth=2, leaf_width=2))
    save(Loaded("dense", made.model, tokenizer), tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an example as `python examples/NAME.py ARGUMENTS` does."""

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")

    return run


def test_embed_and_search(
    encoder: str, run_script: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("embed_and_search", encoder, "Sort a list.")
    title, *found = capsys.readouterr().out.splitlines()
    assert title == "FFFBertModel: Sort a list."
    similarities = [float(line.split()[0]) for line in found]
    assert len(similarities) == 4
    assert similarities == sorted(similarities, reverse=True)


def test_classify(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    run_script: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = convert(classifier, tokenizer, sentences(50), TreeShape(depth=2, leaf_width=2))
    save(Loaded("dense", made.model, tokenizer), tmp_path / "converted")
    run_script("classify", str(tmp_path / "converted"), "a good film", "a bad book")
    for line, text in zip(capsys.readouterr().out.splitlines(), ("a good film", "a bad book"), strict=True):
        assert re.fullmatch(rf"[01]\.\d\d  LABEL_[01]  {text}", line)


def test_classify_with_embeddings(
    encoder: str, run_script: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("classify_with_embeddings", encoder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.split()[-1] in ("files", "networks") for line in lines)


def test_convert_own_classifier(
    classifier: BertForSequenceClassification,
    folder_of: Callable[..., str],
    run_script: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [f"{text},LABEL_{int('good' in text)}" for text in sentences(64)]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    run_script(
        "convert_own_classifier",
        folder_of(classifier, "teacher"),
        str(tmp_path / "own.csv"),
        str(tmp_path / "made"),
    )
    assert "agreement with the teacher" in capsys.readouterr().out
    assert type(pipeline("text-classification", str(tmp_path / "made")).model).__name__.startswith("FFF")


def test_write_python_docs(
    tmp_path: Path,
    run_script: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    docstrings = fffconvert.python_docs.docstrings  # of the whole library it takes seconds
    monkeypatch.setattr(fffconvert.python_docs, "docstrings", lambda folder: docstrings(folder / "json"))
    run_script("write_python_docs", str(tmp_path / "docs.txt"))
    lines = (tmp_path / "docs.txt").read_text(encoding="utf-8").splitlines()
    assert capsys.readouterr().out == f"{tmp_path / 'docs.txt'}: {len(lines)} sentences\n"
    assert any("JSON" in line for line in lines)


def test_every_example_has_a_test_and_says_how_to_run_it() -> None:
    for script in EXAMPLES:
        assert f"test_{script.stem}" in globals()
        assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")
