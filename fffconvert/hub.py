"""The Hub: pushing a converted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fffconvert.checkpoint import load_config
from fffconvert.configuration import refuse_dense
from fffconvert.display import say
from fffconvert.errors import UserError, first_line
from fffconvert.modeling import CODE_MODULE
from fffconvert.recipe import RECIPE
from fffconvert.report import REPORT
from fffconvert.sentence import SENTENCE_FILES

PUBLISHED = (
    "README.md",
    "config.json",
    f"{CODE_MODULE}.py",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    RECIPE,
    REPORT,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "*.model",
    *SENTENCE_FILES,
)
"""All that is ever uploaded, so that checkpoints, optimizer states and tokens cannot be."""


@dataclass(frozen=True)
class Push:
    """What goes to the Hub, or went there.

    Attributes:
        files: Each file's name and size in bytes.
        url: The commit's address; none for a dry run.
    """

    files: dict[str, int]
    url: str | None


def push(folder: Path | str, repo_id: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Uploads a converted model in one commit; makes the repository if it is not there.

    Pushing the same folder again changes nothing.

    Args:
        folder: What `fffconvert run`, `convert` or `distill` wrote.
        repo_id: `user/name`.
        private: Whether a new repository is private.
        dry_run: Only says what would be sent.

    Raises:
        UserError: For a folder without a converted model, a name that no repository can have, or a Hub
            that refuses or cannot be reached.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one that fffconvert wrote")
    refuse_dense(load_config(folder))
    check_repo_id(repo_id)
    paths = {path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()}
    sent = {path.relative_to(folder).as_posix(): content_of(path, repo_id) for path in sorted(paths)}
    files = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in sent.items()
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder} holds no weights; expected model.safetensors beside its config.json")
    if "README.md" not in files:
        say(f"{folder} has no README.md, so there will be no model card; fffconvert.save writes one")
    if dry_run:
        return Push(files, None)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in sent.items()],
            commit_message="Upload a model converted by fffconvert",
        )
    except Exception as error:  # connection, proxy, token and Hub errors share no base class
        raise UserError(
            f"{repo_id} could not be pushed ({first_line(error)}); is the Hub reachable, and are you logged in "
            "(hf auth login)?"
        ) from error
    return Push(files, str(commit))


def check_repo_id(repo_id: str) -> None:
    """Raises a `UserError` for what is no `user/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} cannot name a repository ({first_line(error)}); expected user/name"
        ) from error
    if "/" not in repo_id:  # made for whoever is logged in, and then looked for elsewhere
        raise UserError(f"{repo_id!r} names no user or organization; expected user/name")


def content_of(file: Path, repo_id: str) -> Path | bytes:
    """What is sent of a file: the file, or a card whose example loads the model from the repository."""
    if file.name != "README.md":
        return file
    try:
        name = ModelCard.load(file).data["model_name"]
    except Exception:  # noqa: BLE001 - a card of one's own may hold anything, and goes as it is
        return file
    return file.read_text(encoding="utf-8").replace(f'"{name}")', f'"{repo_id}")').encode()
