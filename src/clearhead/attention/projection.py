"""Random projections of a performer: orthogonal blocks, drawn by an explicit generator.

    a block    Q of G = Q R, G a d x d Gaussian, column j of Q times sign(R_jj): then, and only then, Q is Haar
    its rows   each times a norm: chi_d of its own (the rows are then Gaussian, one by one), or sqrt(d)

Haar means uniform over all rotations and reflections. Blocks are independent, and a last block may be partial. Without
the sign the factorisation decides it, the diagonal of Q is negative on average, and exp(w.z) is biased by up to 21 % at
16 dimensions; the public generators leave it out. arXiv 2009.14794, sections 2.4 and B.2 (whose Theorem 2 wants no more
rows than dimensions).
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from clearhead.attention.spec import Performer

SCALINGS = ("chi", "sqrt_d")


def draw_projection(
    features: int,
    head_dim: int,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    scaling: str = "chi",
    orthogonal: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return [features, head_dim] on the CPU, drawn in float64 so that every dtype rounds the same numbers.

    Args:
        seed: of a generator made for this draw; or give `generator`, which goes on. One of the two.
        scaling: "chi" (rows like N(0, I): unbiased for softmax) | "sqrt_d" (all rows equally long: SMREG).
        orthogonal: rows of a block orthogonal; False = independent Gaussians ("sqrt_d": on the sphere).
    """
    if scaling not in SCALINGS:
        raise ValueError(f"draw_projection: scaling is one of {', '.join(SCALINGS)}, got {scaling!r}")
    if features < 1 or head_dim < 1:
        raise ValueError(f"draw_projection: expected sizes of at least 1, got {features} and {head_dim}")
    if (seed is None) == (generator is None):
        raise ValueError("draw_projection: give a seed or a generator, one of them")
    if generator is None:
        assert seed is not None
        generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()

    if orthogonal:
        blocks = -(-features // head_dim)
        directions = haar(normal(blocks, head_dim, head_dim)).flatten(0, 1)[:features]
    else:
        directions = normal(features, head_dim)
        if scaling == "chi":
            return directions.to(dtype)
        directions = directions / directions.norm(dim=-1, keepdim=True)
    norms = normal(features, head_dim).norm(dim=-1, keepdim=True) if scaling == "chi" else head_dim**0.5
    return (directions * norms).to(dtype)


def haar(gaussian: Tensor) -> Tensor:
    """Uniform orthogonal matrices out of Gaussian ones, [..., d, d]."""
    q, r = torch.linalg.qr(gaussian)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * sign.unsqueeze(-2)


def projection_of(
    choice: Performer, head_dim: int, *, place: int = 0, draw: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """The projection that a spec names, [features, head_dim] float32: decided by (seed, place, draw) alone.

    place: the layer's number. draw: how many were drawn before.
    """
    scaling = "sqrt_d" if choice.kernel == "regularized" else "chi"
    if generator is not None:
        return draw_projection(choice.features, head_dim, generator=generator, scaling=scaling)
    digest = hashlib.sha256(f"performer {choice.seed} {place} {draw}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return draw_projection(choice.features, head_dim, seed=seed, scaling=scaling)


@functools.lru_cache(maxsize=64)
def remembered_projection(choice: Performer, head_dim: int, device: str) -> Tensor:
    """`projection_of` the spec alone, drawn once for each device. Not to be written to."""
    with torch.inference_mode(False), torch.no_grad():
        return projection_of(choice, head_dim).to(device)
