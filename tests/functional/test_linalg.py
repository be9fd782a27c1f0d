import pytest
import torch

from tp_cosep.functional.linalg import add_upper, mirror, self_product


def matrix(n, seed, *, is_transposed):
    x = torch.randn(n, 53, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T.contiguous().T if is_transposed else x


@pytest.mark.parametrize("n", [1, 7, 128, 129, 257, 300, 1025])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_is_the_product_with_the_transpose(n, is_transposed):
    x = matrix(n, n, is_transposed=is_transposed)
    product = self_product(x)
    torch.testing.assert_close(product, torch.einsum("im,jm->ij", x, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(product, product.T)


@pytest.mark.parametrize("n", [1, 128, 131, 515])
def test_several_are_added_up_in_a_part_of_a_larger_matrix(n):
    xs = [matrix(n, seed, is_transposed=True) for seed in range(3)]
    whole = torch.full((n + 2, n + 2), 7.0, dtype=torch.float64)
    part = whole[1:-1, 1:-1]
    part.zero_()
    for x in xs:
        add_upper(part, x)
    mirror(part)
    torch.testing.assert_close(part, sum(torch.einsum("im,jm->ij", x, x) for x in xs), rtol=1e-12, atol=1e-12)
    assert torch.equal(part, part.T)
    assert float(whole.sum() - part.sum()) == pytest.approx(7 * (4 * n + 4))
