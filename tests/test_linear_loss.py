"""Linear + any function in chunks equals plain autograd in float64, whatever the function, the shape and the chunk."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import linear_chunk
from helpers.linear_loss import linear_forward
from helpers.loss_functions import causal_lm_loss, cross_entropy, log_probs, log_probs_and_entropy

V, H = 23, 8


def make(n=11, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(H, V, bias=bias, dtype=dtype)
    for p in linear.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(n, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, linear, torch.randint(V, (n,), generator=generator)


def ce64(x, linear, labels):
    return F.cross_entropy(linear(x), labels, reduction="sum")


def gradients(outputs, upstream, tensors):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, tensors, upstream, allow_unused=True)


ON_LOGITS = [
    lambda z: 3.0 * torch.tanh(z / 3.0),
    lambda z: z / 1.7,
    lambda z: z * torch.sigmoid(z),
    lambda z: z + z.roll(1, 1) / 4,
    lambda z: z - z.mean(1, keepdim=True),
    lambda z: F.layer_norm(z, z.shape[-1:]),
]
OF_ROW = [
    lambda z, y: z.log_softmax(1).gather(1, y[:, None])[:, 0],
    lambda z, y: z.logsumexp(1) ** 2,
    lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1),
    lambda z, y: z.var(1),
    lambda z, y: z[:, :3].exp().sum(1),
    lambda z, y: (1 - z.softmax(1).gather(1, y[:, None])[:, 0]) ** 2,
]


def random_function(draw: random.Random):
    """A random composition: what is done to the logits, what is taken of each row, how rows are weighed and ended."""
    on_logits = draw.sample(ON_LOGITS, draw.randint(0, 3))
    of_row = draw.sample(OF_ROW, draw.randint(1, 3))
    kind = draw.choice(["sum", "rows", "columns", "tuple", "metrics"])
    uses_x, twice = draw.random() < 0.3, draw.random() < 0.3

    def function(x, linear, labels, weights=None):
        z = linear(x)
        if twice:
            z = z + linear(x * 0.5)
        for step in on_logits:
            z = step(z)
        rows = [step(z, labels) for step in of_row]
        if weights is not None:
            rows = [row * weights for row in rows]
        if uses_x:
            rows[0] = rows[0] + x.square().mean(1)
        if kind == "sum":
            return sum(row.sum() for row in rows)
        if kind == "metrics":
            return sum(row.sum() for row in rows), rows[-1].detach(), z.detach().amax(1).sum()
        if kind == "columns":
            return torch.stack(rows, 1)
        return tuple(rows) if kind == "tuple" else sum(rows)

    return function


@pytest.mark.parametrize("seed", range(60))
def test_random_functions_equal_autograd(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    leading = draw.choice([(1,), (7,), (13,), (3, 5), (2, 1, 4)])
    n = torch.Size(leading).numel()
    linear = nn.Linear(H, V, bias=draw.random() < 0.5, dtype=torch.float64)
    x = torch.randn(*leading, H, dtype=torch.float64, requires_grad=draw.random() < 0.8)
    linear.requires_grad_(not x.requires_grad or draw.random() < 0.6)
    labels = torch.randint(V, leading)
    weights = draw.choice([None, torch.randn(*leading, dtype=torch.float64, requires_grad=draw.random() < 0.5)])
    function = random_function(draw)
    tensors = [t for t in (x, weights, *linear.parameters()) if t is not None and t.requires_grad]

    flat = None if weights is None else weights.reshape(n)
    wanted = function(x.reshape(n, H), linear, labels.reshape(n), flat)
    got = linear_forward(
        x, linear, labels, weights, forward_function=function, chunk_size=draw.choice([1, 2, 3, n, 99])
    )
    single = not isinstance(wanted, tuple)
    wanted, got = (wanted,) if single else wanted, (got,) if single else got
    wanted = tuple(w.reshape(*leading, *w.shape[1:]) if w.ndim else w for w in wanted)
    assert [g.requires_grad for g in got] == [w.requires_grad for w in wanted]
    torch.testing.assert_close(got, wanted)
    upstream = [torch.randn(w.shape, dtype=w.dtype) for w in wanted]
    torch.testing.assert_close(gradients(got, upstream, tensors), gradients(wanted, upstream, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("function", [cross_entropy, log_probs_and_entropy])
def test_no_less_exact_than_full_logits(dtype, frozen, function):
    x, linear, labels = make(257, dtype)
    linear.requires_grad_(not frozen)
    tensors = [x, *(() if frozen else linear.parameters())]
    upstream = (
        [torch.tensor(1 / 257)] if function is cross_entropy else [torch.randn(257) / 257, torch.randn(257) / 257]
    )
    exact = [t.detach().double().requires_grad_() for t in (x, linear.weight, linear.bias)]

    def truth(x, weight, bias):
        logp = F.linear(x, weight, bias).log_softmax(1)
        chosen = logp.gather(1, labels[:, None]).squeeze(1)
        return -chosen.sum() if function is cross_entropy else (chosen, -(logp.exp() * logp).sum(1))

    wanted = gradients(truth(*exact), upstream, exact[: len(tensors)])
    stock = gradients(function(x, linear, labels), upstream, tensors)
    ours = gradients(linear_forward(x, linear, labels, forward_function=function, chunk_size=16), upstream, tensors)
    for a, b, c in zip(ours, stock, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - c).norm() <= 1.2 * (b.double() - c).norm() + 1e-6 * c.norm()


def test_float16_gradients_survive_a_mean_over_many_rows():
    """Of a mean's gradient float16 keeps little; with the cotangent scaled up, and divided out later, nearly all."""
    x, linear, labels = make(64, torch.float16)
    items, scaler = 2.0**18, 2.0**12
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(ce64(exact, linear.double(), labels) * scaler / items, exact)
    linear.half().requires_grad_(False)
    loss = linear_forward(x, linear, labels, forward_function=cross_entropy, denominator=items, chunk_size=9)
    (got,) = torch.autograd.grad(loss * scaler, x)
    (stock,) = torch.autograd.grad(cross_entropy(x, linear, labels) / items * scaler, x)
    error, stock_error = ((g.double() - wanted).norm() / wanted.norm() for g in (got, stock))
    assert error < 2e-3 and error < stock_error


@pytest.mark.parametrize("chunk", [1, 4, "auto"])
@pytest.mark.parametrize("ignored", [(), (0, 1, 2, 3, 9), tuple(range(11))])
def test_ignored_rows(chunk, ignored):
    """Uneven and empty chunks; the mean that f takes over valid rows is the mean over all of them."""
    x, linear, labels = make()
    labels[list(ignored)] = -100
    tensors, few = [x, *linear.parameters()], len(ignored) < 11

    def mean(x, linear, labels):
        return F.cross_entropy(linear(x), labels)

    for function, options in ((ce64, {}), (ce64, {"ignore_index": -100}), (mean, {"reduction": "mean"})):
        wanted = (
            function(x, linear, labels) if few or function is ce64 else x.sum() * 0 + sum(p.sum() * 0 for p in tensors)
        )
        got = linear_forward(x, linear, labels, forward_function=function, chunk_size=chunk, **options)
        torch.testing.assert_close(got, wanted)
        got, wanted = gradients(got, [torch.tensor(-0.37)], tensors), gradients(wanted, [torch.tensor(-0.37)], tensors)
        torch.testing.assert_close(
            [torch.zeros_like(t) if g is None else g for g, t in zip(got, tensors, strict=True)], list(wanted)
        )

    rows = linear_forward(
        x, linear, labels, forward_function=log_probs, ignore_index=-100, chunk_size=chunk, reduction="none"
    )
    assert (rows[list(ignored)] == 0).all() and rows.requires_grad
    wanted = log_probs(x, linear, labels.clamp(min=0)).masked_fill(labels == -100, 0)
    torch.testing.assert_close(rows, wanted)
    torch.testing.assert_close(
        gradients(rows.sum(), [torch.tensor(1.0)], x), gradients(wanted.sum(), [torch.tensor(1.0)], x)
    )


def test_reductions_of_rows_and_denominator():
    x, linear, labels = make()
    tensors = [x, *linear.parameters()]
    one = [torch.ones(())]
    for options, wanted in (
        ({"reduction": "sum"}, log_probs(x, linear, labels).sum()),
        ({"reduction": "mean"}, log_probs(x, linear, labels).mean()),
        ({"reduction": "sum", "denominator": torch.tensor([37.0])}, log_probs(x, linear, labels).sum() / 37),
    ):
        got = linear_forward(x, linear, labels, forward_function=log_probs, chunk_size=4, **options)
        torch.testing.assert_close(got, wanted, check_dtype=False)
        torch.testing.assert_close(gradients(got, one, tensors), gradients(wanted, one, tensors), rtol=1e-5, atol=1e-6)


def test_tied_head_and_gradient_accumulation():
    """Two micro-batches divided by the labels of both, through a weight that is the embedding too."""
    torch.manual_seed(0)
    embedding, body = nn.Embedding(V, H, dtype=torch.float64), nn.Linear(H, H, dtype=torch.float64)
    head = nn.Linear(H, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids, labels = torch.randint(V, (4, 6)), torch.randint(V, (4, 6))
    labels[1, 2:] = -100
    items = (labels[:, 1:] != -100).sum()
    hidden = body(embedding(ids)).tanh()
    wanted = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), reduction="sum") / items
    wanted.backward()
    expected = [p.grad.clone() for p in (embedding.weight, body.weight)]
    body.weight.grad = embedding.weight.grad = None
    for half in (slice(0, 2), slice(2, 4)):
        causal_lm_loss(
            body(embedding(ids[half])).tanh(), head, labels[half], items, forward_function=ce64, chunk_size=3
        ).backward()
    torch.testing.assert_close([embedding.weight.grad, body.weight.grad], expected)


def test_nothing_reaches_a_parameter_before_backward_and_hooks_run_once():
    x, linear, labels = make()
    seen = []
    linear.weight.register_hook(lambda g: seen.append(g))
    weight = linear.weight
    loss = linear_forward(x, linear, labels, forward_function=ce64, chunk_size=2)
    assert linear.weight is weight and weight.grad is None and x.grad is None and not seen
    loss.backward()
    assert len(seen) == 1 and weight.grad is not None


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
@pytest.mark.parametrize("frozen", [False, True])
def test_second_backward_is_refused(function, frozen):
    x, linear, labels = make()
    linear.requires_grad_(not frozen)
    loss = linear_forward(x, linear, labels, forward_function=function, chunk_size=4).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


def test_no_grad_does_no_gradient_work():
    x, linear, labels = make()
    modes = []

    def watched(x, linear, labels):
        modes.append((torch.is_grad_enabled(), x.requires_grad))
        return cross_entropy(x, linear, labels)

    with torch.no_grad():
        loss = linear_forward(x, linear, labels, forward_function=watched, chunk_size=4)
    assert not loss.requires_grad and not any(grad or needs for grad, needs in modes)
    torch.testing.assert_close(loss, cross_entropy(x, linear, labels))


class Largest(TorchDispatchMode):
    """The most elements that any tensor made has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_is_larger_than_a_chunks_logits(function, frozen):
    n, chunk, hidden = 512, 64, 4
    linear, x = nn.Linear(hidden, 1000).requires_grad_(not frozen), torch.randn(n, hidden, requires_grad=True)
    with Largest() as largest:
        linear_forward(
            x, linear, torch.randint(1000, (n,)), forward_function=function, chunk_size=chunk
        ).sum().backward()
    assert largest.elements <= chunk * 1000


def test_the_weights_gradient_is_added_up_by_autograds_own_product(monkeypatch):
    """In float32 although the weight is bfloat16; and in bfloat16 where that is asked for."""
    x, linear, labels = make(64, torch.bfloat16)
    sums = []
    add = linear_chunk._add_product
    monkeypatch.setattr(
        linear_chunk, "_add_product", lambda total, *rest: (sums.append(total.dtype), add(total, *rest))
    )
    for sum_dtype, wanted in ((torch.float32, torch.float32), (None, torch.bfloat16)):
        sums.clear()
        loss = linear_forward(x, linear, labels, forward_function=cross_entropy, chunk_size=8, sum_dtype=sum_dtype)
        assert sums == [wanted] * 8
        loss.backward()


def test_function_that_changes_logits_in_place_or_looks_into_the_layer():
    x, linear, labels = make()

    def in_place(x, linear, labels):
        return F.cross_entropy(linear(x).div_(2.0), labels, reduction="sum")

    def looks(x, linear, labels):
        return (
            F.cross_entropy(F.linear(x, linear.weight) + linear.bias, labels, reduction="sum")
            + linear.weight.square().sum() * 0
        )

    for function in (in_place, looks):
        tensors, one = [x, *linear.parameters()], [torch.ones(())]
        got = gradients(linear_forward(x, linear, labels, forward_function=function, chunk_size=3), one, tensors)
        torch.testing.assert_close(got, gradients(function(x, linear, labels), one, tensors))


def test_a_layer_of_ones_own_whose_parameters_share_a_gradient():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(V, H).double())
            self.one, self.two = nn.Parameter(torch.randn(V).double()), nn.Parameter(torch.randn(V).double())

        def forward(self, x):
            return x @ self.weight.t() + (self.one + self.two)

    x, _, labels = make()
    layer = Layer()
    tensors, one = [x, *layer.parameters()], [torch.ones(())]
    got = gradients(linear_forward(x, layer, labels, forward_function=ce64, chunk_size=3), one, tensors)
    torch.testing.assert_close(got, gradients(ce64(x, layer, labels), one, tensors))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_inside_a_checkpoint(reentrant, function):
    x, linear, labels = make()

    def block(x):
        return linear_forward(x.tanh(), linear, labels, forward_function=function, chunk_size=4).sum()

    tensors = [x, *linear.parameters()]
    wanted = torch.autograd.grad(block(x), tensors)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(tuple(t.grad for t in tensors), wanted)


@pytest.mark.parametrize("function", [cross_entropy, log_probs])
def test_autocast_is_that_of_the_forward_pass(function):
    """Weights in float32, products in bfloat16, also where backward, outside of autocast, makes the logits again."""
    x, linear, labels = make(40, torch.float32)
    dtypes = []

    def watched(x, linear, labels):
        return function(x, lambda b: (dtypes.append(linear(b).dtype), linear(b))[1], labels)

    tensors, upstream = [x, *linear.parameters()], [torch.ones(())]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():  # leaves casts without a graph in autocast's cache
            linear(x)
        got = linear_forward(x, linear, labels, forward_function=watched, chunk_size=8).sum()
        plain = linear_forward(x, linear, labels, forward_function=function, chunk_size=8).sum()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = function(x, linear, labels).sum()
    got, plain, wanted = (gradients(loss, upstream, tensors) for loss in (got, plain, wanted))
    assert set(dtypes) == {torch.bfloat16}
    for a, b, c in zip(got, plain, wanted, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - c).norm() < 0.02 * c.norm() and (b - c).norm() < 0.02 * c.norm()


def test_grad_scaler_steps_as_with_full_logits():
    """float16 products, float32 weights: scaled loss, unscaled gradients, a step, and an overflow that skips one."""
    updates = {}
    for name in ("full", "chunked"):
        x, linear, labels = make(40, torch.float32)
        optimizer = torch.optim.SGD([x, *linear.parameters()], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        for weight in (1.0, float("inf")):
            with torch.autocast("cpu", torch.float16):
                if name == "full":
                    loss = cross_entropy(x, linear, labels) / 40
                else:
                    loss = linear_forward(
                        x, linear, labels, forward_function=cross_entropy, chunk_size=7, denominator=40
                    )
            scaler.scale(loss * weight).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**9, "the second step overflowed"
        updates[name] = [p.detach() - b for p, b in zip(optimizer.param_groups[0]["params"], before, strict=True)]
    for a, b in zip(updates["chunked"], updates["full"], strict=True):
        assert b.norm() > 0 and (a - b).norm() < 5e-3 * b.norm()


def test_dropout_is_the_same_when_rows_are_made_again():
    x, linear, labels = make()

    def noisy(x, linear, labels):
        return log_probs(F.dropout(x, 0.5), linear, labels)

    torch.manual_seed(1)
    rows = linear_forward(x, linear, labels, forward_function=noisy, chunk_size=4)
    after = torch.rand(())
    got = gradients(rows, [torch.ones(11)], [x, linear.weight])
    torch.manual_seed(1)
    wanted = torch.cat([noisy(*part) for part in zip(x.split(4), itertools.repeat(linear), labels.split(4))])
    assert torch.rand(()) == after
    torch.testing.assert_close(rows, wanted)
    torch.testing.assert_close(got, gradients(wanted, [torch.ones(11)], [x, linear.weight]), rtol=1e-4, atol=1e-5)


def test_compiled_once_for_all_lengths(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    x, linear, labels = make(40)
    tensors, one = [x, *linear.parameters()], [torch.ones(())]
    for chunk in (5, 7, 13):
        loss = linear_forward(x, linear, labels, forward_function=ce64, chunk_size=chunk, compile=True)
        torch.testing.assert_close(gradients(loss, one, tensors), gradients(ce64(x, linear, labels), one, tensors))
    assert counter.frame_count == 1


def test_inside_a_compiled_model():
    x, linear, labels = make()

    @torch.compile(backend="aot_eager")
    def model(x):
        return linear_forward(x.tanh(), linear, labels, forward_function=ce64, chunk_size=4) * 2

    tensors, one = [x, *linear.parameters()], [torch.ones(())]
    torch.testing.assert_close(
        gradients(model(x), one, tensors), gradients(ce64(x.tanh(), linear, labels) * 2, one, tensors)
    )


def test_memory_that_runs_out_halves_the_chunk():
    x, linear, labels = make(100)
    sizes = []

    def greedy(x, linear, labels):
        sizes.append(len(x))
        if len(x) > 30:
            raise torch.OutOfMemoryError("as if")
        return ce64(x, linear, labels)

    def probed(x, linear, labels):
        return ce64(x, linear, labels) if len(x) == 64 and not sizes else greedy(x, linear, labels)

    tensors, one = [x, *linear.parameters()], [torch.ones(())]
    loss = linear_forward(x, linear, labels, forward_function=probed)
    torch.testing.assert_close(gradients(loss, one, tensors), gradients(ce64(x, linear, labels), one, tensors))
    assert sizes[:3] == [100, 50, 25]
    sizes.clear()
    linear_forward(x, linear, labels, forward_function=probed)
    assert max(sizes) <= 25, "the size that fitted is remembered"
    with pytest.raises(torch.OutOfMemoryError):
        linear_forward(x, linear, labels, forward_function=probed, chunk_size=50)


def test_lora_on_the_head_and_a_4_bit_head():
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(64, 96, bias=False))
    head = get_peft_model(
        model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    ).base_model.model.lm_head
    quantised = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x, labels = torch.randn(11, 64, requires_grad=True), torch.randint(96, (11,))
    for linear in (head, quantised):
        tensors = [x, *[p for p in linear.parameters() if p.requires_grad]]
        assert len(tensors) == (3 if linear is head else 1)
        for function in (cross_entropy, log_probs):
            got = linear_forward(x, linear, labels, forward_function=function, chunk_size=4).sum()
            wanted = function(x, linear, labels).sum()
            one = [torch.ones(())]
            torch.testing.assert_close(
                gradients(got, one, tensors), gradients(wanted, one, tensors), rtol=1e-4, atol=1e-5
            )


def test_fsdp2_weight(tmp_path):
    """A sharded head is gathered for the loop and its gradient comes back sharded, with others' rows averaged in."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, linear, labels = make(dtype=torch.float32)
        wanted = gradients(cross_entropy(x, linear, labels), [torch.ones(())], [x, *linear.parameters()])
        loss = cross_entropy(x, linear, labels).detach()
        fully_shard(linear)
        for frozen, function in itertools.product((False, True), (cross_entropy, log_probs)):
            linear.requires_grad_(not frozen).zero_grad()
            x.grad, sign = None, 1 if function is cross_entropy else -1
            with torch.no_grad():
                out = linear_forward(x, linear, labels, forward_function=function, chunk_size=4).sum() * sign
            torch.testing.assert_close(out, loss)
            (linear_forward(x, linear, labels, forward_function=function, chunk_size=4).sum() * sign).backward()
            torch.testing.assert_close(x.grad, wanted[0])
            if not frozen:
                assert isinstance(linear.weight.grad, torch.distributed.tensor.DTensor)
                torch.testing.assert_close([p.grad.full_tensor() for p in linear.parameters()], list(wanted[1:]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_on_a_gpu_in_a_fraction_of_the_memory(dtype, frozen):
    from helpers.memory import measure_peak

    n, hidden, vocabulary = 4096, 256, 32000
    linear = nn.Linear(hidden, vocabulary, device="cuda", dtype=dtype).requires_grad_(not frozen)
    x = torch.randn(n, hidden, device="cuda", dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (n,), device="cuda")
    tensors = [x, *(() if frozen else linear.parameters())]

    def ours():
        loss = linear_forward(
            x, linear, labels, forward_function=cross_entropy, denominator=n, chunk_size=256, compile=True
        )
        return torch.autograd.grad(loss, tensors)

    ours()
    got, peak = measure_peak(ours)
    stock, stock_peak = measure_peak(lambda: torch.autograd.grad(cross_entropy(x, linear, labels) / n, tensors))
    exact = [t.detach().double().requires_grad_() for t in (x, linear.weight, linear.bias)]
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels), exact[: len(tensors)])
    assert peak < stock_peak / 5
    for a, b, c in zip(got, stock, wanted, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm()


def test_the_challenges_own_function_as_it_is():
    def transformation_function(batch, linear, labels):
        x = linear(batch).float()  # Up projection to large space
        from torch.nn import CrossEntropyLoss

        down_projection_function = CrossEntropyLoss(reduction="sum")
        # Down projection to small space
        loss = down_projection_function(x.view(-1, x.shape[-1]), labels.view(-1))
        return loss  # noqa: RET504

    linear, x, labels = (
        nn.Linear(16, 50, bias=False),
        torch.randn(4, 32, 16, requires_grad=True),
        torch.randint(50, (4, 32)),
    )
    got = linear_forward(x, linear, labels, forward_function=transformation_function, chunk_size=24)
    wanted = transformation_function(x, linear, labels)
    torch.testing.assert_close(got, wanted)
    tensors, one = [x, linear.weight], [torch.ones(())]
    torch.testing.assert_close(gradients(got, one, tensors), gradients(wanted, one, tensors), rtol=1e-4, atol=1e-5)


BAD, LEARNT = torch.randint(V, (11,)), nn.Parameter(torch.ones((), dtype=torch.float64))
CASES = {
    "rows": ({"function": lambda x, lin, y: lin(x)[1:].sum(1)}, ValueError, "given 11 rows and its output 0"),
    "not a tensor": ({"function": lambda x, lin, y: 1.0}, TypeError, "returned a float"),
    "no graph": ({"function": lambda x, lin, y: lin(x).detach().sum()}, ValueError, "cannot be differentiated"),
    "lost": ({"function": lambda x, lin, y: (lin(x) * LEARNT).sum()}, ValueError, "its gradient would be lost"),
    "label too large": ({"labels": torch.full_like(BAD, V)}, ValueError, "label 23 in row 0 is out of range"),
    "label negative": ({"labels": torch.full_like(BAD, -1)}, ValueError, "label -1 in row 0 is out of range"),
    "dtypes": ({"x": torch.randn(11, H)}, ValueError, "x is torch.float32, but linear.weight torch.float64"),
    "devices": ({"labels": BAD.to("meta")}, ValueError, "x is on cpu, but row tensor 0 on meta"),
    "no rows": ({"x": torch.randn(0, H).double(), "labels": BAD[:0]}, ValueError, "there are no rows"),
    "row tensor": ({"labels": BAD[:5]}, ValueError, r"row tensor 0 is \(5,\)"),
    "features": ({"x": torch.randn(11, 3).double()}, ValueError, "x has 3 features, but linear takes 8"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    "chunk word": ({"chunk_size": "big"}, ValueError, "chunk_size is 'big'"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max'"),
    "none": ({"reduction": "none"}, ValueError, "outputs of a row each"),
    "denominator": ({"reduction": "mean", "denominator": 3}, ValueError, "a denominator divides a sum"),
    "not a module": ({"linear": lambda x: x}, TypeError, "must be an nn.Module"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_error(name):
    given, error, said = CASES[name]
    x, linear, labels = make()
    options = {"x": x, "linear": linear, "labels": labels, "function": ce64} | given
    calls = []

    def function(*args):
        calls.append(len(args[0]))
        return options["function"](*args)

    rest = {k: v for k, v in options.items() if k in ("chunk_size", "reduction", "denominator")}
    with pytest.raises(error, match=said):
        linear_forward(options["x"], options["linear"], options["labels"], forward_function=function, **rest)
    assert len(calls) <= 2, "nothing but the first look at the function may have run"
