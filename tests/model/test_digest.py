"""A digest of weights differs if they do."""

import torch

from model.weights.digest import digest_of_weights


def test_a_digest_sees_one_changed_weight() -> None:
    layer = torch.nn.Linear(8, 8)
    before = digest_of_weights([layer])
    with torch.no_grad():
        layer.weight[3, 4] += 1e-3
    assert digest_of_weights([layer]) != before
    assert digest_of_weights([torch.nn.Linear(8, 8).double()]) != before
