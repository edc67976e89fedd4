from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.models.base import Ranker
from fullrank.models.cetnet import CETNet, ConfidenceFusion, MultiEmbedding, binary_entropy, symmetric_divergence
from fullrank.schema import Categorical, Label, Schema

SCHEMA = Schema(
    features=(Categorical(name="user", num_embeddings=20), Categorical(name="item", num_embeddings=30)),
    labels=(Label(name="click"), Label(name="buy")),
)
SMALL = ({"name": "dcn_v2", "hidden": (8,), "embedding_dim": 4}, {"name": "dlrm", "hidden": (8,), "embedding_dim": 6})


def batch(rows: int = 64, labels: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([torch.randint(0, n, (rows,), generator=generator) for n in (20, 30)], 1),
        jagged_keys=(),
        jagged_values=torch.zeros(0, dtype=torch.int64),
        jagged_lengths_KB=torch.zeros(0, rows, dtype=torch.int64),
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=(torch.rand(rows, 2, generator=generator) < 0.3).float() if labels is None else labels,
    )


def net(members: Sequence[dict[str, Any]] = SMALL, **config: Any) -> CETNet:
    torch.manual_seed(0)
    return CETNet.from_config(SCHEMA, {"members": members, "embedding_init": 0.5, **config})


def logits(members: int = 3, rows: int = 200) -> Tensor:
    return torch.randn(members, rows, 2, generator=torch.Generator().manual_seed(2)).double() * 3


def test_a_single_member_is_that_member_and_pays_its_loss_twice() -> None:
    model, rows = net(SMALL[:1]), batch()
    output = model(rows)
    alone = model.members[0]
    assert isinstance(alone, Ranker)
    torch.testing.assert_close(output.logits_BT, alone(rows).logits_BT)
    assert not output.aux_losses
    torch.testing.assert_close(model.loss(output, rows), 2 * alone.loss(alone(rows), rows))


def test_equal_members_share_equally_and_do_not_pull() -> None:
    one = logits(1)
    same = one.expand(4, -1, -1)
    fusion = ConfidenceFusion("confidence", 4, 2)
    torch.testing.assert_close(fusion.log_weights(same).exp(), torch.full_like(same, 0.25))
    torch.testing.assert_close(fusion(same), one[0])
    assert float(symmetric_divergence(same)) == 0


def test_the_order_of_members_does_not_matter() -> None:
    z = logits()
    fusion = ConfidenceFusion("confidence", 3, 2)
    torch.testing.assert_close(fusion(z), fusion(z[[2, 0, 1]]))
    torch.testing.assert_close(fusion.log_weights(z)[[2, 0, 1]], fusion.log_weights(z[[2, 0, 1]]))


@pytest.mark.parametrize("kind", ["confidence", "mean", "learned"])
def test_the_fused_probability_lies_between_the_members(kind: Any) -> None:
    p = torch.sigmoid(logits())
    fused = torch.sigmoid(ConfidenceFusion(kind, 3, 2).double()(logits()))
    assert bool((fused >= p.amin(0) - 1e-12).all()) and bool((fused <= p.amax(0) + 1e-12).all())


def test_limits_of_the_temperature_are_the_mean_and_the_surest_member() -> None:
    z = logits()
    mean = torch.sigmoid(z).mean(0)
    torch.testing.assert_close(torch.sigmoid(ConfidenceFusion("confidence", 3, 2, temperature=1e9)(z)), mean)
    torch.testing.assert_close(torch.sigmoid(ConfidenceFusion("mean", 3, 2)(z)), mean)
    surest = z.gather(0, binary_entropy(z).argmin(0, keepdim=True))[0]
    torch.testing.assert_close(ConfidenceFusion("confidence", 3, 2, temperature=1e-9)(z), surest)


def test_fusion_is_the_weighted_mean_of_probabilities() -> None:
    z = logits()
    p = torch.sigmoid(z)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    weights = torch.softmax(-entropy / 0.7, 0)
    fused = torch.sigmoid(ConfidenceFusion("confidence", 3, 2, temperature=0.7)(z))
    torch.testing.assert_close(fused, (weights * p).sum(0))


def test_the_divergence_is_that_of_pytorchs_bernoullis() -> None:
    a, b = logits(2)
    first, second = Bernoulli(logits=a), Bernoulli(logits=b)
    both = 0.5 * (kl_divergence(first, second) + kl_divergence(second, first))
    torch.testing.assert_close(symmetric_divergence(torch.stack([a, b])), both.mean(), rtol=1e-10, atol=1e-12)


def test_the_divergence_pulls_both_members_together_and_stays_finite() -> None:
    z = torch.tensor([[[100.0]], [[-100.0]]], requires_grad=True)
    loss = symmetric_divergence(z)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 100 and z.grad is not None
    assert float(z.grad[0]) > 0 > float(z.grad[1])


def test_extreme_logits_are_finite_in_fusion_and_gradient() -> None:
    z = torch.tensor([[[100.0, -100.0]], [[-100.0, -100.0]]], requires_grad=True)
    fused = ConfidenceFusion("confidence", 2, 2, detach=False)(z)
    fused.sum().backward()
    assert bool(fused.isfinite().all()) and z.grad is not None and bool(z.grad.isfinite().all())


def test_detached_weights_are_constants_of_the_gradient() -> None:
    z = logits().requires_grad_()
    target = torch.ones(200, 2).double()
    F.binary_cross_entropy_with_logits(ConfidenceFusion("confidence", 3, 2)(z), target).backward()
    weights = ConfidenceFusion("confidence", 3, 2).log_weights(z.detach()).exp()
    frozen = z.detach().clone().requires_grad_()
    (-(weights * torch.sigmoid(frozen)).sum(0).log().mean()).backward()
    assert z.grad is not None and frozen.grad is not None
    torch.testing.assert_close(z.grad, frozen.grad)
    free = logits().requires_grad_()
    F.binary_cross_entropy_with_logits(ConfidenceFusion("confidence", 3, 2, detach=False)(free), target).backward()
    assert free.grad is not None and not torch.allclose(free.grad, z.grad)


def test_no_two_members_share_a_table() -> None:
    model = net((SMALL[0], SMALL[0]))
    places = [p.data_ptr() for p in model.parameters() if p.numel()]
    assert len(places) == len(set(places))
    assert not torch.equal(*(next(iter(m.parameters())) for m in model.members))
    single = net(SMALL[:1])
    assert model.num_parameters().embedding == 2 * single.num_parameters().embedding


def test_the_loss_is_the_sum_of_its_terms() -> None:
    model, rows = net(collaboration=0.3, member_loss=0.5), batch()
    output = model(rows)
    z = output.member_logits_MBT
    expected = F.binary_cross_entropy_with_logits(output.logits_BT, rows.labels_BT) * 2
    for own in z:
        expected = expected + 0.5 * F.binary_cross_entropy_with_logits(own, rows.labels_BT) * 2
    torch.testing.assert_close(model.loss(output, rows), expected + 0.3 * symmetric_divergence(z))


def test_one_sided_divergence_has_the_value_of_the_mutual_one_and_half_its_gradient() -> None:
    both, sided = net(), net(stop_gradient=True)
    gradients = []
    for model in (both, sided):
        loss = model(batch()).aux_losses["collaboration"]
        loss.backward()
        weights = [p.grad for p in model.members[0].parameters() if p.grad is not None]
        gradients.append((loss.item(), torch.cat([grad.flatten() for grad in weights])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    torch.testing.assert_close(gradients[0][1], 2 * gradients[1][1], rtol=1e-4, atol=1e-7)


def test_an_intercept_removes_the_bias_of_the_fusion() -> None:
    torch.manual_seed(0)
    # Two equally noisy members, calibrated on average, at a click rate of about 3 %: their fusion is too low.
    truth = -4 + torch.randn(40_000).double()
    clicks = torch.sigmoid(truth)
    noisy = torch.stack([truth + 1.5 * torch.randn(40_000).double() for _ in range(2)])[:, :, None]
    for _ in range(20):
        noisy = noisy - (torch.sigmoid(noisy).mean() / clicks.mean()).log()
    fused = ConfidenceFusion("confidence", 2, 1)(noisy)[:, 0]
    assert float(torch.sigmoid(fused).sum() / clicks.sum()) < 0.97
    intercept = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([intercept], line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(fused + intercept, clicks)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    assert float(torch.sigmoid(fused + intercept).sum() / clicks.sum()) == pytest.approx(1, abs=1e-3)


def test_the_intercept_of_the_model_is_learnt_to_calibration() -> None:
    model, rows = net(intercept=True), batch(512)
    model.start_at_base_rate(rows)
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "intercept" in name], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(model(rows), rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    predicted = torch.sigmoid(model(rows).logits_BT).mean(0)
    torch.testing.assert_close(predicted, rows.labels_BT.mean(0), rtol=0.02, atol=0)


def test_copies_of_a_backbone_average_their_logits() -> None:
    torch.manual_seed(0)
    model = MultiEmbedding.from_config(SCHEMA, {"backbone": SMALL[0], "num_tables": 3})
    rows = batch()
    each = torch.stack([member(rows).logits_BT for member in model.members])
    torch.testing.assert_close(model(rows).logits_BT, each.mean(0))
    assert float(each.std(0).max()) > 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((), "at least one member"),
        (({"name": "dcnv3"},), r'members\.0\.name\n.*ranker "dcnv3" is unknown; .*did you mean "dcn_v2"'),
        ((SMALL[0], {"name": "dlrm", "hiden": 3}), r"members\.1\.hiden"),
    ],
)
def test_a_wrong_member_is_named(members: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(members)


def test_a_regression_label_is_refused() -> None:
    schema = SCHEMA.model_copy(update={"labels": (Label(name="watch_time", kind="regression"),)})
    with pytest.raises(ValueError, match="watch_time is not"):
        CETNet.from_config(schema, {"members": SMALL})
