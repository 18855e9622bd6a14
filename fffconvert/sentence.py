"""Sentence-transformers models: what a folder holds beside its transformer, kept as it is, and its own pooling.

Such a model is a transformer and a list of modules after it (`modules.json`): a pooling, maybe a projection, a
normalization. Converting touches the transformer alone, so the other files are copied.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from fffconvert.errors import UserError

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"  # and which of them is the default
CASE = "sentence_*_config.json"  # whether texts are put in lower case
SENTENCE_FILES = (MODULES, PROMPTS, CASE, "[0-9]*_*/*.json", "[0-9]*_*/*.safetensors")
"""The files beside the transformer's, in the root and in the modules' folders; none can hold code."""

KNOWN = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "CNN")
"""The modules that need nothing but hidden states and what stands before them."""

EXTRA = "pip install 'fffconvert[sentence]'"


@dataclass(frozen=True)
class SentenceModules:
    """What a sentence-transformers model has beside its transformer.

    Attributes:
        files: Contents by path inside the model's folder.
    """

    files: dict[str, bytes]

    def write(self, folder: Path) -> None:
        """Writes the files into a folder that holds the transformer."""
        for path, content in self.files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)

    @property
    def prompt(self) -> str:
        """What sentence-transformers puts before every text unless told otherwise; in most models nothing."""
        settings = json.loads(self.files.get(PROMPTS, b"{}"))
        return str((settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or "")

    @property
    def lowers(self) -> bool:
        """Whether sentence-transformers itself puts texts in lower case."""
        found = [content for path, content in self.files.items() if fnmatch(path, CASE)]
        return any(json.loads(content).get("do_lower_case") for content in found)

    def check_case(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a `UserError` where sentence-transformers puts texts in lower case that the tokenizer would not."""
        if self.lowers and tokenizer.tokenize("Tree") != tokenizer.tokenize("tree"):
            raise UserError(
                "sentence-transformers puts this model's texts in lower case (do_lower_case) and its tokenizer does "
                "not; expected a tokenizer that does it by itself"
            )

    def pooling(self, prompt_tokens: int = 0) -> nn.Module:
        """The modules after the transformer, as sentence-transformers makes them (see `embeddings`).

        Args:
            prompt_tokens: How long the prompt before every text is; some models leave it out of the pooling.

        Raises:
            UserError: Where sentence-transformers is not installed, or a module is not `KNOWN` or cannot be made from
                its files.
        """
        modules: list[nn.Module] = [_Prompted(prompt_tokens)] if prompt_tokens else []
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder))
            for module in json.loads(self.files[MODULES])[1:]:
                home, _, name = module["type"].rpartition(".")
                if name not in KNOWN:
                    raise UserError(f"{MODULES}: {module['type']} is unknown; expected {', '.join(KNOWN)}")
                try:
                    cls = getattr(import_module(home), name)
                    modules.append(cls.load(folder, subfolder=module["path"]))
                except ImportError as error:
                    raise UserError(f"a sentence-transformers model needs that library: {EXTRA}") from error
                except (AttributeError, OSError, TypeError, ValueError) as error:
                    raise UserError(f"{MODULES}: {module['type']} could not be made ({error})") from error
        return nn.Sequential(*modules).requires_grad_(False).eval()


class _Prompted(nn.Module):
    """Tells the modules after it how many tokens of prompt each text begins with."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "prompt_length": self.n_tokens}


def pools(name: str) -> bool:
    """Whether a Hub id or a folder is a sentence-transformers model of hidden states, not of what a head gives.

    Raises:
        UserError: As `read_modules` does of `modules.json`.
    """
    return any(kind.endswith(".Pooling") for kind, _ in listed_modules(name))


def listed_modules(name: str) -> list[tuple[str, str]]:
    """The type and path of each module, the transformer first; none of what is no sentence-transformers model."""
    found = cached_file(
        name,
        MODULES,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return []
    try:
        modules = json.loads(Path(found).read_text(encoding="utf-8"))
        types, paths = zip(*((str(module["type"]), str(module["path"])) for module in modules), strict=True)
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{name}: {MODULES} is no list of modules with a type and a path each") from error
    for kind in types:
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"{name}: module {kind} is code of the model's own, which is not run")
    if paths[0]:
        raise UserError(
            f"{name}: its transformer lies in {paths[0]}; expected it beside {MODULES}, where "
            "SentenceTransformer(...).save_pretrained(FOLDER) puts it"
        )
    return [*zip(types, paths, strict=True)]


def read_modules(name: str) -> SentenceModules | None:
    """What a Hub id or a folder holds beside its transformer; none for what is no sentence-transformers model.

    Raises:
        UserError: For a `modules.json` that is malformed, a model with code of its own, or with the transformer in a
            place of its own.
    """
    modules = listed_modules(name)
    if not modules:
        return None
    root = (
        Path(name)
        if Path(name).is_dir()
        else Path(snapshot_download(name, allow_patterns=list(SENTENCE_FILES)))
    )
    files = {
        str(p.relative_to(root)): p.read_bytes()
        for pattern in SENTENCE_FILES
        for p in sorted(root.glob(pattern))
    }
    for _, path in modules[1:]:
        folder = root / path
        if not fnmatch(path, "[0-9]*_*") or "/" in path:
            raise UserError(f"{name}: module folder {path!r}; expected one such as 1_Pooling")
        if (folder / "pytorch_model.bin").exists() and not (folder / "model.safetensors").exists():
            raise UserError(
                f"{folder}: weights as a pickle are not read; save the model as safetensors first"
            )
    beside = SentenceModules(files)
    try:
        beside.prompt, beside.lowers  # noqa: B018 - read once, for what they may raise
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{name}: one of {PROMPTS}, {CASE} is not what sentence-transformers writes"
        ) from error
    return beside


def embeddings(hidden: Tensor, attention_mask: Tensor, pooling: nn.Module | None) -> Tensor:
    """Sentence embeddings `(n_rows, d)` of last hidden states `(n_rows, n_tokens, d_model)`.

    Args:
        hidden: The states.
        attention_mask: `(n_rows, n_tokens)`, 1 for real tokens.
        pooling: The model's own; without one the mean over the real tokens.
    """
    if pooling is None:
        real = attention_mask[..., None]  # (n_rows, n_tokens, 1)
        return (hidden * real).sum(1) / real.sum(1)
    pooling = pooling.to(hidden.device, torch.float32)  # whatever the transformer is in
    found: Tensor = pooling({"token_embeddings": hidden.float(), "attention_mask": attention_mask})[
        "sentence_embedding"
    ]
    return found
