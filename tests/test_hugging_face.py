"""Tiny models of transformers, with random weights: text with padding, images, adapters of peft, checkpointing."""

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import innerloop as il

transformers = pytest.importorskip("transformers")

WAYS, LENGTH = 3, 7
EXAMPLE = Path(__file__).parents[1] / "examples" / "hugging_face.py"


def reader() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, num_labels=WAYS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


def viewer() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=WAYS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).double()


def sentences(count: int = 2) -> il.Task:
    torch.manual_seed(1)

    def part() -> tuple[dict[str, Tensor], Tensor]:
        mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 6, 1))).long()
        ids = torch.randint(1, 20, (count, 6, LENGTH)) * mask
        return {"input_ids": ids, "attention_mask": mask}, torch.arange(6).remainder(WAYS).repeat(count, 1)

    return il.Task(part(), part())


def images(count: int = 2) -> il.Task:
    torch.manual_seed(1)
    targets = torch.arange(6).remainder(WAYS).repeat(count, 1)
    return il.Task(*((torch.randn(count, 6, 3, 8, 8).double(), targets) for _ in range(2)))


def unrolled(model: nn.Module, adapted: tuple[str, ...], batch: il.Task, steps: int, lr: float) -> dict[str, Tensor]:
    """By hand, with a graph of everything."""
    meta = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], part: Any, task: int) -> Tensor:
        inputs, targets = torch.utils._pytree.tree_map(lambda value: value[task], part)
        given = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        return F.cross_entropy(functional_call(model, {**meta, **params}, *given).logits, targets)

    with sdpa_kernel(SDPBackend.MATH):
        for task in range(2):
            params = {name: meta[name] for name in adapted}
            for _ in range(steps):
                grads = torch.autograd.grad(loss(params, batch.support, task), list(params.values()), create_graph=True)
                params = {name: p - lr * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
            (loss(params, batch.query, task) / 2).backward()
    return {name: value.grad for name, value in meta.items() if value.grad is not None}


def near(learner: il.MetaLearner, expected: dict[str, Tensor]) -> None:
    found = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11)


CHOICES: dict[str, dict[str, il.adapts.Adapts]] = {
    "head": {"text": il.Head(), "images": il.Head()},
    "everything": {"text": il.Everything(), "images": il.Everything()},
    "lora": {"text": il.LoRA(2, "*.query", "classifier"), "images": il.LoRA(2, "vit.layers.1.*", "classifier")},
}


@pytest.mark.filterwarnings("ignore:.* is computed task by task")
@pytest.mark.parametrize("adapts", list(CHOICES))
@pytest.mark.parametrize("kind", ["text", "images"])
def test_the_meta_gradient_is_that_of_autograd(kind: str, adapts: str) -> None:
    """Of a dict of token ids and masks, given by keywords, and of images; scores are read from ``.logits``."""
    model, batch = (reader(), sentences()) if kind == "text" else (viewer(), images())
    learner = il.MetaLearner(model.eval(), CHOICES[adapts][kind], il.SGD(lr=0.5, steps=2))
    if adapts == "head":
        assert learner.adapted == ("classifier.weight", "classifier.bias")
    expected = unrolled(copy.deepcopy(learner.model), learner.adapted, batch, 2, 0.5)
    learner.eval()
    metrics = learner.meta_step(batch)
    assert metrics.accuracy is not None
    near(learner, expected)


def test_padding_is_not_seen() -> None:
    batch, learner = sentences(1), il.MetaLearner(reader(), "head", il.SGD(lr=0.5, steps=2))
    learner.eval()
    (inputs, targets), (asked, _) = torch.utils._pytree.tree_map(lambda value: value[0], batch)
    other = inputs | {"input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 19)}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    one, same = (learner.adapt(each, targets)(**asked).logits for each in (inputs, other))
    torch.testing.assert_close(one, same)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_models_that_checkpoint_themselves_work_or_are_refused(reentrant: bool) -> None:
    batch = sentences()
    plain = il.MetaLearner(reader(), "everything", il.SGD(lr=0.5, steps=2), chunk_size=1)
    plain.meta_step(batch)
    model = reader()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    learner = il.MetaLearner(model, "everything", il.SGD(lr=0.5, steps=2), chunk_size=1)
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            learner.meta_step(batch)
        return
    learner.meta_step(batch)
    near(learner, {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_adapters_of_peft_move_by_name() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.0)
    model = peft.get_peft_model(reader(), config).double()
    learner = il.MetaLearner(
        model, il.Named("*lora*", "*modules_to_save*"), il.SGD(lr=0.5, steps=2), chunk_size=1
    ).eval()
    assert len(learner.adapted) == 2 * 2 * 2 + 2
    assert all("lora" in name or "classifier" in name for name in learner.meta_tree()), "peft has frozen all else"
    expected = unrolled(copy.deepcopy(learner.model), learner.adapted, sentences(), 2, 0.5)
    learner.meta_step(sentences())
    near(learner, expected)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    found = example["main"](steps=3, test_tasks=4)
    assert set(found) == {"head", "lora"}
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert "test accuracy" in capsys.readouterr().out
