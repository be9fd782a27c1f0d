import pytest
import torch

from tp_cosep.products import self_product


@pytest.mark.parametrize("n", [1, 7, 256, 257, 300, 1025])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_is_the_product_with_the_transpose(n, is_transposed):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 53, generator=generator, dtype=torch.float64)
    x = x.T.contiguous().T if is_transposed else x
    product = self_product(x)
    torch.testing.assert_close(product, torch.einsum("im,jm->ij", x, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(product, product.T)
