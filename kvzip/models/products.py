"""Products of bf16 matrices where torch has none but slow ones: in fp32, rounded to bf16.

Without bf16 products torch multiplies bf16 matrices one number after another, five times as
slowly as the same numbers in fp32. A product of two bf16 numbers is exact in fp32, and torch, too,
adds the products up in fp32 and rounds the sum to bf16: what differs is the order of the additions.
One number in about 10,000 rounds otherwise than torch's own.

No bit of a row of a product depends on how many rows are multiplied with it: a token's keys and
values of the first layer are the same alone and within a document, in whatever chunks it is
computed. That is so by construction: each number is a sum whose order follows from how many numbers
are added, and from nothing else (`codecs/native/bf16_products_kernels.hpp`). Libraries of linear
algebra do not promise it: MKL's sums depend on the number of rows and of threads
(docs/speed-notes.md has how often, and what it costs).

Scaled dot product attention is left to torch, whose kernel for bf16 multiplies in fp32 itself, and
not slower than the one for fp32 (115 against 136 ms of processor time for 2,048 tokens and 9 heads
of 64 numbers on a Zen 3). Attention that is written as products of matrices is not.
"""

from __future__ import annotations

import os
import sys
from threading import local
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kvzip.codecs import _native

FP32 = "fp32, rounded to bf16"

ENVIRONMENT = "KVZIP_NATIVE_BF16"
"""Set to 1, it leaves all models of a process and its children to torch."""

_any_widened = False


def needed() -> bool:
    """Whether torch has no products of bf16 matrices on this processor but its slow ones, and is
    not to use these all the same (`ENVIRONMENT`)."""
    if os.environ.get(ENVIRONMENT, "0") not in ("", "0"):
        return False
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is not None and not known()


def widen(model: Any) -> None:
    """From now on the model's forward calls multiply bf16 matrices on the CPU in fp32, but for what
    torch compiles of them."""
    global _any_widened
    _any_widened = True
    if not widened(model):
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)


def widened(model: Any) -> bool:
    """Whether :func:`widen` was called for the model."""
    return _enter in model._forward_pre_hooks.values()


def of(model: Any) -> dict[str, str]:
    """What a snapshot's origin says of its model's products, among its software: nothing where
    they were torch's own."""
    return {"bf16_products": FP32} if widened(model) else {}


def of_process() -> dict[str, str]:
    """The same of a result that this process makes, with whatever models it loaded."""
    return {"bf16_products": FP32} if _any_widened else {}


class Fp32Products(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """While this context lasts, products of bf16 matrices on the CPU are those of fp32, rounded."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = _PRODUCTS.get(function)
        if (
            ours is None
            or len(args) > 3
            or not kwargs.keys() <= _ARGUMENTS.keys()
            or not _all_plain_bf16((*args, *kwargs.values()))
        ):
            return function(*args, **kwargs)
        return ours(*args, **{_ARGUMENTS[name]: value for name, value in kwargs.items()})


def _all_plain_bf16(arguments: Any) -> bool:
    """Whether all tensors are of bf16, on the CPU, and of no class with products of its own."""
    return all(
        type(a) in (torch.Tensor, torch.nn.Parameter)
        and a.dtype == torch.bfloat16
        and a.device.type == "cpu"
        for a in arguments
        if isinstance(a, torch.Tensor)
    )


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if weight.ndim != 2 or input.shape[-1:] != weight.shape[1:]:
        return functional.linear(input, weight, bias)  # whose error names the shapes
    out_features, in_features = weight.shape
    if bias is not None:
        bias = bias.expand(out_features).contiguous()
    rows = input.reshape(1, input.shape[:-1].numel(), in_features)
    return _multiplied(rows, weight[None], bias).view(*input.shape[:-1], out_features)


def _product(dimensions: int | None, function: Any, a: Any, b: Any, kind: Any) -> Any:
    """`function`'s product of matrices of so many dimensions, or of any."""
    if (
        min(a.ndim, b.ndim) < 2
        or (dimensions and (a.ndim, b.ndim) != (dimensions, dimensions))
        or (dimensions and a.shape[:-2] != b.shape[:-2])
        or a.shape[-1] != b.shape[-2]
    ):
        found = function(a.float(), b.float())  # of vectors, or an error that names the shapes
        return found.to(kind)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    wanted = (*batch, a.shape[-2], b.shape[-1])
    if b.ndim == 2:  # one for all
        a, batch = a.flatten(0, -2), b.shape[:0]
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    found = _multiplied(
        a.expand(*batch, rows, inner).reshape(batch.numel(), rows, inner),
        b.expand(*batch, inner, columns).reshape(batch.numel(), inner, columns).mT,
        kind=kind,
    )
    return found.view(wanted)


def _rounded(dimensions: int | None, function: Any) -> Any:
    def product(input: Any, mat2: Any) -> Any:
        return _product(dimensions, function, input, mat2, torch.bfloat16)

    return product


def _added(dimensions: int, function: Any) -> Any:
    def product(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        found = alpha * _product(dimensions, function, mat1, mat2, torch.float32)
        if beta:  # else what is in the input does not count, NaN neither
            found = found + beta * input.float().expand(found.shape)
        return found.to(torch.bfloat16)

    return product


def _multiplied(x: Any, w: Any, bias: Any = None, kind: Any = torch.bfloat16) -> Any:
    """Rows of x, [batch, rows, inner], times rows of w, [batch, columns, inner]: [batch, rows,
    columns]."""
    if torch.is_grad_enabled():
        return _Multiplied.apply(x, w, bias, kind)
    return _Multiplied.forward(None, x, w, bias, kind)


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, kind: Any) -> Any:
        out = torch.empty(*x.shape[:2], w.shape[1], dtype=kind)
        _native.multiply_bf16(
            _bits(x),
            _bits(w),
            out.numpy() if kind == torch.float32 else _bits(out),
            None if bias is None else _bits(bias),
            torch.get_num_threads(),
        )
        if ctx is not None:
            ctx.save_for_backward(x, w)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x, w = ctx.saved_tensors
        gradient = gradient.float()
        of_x, of_w, of_bias, _ = ctx.needs_input_grad
        return (
            (gradient @ w.float()).to(torch.bfloat16) if of_x else None,
            (gradient.mT @ x.float()).to(torch.bfloat16) if of_w else None,
            gradient.sum((0, 1)).to(torch.bfloat16) if of_bias else None,
            None,
        )


def _bits(numbers: Any) -> Any:
    return numbers.detach().view(torch.int16).numpy()


_PRODUCTS = {
    functional.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _rounded(None, torch.matmul)
    ),
    **dict.fromkeys((torch.mm, torch.Tensor.mm), _rounded(2, torch.mm)),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), _rounded(3, torch.bmm)),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _added(2, torch.mm)),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), _added(3, torch.bmm)),
}

_ARGUMENTS = {name: name for name in ("input", "weight", "bias", "mat1", "mat2", "beta", "alpha")}
_ARGUMENTS |= {"other": "mat2", "batch1": "mat1", "batch2": "mat2"}
"""What torch calls the arguments of these functions, and what they are called here. With others,
such as an output that is given, a call is left to torch."""


class _WithinCalls(Fp32Products):
    """The same, but for what comes after a forward call. Where Ctrl-C ends one, torch does not call
    what leaves it, and the context stays."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _PRODUCTS and not _is_under_way():
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


_MODE = _WithinCalls()
_calls = local()
"""The frames from which a thread's forward calls of widened models were made, the last one last."""


def _enter(model: Any, args: Any) -> None:
    if torch.compiler.is_compiling():
        return  # what torch compiles has torch's products: it knows no others
    _calls.__dict__.setdefault("frames", []).append(sys._getframe(1))
    _MODE.__enter__()


def _leave(model: Any, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _MODE.__exit__(None, None, None)
    if _is_under_way():
        _calls.frames.pop()


def _is_under_way() -> bool:
    """Whether this is within the forward call of a widened model."""
    frames = _calls.__dict__.get("frames", [])
    while frames:
        frame: Any = sys._getframe(1)
        while frame is not None and frame is not frames[-1]:
            frame = frame.f_back
        if frame is not None:
            return True
        frames.pop()
    return False
