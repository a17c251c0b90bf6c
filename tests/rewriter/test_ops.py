"""The dialect ops: their formulas, their variants, gradients, and the contract of torch.library."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.rewriter import ops
from attnopt.rewriter.ops.attention import attention_reference
from attnopt.rewriter.ops.autograd import IN_PLACE
from attnopt.rewriter.ops.latent import absorbing_is_cheaper, latent_attention_reference
from attnopt.rewriter.ops.rope import rope_reference

GRIDS = [(8, 2), (8, 4), (16, 4), (16, 2), (8, 8), (8, 1), (9, 3)]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    positions: list[int],
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, one number at a time."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i, position in enumerate(positions):
                logits = {}
                for j in range(k.shape[2]):
                    if (causal and j > position) or (window and j <= position - window):
                        continue
                    s = scale * torch.dot(q[b, h, i], k[b, h // group, j])
                    if softcap:
                        s = softcap * torch.tanh(s / softcap)
                    logits[j] = s if bias is None else s + bias[0, h, i, j]
                rest = 0.0 if sinks is None else torch.exp(sinks[h])
                total = sum(torch.exp(s) for s in logits.values()) + rest
                for j, s in logits.items():
                    out[b, i, h] += torch.exp(s) / total * v[b, h // group, j]
    return out


@pytest.mark.parametrize(("heads", "groups"), GRIDS)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 1), (2, 5, 5), (2, 1, 6), (1, 3, 7)])
def test_attention_is_its_definition_for_every_head_grid(
    heads: int, groups: int, batch: int, queries: int, keys: int
) -> None:
    q, k, v = rand(batch, heads, queries, 4), rand(batch, groups, keys, 4, seed=1), rand(batch, groups, keys, 3)
    out = ops.attention(q, k, v, None, None, 0.4, True, 0, 0.0, None, 0)
    expected = naive(q, k, v, 0.4, True, 0, 0.0, list(range(keys - queries, keys)))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 2},
        {"softcap": 0.7},
        {"bias": True},
        {"sinks": True},
        {"window": 3, "softcap": 1.5, "bias": True, "sinks": True},
    ],
)
def test_attention_arguments(options: dict[str, Any]) -> None:
    q, k, v = rand(2, 4, 5, 4), rand(2, 2, 5, 4, seed=1), rand(2, 2, 5, 3)
    causal, window, softcap = options.get("causal", True), options.get("window", 0), options.get("softcap", 0.0)
    bias = rand(1, 4, 5, 5) if options.get("bias") else None
    sinks = rand(4) if options.get("sinks") else None
    out = ops.attention(q, k, v, bias, None, 0.4, causal, window, softcap, sinks, 0)
    torch.testing.assert_close(out, naive(q, k, v, 0.4, causal, window, softcap, list(range(5)), bias, sinks))


def test_query_positions_decide_what_is_visible() -> None:
    q, k, v = rand(1, 2, 2, 4), rand(1, 2, 6, 4, seed=1), rand(1, 2, 6, 3)
    out = ops.attention(q, k, v, None, torch.tensor([[1, 3]]), 0.4, True, 0, 0.0, None, 0)
    torch.testing.assert_close(out, naive(q, k, v, 0.4, True, 0, 0.0, [1, 3]))


def test_shared_and_routed_attention_extend_attention() -> None:
    q, k, v, gates = rand(2, 4, 5, 4), rand(2, 2, 5, 4, seed=1), rand(2, 2, 5, 3), rand(2, 5, 4)
    plain = ops.attention(q, k, v, None, None, 0.4, True, 0, 0.0, None, 3)
    shared = ops.shared_attention(q, k, v, None, None, 0.4, True, 0, 0.0, None, 2, 3)
    routed = ops.routed_attention(q, k, v, gates, None, None, 0.4, True, 0, 0.0, None, 3)
    torch.testing.assert_close(shared, plain)
    torch.testing.assert_close(routed, plain * gates[..., None])


def latent_operands(batch: int = 2, queries: int = 5, keys: int = 5) -> tuple[Tensor, ...]:
    heads, dn, dr, dv, r = 3, 4, 2, 5, 6
    return (
        rand(batch, heads, queries, dn),
        rand(batch, heads, queries, dr),
        rand(batch, keys, r),
        rand(batch, keys, dr),
        rand(heads, dn, r),
        rand(heads, dv, r),
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (3, 7)])
@pytest.mark.parametrize(("causal", "window", "softcap"), [(True, 0, 0.0), (True, 3, 0.0), (False, 0, 0.9)])
def test_latent_attention_absorbed_and_expanded_are_plain_attention(
    queries: int, keys: int, causal: bool, window: int, softcap: float
) -> None:
    q_nope, q_rope, c, k_rope, w_uk, w_uv = latent_operands(2, queries, keys)
    k_nope = torch.einsum("btr,hnr->bhtn", c, w_uk)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, 3, -1, -1)], dim=-1)
    v = torch.einsum("btr,hvr->bhtv", c, w_uv)
    expected = naive(
        torch.cat([q_nope, q_rope], -1), k, v, 0.3, causal, window, softcap, list(range(keys - queries, keys))
    )
    args = (q_nope, q_rope, c, k_rope, w_uk, w_uv, None, 0.3, causal, window, softcap, 0)
    torch.testing.assert_close(ops.latent_attention(*args), expected)
    for absorb in (True, False):
        torch.testing.assert_close(latent_attention_reference(*args, absorb=absorb), expected)


def test_decoding_absorbs_and_long_prefill_expands() -> None:
    assert absorbing_is_cheaper(queries=1, keys=4096, r=512, d_nope=128, d_rope=64, d_v=128)
    assert not absorbing_is_cheaper(queries=4096, keys=4096, r=512, d_nope=128, d_rope=64, d_v=128)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("offset", [0, 3])
def test_rope_turns_pairs_by_position_times_frequency(style: str, offset: int) -> None:
    x, table = rand(2, 3, 4, 9), torch.tensor([1.0, 0.1, 0.01])
    positions = torch.tensor([[0, 1, 2, 30]])
    out = ops.rope(x, positions, table, style, offset, 1.5)
    for m in range(3):
        a, b = (offset + m, offset + m + 3) if style == "half" else (offset + 2 * m, offset + 2 * m + 1)
        z = torch.complex(x[..., a], x[..., b]) * 1.5
        angle = (positions[0].double() * float(table[m])).view(1, 1, -1)
        turned = z * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(torch.complex(out[..., a], out[..., b]), turned, rtol=1e-5, atol=1e-5)
    rest = [i for i in range(9) if not offset <= i < offset + 6]
    torch.testing.assert_close(out[..., rest], x[..., rest])


def test_rope_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rope_reference(rand(1, 1, 1, 4), torch.zeros(1, 1), torch.ones(3), "half", 0, 1.0)
    with pytest.raises(ValueError, match="unknown rope style"):
        rope_reference(rand(1, 1, 1, 4), torch.zeros(1, 1), torch.ones(2), "diagonal", 0, 1.0)


def test_expert_linear_applies_each_rows_own_matrix() -> None:
    x, weight, bias = rand(6, 4), rand(3, 5, 4), rand(3, 5)
    expert = torch.tensor([2, 0, 2, 2, 0, 2])
    out = ops.expert_linear(x, expert, weight, bias)
    expected = torch.stack([weight[e] @ row + bias[e] for e, row in zip(expert, x, strict=True)])
    torch.testing.assert_close(out, expected)
    assert ops.expert_linear(x[:0], expert[:0], weight, None).shape == (0, 5)


def cases() -> list[Any]:
    q, k, v = rand(2, 4, 3, 4), rand(2, 2, 3, 4, seed=1), rand(2, 2, 3, 5)
    bias, sinks, gates = rand(1, 4, 3, 3), rand(4), rand(2, 3, 4)
    pos = torch.tensor([[0, 1, 2]])
    return [
        pytest.param(ops.attention, (q, k, v, None, None, 0.4, True, 0, 0.0, None, 0), id="attention"),
        pytest.param(ops.attention, (q, k, v, bias, pos, 0.4, True, 2, 0.7, sinks, 0), id="attention-all"),
        pytest.param(ops.shared_attention, (q, k, v, None, None, 0.4, True, 0, 0.0, None, 1, 2), id="shared"),
        pytest.param(ops.routed_attention, (q, k, v, gates, None, None, 0.4, True, 0, 0.0, None, 2), id="routed"),
        pytest.param(ops.latent_attention, (*latent_operands(), None, 0.3, True, 0, 0.0, 0), id="latent"),
        pytest.param(ops.rope, (q, pos, torch.tensor([1.0, 0.1]), "half", 0, 1.2), id="rope-half"),
        pytest.param(ops.rope, (q, pos, torch.tensor([1.0]), "interleaved", 1, 1.0), id="rope-interleaved"),
        pytest.param(
            ops.expert_linear, (rand(4, 3), torch.tensor([1, 0, 1, 1]), rand(2, 5, 3), rand(2, 5)), id="experts"
        ),
    ]


@pytest.mark.parametrize(("op", "args"), cases())
def test_torch_library_contract(op: Any, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize(("op", "args"), cases())
def test_gradients(op: Any, args: tuple[Any, ...]) -> None:
    wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype == torch.float64]
    leaves = [args[i].clone().requires_grad_() for i in wanted]

    def function(*values: Tensor) -> Tensor:
        filled = list(args)
        for i, value in zip(wanted, values, strict=True):
            filled[i] = value
        return op(*filled)

    # Rotary angles are float32, so their effect is only known to 1e-7: the numerical derivative is coarser.
    assert torch.autograd.gradcheck(function, leaves, eps=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "again"), [("attention", False), ("shared", False), ("routed", False), ("attention-all", True)]
)
def test_run_in_place_the_gradient_is_the_same_and_a_fused_attention_is_not_run_again(
    case: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, args = next(c.values for c in cases() if c.id == case)
    module = importlib.import_module("attnopt.rewriter.ops.attention")
    calls = []
    for name in ("fused_attention", "explicit_attention"):
        used = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, used=used: calls.append(1) or used(*given))

    def found(function: Any) -> tuple[list[Tensor], int]:
        calls.clear()
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        out = function(*leaves)
        (out**2).sum().backward()
        grads = [x.grad for x in leaves if isinstance(x, Tensor) and x.grad is not None]
        return [out.detach(), *grads], len(calls)

    reference, twice = found(op)
    values, times = found(IN_PLACE[op._opoverload])
    assert (twice, times) == (2, 2 if again else 1)
    assert len(values) == len(reference) > 3
    for value, expected in zip(values, reference, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(IN_PLACE[op._opoverload](*args), reference[0], rtol=1e-12, atol=1e-12)


def test_half_precision_softmax_runs_in_float32() -> None:
    q, k, v = (rand(1, 2, 8, 16, seed=s, dtype=torch.float32) * 4 for s in range(3))
    exact = attention_reference(q, k, v, None, None, 1.0, True, 0, 30.0, None, 0)
    low = [x.to(torch.bfloat16) for x in (q, k, v)]
    out = ops.attention(*low, None, None, 1.0, True, 0, 30.0, None, 0)
    assert out.dtype == torch.bfloat16
    rounded = attention_reference(*(x.float() for x in low), None, None, 1.0, True, 0, 30.0, None, 0)
    assert (out.float() - rounded).abs().max() < 0.1 * exact.abs().max()


def test_autocast_attention_of_mixed_types_takes_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 16, 8, generator=generator) for heads in (4, 2, 2))
    exact = attention_reference(q, k, v, None, None, 0.3, True, 0, 0.0, None, 0)
    calls = []
    module = importlib.import_module("attnopt.rewriter.ops.attention")
    fused = module.fused_attention
    monkeypatch.setattr(module, "fused_attention", lambda *given: calls.append(1) or fused(*given))
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_reference(q, k, v.bfloat16(), None, None, 0.3, True, 0, 0.0, None, 0)
    assert calls and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
