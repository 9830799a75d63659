"""`embed-policy MODEL` without a policy: profiles the file, plans and writes the plan into it."""

from __future__ import annotations

import sys

from .gguf_header import Progress, write_policy
from .plan import plan_options, plan_policy
from .policy import Policy
from .profile import describe, named_texts, options_of, profile_model


def plan_for_model(args) -> Policy:
    """Profile and plan in one go; the planning flags that shape the measurement reach the profile too."""
    profile = profile_model(args.model, named_texts(args.file), options_of(args))
    print(describe(profile), file=sys.stderr)
    return plan_policy(profile, **plan_options(args))


def cmd_embed_auto(args, progress: Progress | None = None) -> None:
    policy = plan_for_model(args)
    if not args.dry_run:
        write_policy(args.model, policy, args.output, progress, args.force)
    print(policy.describe())
    print(f"{args.output or args.model}: {'dry run, nothing written' if args.dry_run else 'policy written'}", file=sys.stderr)
