"""Targets, and which sites the lanes claim or refuse on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.codegen.onnx.forms import claim as onnx_claim
from attnopt.codegen.target import TARGETS, Claim, Refusal, find_target
from attnopt.codegen.triton.lane import claim as triton_claim
from attnopt.errors import OptionError
from attnopt.rewriter.absorb import to_latent_form
from tests.models import captured


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="sm_9O") as raised:
        find_target("sm_9O")
    assert "did you mean sm_" in raised.value.hint
    assert all(name in raised.value.hint for name in TARGETS)


@pytest.mark.parametrize(
    ("family", "target", "form", "expected"),
    [
        ("llama", "cpu", "auto", "matmul"),
        ("llama", "sm_90", "auto", "operator"),
        ("llama", "cpu", "operator", "operator"),
        ("deepseek_v3", "cpu", "auto", "matmul"),
        ("deepseek_v3", "sm_90", "auto", "matmul"),
        ("deepseek_v3", "cpu", "operator", "operator"),
        ("bert", "cpu", "auto", "matmul"),
    ],
)
def test_onnx_forms(family: str, target: str, form: str, expected: str) -> None:
    program = to_latent_form(captured(family)[1])
    verdict = onnx_claim(program, program.site_list[0], find_target(target), form)
    assert isinstance(verdict, Claim)
    assert verdict.form == expected


@pytest.mark.parametrize(
    ("family", "target", "expected"),
    [
        ("llama", "sm_90", "gqa_decode"),
        ("gemma2", "sm_80", "gqa_decode"),
        ("deepseek_v3", "sm_90", "mla_decode_d1"),
        ("llama", "cpu", "does not compile for cpu"),
        ("bert", "sm_90", "an encoder has no cache"),
    ],
)
def test_triton_claims_or_says_why_not(family: str, target: str, expected: str) -> None:
    program = to_latent_form(captured(family)[1])
    verdict = triton_claim(program, program.site_list[0], find_target(target), 2)
    assert expected in (verdict.form if isinstance(verdict, Claim) else verdict.reason)


def test_triton_refuses_what_no_kernel_computes() -> None:
    program = captured("llama")[1]
    site = program.site_list[0]
    target = find_target("sm_90")
    for changed, reason in (
        (replace(site, mask=replace(site.mask, sinks="s")), "learned sinks"),
        (replace(site, mask=replace(site.mask, bias=("b",))), "additive bias"),
        (replace(site, d_qk=512), "wider than 256"),
    ):
        verdict = triton_claim(program, changed, target, 2)
        assert isinstance(verdict, Refusal)
        assert reason in verdict.reason
    latent = to_latent_form(captured("deepseek_v3")[1])
    mla = latent.site_list[0]
    assert mla.latent is not None
    for changed, reason in (
        (replace(mla, mask=replace(mla.mask, window=4)), "window"),
        (replace(mla, latent=replace(mla.latent, kv_lora_rank=1024)), "wider than 512"),
    ):
        verdict = triton_claim(latent, changed, target, 2)
        assert isinstance(verdict, Refusal)
        assert reason in verdict.reason
