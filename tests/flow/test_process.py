import numpy as np
import pytest
import torch

from moedistill.flow.process import add_noise, as_sigma, from_vp, jump, renoise, sigma_from_vp, to_vp, velocity_from_vp

SHAPE = (2, 3, 4, 5, 6)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(2)]


FUNCTIONS = [
    pytest.param(lambda x, n, s: add_noise(x, n, s), id="add_noise"),
    pytest.param(lambda x, n, s: jump(x, n, s, 0.1), id="jump-from"),
    pytest.param(lambda x, n, s: jump(x, n, 0.9, s), id="jump-to"),
    pytest.param(lambda x, n, s: renoise(x, n, s, 0.95), id="renoise-from"),
    pytest.param(lambda x, n, s: renoise(x, n, 0.01, s), id="renoise-to"),
    pytest.param(lambda x, n, s: velocity_from_vp(x, n, s), id="velocity_from_vp"),
    pytest.param(lambda x, n, s: to_vp(x, s), id="to_vp"),
    pytest.param(lambda x, n, s: from_vp(x, s), id="from_vp"),
]


def test_values_by_hand():
    x, n = torch.tensor([[2.0]]), torch.tensor([[10.0]])
    assert add_noise(x, n, 0.25).item() == 4.0
    assert jump(x, n, 0.75, 0.25).item() == -3.0
    assert renoise(x, n, 0.0, 0.25).item() == 4.0
    assert renoise(x, n, 0.5, 0.75).item() == 0.5 * 2 + 0.5 * 10


def test_ends_are_exact(tensors):
    x, n = tensors
    assert torch.equal(add_noise(x, n, 0.0), x)
    assert torch.equal(add_noise(x, n, 1.0), n)
    assert torch.equal(jump(x, n, 0.3, 0.3), x)
    assert torch.equal(renoise(x, n, 0.3, 0.3), x)


def test_a_jump_with_the_true_velocity_follows_the_path(tensors):
    x0, noise = tensors
    torch.testing.assert_close(
        jump(add_noise(x0, noise, 0.8), noise - x0, 0.8, 0.2), add_noise(x0, noise, 0.2), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sigma_per_sample_or_scalar(function, tensors):
    x, n = tensors
    both = function(x, n, torch.tensor([0.2, 0.7]))
    for i, sigma in enumerate((0.2, 0.7)):
        for scalar in (sigma, torch.tensor(sigma), np.float64(sigma), torch.tensor(sigma, dtype=torch.float64)):
            torch.testing.assert_close(function(x, n, scalar)[i], both[i], rtol=0, atol=0)
    assert not torch.equal(function(x, n, 0.2), function(x, n, 0.7))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sigma", [0.3, np.float64(0.3), torch.tensor([0.3, 0.3], dtype=torch.float64)])
def test_dtype_is_that_of_the_tensors_and_arithmetic_at_least_float32(function, dtype, sigma, tensors):
    x, n = (tensor.to(dtype) for tensor in tensors)
    result = function(x, n, sigma)
    assert result.dtype == dtype
    if dtype == torch.float64:
        # Computed in float64 throughout: nothing is rounded to float32 on the way.
        once_more = function(torch.stack([x, x]).flatten(0, 1), torch.stack([n, n]).flatten(0, 1), 0.3)[:2]
        torch.testing.assert_close(result, once_more, rtol=0, atol=1e-15)
        assert not torch.equal(result, function(x.float(), n.float(), sigma).double())
    else:
        # Rounded to the low dtype once, at the end.
        assert torch.equal(result, function(x.float(), n.float(), 0.3).to(dtype))


def test_the_first_tensor_decides_the_dtype(tensors):
    x, v = tensors
    assert jump(x, v.bfloat16(), 0.9, 0.1).dtype == torch.float32
    assert jump(x, v.double(), 0.9, 0.1).dtype == torch.float32
    assert jump(x.bfloat16(), v, 0.9, 0.1).dtype == torch.bfloat16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sigma_that_does_not_fit_names_both_shapes(function, tensors):
    for shape in [(3,), (1,), (2, 1), (2, 1, 1, 1, 1)]:
        with pytest.raises(ValueError, match="does not fit") as error:
            function(*tensors, torch.full(shape, 0.3))
        assert str(list(shape)) in str(error.value)
        assert str(list(SHAPE)) in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS[:6])
def test_tensors_that_do_not_fit_name_both_shapes(function, tensors):
    x, n = tensors
    with pytest.raises(ValueError, match="differ in shape") as error:
        function(x, n[:1], 0.3)
    assert str(list(SHAPE)) in str(error.value)
    assert str([1, *SHAPE[1:]]) in str(error.value)


def test_integer_tensors_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        add_noise(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), 0.5)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0.5, 0.4, "sigma_to must be at least sigma_from"),
        (torch.tensor([0.1, 0.5]), 0.4, "sigma_to must be at least sigma_from"),
        (1.0, 1.0, "must be below 1"),
        (0.1, torch.tensor(float("nan")), "sigma_to must be"),
        (0.1, float("nan"), "sigma_to nan is outside"),
        (torch.tensor(float("nan")), 0.1, "must be below 1"),
        (float("nan"), 0.1, "sigma_from nan is outside"),
    ],
)
def test_renoise_only_goes_up(low, high, message, tensors):
    with pytest.raises(ValueError, match=message):
        renoise(*tensors, low, high)


def test_renoise_is_exact_in_law_only_from_zero():
    """Its noise variance is that of x at sigma_to from sigma 0, and too small from above."""
    unit = torch.ones(1, dtype=torch.float64)
    for sigma_from, exact in [(0.0, True), (0.4, False)]:
        # Coefficients of noise already in x, and of fresh noise: they add up in variance.
        old = renoise(sigma_from * unit, 0 * unit, sigma_from, 0.7).item()
        fresh = renoise(0 * unit, unit, sigma_from, 0.7).item()
        assert (abs(old**2 + fresh**2 - 0.7**2) < 1e-12) == exact
        assert old + fresh == pytest.approx(0.7, abs=1e-12)


def test_gradients_flow_through_all_but_sigma(tensors):
    x, n = (tensor.double().requires_grad_() for tensor in tensors)
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, n: renoise(jump(x, n, 0.9, 0.1), n, 0.1, sigma), (x, n), fast_mode=True)


# --- Variance-preserving models


def test_vp_and_flow_describe_the_same_sample(tensors):
    x0, eps = (tensor.double() for tensor in tensors)
    angle = torch.tensor([0.3, 1.2], dtype=torch.float64)
    alpha, s = angle.cos(), angle.sin()
    sigma = sigma_from_vp(alpha, s)
    a, b = (coefficient.view(-1, 1, 1, 1, 1) for coefficient in (alpha, s))
    x_vp, v_vp = a * x0 + b * eps, a * eps - b * x0
    x = add_noise(x0, eps, sigma)
    torch.testing.assert_close(from_vp(x_vp, sigma), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(to_vp(x, sigma), x_vp, rtol=0, atol=1e-14)
    torch.testing.assert_close(velocity_from_vp(x_vp, v_vp, sigma), eps - x0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_vp_is_finite_and_exact_at_both_ends(sigma, tensors):
    """At zero terminal SNR alpha is 0: dividing by it would blow up."""
    x0, eps = tensors
    x_vp, v_vp = (x0, eps) if sigma == 0 else (eps, -x0)
    assert torch.equal(velocity_from_vp(x_vp, v_vp, sigma), eps - x0)
    assert torch.equal(from_vp(x_vp, sigma), x_vp)


@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan"), float("inf"), torch.tensor(2.0)])
def test_as_sigma_refuses(value):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        as_sigma(value)


def test_as_sigma_rounds_to_float32():
    assert as_sigma(0.9818) == torch.tensor(0.9818).item() != 0.9818
