"""Linear solvers against dense solves in float64, and the guards that keep a vmapped solve finite."""

import itertools

import pytest
import torch
from torch import Tensor

from innerloop.linear import CG, Neumann, Nystrom, solve_tree

SIZE = 12
EYE = torch.eye(SIZE, dtype=torch.float64)


def symmetric(*eigenvalues: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(square).Q
    return basis @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T


def positive(seed: int = 0) -> Tensor:
    return symmetric(*torch.logspace(-1, 1, SIZE).tolist(), seed=seed)


def right_hand_side(size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solve(solver, matrix: Tensor, b: Tensor, shift: float = 0.0, start: Tensor | None = None):
    return solver.solve(lambda vector: matrix @ vector, b, shift, start)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_conjugate_gradients_are_exact_after_as_many_iterations_as_unknowns(shift):
    matrix, b = positive(), right_hand_side()
    x, info = solve(CG(SIZE, damping=0.3), matrix, b, shift)
    assert relative(x, torch.linalg.solve(matrix + (shift + 0.3) * EYE, b)) < 1e-8
    assert info.residual < 1e-8
    assert (info.products, info.negative_curvature) == (SIZE, 0)


def test_the_error_of_conjugate_gradients_falls_monotonically_in_the_matrix_norm():
    matrix, b = positive(), right_hand_side()
    exact = torch.linalg.solve(matrix, b)
    errors = [exact @ b]  # squared norm of the error of 0
    for iterations in range(1, SIZE):
        error = solve(CG(iterations), matrix, b)[0] - exact
        errors.append(error @ matrix @ error)
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] > 1e-12 * errors[0]  # not yet exact, so the comparison was no accident of rounding


@pytest.mark.parametrize("solver", [CG(3), Neumann(3), Neumann(3, step=0.1), Nystrom(3, damping=0.1)])
def test_nothing_to_solve_gives_zero(solver):
    x, info = solve(solver, positive(), torch.zeros(SIZE, dtype=torch.float64))
    assert torch.equal(x, torch.zeros_like(x))
    assert info.residual == 0


def test_a_tolerance_ends_the_solve_early():
    matrix, b = positive(), right_hand_side()
    x, info = solve(CG(SIZE, tolerance=1e-2), matrix, b)
    assert 1 < info.iterations < SIZE
    assert info.residual <= 1e-2
    assert torch.equal(x, solve(CG(int(info.iterations)), matrix, b)[0])
    assert solve(CG(int(info.iterations) - 1), matrix, b)[1].residual > 1e-2
    assert float((b - matrix @ x).norm() / b.norm()) == pytest.approx(float(info.residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_going_on_after_convergence_stays_finite(dtype):
    matrix, b = symmetric(1, 1, 1, 2, 2, 5, 5, 5).to(dtype), right_hand_side(8).to(dtype)
    x, info = solve(CG(200), matrix, b)
    assert relative(x, torch.linalg.solve(matrix, b)) < 100 * torch.finfo(dtype).eps
    assert info.iterations < 10
    assert info.negative_curvature == 0


def test_negative_curvature_in_the_first_iteration_returns_the_right_hand_side():
    matrix = torch.tensor([1.0, -2.0], dtype=torch.float64).diag()
    b = torch.tensor([0.1, 1.0], dtype=torch.float64)
    x, info = solve(CG(5), matrix, b)
    assert torch.equal(x, b)
    assert (info.negative_curvature, info.iterations) == (1, 0)
    start = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.equal(solve(CG(5), matrix, b, start=start)[0], start)
    # With something on the diagonal, the solution where there is nothing else.
    assert torch.equal(solve(CG(5, damping=0.5), matrix, b)[0], b / 0.5)
    x, info = solve(CG(5, damping=0.25), matrix, b, shift=0.5)
    assert torch.equal(x, b / 0.75)
    assert info.negative_curvature == 1


def test_negative_curvature_later_keeps_what_was_found():
    matrix = torch.tensor([3.0, 2.0, -0.1], dtype=torch.float64).diag()
    b = torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    x, info = solve(CG(9), matrix, b)
    assert info.negative_curvature == 1
    assert info.iterations > 0
    assert torch.equal(x, solve(CG(int(info.iterations)), matrix, b)[0])


def test_zero_curvature_is_a_stop_too():
    x, info = solve(CG(5), torch.zeros(3, 3, dtype=torch.float64), right_hand_side(3))
    assert torch.equal(x, right_hand_side(3))
    assert info.negative_curvature == 1


def test_a_broken_product_is_never_hidden():
    b, calls = right_hand_side(), []

    def product(vector: Tensor) -> Tensor:
        calls.append(None)
        return positive() @ vector * (float("nan") if len(calls) == 3 else 1.0)

    x, info = CG(6).solve(product, b)
    assert x.isnan().any()
    assert info.residual.isnan()
    assert info.iterations == 2
    assert solve(CG(6), positive(), b * float("nan"))[0].isnan().any()


@pytest.mark.parametrize("solver", [CG(4), Neumann(4, step=0.05), Nystrom(4, damping=0.5)])
def test_a_warm_start_solves_for_what_is_left(solver):
    matrix, b, start = positive(), right_hand_side(), right_hand_side(seed=2)
    x, info = solve(solver, matrix, b, start=start)
    rest, _ = solve(solver, matrix, b - (matrix + getattr(solver, "damping", 0) * EYE) @ start)
    torch.testing.assert_close(x, start + rest)
    assert info.products == solve(solver, matrix, b)[1].products + 1


@pytest.mark.parametrize("solver", [CG(4), Neumann(4), Nystrom(4, damping=0.5)])
def test_a_warm_start_at_the_solution_stays_there(solver):
    matrix, b = positive(), right_hand_side()
    damped = matrix + getattr(solver, "damping", 0) * EYE
    start = torch.linalg.solve(damped, b)
    x, info = solve(solver, matrix, b, start=start)
    torch.testing.assert_close(x, start)
    assert info.residual < 1e-13


def test_the_neumann_series_is_the_sum_of_the_powers():
    matrix, b, step = positive(), right_hand_side(), 0.08
    power, total = b, torch.zeros_like(b)
    for _ in range(7):
        total, power = total + step * power, power - step * (matrix @ power + 0.5 * power)
    x, info = solve(Neumann(7, step), matrix, b, 0.5)
    torch.testing.assert_close(x, total)
    assert float(info.residual) == pytest.approx(float((b - matrix @ x - 0.5 * x).norm() / b.norm()))


def test_the_neumann_series_finds_its_own_step():
    matrix, b = positive(), right_hand_side()
    x, info = solve(Neumann(4000), matrix, b)
    assert relative(x, torch.linalg.solve(matrix, b)) < 1e-8
    assert info.products == 4005


def test_nystrom_is_the_formula_of_its_paper():
    matrix, b, shift = positive(), right_hand_side(), 0.4
    x, _ = solve(Nystrom(5, seed=3), matrix, b, shift)
    matches = []
    for rows in torch.combinations(torch.arange(SIZE), 5):
        picked = matrix[rows]
        middle = picked[:, rows] + picked @ picked.T / shift
        formula = b / shift - picked.T @ torch.linalg.solve(middle, picked @ b) / shift**2
        matches.append(relative(x, formula) < 1e-10)
    assert sum(matches) == 1


def test_nystrom_is_exact_on_all_rows_and_on_matrices_of_low_rank():
    b = right_hand_side()
    low = positive(4)[:, :3] @ positive(4)[:3]
    low = low[:, :3] @ low[:, :3].T
    for rank, matrix in ((99, positive()), (3, low)):
        x, info = solve(Nystrom(rank), matrix, b, 0.4)
        assert relative(x, torch.linalg.solve(matrix + 0.4 * EYE, b)) < 1e-9
        assert info.residual < 1e-9


def test_nystrom_stays_positive_definite_on_an_indefinite_matrix():
    matrix = symmetric(-5, -1, 2, 3, 4, 8)
    inverse = torch.stack([solve(Nystrom(6), matrix, unit, 0.5)[0] for unit in torch.eye(6, dtype=torch.float64)])
    assert torch.linalg.eigvalsh(inverse).min() > 0
    assert solve(Nystrom(6), matrix, right_hand_side(6), 0.5)[1].negative_curvature == 1


def test_nystrom_needs_something_on_the_diagonal():
    with pytest.raises(ValueError, match=r"Nystrom\(damping=\.\.\.\) above 0"):
        solve(Nystrom(3), positive(), right_hand_side())


@pytest.mark.parametrize("solver", [CG(30), Neumann(600), Nystrom(SIZE)])
def test_solvers_are_interchangeable(solver):
    matrix, b = positive(), right_hand_side()
    expected = torch.linalg.solve(matrix + EYE, b)
    assert relative(solve(solver, matrix, b, 1.0)[0], expected) < 1e-10


@pytest.mark.parametrize("solver", [CG(4), CG(40), CG(9, tolerance=1e-3), Neumann(5), Nystrom(3, damping=1.0)])
def test_vmapped_systems_do_not_see_each_other(solver):
    # one solved at once, one that meets negative curvature, one with nothing to solve, and one ordinary
    matrices = torch.stack(
        [torch.eye(6, dtype=torch.float64), symmetric(-1, 1, 2, 3, 4, 5), *[symmetric(*range(1, 7))] * 2]
    )
    bs = torch.stack([right_hand_side(6, seed) for seed in range(4)])
    bs[2] = 0
    together, info = torch.func.vmap(lambda matrix, b: _tensors(solve(solver, matrix, b)))(matrices, bs)
    for place, (matrix, b) in enumerate(zip(matrices, bs, strict=True)):
        alone, expected = _tensors(solve(solver, matrix, b))
        torch.testing.assert_close(together[place], alone)
        torch.testing.assert_close(tuple(value[place] for value in info), expected)


def _tensors(result):
    x, info = result
    return x, tuple(info)[:3]


def test_trees_are_solved_as_one_vector():
    matrix, b = positive(), right_hand_side()
    tree = {"weight": b[:8].view(2, 4), "bias": b[8:]}

    def product(direction: dict[str, Tensor]) -> dict[str, Tensor]:
        image = matrix @ torch.cat([direction["weight"].flatten(), direction["bias"]])
        return {"bias": image[8:], "weight": image[:8].view(2, 4)}  # the order of names does not matter

    x, _ = solve_tree(CG(SIZE), product, tree)
    assert list(x) == ["weight", "bias"]
    torch.testing.assert_close(torch.cat([x["weight"].flatten(), x["bias"]]), torch.linalg.solve(matrix, b))


@pytest.mark.parametrize("solver", [CG(3), Neumann(3), Nystrom(3, damping=1.0)])
def test_complex_systems_are_refused(solver):
    with pytest.raises(ValueError, match="real parameters alone"):
        solve_tree(solver, dict, {"w": torch.ones(3, dtype=torch.complex128)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CG(0), r"CG\(iterations=0\): give 1 or more"),
        (lambda: CG(5, damping=-1.0), r"CG\(damping=-1.0\): must be 0 or more"),
        (lambda: CG(5, tolerance=-1e-3), "relative residual of 0 or more, or None"),
        (lambda: CG(5, tolerance=float("nan")), "relative residual of 0 or more, or None"),
        (lambda: Neumann(0), r"Neumann\(terms=0\): give 1 or more"),
        (lambda: Neumann(3, step=0.0), "a step above 0, or None"),
        (lambda: Nystrom(0), "give 1 row or more"),
        (lambda: Nystrom(3, damping=-1.0), "must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
