"""Pushing, by the real Hub client to a small Hub on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import converted
from hub_server import Hub, serving
from huggingface_hub import constants
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from fffconvert.checkpoint import load, save
from fffconvert.errors import UserError
from fffconvert.hub import content_of, push

SECRETS = (
    ".env",
    "token",
    "optimizer.bin",
    "training_args.bin",
    "pytorch_model.bin",
    "checkpoints/step-5/model.safetensors",
    ".cache/huggingface/token",
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(
    classifier: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    folder_of: Callable[..., str],
    tmp_path: Path,
) -> Path:
    """A converted model, and beside it in the same folder what nobody may see."""
    dense = load(folder_of(classifier))
    model = converted(classifier, tokenizer)
    save(replace(dense, model=model), tmp_path / "student", report={"layers": []})
    (tmp_path / "student" / "generation_config.json").write_text("{}")  # as a decoder has it
    for name in SECRETS:
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_text(f"secret of {name}")
    return tmp_path / "student"


def test_one_commit_with_the_model_and_nothing_else(hub: Hub, folder: Path) -> None:
    pushed = push(folder, "user/fast-bert")
    repository = hub.repositories["user/fast-bert"]
    assert repository.commits == [sorted(pushed.files)]
    assert {"README.md", "config.json", "model.safetensors", "report.json"} <= set(pushed.files)
    assert not set(pushed.files) & set(SECRETS)
    assert "generation_config.json" in pushed.files
    assert not any(b"secret of" in content for content in repository.files.values())
    for name, size in pushed.files.items():
        content = (folder / name).read_bytes()
        if name == "README.md":  # its example loads the model from where it is now
            assert b'pipeline("text-classification", "student")' in content
            content = content.replace(b'"student"', b'"user/fast-bert"')
        assert repository.files[name] == content
        assert size == len(repository.files[name])
    assert not repository.private
    assert pushed.url is not None
    assert pushed.url.startswith(hub.url)


def test_what_was_pushed_is_a_model_that_loads(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push(folder, "user/fast-bert")
    (tmp_path / "again").mkdir()
    for name, content in hub.repositories["user/fast-bert"].files.items():
        (tmp_path / "again" / name).write_bytes(content)
    assert type(load(tmp_path / "again").model) is type(load(folder).model)


def test_pushed_again_changes_nothing(hub: Hub, folder: Path) -> None:
    first, second = push(folder, "user/fast-bert"), push(folder, "user/fast-bert")
    assert len(hub.repositories["user/fast-bert"].commits) == 1
    assert second.url == first.url.replace("/user/x/", "/user/fast-bert/")  # type: ignore[union-attr]


def test_what_changed_is_one_more_commit(hub: Hub, folder: Path) -> None:
    push(folder, "user/fast-bert")
    (folder / "README.md").write_text("# Another card\n")
    push(folder, "user/fast-bert")
    assert hub.repositories["user/fast-bert"].commits[1:] == [["README.md"]]


def test_a_folder_without_a_card_is_said_to_have_none(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder, "user/fast-bert", dry_run=True)
    assert "README.md" not in capsys.readouterr().err
    (folder / "README.md").unlink()
    push(folder, "user/fast-bert", dry_run=True)
    assert "has no README.md, so there will be no model card" in " ".join(capsys.readouterr().err.split())


def test_dry_run_sends_nothing(hub: Hub, folder: Path) -> None:
    dry = push(folder, "user/fast-bert", dry_run=True)
    assert hub.requests == []
    assert dry.url is None
    assert dry.files == push(folder, "user/fast-bert").files


def test_private(hub: Hub, folder: Path) -> None:
    push(folder, "user/fast-bert", private=True)
    assert hub.repositories["user/fast-bert"].private


def test_hub_that_cannot_be_reached_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        UserError, match=r"user/fast-bert could not be pushed \(.*is the Hub reachable"
    ) as told:
        push(folder, "user/fast-bert")
    assert "\n" not in str(told.value)


def test_vocabularies_of_tokenizers_that_are_no_tokenizer_json(folder: Path) -> None:
    vocabularies = {"vocab.txt", "bpe.codes", "sentencepiece.bpe.model"}
    for name in vocabularies:
        (folder / name).touch()
    assert push(folder, "user/fast-bert", dry_run=True).files.keys() >= vocabularies


def test_a_name_without_a_user_is_refused(hub: Hub, folder: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"'fast-bert' names no user or organization; expected user/name"):
            push(folder, "fast-bert", dry_run=dry_run)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a b", "user/name/more", "user/na--me", "../etc"])
def test_name_that_no_repository_can_have_is_refused(name: str, hub: Hub, folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot name a repository .*; expected user/name"):
        push(folder, name)
    assert hub.requests == []


def test_folder_without_a_converted_model_is_refused(
    hub: Hub,
    folder: Path,
    classifier: BertForSequenceClassification,
    folder_of: Callable[..., str],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="is dense; expected a converted model"):
        push(Path(folder_of(classifier)), "user/name")
    with pytest.raises(UserError, match="user/name is no folder; expected one that fffconvert wrote"):
        push(Path("user/name"), "user/name")  # which the Hub may have
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights; expected model\.safetensors"):
        push(folder, "user/name", dry_run=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        push(tmp_path / "empty", "user/name")
    assert hub.requests == []


def test_only_the_models_own_name_is_another_in_the_card(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(
        '---\nmodel_name: text-classification\n---\nmodel = pipeline("text-classification", "text-classification")\n'
    )
    content = content_of(card, "user/fast")
    assert isinstance(content, bytes)
    assert b'pipeline("text-classification", "user/fast")' in content
