"""Products of bf16 matrices where the processor has none: in fp32, rounded to bf16.

Without bf16 products torch multiplies bf16 matrices one number after another, five times as slowly
as the same numbers in fp32. A product of two bf16 numbers is exact in fp32, and torch, too, adds
the products up in fp32 and rounds the sum to bf16: what differs is the order of the additions. One
number in about 10,000 rounds otherwise than torch's own.

No bit of a row of a product depends on how many rows are multiplied with it, which is so of torch's
own products, too: a token's keys of the first layer are the same alone and within a document. MKL's
kernels take four rows at a time, and add up in another order where fewer are left; so rows are
filled up to a multiple of four. That is enough on AMD's processors, on which it was seen. On
Intel's MKL cuts long sums by the number of rows, too, and filling up does not help: of 120 random
products of 1 to 40 rows 22 had a number that rounds otherwise beside 37 more rows with MKL held to
AVX2, and 3 with AVX-512 (which has bf16 products in torch, so that these are not used).

Scaled dot product attention is left to torch, whose kernel for bf16 multiplies in fp32 itself, and
not slower than the one for fp32 (115 against 136 ms of processor time for 2,048 tokens and 9 heads
of 64 numbers on a Zen 3). Attention that is written as products of matrices is not.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FP32 = "fp32, rounded to bf16"

_ROWS = 4
_BLOCK = 1 << 20
"""Numbers of a weight that are brought to fp32 at a time: 4 MB, which the products then find in the
processor's cache."""


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
    """From now on the model's forward calls multiply bf16 matrices on the CPU in fp32."""
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
    if weight.ndim != 2 or not weight.numel() or input.shape[-1:] != weight.shape[1:]:
        return functional.linear(input, weight, bias)  # whose error names the shapes
    out_features, in_features = weight.shape
    rows = input.reshape(-1, in_features)
    filled = _filled(rows.float())
    step = max(_BLOCK // in_features // 64, 1) * 64
    parts = []
    for start in range(0, out_features, step):
        block = slice(start, start + step)
        offset = None if bias is None else bias[block].float()
        product = functional.linear(filled, _wide(weight[block]), offset)
        parts.append(product[: len(rows)].to(torch.bfloat16))
    result = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return result.view(*input.shape[:-1], out_features)


def _product(function: Any, a: Any, b: Any) -> Any:
    """The product in fp32; no bit of a row depends on how many rows there are."""
    if min(a.ndim, b.ndim) < 2:
        return function(a.float(), b.float())
    return function(_filled(a.float()), b.float())[..., : a.shape[-2], :]


def _rounded(function: Any) -> Any:
    def product(input: Any, mat2: Any) -> Any:
        return _product(function, input, mat2).to(torch.bfloat16)

    return product


def _added(function: Any) -> Any:
    def product(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        found = alpha * _product(function, mat1, mat2)
        if beta:  # else what is in the input does not count, NaN neither
            found = found + beta * input.float().expand(found.shape)
        return found.to(torch.bfloat16)

    return product


def _filled(rows: Any) -> Any:
    """Rows, [..., n, k], with rows of zeros after them to a multiple of four."""
    lacking = -rows.shape[-2] % _ROWS
    return functional.pad(rows, (0, 0, 0, lacking)) if lacking else rows


_held = threading.local()


def _wide(weight: Any) -> Any:
    """A weight in fp32, in memory that the thread keeps: new memory takes longer than the copy."""
    if torch.is_grad_enabled():
        return weight.float()  # which autograd may keep
    scratch = getattr(_held, "scratch", None)
    if scratch is None or scratch.numel() < weight.numel():
        # Memory of inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            scratch = _held.scratch = torch.empty(weight.numel(), dtype=torch.float32)
    return scratch[: weight.numel()].view(weight.shape).copy_(weight)


_PRODUCTS = {
    functional.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _rounded(torch.matmul)
    ),
    **dict.fromkeys((torch.mm, torch.Tensor.mm), _rounded(torch.mm)),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), _rounded(torch.bmm)),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _added(torch.mm)),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), _added(torch.bmm)),
}

_ARGUMENTS = {name: name for name in ("input", "weight", "bias", "mat1", "mat2", "beta", "alpha")}
_ARGUMENTS |= {"other": "mat2", "batch1": "mat1", "batch2": "mat2"}
"""What torch calls the arguments of these functions, and what they are called here. With others,
such as an output that is given, a call is left to torch."""

_MODE = Fp32Products()


def _enter(model: Any, args: Any) -> None:
    _MODE.__enter__()


def _leave(model: Any, args: Any, output: Any) -> None:
    _MODE.__exit__(None, None, None)
