"""What `info` reads of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY, tiny_model

from fffconvert import UserError
from fffconvert.inspection import env, info

FIT = {"layer": 0, "error": 0.5, "smallest_leaf": 0.2, "largest_leaf": 0.3}


@pytest.mark.parametrize("model_type", TINY)
def test_a_dense_model_is_all_active(model_type, folder_of):
    found = info(folder_of(tiny_model(model_type)))
    assert (found.model_type, found.d_model, found.dense_neurons) == (model_type, 16, 32)
    assert found.tree is None
    assert found.active_neurons == 32
    assert found.ffn_parameters == found.dense_ffn_parameters
    assert found.layers == []


def test_what_it_finds_is_plain_whatever_names_the_folder(classifier, folder_of):
    folder = folder_of(classifier)
    assert json.loads(json.dumps(info(Path(folder)).to_dict()))["name"] == folder


@pytest.mark.parametrize(
    "layers",
    [3, "none", [1], [{}], [{"layer": 0}], [{**FIT, "error": "small"}], [{**FIT, "error": None}]],
    ids=str,
)
def test_malformed_layers_are_one_line(layers, classifier, folder_of):
    folder = folder_of(classifier)
    file = Path(folder, "report.json")
    file.write_text(json.dumps({"layers": [FIT]}))
    assert info(folder).layers == [FIT]
    file.write_text(json.dumps({"layers": layers}))
    with pytest.raises(
        UserError, match=r"report.json: `layers` is not what fffconvert wrote there"
    ) as caught:
        info(folder)
    assert "\n" not in str(caught.value)


def test_every_kernel_says_whether_it_is_there():
    kernels = {name: text for name, text in env().items() if name.startswith("kernel ")}
    assert kernels
    assert all(text.startswith(("available: ", "not available: ")) for text in kernels.values())
