"""How much a model's outputs depend on those of its modules: for each the Gauss-Newton matrix, estimated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from fffconvert.activations import check_finite
from fffconvert.batch import Batch, first_with, parts_of, to_device, tokens_in
from fffconvert.display import track
from fffconvert.families import chooses_among_texts
from fffconvert.heads import TOKEN_LOGITS
from fffconvert.modes import evaluating, frozen
from fffconvert.onednn import onednn_on

SENSITIVITY_TOKENS = 8192  # what is estimated from them are no more than d_model * d_model numbers
BATCH_SIZE_OF_WORDS = 4  # where the words of a vocabulary are differentiated


def sensitivities(
    model: PreTrainedModel, places: list[nn.Module], batches: list[Batch], seed: int
) -> list[Tensor]:
    """How a model's outputs depend on the outputs of some modules: for each `(d_model, d_model)`, mean diagonal 1.

    For a small error `e` of a module's output at a token, `e @ sensitivity @ e` is in proportion to the squared
    error that it makes in what the model gives: the logits, or the last hidden states where there is no head. It is
    the mean over tokens of `J.T @ J`, `J` the Jacobian: the Gauss-Newton matrix, by one random projection of
    the outputs for each batch (Hutchinson 1989).

    Args:
        model: Any model. Left as it was.
        places: Modules in it; one may be used several times.
        batches: Padded batches; the first are used, some `SENSITIVITY_TOKENS` together.
        seed: Of the projections.

    Raises:
        UserError: For gradients that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = [torch.zeros(()) for _ in places]
    few = batches[: first_with(SENSITIVITY_TOKENS, map(tokens_in, batches))]
    if model.get_output_embeddings() is not None:  # a number for each word of the vocabulary at each place
        few = [part for batch in few for part in parts_of(batch, BATCH_SIZE_OF_WORDS)]
    # a head that chooses among texts reads them in groups
    differentiated = model.base_model if chooses_among_texts(model) else model
    with (
        evaluating(model),
        frozen(model),
        torch.enable_grad(),
        onednn_on(model.device),
        differentiable(places) as outputs,
    ):
        for batch in track(few, "Measuring sensitivities"):
            given = differentiated(**to_device(batch, model.device), return_dict=True)
            projected = random_projection(given, batch["attention_mask"], generator)
            flat = [output for of_place in outputs for output in of_place]
            gradients = iter(torch.autograd.grad(projected, flat))
            for number, of_place in enumerate(outputs):
                rows = torch.cat([next(gradients).flatten(0, -2) for _ in of_place]).float().cpu()
                totals[number] = totals[number] + rows.T @ rows
                of_place.clear()
    for total in totals:
        check_finite(total)
    return [total / total.diagonal().mean().clamp_min(torch.finfo(total.dtype).tiny) for total in totals]


def random_projection(given: ModelOutput, attention_mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random projection, a scalar, of a model's logits, or of its last hidden states at real tokens."""
    outputs = {name: value for name, value in given.items() if name.endswith("logits")} or {"": given[0]}
    total = given[0].new_zeros(())
    for name, output in outputs.items():
        weights = torch.randn(output.shape, generator=generator).to(output)
        real = attention_mask.to(output)  # (n_texts, n_tokens)
        if name in TOKEN_LOGITS:
            weights *= real
        elif output.dim() == 3:  # (n_texts, n_tokens, n_outputs)
            weights *= real[..., None]
        total = total + (weights * output).sum()
    return total


@contextmanager
def differentiable(modules: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Yields a list per module, to which every call of it adds its output, from which a gradient can be asked.

    The graph begins at the first of them, whether the model's parameters require gradients or not.
    """
    outputs: list[list[Tensor]] = [[] for _ in modules]

    def listen(of_module: list[Tensor], _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        if not any(outputs):
            output = output.detach().requires_grad_()
        of_module.append(output)
        return output

    with ExitStack() as stack:
        for module, own in zip(modules, outputs, strict=True):
            stack.enter_context(module.register_forward_hook(partial(listen, own)))
        yield outputs
