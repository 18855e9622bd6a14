"""Tiny real models, and the data to train them on: no network, no GPU."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

if multiprocessing.parent_process() is None:  # a process that a test starts has its parent's
    CACHE = tempfile.TemporaryDirectory(prefix="fffconvert-tests-")  # deleted when Python ends
    os.environ.update(HF_HOME=CACHE.name, HF_HUB_OFFLINE="1")
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import click
import datasets
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from fffconvert import clock
from fffconvert.cli import main
from fffconvert.columns import unlabelled
from fffconvert.conversion import convert
from fffconvert.encoding import tokenized
from fffconvert.families import FAMILIES
from fffconvert.latency import benchmark
from fffconvert.tasks import TASKS
from fffconvert.tree import TreeShape

WORDS = (
    "the a film book is was very not good bad fine dull bright and but I you we they liked hated saw".split()  # noqa: SIM905
)
TREE = TreeShape(2, 3)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="Also run the tests that are marked slow.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skipped = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tiny models gain nothing from more
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def pytest_collection_finish() -> None:
    gc.freeze()  # training ends with a collection, which need not look at all of torch and transformers


def sentences(n: int, seed: int = 0) -> list[str]:
    """Sentences of three to twelve known words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (n,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))
        for length in lengths
    ]


def tokenized_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Texts without labels as a model takes them."""
    rows = Dataset.from_dict({"text": texts})
    return tokenized(unlabelled("text", ("text",), None), rows, tokenizer)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer that treats text as BERT's does."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *(w.lower() for w in WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    )


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}

TINY: dict[str, dict[str, object]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 8},
    "distilbert": {},
    "mpnet": {"pad_token_id": 1},  # its positions are counted from there whatever the configuration says
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {  # as the published v3 models have it, and the convolution of v2
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        **{"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "conv_kernel_size": 3},
    },
    "albert": {"embedding_size": 8, "num_hidden_layers": 4, "num_hidden_groups": 2},
    "modernbert": {  # global attention, then two local layers; 12 tokens are longer than their window
        **{"num_hidden_layers": 4, "local_attention": 6, "bos_token_id": 2, "eos_token_id": 3},
        **{"cls_token_id": 2, "sep_token_id": 3},
    },
    "nomic_bert": {"head_dim": 8},
    "eurobert": {"head_dim": 8, "bos_token_id": 2, "eos_token_id": 3},
    "jina_embeddings_v3": {},
    "ernie": {},
    "xlm-roberta-xl": {},
}
"""For each row of `FAMILIES` what its tiny configuration needs beyond the sizes that all share."""

UNLIKE = ("bert", "distilbert", "deberta-v2", "albert", "modernbert")
"""The families that differ in where FFNs are and what they are; the others are like one of them."""


def unlike_first(names: Iterable[str] = TINY) -> pytest.MarkDecorator:
    """For a test of many families: by default only of those that are unlike; of the rest it is slow."""
    marked = [pytest.param(name, marks=[] if name in UNLIKE else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("model_type", marked)


def tiny_config(model_type: str = "bert", **changes: object) -> PreTrainedConfig:
    """The smallest model of a family that still has two layers and two attention heads."""
    family = FAMILIES[model_type]
    widths = {"hidden_size": 16, family.n_neurons: 32}
    more = {**SIZES, **widths, "pad_token_id": 0, **TINY[model_type], **changes}
    return getattr(transformers, family.config_class)(**more)


def tiny_model(
    model_type: str, auto_class: str = "AutoModelForSequenceClassification", **changes: object
) -> PreTrainedModel:
    """A dense model of a family, with weights large enough for its FFNs to matter."""
    set_seed(0)
    config = tiny_config(model_type, initializer_range=0.5, **changes)
    return getattr(transformers, auto_class).from_config(config).eval()


def converted(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shape: TreeShape = TREE
) -> PreTrainedModel:
    """A dense model with trees that are fitted on little text."""
    return convert(dense, tokenizer, sentences(60), shape, calibration_tokens=300).model


def batch_of(tokenizer: PreTrainedTokenizerFast, n: int = 8) -> dict[str, Tensor]:
    """Texts that no tree was fitted on, padded."""
    return dict(tokenizer(sentences(n, seed=5), padding=True, return_tensors="pt"))


@pytest.fixture
def classifier() -> BertForSequenceClassification:
    """A dense BERT with a head for two classes and weights large enough for its FFNs to matter."""
    set_seed(0)
    return BertForSequenceClassification(tiny_config(initializer_range=0.5)).eval()


@pytest.fixture
def texts() -> list[str]:
    return sentences(200)


@pytest.fixture(scope="session")
def made_up_glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of GLUE's layout with made-up rows for every task; of MNLI's training rows only a part."""
    root = tmp_path_factory.mktemp("glue")
    for task in TASKS.values():
        (root / task.name).mkdir(parents=True)
        train = "train_partial" if task.name == "mnli" else "train"
        for number, split in enumerate((train, *task.validations)):
            size = 37 if number else 96
            texts = [sentences(size, seed=min(number, 1) + 10 * column) for column in range(2)]
            columns = dict(zip(task.columns, texts, strict=False))
            labels: list[float | int] = [int("good" in text) for text in texts[0]]
            if task.is_regression:
                labels = [float(len({*a.split()} & {*b.split()})) for a, b in zip(*texts, strict=True)]
            elif task.n_outputs == 3:
                labels = [row % 3 for row in range(size)]
            rows = Dataset.from_dict({**columns, "label": labels, "idx": list(range(size))})
            rows.to_parquet(root / task.name / f"{split}.parquet")
    return root


@pytest.fixture
def glue(made_up_glue: Path, tmp_path: Path) -> Path:
    """A test's own copy of `made_up_glue`."""
    return Path(shutil.copytree(made_up_glue, tmp_path / "glue"))


@pytest.fixture
def folder_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    """Saves a model with the tokenizer, and gives its folder."""

    def save(model: transformers.PreTrainedModel, name: str = "dense") -> str:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `benchmark` measure no more than it must: the numbers mean nothing."""
    quick = {"sizes": ((1, 16),), "layer_tokens": (4,), "others": False, "seconds_per_row": 0.0}
    monkeypatch.setattr(benchmark, "__kwdefaults__", quick)
    monkeypatch.setattr(clock, "MOST_CALLS", 1)
    monkeypatch.setattr(clock, "FEWEST_ROUNDS", 2)


def commands(group: click.Group = main, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command by its whole name, those of groups inside groups too."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


def hooks_of(model: torch.nn.Module) -> int:
    """How many hooks the parts of a model have."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
