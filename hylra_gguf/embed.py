"""`embed-policy MODEL` without a policy: profiles the file, plans from what it finds and, given minutes, refines the plan on the file."""

from __future__ import annotations

import sys

from .plan import plan_options, plan_policy
from .policy import Policy
from .profile import describe, named_texts, options_of, profile_model
from .refine import default_depth, refine_policy


def plan_for_model(args) -> Policy:
    """Profile and plan in one go; the planning flags that shape the measurement reach the profile too."""
    profile = profile_model(args.model, named_texts(args.file), options_of(args))
    print(describe(profile), file=sys.stderr)
    policy = plan_policy(profile, **plan_options(args))
    if args.minutes is None:
        return policy
    return refine_policy(policy, args.model, args.file or [], default_depth(profile), args.minutes, args.threads, not args.no_progress)
