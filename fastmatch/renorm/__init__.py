"""Renormalization of merged and pruned networks.

A merge of aligned networks has activations of too small a variance (Jordan et al. 2022, REPAIR). Each method
brings the statistics of every linear and convolution output, before norm and activation, to targets made of
the endpoints' statistics: ``mu* = sum_k alpha_k mu_k`` and ``sigma* = sum_k alpha_k sigma_k`` (Qu and Horvath
2024, arXiv 2402.05966). With the merge's own mean mu and variance v, ``g = sigma* / sqrt(v + eps)`` and
``sigma_k = sqrt(v_k + eps)``:

=========  ======================  ===============================
method     forward form            folded into weight W and bias b
=========  ======================  ===============================
repair     (z - mu) g + mu*        W' = g W, b' = mu* + g (b - mu)
rescale    z g                     W' = g W, b' = g b
reshift    z - mu + mu*            b' = b - mu + mu*
reset      batch norm's running statistics, measured again
=========  ======================  ===============================

A fifth method, least-squares, changes whole weights instead of channels (:mod:`fastmatch.renorm.least_squares`).

A channel whose gain would take it away from its target keeps gain one (:mod:`fastmatch.renorm.harm`).
"""

from fastmatch.renorm.endpoints import EndpointStatistics, endpoint_statistics
from fastmatch.renorm.options import Renormalization
from fastmatch.renorm.plan import Plan, applied_plan, plan_renormalization
from fastmatch.renorm.renormalize import renormalize, renormalize_many

__all__ = [
    "EndpointStatistics",
    "Plan",
    "Renormalization",
    "applied_plan",
    "endpoint_statistics",
    "plan_renormalization",
    "renormalize",
    "renormalize_many",
]
