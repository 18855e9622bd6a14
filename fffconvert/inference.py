"""A model's answers on every row, and how far its hidden states are from its teacher's.

Rows may be shared out over the processes of `accelerate launch`; every process gets all answers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from fffconvert.accelerator import make_accelerator, own_accelerate, process_state
from fffconvert.batch import Batch, to_device, without_truth
from fffconvert.configuration import is_int8
from fffconvert.display import progress_bar
from fffconvert.errors import UserError
from fffconvert.labels import IGNORED
from fffconvert.loader import loader_of
from fffconvert.loss import hidden_errors
from fffconvert.metrics import Answers
from fffconvert.modes import evaluating, moved
from fffconvert.onednn import onednn_on
from fffconvert.sentence import embeddings
from fffconvert.tasks import Task

BATCH_SIZE = 64
BATCH_SIZE_OF_WORDS = 8  # of models that give a number for each word of their vocabulary at each place

ROWS_FOR_HIDDEN_ERROR = 512  # hidden states vary little from row to row, and both models must run

LONGEST_ANSWER = 30  # tokens, as SQuAD's own baselines have it


def predict(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Dataset, split: str
) -> Answers:
    """A model's answers on every row (see `fffconvert.metrics`), in the rows' order."""
    picks: dict[str, Callable[[ModelOutput, Batch], Tensor]] = {
        "tokens": tags,
        "question": partial(spans, sep_token_id=tokenizer.sep_token_id),
        "masked": words,
    }
    pick = picks.get(task.kind, logits)
    found = forward_all(model, tokenizer, rows, f"Evaluating on {split}", pick)
    if not task.is_per_token:
        return np.stack(found)
    labels = map(np.asarray, rows["labels"])
    return [answer[: len(label)][label != IGNORED] for answer, label in zip(found, labels, strict=True)]


def logits(output: ModelOutput, _batch: Batch) -> Tensor:
    """The logits of each row, `(n_rows, n_outputs)`."""
    found: Tensor = output["logits"]
    return found.float()


def tags(output: ModelOutput, _batch: Batch) -> Tensor:
    """The class of each token, `(n_rows, n_tokens)`."""
    return logits(output, _batch).argmax(-1)


def words(output: ModelOutput, batch: Batch) -> Tensor:
    """The likeliest token at each masked place and the true one's log-probability there, `(n_rows, n_tokens, 2)`."""
    counted = batch["labels"] != IGNORED  # (n_rows, n_tokens)
    scores = output["logits"][counted].float()  # (n_counted, n_words)
    true = batch["labels"][counted][:, None]  # (n_counted, 1)
    log_probability = scores.gather(-1, true)[:, 0] - scores.logsumexp(-1)
    found = scores.new_zeros(*counted.shape, 2)
    found[counted] = torch.stack([scores.argmax(-1).float(), log_probability], -1)
    return found


def spans(output: ModelOutput, batch: Batch, sep_token_id: int) -> Tensor:
    """The first and last token of the likeliest span of each row, `(n_rows, 2)`: in the context, or at place 0 none."""
    separators = batch["input_ids"] == sep_token_id  # (n_rows, n_tokens)
    possible = batch["attention_mask"].bool() & separators.cumsum(1).bool() & ~separators
    possible[:, 0] = True
    lowest = torch.finfo(torch.float32).min / 4
    start, end = (
        output[f"{name}_logits"].float().masked_fill(~possible, lowest) for name in ("start", "end")
    )
    n_tokens = start.shape[1]
    allowed = torch.ones(n_tokens, n_tokens, device=start.device).triu().tril(LONGEST_ANSWER - 1).bool()
    allowed[0, 1:] = False
    scores = (start[:, :, None] + end[:, None, :]).masked_fill(~allowed, 4 * lowest)
    best = scores.flatten(1).argmax(1)
    return torch.stack([best // n_tokens, best % n_tokens], 1)


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pooling: nn.Module | None,
    rows: Dataset,
    split: str,
) -> NDArray[np.float32]:
    """Sentence embeddings at unit length, `(n_rows, d)`, by the model's pooling or the mean over its tokens.

    Raises:
        UserError: For a model with a head, or that gives NaN or infinity.
    """

    def pool(output: ModelOutput, batch: Batch) -> Tensor:
        if "last_hidden_state" not in output:
            raise UserError(f"{type(model).__name__} has a head that cannot be judged; expected a known one")
        found = embeddings(output["last_hidden_state"], batch["attention_mask"], pooling)
        return nn.functional.normalize(found.float(), dim=-1)

    return np.stack(forward_all(model, tokenizer, rows, f"Embedding {split}", pool))


def device_for(model: PreTrainedModel) -> torch.device:
    """Where a model is judged: where Accelerate would train it, but int8 projections run on CPUs alone."""
    return torch.device("cpu") if is_int8(model.config) else process_state().device


@own_accelerate()
def forward_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    description: str,
    pick: Callable[[ModelOutput, Batch], Tensor],
    hidden_states: bool = False,
) -> list[NDArray[Any]]:
    """Runs a model over all rows; gives for each row what `pick` takes from the output and the batch.

    Raises:
        UserError: For a model that gives NaN or infinity.
    """
    accelerator, device = make_accelerator(), device_for(model)
    most = BATCH_SIZE if model.get_output_embeddings() is None else BATCH_SIZE_OF_WORDS
    size = -(-most // accelerator.num_processes) * accelerator.num_processes
    by_length = np.argsort(rows["length"], kind="stable")[::-1]  # little padding, and the longest batch first
    sampler = BatchSampler(SequentialSampler(rows), size, drop_last=False)
    loader = accelerator.prepare_data_loader(loader_of(rows.select(by_length), tokenizer, sampler))
    found: list[NDArray[Any]] = []
    with (
        evaluating(model),
        moved(model, device),
        torch.no_grad(),
        onednn_on(device),
        progress_bar(description, len(loader)) as advance,
    ):
        for batch in loader:
            batch = to_device(batch, device)
            output = model(**without_truth(batch), output_hidden_states=hidden_states, return_dict=True)
            if not output[0].isfinite().all():
                raise UserError(f"{type(model).__name__} gives NaN or infinity; expected finite numbers")
            picked = pick(output, batch).to(accelerator.device)
            found.extend(
                accelerator.gather_for_metrics(accelerator.pad_across_processes(picked, dim=1)).cpu().numpy()
            )
            advance("")
    return [found[place] for place in np.argsort(by_length)]


def hidden_error(
    model: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> float:
    """The mean error of a model's hidden states on the first rows."""

    def compare(output: ModelOutput, batch: Batch) -> Tensor:
        real = batch["attention_mask"].float()
        theirs = teacher(**without_truth(batch), output_hidden_states=True, return_dict=True)
        return hidden_errors(output, theirs, real)

    rows = rows.select(range(min(ROWS_FOR_HIDDEN_ERROR, len(rows))))
    with evaluating(teacher), moved(teacher, device_for(model)):
        errors = forward_all(model, tokenizer, rows, "Comparing hidden states", compare, True)
    return float(np.mean(errors))
