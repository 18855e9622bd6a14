"""A converted model where fffconvert is not installed: one flat file, through `trust_remote_code`."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from conftest import UNLIKE, tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from fffconvert import TreeShape, modeling, remote
from fffconvert.families import FAMILIES, Family
from fffconvert.kernels import reference
from fffconvert.quantization import quantize

SHAPE = TreeShape(depth=2, leaf_width=3, trunk=2, trees=2, emitting=True)
IDS = torch.arange(5, 29).reshape(2, 12)

# Runs without the site module, so that no editable installation is seen, and from another folder.
CLEAN = """
import json, sys
folders, sys.path[:] = json.loads(sys.argv[1]), [*sys.path, *json.loads(sys.argv[2])]
sys.modules["fffconvert"] = None  # even a copy in site-packages cannot be imported
import torch, transformers
torch.set_num_threads(1)
results = {}
for folder, auto_class in folders:
    load = getattr(transformers, auto_class).from_pretrained
    model = load(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = model(torch.arange(5, 29).reshape(2, 12))
    results[folder] = {k: v for k, v in outputs.items() if isinstance(v, torch.Tensor)}
    if folder == folders[0][0]:
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager")(torch.arange(5, 29).reshape(2, 12))
        torch.testing.assert_close(compiled[0], outputs[0])
    if auto_class == "AutoModel":
        model.save_pretrained(folder + "-again")
        load(folder + "-again", trust_remote_code=True)
torch.save(results, sys.argv[3])
"""


def tiny(family: Family, dense_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A converted model of a family and head, with random weights large enough to matter."""
    dense = tiny_config(family.model_type, initializer_range=0.5)
    config = modeling.config_with(dense, modeling.config_class(family), fff=SHAPE.to_dict())
    transformers.set_seed(0)
    return modeling.model_class(dense_class)(config).eval()


def in_clean_environment(folders: list[tuple[str, str]], tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """The outputs of models by folder, from a process that cannot import fffconvert."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    file = tmp_path / "results.pt"
    arguments = [json.dumps(folders), json.dumps(paths), str(file)]
    command = [sys.executable, "-I", "-S", "-c", CLEAN, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


def tensors(outputs: dict[str, object]) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference instead of the kernel: what the flat file holds."""
    monkeypatch.setattr("fffconvert.fff.fff_forward", reference.fff_forward)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("all_heads", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "all"])
def test_heads_of_every_family_load_without_fffconvert_and_give_the_same_bits(tmp_path, all_heads):
    """Of each family that is unlike the others another head in turn, or all heads of all families."""
    models: dict[str, PreTrainedModel] = {}
    folders = []
    families = [FAMILIES[name] for name in (FAMILIES if all_heads else UNLIKE)]
    for number, family in enumerate(families):
        heads = {dense_class: auto_class for auto_class, dense_class in modeling.heads_of(family)}
        usual = [
            head for head in heads.items() if "MultipleChoice" not in head[0].__name__
        ]  # takes other inputs
        for dense_class, auto_class in usual if all_heads else [usual[number % len(usual)]]:
            folder = str(tmp_path / f"{family.model_type}-{auto_class.__name__}")
            models[folder] = tiny(family, dense_class)
            models[folder].save_pretrained(folder)
            folders.append((folder, auto_class.__name__))
    assert len(folders) >= (4 if all_heads else 1) * len(families)
    assert "AutoModel" in {auto_class for _, auto_class in folders}
    int8 = str(tmp_path / "int8")
    models[int8] = quantize(tiny(FAMILIES["bert"], transformers.BertForSequenceClassification))
    models[int8].save_pretrained(int8)
    folders.append((int8, "AutoModelForSequenceClassification"))
    found = in_clean_environment(folders, tmp_path)
    for folder, auto_class in folders:
        with torch.no_grad():
            ours = tensors(models[folder](IDS))
        assert found[folder].keys() == ours.keys()
        assert all(torch.equal(found[folder][name], value) for name, value in ours.items()), folder
        if auto_class == "AutoModel":
            again = AutoModel.from_pretrained(f"{folder}-again").eval()
            assert type(again) is type(models[folder])  # saved without fffconvert, loaded with it
            with torch.no_grad():
                assert all(torch.equal(value, ours[name]) for name, value in tensors(again(IDS)).items())


def test_registered_classes_win_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to trust the code"))
    tiny(FAMILIES["bert"], transformers.BertModel).save_pretrained(tmp_path)
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        model = AutoModel.from_pretrained(tmp_path, **trust)
        assert type(model) is modeling.FFFBertModel
        assert type(model.config) is modeling.FFFBertConfig
        assert type(AutoModel.from_config(model.config, **trust)) is modeling.FFFBertModel


def test_a_model_can_be_loaded_with_another_head(tmp_path):
    tiny(FAMILIES["bert"], transformers.BertModel).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model).__name__ == "FFFBertForSequenceClassification"
    assert AutoConfig.from_pretrained(tmp_path).auto_map["AutoModelForSequenceClassification"] == (
        "modeling_fff.FFFBertForSequenceClassification"
    )


def test_the_flat_file_is_complete_and_small(tmp_path):
    file = tmp_path / "modeling_fff.py"
    file.write_text(remote.flat_source(), encoding="utf-8")
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(file)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # no name undefined, no import unused
    text = file.read_text(encoding="utf-8")
    assert "import fffconvert" not in text
    assert "from fffconvert" not in text
    assert "SPDX-License-Identifier: Apache-2.0" in text
    assert len(text) < 40_000


def test_a_name_defined_twice_is_refused():
    definitions: dict[str, str] = {}
    remote._read("def f(): ...", {}, definitions)
    with pytest.raises(ValueError, match="f is defined twice"):
        remote._read("def f(): ...", {}, definitions)


def test_what_is_not_needed_is_left_out():
    source = '''
import os
from sys import argv as arguments

# Why it is so.
NUMBER = 1
"""What it is."""


def used():
    return NUMBER, arguments


def unused():
    return os
'''
    imports, definitions = {}, {}
    remote._read(source, imports, definitions)
    needed = remote._needed({"used"}, definitions)
    assert {"used", "NUMBER"} == needed & definitions.keys()
    assert definitions["NUMBER"].strip() == '# Why it is so.\nNUMBER = 1\n"""What it is."""'
    assert remote._import_lines(imports, needed) == ["from sys import argv as arguments", ""]


def test_classes_are_pickled_by_name():
    assert pickle.loads(pickle.dumps(modeling.FFFBertModel)) is modeling.FFFBertModel
    for name in ("FFFGPT2Model", "FFFNothing", "BertModel"):
        assert not hasattr(modeling, name)
