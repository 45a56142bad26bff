"""One thing that is or went wrong in a run, as the doctor, the verdict and the report say it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`kind` names the cause; `evidence` has the figures and the step; `advice` the key."""

    kind: str
    says: str
    evidence: str
    advice: str
