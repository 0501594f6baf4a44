"""float16 and bfloat16 inside compiled loops, with the processor's conversions and without."""

import numba
import numpy as np
import pytest
import torch

from fastmatch_kernels._numba import half


def over_arrays(convert, dtype):
    """``convert(number, kind)`` compiled over an array."""
    convert = numba.njit(convert)

    @numba.njit
    def converted(values, kind):
        out = np.empty(len(values), dtype)
        for i in range(len(values)):
            out[i] = convert(values[i], kind)
        return out

    return converted


decoded = over_arrays(lambda bits, kind: half.decode(bits, kind, np.float32(0)), np.float32)
encoded = over_arrays(lambda value, kind: half.encode(value, kind), np.uint16)
decoded_without_hardware = over_arrays(lambda bits, kind: half._decode_float16(bits), np.float32)
encoded_without_hardware = over_arrays(lambda value, kind: half._encode_float16(value), np.uint16)


CASES = [
    (torch.bfloat16, decoded, encoded),
    (torch.float16, decoded, encoded),
    (torch.float16, decoded_without_hardware, encoded_without_hardware),
]


@pytest.mark.parametrize(("dtype", "decode", "encode"), CASES)
def test_every_number_and_what_lies_between_is_converted_as_torch_does(dtype, decode, encode):
    kind = half.HALF[dtype]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    numbers = every.view(dtype).float()
    assert np.array_equal(decode(every.numpy(), kind), numbers.numpy(), equal_nan=True)
    # Each number, the points halfway to its neighbours, and the float32 next to those on either side.
    bits = numbers.view(torch.int32)
    step = 1 << (15 if dtype == torch.bfloat16 else 12)
    near = torch.cat([bits + k * step + e for k in (-1, 0, 1) for e in (-1, 0, 1)]).view(torch.float32)
    below = torch.linspace(-(2.0**-23), 2.0**-23, 4097)  # float16's subnormal numbers and what rounds to 0
    values = torch.cat([near, below, torch.tensor([65519.0, 65520.0, -65536.0, 3e38])])
    wanted = values.to(dtype)
    got = torch.from_numpy(encode(values.numpy(), kind)).view(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    whole = ~wanted.isnan()
    assert torch.equal(got.view(torch.int16)[whole], wanted.view(torch.int16)[whole])
