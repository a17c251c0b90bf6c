"""The backward pass: dL/d(heads' outputs) of every layer, layer by layer, and the metrics that need it.

A few prompts at a time go forward and leave their hidden states before every layer; then the layers are taken from the
last to the first, each run again with gradients. Only inputs get gradients, so a layer's weights are dropped as ever.

L is the sum of a causal language model's next-token losses (nats). Other models have no labels here; their L is the
inner product of the output with a random tensor of standard normal entries, whose gradient estimates the size of the
output's Jacobian (Hutchinson 1990): heads are then ranked by how much the output depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.profiles.attention import heads_outputs
from attnopt.profiles.layers import LayerReader
from attnopt.profiles.metric import Collected, Metric, measured
from attnopt.profiles.metrics.gradient import MapInfluence, Michel
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.view import LayerView
from attnopt.progress import Reporter, bar
from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment
from attnopt.rewriter.memory import give_back

#: What is measured.
BACKWARD: tuple[type[Metric], ...] = (Michel, MapInfluence)

#: Hidden states that are kept at once, in bytes: so many prompts go together through the layers.
KEPT_BYTES = 256 << 20

#: Logits of a language model that are in memory at once, in bytes.
LOGIT_BYTES = 16 << 20


class BackwardPass:
    """The pass; see the module.

    Args:
        runner: of the program.
        reader: opens its layers.
        prompts: what to measure on.
        seed: of the random tensor of models without a loss.
        reporter: told of the layers done.
    """

    def __init__(
        self, runner: LayerRunner, reader: LayerReader, prompts: Prompts, seed: int, reporter: Reporter
    ) -> None:
        self.runner, self.reader, self.prompts, self.reporter = runner, reader, prompts, reporter
        self.seed = seed
        self.found = Collected(len(runner.layers))

    @property
    def causal_loss(self) -> bool:
        """Whether the model predicts the next token."""
        program = self.runner.program
        causal = all(site.mask.causal for site in program.site_list)
        return causal and program.outputs[0] == "logits" and not self.prompts.images

    def run(self) -> Collected:
        """Measure on all prompts."""
        total = len(self.prompts) * len(self.runner.layers)
        with bar(self.reporter, "measuring gradients", total, "layers") as handle:
            start = 0
            while start < len(self.prompts):
                start += self._together(start, handle)
        return self.found

    def _together(self, start: int, handle: int) -> int:
        """Measure on as many prompts from `start` as may be kept at once; returns how many."""
        with torch.inference_mode(False), torch.no_grad():
            first = self.runner.start(self.prompts.inputs[start])
            size = sum(v.nbytes for v in first.values.values() if isinstance(v, Tensor)) * (len(self.runner.layers) + 1)
            count = max(1, min(len(self.prompts) - start, KEPT_BYTES // max(1, size)))
            more = [self.runner.start(inputs) for inputs in self.prompts.inputs[start + 1 : start + count]]
            kept = [[first, *more]]
            for segment in self.runner.layers:
                with self.runner.load(segment) as layer:
                    kept.append([layer.advance(env) for env in kept[-1]])
        given = [self._loss_gradients(env, start + i) for i, env in enumerate(kept.pop())]
        self.runner.close()
        give_back()
        for index in range(len(self.runner.layers) - 1, -1, -1):
            envs = kept.pop()
            with self.runner.load(self.runner.layers[index]) as layer:
                for i, env in enumerate(envs):
                    given[i] = self._layer(index, start + i, layer, env, given[i])
            self.reporter.advance(handle, count)
        return count

    def _loss_gradients(self, env: Env, prompt: int) -> dict[str, Tensor]:
        """dL with respect to what is live before the head."""
        leaves = self._leaves(env, len(self.runner.layers))
        if self.causal_loss and set(leaves) == {env.stream}:
            return {str(env.stream): self._loss_gradient(env, prompt)}
        output = self.runner.finish(Env({**env.values, **leaves}, env.stream))
        generator = torch.Generator().manual_seed(self.seed + prompt)
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        return _gradients([output], list(leaves.items()), [direction.to(output)])

    def _loss_gradient(self, env: Env, prompt: int) -> Tensor:
        """dL/d(stream) of the next-token losses, over rows in parts: logits are wide."""
        ids = self.prompts.inputs[prompt]["input_ids"].to(self.runner.device)
        hidden = env.hidden
        result = torch.zeros_like(hidden)
        vocabulary = int(self.runner.program.config.get("vocab_size") or 65536)
        step = max(16, LOGIT_BYTES // (vocabulary * hidden.element_size()))
        if self.runner.head.live_in != (env.stream,):  # some heads are given the length as well (GPT-2)
            step = hidden.shape[1]
        for first in range(0, hidden.shape[1], step):
            last = min(first + step, hidden.shape[1])
            part = hidden[:, first:last].detach().requires_grad_()
            logits = self.runner.finish(env.with_hidden(part))
            targets = ids[:, first + 1 : last + 1]  # the last token predicts nothing that is known
            logits = logits[:, : targets.shape[1]]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (result[:, first:last],) = torch.autograd.grad(loss, part)
        return result

    def _layer(
        self, index: int, prompt: int, layer: LoadedSegment, env: Env, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Measure a layer, from dL with respect to what is live after it to what is live before it."""
        site = layer.segment.site
        assert site is not None
        leaves = self._leaves(env, index)
        with torch.enable_grad():
            live = Env({**env.values, **leaves}, env.stream)
            outputs_of_heads = heads_outputs(self.runner.program, site)
            context = layer.evaluate(live, outputs_of_heads)
            if not context.requires_grad:  # nothing before it needs a gradient
                context = context.detach().requires_grad_()
            after = layer.advance(live, {outputs_of_heads: context})
            outputs = [after.values[name] for name in given]
        wanted = [("", context), *leaves.items()]
        found = _gradients(outputs, wanted, list(given.values()))
        with torch.no_grad():
            opened = self.reader.open(layer, env)
            self._measure(index, prompt, opened.view.with_gradient(found.pop("")))
        return found

    def _measure(self, index: int, prompt: int, view: LayerView) -> None:
        for _, values in measured(BACKWARD, view):
            self.found.add(prompt, index, values)

    def _leaves(self, env: Env, index: int) -> dict[str, Tensor]:
        """What needs a gradient before layer `index`: what earlier layers made. Before the first, nothing does."""
        if index == 0:
            return {}
        made_before = set(self.runner.prelude.live_out)
        return {
            name: value.detach().requires_grad_()
            for name, value in env.values.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name not in made_before
        }


def _gradients(
    outputs: Sequence[Tensor], wanted: Sequence[tuple[str, Tensor]], given: Sequence[Tensor]
) -> dict[str, Tensor]:
    """d(sum of outputs times given) with respect to each wanted tensor; zero where they do not depend on it."""
    live = [(output, grad) for output, grad in zip(outputs, given, strict=True) if output.requires_grad]
    tensors = [tensor for _, tensor in wanted]
    grads = torch.autograd.grad([o for o, _ in live], tensors, [g for _, g in live], allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(wanted, grads, strict=True)
    }
