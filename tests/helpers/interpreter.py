"""Triton's interpreter without what it repeats: more than half of the time of the tests of kernels."""

from __future__ import annotations

from typing import Any


def quicken() -> None:
    """Make the interpreter keep what it makes anew at every call of a function or for every tensor.

    Kernels compute the same: types and shapes are kept by their names, and Triton's functions stay replaced after a launch.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    block, tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    broadcast, sanitize = TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_sanitize_overflow_impl
    patched: dict[int, Any] = {}
    numpy_types: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patch(fn)
            patched[id(fn.__globals__)] = fn  # whose globals keep their id
        return interpreter._LangPatchScope()

    def known_numpy_type(kind: Any) -> Any:
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *map(int, shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def known_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    def broadcast_if_shapes_differ(self: Any, lhs: Any, rhs: Any) -> Any:
        if [size.value for size in lhs.shape] == [size.value for size in rhs.shape]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def sanitize_in_debugging(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:  # else what it finds is told nobody
            sanitize(self, *operands)

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = known_numpy_type
    core.block_type.__init__ = known_block
    core.tensor.__init__ = known_tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    TritonSemantic.broadcast_impl_value = broadcast_if_shapes_differ
    TritonSemantic.binary_op_sanitize_overflow_impl = sanitize_in_debugging
