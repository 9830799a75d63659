"""`embed-policy MODEL` without a policy: profiles the file and plans from what it finds."""

from __future__ import annotations

import sys

from .plan import plan_options, plan_policy
from .policy import Policy
from .profile import describe, named_texts, options_of, profile_model


def plan_for_model(args) -> Policy:
    """Profile and plan in one go; the planning flags that shape the measurement reach the profile too."""
    profile = profile_model(args.model, named_texts(args.file), options_of(args))
    print(describe(profile), file=sys.stderr)
    return plan_policy(profile, **plan_options(args))
