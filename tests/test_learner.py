"""The learner as its users meet it: gradients, evaluation, adaptation, state, and models of their own."""

import copy
import warnings

import pytest
import torch
from torch import nn

import innerloop as il
from problems import TASKS, WAYS, SharedWeights, model_and_batch, relative_error
from reference import meta_gradient


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def grads(learner: il.MetaLearner) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


def flat_batch(tasks: int = TASKS, features: int = 6) -> il.Task:
    labels = torch.arange(WAYS).repeat_interleave(2).expand(tasks, -1)
    return il.Task((torch.randn(tasks, 2 * WAYS, features), labels), (torch.randn(tasks, 2 * WAYS, features), labels))


def test_a_training_loop_of_ones_own_finds_the_best_initialisation():
    tasks = il.tasks.linear(shots=5, queries=10)  # the best start of a linear model is known: all ones
    learner = il.MetaLearner(
        nn.Sequential(nn.Linear(10, 1, bias=False)), inner=il.SGD(lr=0.02, steps=2), loss=nn.functional.mse_loss
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for batch in tasks.train(tasks_per_batch=16, steps=150):
        optimizer.zero_grad()
        metrics = learner.meta_step(batch)
        optimizer.step()
        assert metrics.accuracy is None
    assert (learner.model[0].weight - 1).abs().max() < 0.3
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    assert adapted(batch.query[0][0]).shape == batch.query[1][0].shape


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, None])
def test_chunks_change_nothing(chunk_size):
    model, _ = model_and_batch("mlp")
    torch.manual_seed(3)
    batch = flat_batch(tasks=7).to(dtype=torch.float64)
    whole, chunked = (
        il.MetaLearner(model, inner=il.LearnedRates(lr=0.1, steps=2), chunk_size=size) for size in (7, chunk_size)
    )
    expected, found = whole.meta_step(batch), chunked.meta_step(batch)
    assert relative_error(grads(chunked), grads(whole)) < 1e-14
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-14)
    assert found.accuracy.item() == pytest.approx(expected.accuracy.item())
    torch.testing.assert_close(chunked.evaluate(batch).outputs, whole.evaluate(batch).outputs)


def test_gradients_add_up_over_meta_steps_as_backward_does():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2))
    learner.meta_step(batch)
    once = {name: value.clone() for name, value in grads(learner).items()}
    learner.meta_step(batch)
    assert relative_error(grads(learner), {name: 2 * value for name, value in once.items()}) < 1e-14


def test_meta_gradient_is_the_mean_over_tasks():
    model, batch = model_and_batch("mlp")
    both, each = il.MetaLearner(model), il.MetaLearner(model)
    both.meta_step(batch)
    for task in range(TASKS):
        each.meta_step(torch.utils._pytree.tree_map(lambda value, task=task: value[task : task + 1], batch))
    assert relative_error(grads(both), {name: value / TASKS for name, value in grads(each).items()}) < 1e-14


def test_evaluation_changes_nothing_and_its_curve_starts_unadapted():
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model, inner=il.Momentum(lr=0.1, steps=2, test_steps=4))
    before = state(learner)
    result = learner.evaluate(batch, curve=True)
    assert same(before, state(learner))
    assert not grads(learner)
    assert result.accuracy_curve.shape == result.loss_curve.shape == (TASKS, 5)
    torch.testing.assert_close(result.accuracy_curve[:, -1], result.accuracy)
    none = learner.evaluate(batch, steps=0)
    torch.testing.assert_close(result.loss_curve[:, 0], none.loss)
    outputs = torch.stack([learner.model(images) for images in batch.query[0]])
    torch.testing.assert_close(none.outputs, outputs)
    assert torch.equal((none.outputs.argmax(-1) == batch.query[1]).float().mean(-1), none.accuracy)


@pytest.mark.parametrize("inductive", [False, True])
@pytest.mark.parametrize("adapts", [il.Everything(), il.Head(), il.Blocks("00110")])
@pytest.mark.parametrize("batch_norm", ["batch", "task"])
def test_adapted_module_predicts_what_evaluation_predicts(inductive, adapts, batch_norm):
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model, adapts, il.SGD(lr=0.1, steps=3), batch_norm=batch_norm)
    outputs = learner.evaluate(batch, inductive=inductive).outputs
    before = state(learner)
    for task in range(TASKS):
        adapted = learner.adapt(batch.support[0][task], batch.support[1][task], inductive=inductive)
        torch.testing.assert_close(adapted(batch.query[0][task]), outputs[task], rtol=1e-9, atol=1e-9)
    assert same(before, state(learner))


def test_adapted_module_is_plain_and_shares_what_did_not_change():
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=1))
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0], inductive=True)
    assert not any(type(module).__module__.startswith("innerloop.batch_norm") for module in adapted.modules())
    assert not adapted(batch.query[0][0]).requires_grad
    for name, parameter in adapted.named_parameters():
        shared = parameter.data_ptr() == learner.model.get_parameter(name).data_ptr()
        assert shared == (not name.startswith("head."))
    alone = torch.cat([adapted(image[None]) for image in batch.query[0][0]])
    torch.testing.assert_close(alone, adapted(batch.query[0][0]))


def test_state_dict_round_trips_learned_rates_included():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.LearnedRates(lr=0.1, steps=2, per="layer-step"))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    learner.meta_step(batch)
    optimizer.step()
    fresh = il.MetaLearner(model, inner=il.LearnedRates(lr=0.1, steps=2, per="layer-step"))
    assert not same(state(fresh), state(learner))
    fresh.load_state_dict(learner.state_dict())
    assert same(state(fresh), state(learner))
    assert torch.equal(fresh.evaluate(batch).loss, learner.evaluate(batch).loss)
    assert torch.equal(copy.deepcopy(learner).evaluate(batch).loss, learner.evaluate(batch).loss)


def test_the_users_model_is_never_changed():
    model, batch = model_and_batch("conv4")
    before, kinds = state(model), [type(module) for module in model.modules()]
    learner = il.MetaLearner(model)
    learner.meta_step(batch)
    torch.optim.SGD(learner.parameters(), lr=1.0).step()
    assert same(before, state(model))
    assert kinds == [type(module) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("record", [None, False])
def test_shared_and_unused_parameters(record):
    model, batch = SharedWeights().double(), flat_batch().to(dtype=torch.float64)
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=3), meta_gradient=il.Unrolled(record=record))
    learner.meta_step(batch)
    assert relative_error(grads(learner), meta_gradient(learner, batch)[0]) < 1e-12
    assert not learner.model.unused.grad.any()
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    assert adapted.first.weight is adapted.second.weight


def test_a_weight_shared_between_an_adapted_and_a_frozen_block_adapts_in_both():
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, WAYS))
        model[2].weight = model[0].weight
        return model.double()

    batch = flat_batch().to(dtype=torch.float64)
    for pattern in ("011", "001"):
        learner = il.MetaLearner(tied(), il.Blocks(pattern), il.SGD(lr=0.1, steps=3))
        learner.meta_step(batch)
        assert relative_error(grads(learner), meta_gradient(learner, batch)[0]) < 1e-12


def test_frozen_parameters_neither_adapt_nor_learn():
    model, batch = copy.deepcopy(model_and_batch("mlp")[0]), model_and_batch("mlp")[1]
    model[0].requires_grad_(False)
    learner = il.MetaLearner(model)
    learner.meta_step(batch)
    assert relative_error(grads(learner), meta_gradient(learner, batch)[0]) < 1e-12
    assert "model.layer1.weight" not in grads(learner)
    adapted = learner.adapt(batch.support[0][0], batch.support[1][0])
    assert torch.equal(adapted[0].weight, model[0].weight)


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, WAYS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(inputs)[0][:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_fall_back_to_the_loop_with_one_warning(dtype):
    batch = model_and_batch("gru")[1].to(dtype=dtype)
    learner = il.MetaLearner(LSTMClassifier().to(dtype), inner=il.SGD(lr=0.1, steps=2))
    with pytest.warns(UserWarning, match="LSTMClassifier is computed task by task"):
        learner.meta_step(batch)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert relative_error(grads(learner), meta_gradient(learner, batch)[0]) < tolerance
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learner.meta_step(batch)
        learner.evaluate(batch)


@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_an_operation_without_a_second_derivative_names_the_cure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, WAYS))
    words = torch.randint(9, (2, 6, 3)), torch.randint(WAYS, (2, 6))
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2))
    with pytest.raises(NotImplementedError) as caught:
        learner.meta_step(il.Task(words, words))
    assert any("products='differences'" in note for note in caught.value.__notes__)
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), products="differences")
    learner.meta_step(il.Task(words, words))
    assert all(parameter.grad.isfinite().all() for parameter in learner.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("record", [None, False])
def test_attention_works_out_of_the_box(training, record):
    model, batch = model_and_batch("encoder")
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=2), meta_gradient=il.Unrolled(record=record)).train(
        training
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.meta_step(batch)
    assert relative_error(grads(learner), meta_gradient(learner, batch)[0]) < 1e-9


@pytest.mark.parametrize("record", [None, False])
def test_dropout_replays_its_masks_and_differs_between_tasks(record):
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, WAYS)).double()
    batch = flat_batch().to(dtype=torch.float64)
    identical = torch.utils._pytree.tree_map(lambda value: value[:1].expand(8, *value.shape[1:]).contiguous(), batch)
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=3), meta_gradient=il.Unrolled(record=record))
    assert learner.evaluate(identical).loss.unique().numel() == 8
    learner.eval()
    assert learner.evaluate(identical).loss.unique().numel() == 1

    # With the draws fixed, the meta-gradient is the derivative of what it claims to be: compare with finite
    # differences.
    learner.train()

    def loss_at(shift: float, direction: dict[str, torch.Tensor]) -> float:
        moved = copy.deepcopy(learner)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += shift * direction[name]
        moved.model[1].register_forward_pre_hook(lambda module, _: torch.manual_seed(int(module.training)) and None)
        torch.manual_seed(5)
        return moved.meta_step(batch).loss.item()

    learner.model[1].register_forward_pre_hook(lambda module, _: torch.manual_seed(int(module.training)) and None)
    torch.manual_seed(5)
    learner.meta_step(batch)
    direction = {name: torch.randn_like(value) for name, value in grads(learner).items()}
    slope = sum(float((grads(learner)[name] * direction[name]).sum()) for name in direction)
    assert (loss_at(1e-5, direction) - loss_at(-1e-5, direction)) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_meta_step_with_dropout_is_reproducible_from_torchs_seed():
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, WAYS))
    batch, found = flat_batch(), []
    for seed in (1, 1, 2):
        learner = il.MetaLearner(model)
        torch.manual_seed(seed)
        learner.meta_step(batch)
        found.append(grads(learner))
    assert relative_error(found[1], found[0]) == 0
    assert relative_error(found[2], found[0]) > 1e-3


def test_adam_inside_gives_no_nan_at_a_zero_gradient():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, WAYS)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is dead, so the first layer's gradient is exactly zero
    learner = il.MetaLearner(model, inner=il.Adam(lr=0.01, steps=3))
    learner.meta_step(flat_batch().to(dtype=torch.float64))
    assert all(value.isfinite().all() for value in grads(learner).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precisions(dtype):
    model, batch = model_and_batch("conv4")
    learner = il.MetaLearner(model).to(dtype)
    metrics = learner.meta_step(batch.to(dtype=torch.float32))  # the batch follows the learner
    assert metrics.loss.dtype == dtype
    assert all(value.dtype == dtype for value in grads(learner).values())


def test_bfloat16_autocast_is_close_to_float32():
    model, batch = model_and_batch("conv4")
    full, half = il.MetaLearner(model).float(), il.MetaLearner(model).float()
    full.meta_step(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert half.meta_step(batch).loss.dtype == torch.float32
    a, b = (torch.cat([value.flatten() for value in grads(learner).values()]) for learner in (full, half))
    assert b.dtype == torch.float32
    assert torch.cosine_similarity(a, b, dim=0) > 0.98


def test_a_whole_model_in_bfloat16_is_close_to_float32():
    model, batch = model_and_batch("conv4")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        learner = il.MetaLearner(copy.deepcopy(model).to(dtype))
        learner.meta_step(batch.to(dtype=dtype))
        found.append(torch.cat([value.flatten().float() for value in grads(learner).values()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.95


def test_different_steps_in_training_and_testing():
    model, batch = model_and_batch("mlp")
    learner = il.MetaLearner(model, inner=il.LearnedRates(lr=0.1, steps=1, test_steps=4, per="layer-step"))
    assert learner.evaluate(batch, curve=True).loss_curve.shape == (TASKS, 5)
    longer = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=4))
    torch.testing.assert_close(learner.evaluate(batch).loss, longer.evaluate(batch).loss)


def test_every_estimator_refuses_or_works_with_every_solver_and_subset():
    estimators = (il.Unrolled(), il.Truncated(1), il.FirstOrder(), il.Reptile())
    solvers = (il.SGD, il.Momentum, il.Adam, il.LearnedRates)
    batch, outcomes = model_and_batch("mlp")[1], {"worked": 0, "refused": 0}
    for estimator in estimators:
        for solver in solvers:
            for adapts in (il.Everything(), il.Head(), il.Body(), il.Blocks("011"), il.Named("*.bias")):
                try:
                    learner = il.MetaLearner(model_and_batch("mlp")[0], adapts, solver(lr=0.1, steps=2), estimator)
                except ValueError as error:
                    outcomes["refused"] += "in place of" in str(error)
                    continue
                learner.meta_step(batch)
                assert any(value.any() for value in grads(learner).values())
                outcomes["worked"] += 1
    assert outcomes["refused"] == 4 * 5 - 3  # Reptile wants everything adapted at rates that are not learned


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: il.MetaLearner(m, il.Blocks("01")), "has 3 blocks: give 3 characters"),
        (
            lambda m: il.MetaLearner(m, il.Named("nothing.*")),
            "'nothing.\\*' matches none of the parameters layer1.weight",
        ),
        (
            lambda m: il.MetaLearner(m, batch_norm="running"),  # type: ignore[arg-type]
            "choose 'batch', 'frozen', 'step' or 'task'",
        ),
        (lambda m: il.MetaLearner(m, chunk_size=0), "1 or more"),
        (lambda m: il.MetaLearner(nn.Sequential(nn.LazyLinear(3))), "pass one batch of inputs through it"),
        (lambda m: il.MetaLearner(m, meta_gradient=il.Reptile(), adapts=il.Head()), "FirstOrder\\(\\) in place of"),
        (lambda m: il.MetaLearner(m).evaluate(model_and_batch("mlp")[1], steps=-1), "0 or more inner steps"),
        (lambda m: il.SGD(lr=0.0, steps=1), "above 0"),
        (lambda m: il.SGD(lr=0.1, steps=-1), "give a whole number of 0 or more"),
        (lambda m: il.Blocks("00000"), "put a 1"),
        (lambda m: il.Blocks("0a1"), "one 0 or 1 a block"),
        (lambda m: il.MetaLearner(SharedWeights(), il.Blocks("01")), "does not say what its blocks are"),
        (lambda m: il.MetaLearner(m).meta_step(model_and_batch("mlp")[1], [1.0]), "1 weights for 5 inner steps"),
    ],
)
def test_errors_name_the_cure(build, message):
    with pytest.raises(ValueError, match=message):
        build(model_and_batch("mlp")[0])


def test_a_single_task_given_as_a_batch_is_told_so():
    model, batch = model_and_batch("mlp")
    single = torch.utils._pytree.tree_map(lambda value: value[0], batch)
    with pytest.raises(ValueError, match="unsqueeze"):
        il.MetaLearner(model).meta_step(single)
