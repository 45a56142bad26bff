"""optax: the trust region, and the rules of learning rate, momentum, betas and weight decay.

Both are `optax.GradientTransformationExtraArgs`: `init` and `update`, pure, to be jitted.
"""

from adaptiverl.integrations.optax.line_search import line_search
from adaptiverl.integrations.optax.rules import AdaptiveState, adaptive
from adaptiverl.integrations.optax.trust_region import TrustRegionState, confidence, trust_region

__all__ = [
    "AdaptiveState",
    "TrustRegionState",
    "adaptive",
    "confidence",
    "line_search",
    "trust_region",
]
